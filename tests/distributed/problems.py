"""Models, gradients and the one-process run that the tests compare with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

# 0-d, no elements, odd, one element, larger than a small bucket; padding differs from world size to world size.
SHAPES: list[tuple[int, ...]] = [(), (3, 0), (7,), (1,), (5, 13), (64,), (2, 3, 5), (129, 33), (63,), (65,)]


def make_params(dtype: torch.dtype, shapes: Sequence[tuple[int, ...]] = SHAPES, seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype)) for shape in shapes]


def gradient(step: int, rank: int, index: int, param: Tensor) -> Tensor:
    """The gradient of parameter ``index`` on ``rank`` at ``step``: the same wherever it is computed."""
    generator = torch.Generator().manual_seed(1_000_003 * step + 1_009 * rank + index)
    scale = 10.0 ** (index % 5 - 2)
    return (torch.randn(param.shape, generator=generator, dtype=torch.float64) * scale).to(param.dtype)


def backward(params: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
    """Make autograd deliver exactly these gradients; none where there is None."""
    terms = [(p * g).sum() for p, g in zip(params, gradients, strict=True) if g is not None]
    if terms:
        torch.stack([term.to(torch.float64) for term in terms]).sum().backward()


def mean_gradients(
    step: int, params: Sequence[Tensor], world_size: int, present: Callable[[int, int, int], bool] | None = None
) -> list[Tensor | None]:
    """The documented reduction: sum in the order of the ranks, divided by their number; missing ones count as zero."""
    of_ranks = [
        [
            gradient(step, rank, i, p) if present is None or present(step, rank, i) else None
            for i, p in enumerate(params)
        ]
        for rank in range(world_size)
    ]
    return mean_over_ranks(of_ranks)


def mean_over_ranks(of_ranks: Sequence[Sequence[Tensor | None]]) -> list[Tensor | None]:
    """The documented reduction of what the ranks hold; a gradient that some ranks lack counts as zero there."""
    means: list[Tensor | None] = []
    for found in zip(*of_ranks, strict=True):
        held = [gradient for gradient in found if gradient is not None]
        if not held:
            means.append(None)
            continue
        terms = [torch.zeros_like(held[0]) if gradient is None else gradient for gradient in found]
        total = terms[0].clone()
        for term in terms[1:]:
            total += term
        means.append(total / len(of_ranks))
    return means


def local_gradients(step: int, params: Sequence[Tensor]) -> list[Tensor]:
    """The gradients of this rank."""
    return [gradient(step, rank_or_zero(), index, param) for index, param in enumerate(params)]


def feed_mean(params: Sequence[Tensor], step: int, present: Callable[[int, int, int], bool] | None = None) -> None:
    """Give the reference the mean gradients of all ranks of the default process group."""
    for param, mean in zip(params, mean_gradients(step, params, dist.get_world_size(), present), strict=True):
        param.grad = mean


def assert_same_params(params: Sequence[Tensor], expected: Sequence[Tensor], when: str) -> None:
    for index, (param, other) in enumerate(zip(params, expected, strict=True)):
        assert_same_bits(param, other, f"parameter {index} {when}")


def assert_same_bits(got: Tensor, expected: Tensor, what: str) -> None:
    assert got.dtype == expected.dtype and got.shape == expected.shape, (what, got.shape, expected.shape)
    if not torch.equal(got, expected):
        worst = (got.double() - expected.double()).abs().max().item()
        raise AssertionError(f"rank {rank_or_zero()}: {what} differs, by up to {worst}")


def assert_same_state(full: dict[str, Any], reference: torch.optim.Optimizer, step_zero_may_miss: bool = False) -> None:
    """Compare a full state dict with the state of a torch.optim.Adamax, every element."""
    expected = reference.state_dict()["state"]
    for index, state in full["state"].items():
        if index not in expected:
            assert step_zero_may_miss and state["step"] == 0, f"parameter {index} has a state, torch has none"
            continue
        for key in ("step", "exp_avg", "exp_inf"):
            assert_same_bits(state[key], expected[index][key], f"{key} of parameter {index}")
    assert set(expected) <= set(full["state"])


def rank_or_zero() -> int:
    return dist.get_rank() if dist.is_initialized() else 0
