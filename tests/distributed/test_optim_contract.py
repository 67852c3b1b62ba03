"""What torch.optim.Optimizer promises of every optimizer: groups, repr, hooks, closures, zero_grad, state dicts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from sharded_adamax import ShardedAdamax
from tests.distributed.models import Net, Twins, compare_groups, loss_of, straight_backward
from tests.distributed.pool import Pool

EDITS: list[dict[str, Any]] = [
    {},
    {"lr": 0.05},
    {"betas": (0.7, 0.9)},
    {"weight_decay": 0.2},
    {"maximize": True},
    {"eps": 1e-2, "maximize": False},
    {"foreach": True, "betas": [0.6, 0.8]},
    {"lr": torch.tensor(0.01), "weight_decay": 0.0},
    {"foreach": False, "maximize": True, "weight_decay": 0.3},
    {"lr": 0},
]


def _edit() -> None:
    twins = Twins()
    for step, edit in enumerate(EDITS):
        for optimizer in (twins.optimizer, twins.reference):
            optimizer.param_groups[0].update(edit)
        twins.train(1, first_step=step)
        compare_groups(twins.optimizer, twins.reference, f"after step {step}")
    twins.compare_state()


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_groups_edited_between_steps_count_at_the_next_step(ranks: Pool, world_size: int) -> None:
    ranks.run(world_size, _edit)


def _looks() -> None:
    options: dict[str, Any] = {"lr": 0.01, "betas": (0.8, 0.9), "weight_decay": 0.1, "maximize": True}
    twins = Twins(**options)
    for optimizer in (twins.optimizer, twins.reference):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3))], "lr": 0.5, "param_names": ["late"]})
    assert repr(twins.optimizer) == repr(twins.reference).replace("Adamax (", "ShardedAdamax (", 1)
    assert twins.optimizer.defaults == twins.reference.defaults
    assert list(twins.optimizer.defaults) == list(twins.reference.defaults)
    compare_groups(twins.optimizer, twins.reference, "as built")
    assert isinstance(twins.optimizer, torch.optim.Adamax)


@pytest.mark.parametrize("world_size", [1, 2])
def test_repr_and_defaults_are_those_of_adamax(ranks: Pool, world_size: int) -> None:
    ranks.run(world_size, _looks)


def _state_dict_hooks() -> None:
    twins = Twins()
    twins.train(2)
    fired: dict[Optimizer, list[str]] = {twins.optimizer: [], twins.reference: []}
    for optimizer, log in fired.items():
        optimizer.register_state_dict_pre_hook(lambda o, log=log: log.append("pre"))
        optimizer.register_state_dict_pre_hook(lambda o, log=log: log.append("first"), prepend=True)
        optimizer.register_state_dict_post_hook(lambda o, sd, log=log: log.append("post"))
        handle = optimizer.register_state_dict_post_hook(lambda o, sd: {**sd, "replaced": True})
        assert optimizer.state_dict()["replaced"] is True
        handle.remove()
        assert "replaced" not in optimizer.state_dict()
    assert fired[twins.optimizer] == fired[twins.reference] == ["first", "pre", "post"] * 2


@pytest.mark.parametrize("world_size", [1, 2])
def test_state_dict_hooks_fire_once_and_may_replace_the_dict(ranks: Pool, world_size: int) -> None:
    ranks.run(world_size, _state_dict_hooks)


def _load_hooks() -> None:
    twins = Twins()
    twins.train(2)
    fired: dict[Optimizer, list[str]] = {twins.optimizer: [], twins.reference: []}

    def raise_lr(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        fired[optimizer].append("pre")
        groups = [{**group, "lr": 0.25} for group in state_dict["param_groups"]]
        return {**state_dict, "param_groups": groups}

    for optimizer, log in fired.items():
        saved = optimizer.state_dict()
        optimizer.register_load_state_dict_pre_hook(raise_lr)
        optimizer.register_load_state_dict_pre_hook(lambda o, sd, log=log: log.append("first"), prepend=True)
        optimizer.register_load_state_dict_post_hook(lambda o, log=log: log.append(f"post {o.param_groups[0]['lr']}"))
        optimizer.load_state_dict(saved)
        assert saved["param_groups"][0]["lr"] == 2e-3, "a hook that replaces the dict leaves the caller's alone"
    assert fired[twins.optimizer] == fired[twins.reference] == ["first", "pre", "post 0.25"]
    twins.train(2, first_step=2)


@pytest.mark.parametrize("world_size", [1, 2])
def test_load_state_dict_hooks_fire_once_and_may_replace_the_dict(ranks: Pool, world_size: int) -> None:
    ranks.run(world_size, _load_hooks)


def _step_hooks() -> None:
    twins = Twins()
    fired: dict[Optimizer, list[str]] = {twins.optimizer: [], twins.reference: []}
    # Other optimizers may live in the process: only these two count.
    handles = [
        register_optimizer_step_pre_hook(lambda o, args, kwargs: fired.get(o, []).append("global pre")),
        register_optimizer_step_post_hook(lambda o, args, kwargs: fired.get(o, []).append("global post")),
    ]
    for optimizer, log in fired.items():
        optimizer.register_step_pre_hook(lambda o, args, kwargs, log=log: log.append(f"pre {len(args)} {kwargs}"))
        optimizer.register_step_post_hook(lambda o, args, kwargs, log=log: log.append(f"post {len(args)} {kwargs}"))
    try:
        twins.train(2)
    finally:
        for handle in handles:
            handle.remove()
    assert fired[twins.optimizer] == fired[twins.reference]
    assert sorted(fired[twins.optimizer]) == sorted(["global pre", "pre 1 {}", "post 1 {}", "global post"] * 2)


@pytest.mark.parametrize("world_size", [1, 2])
def test_step_hooks_and_global_hooks_fire_once_in_the_order_of_adamax(ranks: Pool, world_size: int) -> None:
    ranks.run(world_size, _step_hooks)


def _closure(twins: Twins, step: int, calls: list[str]) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """The closures of the model and of its twin."""

    def ours() -> Tensor:
        assert torch.is_grad_enabled()
        calls.append("ours")
        twins.optimizer.zero_grad()
        loss = loss_of(twins.model, step, dist.get_rank())
        loss.backward()
        return loss

    def expected() -> Tensor:
        twins.feed_twin(step, straight_backward)
        return loss_of(twins.twin, step, dist.get_rank())

    return ours, expected


def _closures(how: str) -> None:
    twins = Twins()
    calls: list[str] = []
    for step in range(4):
        ours, expected = _closure(twins, step, calls)
        losses: list[Any] = []
        for optimizer, closure in ((twins.optimizer, ours), (twins.reference, expected)):
            if how == "positional":
                losses.append(optimizer.step(closure))
            elif how == "keyword":
                losses.append(optimizer.step(closure=closure))
            else:  # a pre hook puts the closure in place of what the caller gave
                handle = optimizer.register_step_pre_hook(lambda o, args, kwargs, c=closure: ((o, c), {}))
                losses.append(optimizer.step())
                handle.remove()
        assert torch.equal(losses[0], losses[1]) and losses[0].requires_grad == losses[1].requires_grad
        assert calls == ["ours"] * (step + 1)
        twins.compare(f"after step {step}")
    twins.compare_state()


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("how", ["positional", "keyword", "given by a pre hook"])
def test_a_closure_is_called_once_and_its_loss_returned(ranks: Pool, how: str, world_size: int) -> None:
    ranks.run(world_size, _closures, how)


class Switched(Net):
    """Net with a layer that is used only while it is switched on."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.is_on = True

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.middle(self.first(x)) if self.is_on else self.first(x)) * self.scale
        return out


