"""Given the same mean gradients, parameters and state are those of torch.optim.Adamax to the last bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from sharded_adamax import ShardedAdamax
from tests.distributed.pool import Pool
from tests.distributed.problems import (
    assert_same_bits,
    assert_same_params,
    assert_same_state,
    backward,
    gradient,
    local_gradients,
    make_params,
    mean_gradients,
)

NUM_STEPS = 20


def _groups(params: list[nn.Parameter]) -> list[dict[str, Any]]:
    """Three groups that interleave in memory order, with hyper-parameters of their own."""
    return [
        {"params": params[0::3], "lr": 3e-3},
        {"params": params[1::3], "betas": (0.5, 0.99), "eps": 1e-3},
        {"params": params[2::3], "weight_decay": 0.3},
    ]


def _train(dtype: torch.dtype, options: dict[str, Any]) -> None:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    # Other ranks start elsewhere: construction must overwrite them with the first rank's.
    params, expected = make_params(dtype, seed=rank), make_params(dtype, seed=0)
    optimizer = ShardedAdamax(_groups(params), bucket_mib=0.01, **options)
    reference = torch.optim.Adamax(_groups(expected), **options)
    ordered = [param for group in optimizer.param_groups for param in group["params"]]
    expected_ordered = [param for group in reference.param_groups for param in group["params"]]
    schedulers = [
        torch.optim.lr_scheduler.CosineAnnealingLR(either, T_max=NUM_STEPS) for either in (optimizer, reference)
    ]
    assert len(optimizer.layout.buckets) > 2
    for step in range(NUM_STEPS):
        backward(ordered, local_gradients(step, ordered))
        assert all(param.grad is None for param in ordered), "gradients must not outlive the reduce-scatter"
        for param, mean in zip(expected_ordered, mean_gradients(step, ordered, world_size), strict=True):
            param.grad = mean
        optimizer.step()
        reference.step()
        optimizer.zero_grad()
        for scheduler in schedulers:
            scheduler.step()
        assert_same_params(ordered, expected_ordered, f"after step {step}")
    full = optimizer.full_state_dict(to=world_size - 1)
    assert (full is None) == (rank != world_size - 1)
    if full is not None:
        assert_same_state(full, reference)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weight_decay": 0.1},
        {"maximize": True},
        {"maximize": True, "weight_decay": 0.1},
        {"foreach": True},
        {"foreach": False},
    ],
    ids=["plain", "weight-decay", "maximize", "maximize-weight-decay", "foreach", "loop"],
)
def test_twenty_steps_equal_adamax_fed_the_mean_gradients(
    ranks: Pool, world_size: int, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    ranks.run(world_size, _train, dtype, options)


class _Net(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.embedding = nn.Embedding(37, 11, dtype=dtype)
        self.body = nn.Sequential(nn.Linear(11, 29, dtype=dtype), nn.Tanh(), nn.Linear(29, 11, dtype=dtype))
        self.scale = nn.Parameter(torch.ones((), dtype=dtype))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.body(self.embedding(tokens))
        return (self.scale * hidden @ self.embedding.weight.T).log_softmax(-1)  # the embedding is tied


def _tokens(step: int, rank: int) -> torch.Tensor:
    return torch.randint(37, (8,), generator=torch.Generator().manual_seed(100 * step + rank))


def _train_under_ddp(dtype: torch.dtype, bucket_as_view: bool) -> None:
    rank = dist.get_rank()
    torch.manual_seed(0)
    model, other = _Net(dtype), _Net(dtype)
    other.load_state_dict(model.state_dict())
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=bucket_as_view)
    wrapped_other = DistributedDataParallel(other, gradient_as_bucket_view=bucket_as_view)
    options: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.01}
    optimizer = ShardedAdamax(wrapped.parameters(), reduce_gradients=False, bucket_mib=0.002, **options)
    reference = torch.optim.Adamax(wrapped_other.parameters(), **options)
    for step in range(NUM_STEPS):
        for net, either in ((wrapped, optimizer), (wrapped_other, reference)):
            tokens = _tokens(step, rank)
            nn.functional.nll_loss(net(tokens), tokens.roll(1)).backward()
            either.step()
            either.zero_grad()
        for (name, param), expected in zip(model.named_parameters(), other.parameters(), strict=True):
            assert_same_bits(param, expected, f"{name} after step {step}")
    full = optimizer.full_state_dict()
    if full is not None:
        assert_same_state(full, reference)


@pytest.mark.parametrize("world_size", [2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("bucket_as_view", [False, True])
def test_reduced_by_ddp_equals_ddp_with_adamax(
    ranks: Pool, world_size: int, dtype: torch.dtype, bucket_as_view: bool
) -> None:
    ranks.run(world_size, _train_under_ddp, dtype, bucket_as_view)


def _train_with_gaps() -> None:
    rank, world_size = dist.get_rank(), dist.get_world_size()

    def present(step: int, of_rank: int, index: int) -> bool:
        if index == 4:
            return False  # nowhere, ever
        if index == 7:
            return step % 3 == 1  # everywhere, now and then
        if index == 1 or index == 5:
            return (step + of_rank) % world_size == 0  # on one rank
        return True

    params, expected = make_params(torch.float32), make_params(torch.float32)
    optimizer = ShardedAdamax(params, weight_decay=0.1, bucket_mib=0.005)
    reference = torch.optim.Adamax(expected, weight_decay=0.1)
    for step in range(NUM_STEPS):
        backward(
            params,
            [gradient(step, rank, i, p) if present(step, rank, i) else None for i, p in enumerate(params)],
        )
        for param, mean in zip(expected, mean_gradients(step, params, world_size, present), strict=True):
            param.grad = mean
        optimizer.step()
        reference.step()
        optimizer.zero_grad()
        assert_same_params(params, expected, f"after step {step}")
    full = optimizer.full_state_dict()
    if full is not None:
        assert_same_state(full, reference, step_zero_may_miss=True)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_none_everywhere_is_skipped_and_none_on_some_ranks_is_zero(ranks: Pool, world_size: int) -> None:
    ranks.run(world_size, _train_with_gaps)
