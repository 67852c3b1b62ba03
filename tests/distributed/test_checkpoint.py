"""Saved at N ranks, loaded at M: every element equal; and training goes on as if never stopped."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from sharded_adamax import ShardedAdamax, load, save
from tests.distributed.pool import Pool
from tests.distributed.problems import (
    SHAPES,
    assert_same_bits,
    assert_same_state,
    backward,
    gradient,
    mean_gradients,
)

WORLD_SIZES = [1, 2, 3, 4]
SAVED_STEPS = 5


class Zoo(nn.Module):
    """Parameters of all shapes, and a buffer."""

    def __init__(self, dtype: torch.dtype, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        for index, shape in enumerate(SHAPES):
            self.register_parameter(f"p{index}", nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype)))
        self.register_buffer("seen", torch.zeros(2))


def _optimizer(model: nn.Module, lr: float = 1e-2) -> ShardedAdamax:
    named = list(model.named_parameters())
    groups: list[dict[str, Any]] = [{"params": named[::2]}, {"params": named[1::2], "weight_decay": 0.1, "lr": lr / 2}]
    return ShardedAdamax(groups, lr=lr, bucket_mib=0.01)


def _ordered(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def _train(optimizer: ShardedAdamax, model: nn.Module, steps: range) -> None:
    params = _ordered(optimizer)
    for step in steps:
        model.seen += 1
        backward(params, [gradient(step, dist.get_rank(), i, p) for i, p in enumerate(params)])
        optimizer.step()
        optimizer.zero_grad()


def _reference(dtype: torch.dtype, world_size: int) -> tuple[Zoo, torch.optim.Adamax]:
    """What one process computes from the mean gradients of ``world_size`` ranks."""
    model = Zoo(dtype)
    named = list(model.named_parameters())
    reference = torch.optim.Adamax(
        [{"params": named[::2]}, {"params": named[1::2], "weight_decay": 0.1, "lr": 5e-3}], lr=1e-2
    )
    params = _ordered(reference)
    for step in range(SAVED_STEPS):
        model.seen += 1
        for param, mean in zip(params, mean_gradients(step, params, world_size), strict=True):
            param.grad = mean
        reference.step()
    return model, reference


def _save(path: str, dtype: torch.dtype) -> None:
    model = Zoo(dtype)
    optimizer = _optimizer(model)
    _train(optimizer, model, range(SAVED_STEPS))
    save(path, model, optimizer, extra={"epoch": 3, "generator": torch.get_rng_state()})


def _load(path: str, dtype: torch.dtype, saved_at: int) -> None:
    model = Zoo(dtype, seed=99)
    optimizer = _optimizer(model, lr=0.5)
    extra = load(path, model, optimizer)
    assert extra["epoch"] == 3 and extra["generator"].dtype == torch.uint8
    expected_model, reference = _reference(dtype, saved_at)
    for (name, got), expected in zip(model.state_dict().items(), expected_model.state_dict().values(), strict=True):
        assert_same_bits(got, expected, name)
    assert [group["lr"] for group in optimizer.param_groups] == [1e-2, 5e-3]
    for param, expected_param in zip(_ordered(optimizer), _ordered(reference), strict=True):
        state, expected_state = optimizer.state[param], reference.state[expected_param]
        assert_same_bits(state["step"], expected_state["step"], "step")
        for key in ("exp_avg", "exp_inf"):
            mine = expected_state[key].reshape(-1)[state[key].owned.as_slice()]
            assert_same_bits(state[key].local, mine, key)
    full = optimizer.full_state_dict()
    if full is not None:
        assert_same_state(full, reference)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_saved_at_n_loaded_at_m_is_equal_in_every_element(ranks: Pool, tmp_path: Path, dtype: torch.dtype) -> None:
    for saved_at in WORLD_SIZES:
        path = str(tmp_path / f"from{saved_at}")
        ranks.run(saved_at, _save, path, dtype)
        for loaded_at in WORLD_SIZES:
            ranks.run(loaded_at, _load, path, dtype, saved_at)


def _uninterrupted_and_resumed(path: str) -> None:
    model = Zoo(torch.float32)
    optimizer = _optimizer(model)
    _train(optimizer, model, range(4))
    save(path, model, optimizer)
    _train(optimizer, model, range(4, 10))

    resumed_model = Zoo(torch.float32, seed=5)
    resumed = _optimizer(resumed_model, lr=7.0)
    load(path, resumed_model, resumed)
    _train(resumed, resumed_model, range(4, 10))
    for (name, got), expected in zip(resumed_model.state_dict().items(), model.state_dict().values(), strict=True):
        assert_same_bits(got, expected, name)
    for param, other in zip(_ordered(resumed), _ordered(optimizer), strict=True):
        for key in ("exp_avg", "exp_inf"):
            assert_same_bits(resumed.state[param][key].local, optimizer.state[other][key].local, key)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_training_on_after_a_resume_is_bit_identical(ranks: Pool, tmp_path: Path, world_size: int) -> None:
    ranks.run(world_size, _uninterrupted_and_resumed, str(tmp_path / "checkpoint"))


def _save_twice(path: str) -> list[str]:
    model = Zoo(torch.float32)
    optimizer = _optimizer(model)
    (Path(path).parent / f".{Path(path).name}.incomplete").mkdir(exist_ok=True)  # left by a crashed save
    save(path, model, optimizer)
    messages = []
    for action in (
        lambda: save(path, model, optimizer),
        lambda: save(path + "x", model, optimizer, extra=model),
        lambda: load(path + "missing", model, optimizer),
    ):
        try:
            action()
        except (FileExistsError, ValueError, FileNotFoundError, RuntimeError) as error:
            messages.append(f"{type(error).__name__}: {error}")
    return messages


def test_bad_paths_and_extras_fail_on_all_ranks_together(ranks: Pool, tmp_path: Path) -> None:
    first, second = ranks.run(2, _save_twice, str(tmp_path / "checkpoint"))
    assert "FileExistsError" in first[0] and "RemoteError: rank 0" in second[0] and "exists" in second[0]
    assert "weights_only" in first[1] and "weights_only" in second[1]
    assert "there is no checkpoint" in first[2] and "there is no checkpoint" in second[2]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint"]


def _load_plain(plain: dict[str, Any], saved_at: int) -> None:
    model, reference = _reference(torch.float32, saved_at)
    fresh = Zoo(torch.float32)
    fresh.load_state_dict(model.state_dict())
    optimizer = _optimizer(fresh, lr=0.5)
    fired: list[str] = []
    optimizer.register_load_state_dict_pre_hook(lambda *_: fired.append("pre"))
    optimizer.register_load_state_dict_post_hook(lambda *_: fired.append("post"))
    optimizer.load_state_dict(copy.deepcopy(plain))
    assert fired == ["pre", "post"]
    full = optimizer.full_state_dict(to=dist.get_world_size() - 1)
    if full is not None:
        assert_same_state(full, reference)
        back = torch.optim.Adamax(
            [{"params": list(fresh.parameters())[::2]}, {"params": list(fresh.parameters())[1::2]}]
        )
        back.load_state_dict(full)
        assert_same_state(back.state_dict(), reference)
        assert [group["lr"] for group in back.param_groups] == [1e-2, 5e-3]


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_a_plain_adamax_state_dict_loads_anywhere_and_the_full_one_loads_into_adamax(
    ranks: Pool, world_size: int
) -> None:
    _, reference = _reference(torch.float32, 2)
    ranks.run(world_size, _load_plain, reference.state_dict(), 2)


def _sharded_round_trip() -> None:
    model = Zoo(torch.float32)
    optimizer = _optimizer(model)
    _train(optimizer, model, range(3))
    snapshot = copy.deepcopy(optimizer.state_dict())
    expected = [param.detach().clone() for param in model.parameters()]
    _train(optimizer, model, range(3, 6))
    after = [param.detach().clone() for param in model.parameters()]
    optimizer.load_state_dict(snapshot)
    with torch.no_grad():
        for param, value in zip(model.parameters(), expected, strict=True):
            param.copy_(value)
    _train(optimizer, model, range(3, 6))
    for index, (param, value) in enumerate(zip(model.parameters(), after, strict=True)):
        assert_same_bits(param, value, f"parameter {index}")


@pytest.mark.parametrize("world_size", [1, 3])
def test_a_copied_sharded_state_dict_is_a_snapshot(ranks: Pool, world_size: int) -> None:
    ranks.run(world_size, _sharded_round_trip)


def _pickle_sharded(path: str) -> list[str]:
    model = Zoo(torch.float32)
    optimizer = _optimizer(model)
    _train(optimizer, model, range(2))
    messages = []
    try:
        torch.save(optimizer.state_dict(), f"{path}{dist.get_rank()}")
    except RuntimeError as error:
        messages.append(str(error))
    optimizer.consolidate_state_dict(to=1)
    if dist.get_rank() == 1:
        torch.save(optimizer.state_dict(), f"{path}whole")
        plain = torch.load(f"{path}whole", weights_only=True)
        assert all(type(entry["exp_avg"]) is torch.Tensor for entry in plain["state"].values())
        reference = torch.optim.Adamax(
            [{"params": list(model.named_parameters())[::2]}, {"params": list(model.named_parameters())[1::2]}]
        )
        reference.load_state_dict(plain)
    _train(optimizer, model, range(2, 3))
    try:  # the consolidated state is stale after a step and must not be handed out
        torch.save(optimizer.state_dict(), f"{path}stale")
    except RuntimeError as error:
        messages.append(str(error))
    return messages


def test_torch_save_of_a_sharded_state_names_the_remedy(ranks: Pool, tmp_path: Path) -> None:
    for messages in ranks.run(2, _pickle_sharded, str(tmp_path / "state")):
        assert len(messages) == 2
        assert all("full_state_dict" in message and "sharded_adamax.save" in message for message in messages)


def _micro(step: int, part: int, params: list[nn.Parameter]) -> list[torch.Tensor | None]:
    return [gradient(100 * step + part, dist.get_rank(), i, p) for i, p in enumerate(params)]


def _accumulating_run(path: str, save_in_step: int | None, first_step: int, resume: bool) -> list[torch.Tensor]:
    """Six steps of three backward passes with a scheduler; a save falls between the passes of one step."""
    model = Zoo(torch.float32, seed=5 if resume else 0)
    optimizer = _optimizer(model, lr=3.0 if resume else 1e-2)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.7)
    if resume:
        scheduler.load_state_dict(load(path, model, optimizer)["scheduler"])
        save(path + "again", model, optimizer, extra={"scheduler": scheduler.state_dict()})  # right after load
        scheduler.load_state_dict(load(path + "again", model, optimizer)["scheduler"])
    params = _ordered(optimizer)
    for step in range(first_step, 6):
        backward(params, _micro(step, 0, params))  # its buckets are being reduced from here on
        backward(params, _micro(step, 1, params))  # these gradients are still in p.grad
        if step == save_in_step:
            save(path, model, optimizer, extra={"scheduler": scheduler.state_dict()})
        backward(params, _micro(step, 2, params))
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    shards = [optimizer.state[param][key].local for param in params for key in ("exp_avg", "exp_inf")]
    return [tensor.detach().clone() for tensor in (*params, *shards)]


def _save_between_passes(path: str) -> None:
    undisturbed = _accumulating_run(path, None, 0, resume=False)
    saving = _accumulating_run(path, 3, 0, resume=False)
    resumed = _accumulating_run(path, None, 3, resume=True)  # the step that was under way is done again
    for index, tensors in enumerate(zip(undisturbed, saving, resumed, strict=True)):
        assert_same_bits(tensors[1], tensors[0], f"tensor {index} of the run that saved")
        assert_same_bits(tensors[2], tensors[0], f"tensor {index} of the run that resumed")


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_save_while_gradients_are_reduced_and_accumulated_disturbs_nothing_and_resumes_exactly(
    ranks: Pool, tmp_path: Path, world_size: int
) -> None:
    ranks.run(world_size, _save_between_passes, str(tmp_path / "checkpoint"))


def _save_after_consolidating(path: str) -> None:
    model = Zoo(torch.float32)
    optimizer = ShardedAdamax(model.parameters(), bucket_mib=0.01)
    optimizer.add_param_group({"params": []})  # torch takes a group without parameters
    _train(optimizer, model, range(2))
    optimizer.consolidate_state_dict(to=1)
    save(path, model, optimizer)
    expected = optimizer.full_state_dict(to=0)
    _train(optimizer, model, range(2, 3))
    optimizer.consolidate_state_dict(to=1)
    load(path, model, optimizer)
    full = optimizer.full_state_dict(to=0)
    if full is not None and expected is not None:
        for index, state in full["state"].items():
            for key, value in state.items():
                assert_same_bits(value, expected["state"][index][key], f"{key} of parameter {index}")


def test_a_consolidated_state_does_not_get_into_a_sharded_checkpoint(ranks: Pool, tmp_path: Path) -> None:
    ranks.run(2, _save_after_consolidating, str(tmp_path / "checkpoint"))