def _clear(reduce_gradients: bool, set_to_none: bool, of_model: bool) -> None:
    """A layer is used in some steps only: cleared to None it is skipped then, cleared to zeros it goes on moving."""
    twins = Twins(Switched)
    if not reduce_gradients:
        twins.optimizer = ShardedAdamax(twins.model.named_parameters(), bucket_mib=0.001, reduce_gradients=False)
    for step in range(6):
        for model in (twins.model, twins.twin):
            assert isinstance(model, Switched)
            model.is_on = step not in (2, 3)
        for param, mean in zip(twins.twin.parameters(), twins.mean_of(step, straight_backward), strict=True):
            param.grad = mean if mean is not None or set_to_none or step == 0 else torch.zeros_like(param)
        if reduce_gradients:
            straight_backward(twins.model, step, dist.get_rank())
        else:
            for param, other in zip(twins.model.parameters(), twins.twin.parameters(), strict=True):
                if other.grad is not None:
                    param.grad = other.grad.clone() if param.grad is None else param.grad.copy_(other.grad)
        twins.optimizer.step()
        twins.reference.step()
        if of_model:
            twins.model.zero_grad(set_to_none=set_to_none)
        else:
            twins.optimizer.zero_grad(set_to_none=set_to_none)
        twins.compare(f"after step {step}")
    twins.compare_state()


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("reduce_gradients", [True, False], ids=["reduced here", "reduced before"])
def test_zero_grad_to_none_makes_unused_parameters_be_skipped(
    ranks: Pool, reduce_gradients: bool, world_size: int
) -> None:
    ranks.run(world_size, _clear, reduce_gradients, True, False)


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("reduce_gradients", [True, False], ids=["reduced here", "reduced before"])
def test_zero_grad_to_zeros_makes_unused_parameters_go_on_moving(
    ranks: Pool, reduce_gradients: bool, world_size: int
) -> None:
    ranks.run(world_size, _clear, reduce_gradients, False, False)


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("reduce_gradients", [True, False], ids=["reduced here", "reduced before"])
def test_model_zero_grad_after_the_step_is_as_good_as_the_optimizers(
    ranks: Pool, reduce_gradients: bool, world_size: int
) -> None:
    ranks.run(world_size, _clear, reduce_gradients, True, True)


