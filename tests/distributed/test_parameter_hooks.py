"""Hooks by which users change gradients on their way: whether the optimizer comes before them or after, they count."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.distributed.models import Backward, Net, Twins, loss_of, straight_backward
from tests.distributed.pool import Pool

Attach = Callable[[nn.Module], None]


def _scale_gradients(model: nn.Module) -> None:
    for index, param in enumerate(model.parameters()):
        param.register_hook(lambda gradient, index=index: gradient * (1.5 + index))


def _clamp_in_place(model: nn.Module) -> None:
    """Value clipping as gradients come: what torch's own tutorial does in this hook."""

    def clamp_(param: Tensor) -> None:
        assert param.grad is not None
        param.grad.clamp_(-0.01, 0.01)

    for param in model.parameters():
        param.register_post_accumulate_grad_hook(clamp_)


def _replace(model: nn.Module) -> None:
    """A new tensor in .grad, of other strides."""

    def replace(param: Tensor) -> None:
        assert param.grad is not None
        param.grad = (3 * param.grad).t().contiguous().t() if param.ndim == 2 else 3 * param.grad

    for param in model.parameters():
        param.register_post_accumulate_grad_hook(replace)


def _drop(model: nn.Module) -> None:
    """No gradient for some parameters after all."""

    def drop(param: Tensor) -> None:
        param.grad = None

    for name, param in model.named_parameters():
        if "middle" in name:
            param.register_post_accumulate_grad_hook(drop)


def _of_modules(model: nn.Module) -> None:
    """Hooks of the modules change what flows back, and so the gradients of the parameters before them."""
    assert isinstance(model, Net)
    model.middle.register_full_backward_hook(lambda module, inputs, outputs: tuple(2 * g for g in inputs))
    model.last.register_full_backward_pre_hook(lambda module, outputs: tuple(0.5 * g for g in outputs))


ATTACHMENTS: dict[str, Attach] = {
    "register_hook": _scale_gradients,
    "post-accumulate, in place": _clamp_in_place,
    "post-accumulate, replaced": _replace,
    "post-accumulate, dropped": _drop,
    "modules": _of_modules,
}


def _train(kind: str, when: str) -> None:
    attach = ATTACHMENTS[kind]

    def make(seed: int) -> Net:
        net = Net(seed)
        if when == "before":
            attach(net)
        return net

    twins = Twins(make)
    if when == "after":
        attach(twins.model)
        attach(twins.twin)
    if when == "between steps":
        twins.train(2)
        attach(twins.model)
        attach(twins.twin)
    twins.train(4, first_step=2)
    twins.compare_state()


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("when", ["before", "after", "between steps"])
@pytest.mark.parametrize("kind", ATTACHMENTS)
def test_a_hook_changes_gradients_as_with_adamax_whenever_it_was_registered(
    ranks: Pool, kind: str, when: str, world_size: int
) -> None:
    ranks.run(world_size, _train, kind, when)


def _on_one_rank() -> None:
    """Rank 1 alone has a hook: its part of the mean changes, the others' does not."""
    twins = Twins()

    def triple(gradient: Tensor) -> Tensor:
        return 3 * gradient

    def backward(model: nn.Module, step: int, rank: int) -> None:
        handles = [param.register_hook(triple) for param in model.parameters() if rank == 1]
        straight_backward(model, step, rank)
        for handle in handles:
            handle.remove()

    twins.train(3, backward)
    twins.compare_state()


def test_a_hook_on_one_rank_changes_that_ranks_part_of_the_mean(ranks: Pool) -> None:
    ranks.run(3, _on_one_rank)


def _remove() -> None:
    twins = Twins()

    def quarter(param: Tensor) -> None:
        assert param.grad is not None
        param.grad.mul_(0.25)

    for step in range(5):
        if step in (1, 3):
            handles = [
                param.register_post_accumulate_grad_hook(quarter)
                for model in (twins.model, twins.twin)
                for param in list(model.parameters())[1::2]
            ]
        twins.train(1, first_step=step)
        if step in (2, 4):
            for handle in handles:
                handle.remove()
    twins.compare_state()


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_hook_may_come_and_go(ranks: Pool, world_size: int) -> None:
    ranks.run(world_size, _remove)


def _watch() -> None:
    """A hook that only looks (wandb.watch, a histogram) sees the rank's own gradient, each once per backward."""
    twins = Twins()
    seen: dict[nn.Module, list[Any]] = {twins.model: [], twins.twin: []}
    for model, log in seen.items():
        for param in model.parameters():
            param.register_hook(lambda gradient, log=log: log.append(gradient.clone()))
            param.register_post_accumulate_grad_hook(
                lambda p, log=log: log.append(None if p.grad is None else p.grad.clone())
            )
    rank = dist.get_rank()
    straight_backward(twins.model, 0, rank)
    straight_backward(twins.twin, 0, rank)
    ours, expected = seen[twins.model], seen[twins.twin]
    assert len(ours) == len(expected) == 2 * len(list(twins.model.parameters()))
    for one, other in zip(ours, expected, strict=True):
        assert one is not None, "the gradient was gone when the hook that came after the optimizer looked"
        assert torch.equal(one, other)
    twins.optimizer.step()


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_hook_that_looks_sees_each_gradient_of_its_rank_once(ranks: Pool, world_size: int) -> None:
    ranks.run(world_size, _watch)


def _accumulate_with_hooks(make_backward: Callable[[Twins], Backward]) -> None:
    """Inside no_sync hooks see what has accumulated, as with Adamax."""
    twins = Twins()
    _clamp_in_place(twins.model)
    _clamp_in_place(twins.twin)
    twins.train(3, make_backward(twins))
    twins.compare_state()


def _two_passes(twins: Twins) -> Backward:
    def backward(model: nn.Module, step: int, rank: int) -> None:
        if model is twins.model:
            with twins.optimizer.no_sync():
                loss_of(model, 2 * step, rank).backward()
        else:
            loss_of(model, 2 * step, rank).backward()
        loss_of(model, 2 * step + 1, rank).backward()

    return backward


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_hook_sees_what_no_sync_has_accumulated(ranks: Pool, world_size: int) -> None:
    ranks.run(world_size, _accumulate_with_hooks, _two_passes)