def _clear_before_backward() -> None:
    twins = Twins()
    for step in range(4):
        twins.feed_twin(step, straight_backward)
        twins.model.zero_grad(set_to_none=step % 2 == 0)
        straight_backward(twins.model, step, dist.get_rank())
        twins.optimizer.step()
        twins.reference.step()
        twins.compare(f"after step {step}")


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_model_zero_grad_before_backward_changes_nothing(ranks: Pool, world_size: int) -> None:
    ranks.run(world_size, _clear_before_backward)


OPTIONS: dict[str, Any] = {"lr": 0.01, "weight_decay": 0.1}


def _to_adamax_and_back(directory: str) -> None:
    twins = Twins(**OPTIONS)
    twins.train(3)
    to = dist.get_world_size() - 1
    full = twins.optimizer.full_state_dict(to=to)
    if full is not None:
        torch.save(full, f"{directory}/ours.pt")
        torch.save(twins.reference.state_dict(), f"{directory}/adamax.pt")
    dist.barrier()

    # Ours into plain Adamax, which goes on as if it had always been there.
    loaded = torch.load(f"{directory}/ours.pt", weights_only=True)
    assert set(loaded) == set(twins.reference.state_dict())
    twins.reference = torch.optim.Adamax(twins.twin.named_parameters())
    twins.reference.load_state_dict(loaded)
    twins.train(2, first_step=3)
    twins.compare_state()
    compare_groups(twins.optimizer, twins.reference, "after Adamax took over")

    # Adamax's into a new one of ours.
    back = Twins()
    for model in (back.model, back.twin):
        model.load_state_dict({name: value.clone() for name, value in twins.twin.state_dict().items()})
    saved = twins.reference.state_dict()
    if dist.get_rank() == 0:
        torch.save(saved, f"{directory}/adamax.pt")
    dist.barrier()
    back.optimizer.load_state_dict(torch.load(f"{directory}/adamax.pt", weights_only=True))
    back.reference.load_state_dict(saved)
    compare_groups(back.optimizer, back.reference, "after ours took over")
    back.compare_state()
    back.train(3, first_step=5)
    back.compare_state()


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_full_state_dict_goes_through_weights_only_files_to_adamax_and_back(
    ranks: Pool, tmp_path: Path, world_size: int
) -> None:
    ranks.run(world_size, _to_adamax_and_back, str(tmp_path))
