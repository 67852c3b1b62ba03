"""A model that ShardedAdamax trains on every rank, and its twin that torch.optim.Adamax trains in one process.

The twin computes what every rank computes, one rank after another, and is fed with the documented mean: the sum in the
order of the ranks, divided by their number. What backward does on a rank is a function of the model, the step and the
rank, so that both run the same code: checkpointed, compiled, with hooks, in several passes.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from sharded_adamax import ShardedAdamax
from tests.distributed.problems import assert_same_bits, assert_same_state, mean_over_ranks, rank_or_zero

Gradients = list[Tensor | None]
Backward = Callable[[nn.Module, int, int], object]  # (model, step, rank): forward and backward as that rank does them

NUM_INPUTS, NUM_HIDDEN, NUM_OUTPUTS = 6, 16, 3
# The largest parameter of Net has 256 elements, so that buckets hold one to a few parameters.
SMALL_BUCKET_MIB = 0.001


def fill_(module: nn.Module, seed: int) -> None:
    """Draw all parameters anew, the same wherever it is done."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for param in module.parameters():
            param.copy_(0.3 * torch.randn(param.shape, generator=generator, dtype=torch.float64))


class Net(nn.Module):
    """Three layers and a scale; `first`, `middle` and `last` may be run one by one."""

    def __init__(self, seed: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(NUM_INPUTS, NUM_HIDDEN, dtype=dtype), nn.Tanh())
        self.middle = nn.Sequential(nn.Linear(NUM_HIDDEN, NUM_HIDDEN, dtype=dtype), nn.GELU())
        self.last = nn.Linear(NUM_HIDDEN, NUM_OUTPUTS, dtype=dtype)
        self.scale = nn.Parameter(torch.ones((), dtype=dtype))
        fill_(self, seed)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.middle(self.first(x))) * self.scale
        return out


class Batch:
    """What a rank sees at a step."""

    def __init__(self, step: int, rank: int, dtype: torch.dtype = torch.float32) -> None:
        generator = torch.Generator().manual_seed(1_009 * step + rank)
        self.x = torch.randn(5, NUM_INPUTS, generator=generator, dtype=torch.float64).to(dtype)
        self.y = torch.randn(5, NUM_OUTPUTS, generator=generator, dtype=torch.float64).to(dtype)


def dtype_of(model: nn.Module) -> torch.dtype:
    return next(model.parameters()).dtype


def loss_of(model: nn.Module, step: int, rank: int) -> Tensor:
    batch = Batch(step, rank, dtype_of(model))
    return F.mse_loss(model(batch.x), batch.y)


def straight_backward(model: nn.Module, step: int, rank: int) -> None:
    loss_of(model, step, rank).backward()


class Twins:
    """The same model twice, and the two optimizers. The ranks' models begin differently: the first rank's counts."""

    def __init__(self, make: Callable[[int], nn.Module] = Net, **options: Any) -> None:
        self.model, self.twin = make(dist.get_rank()), make(0)
        self.optimizer = ShardedAdamax(self.model.named_parameters(), bucket_mib=SMALL_BUCKET_MIB, **options)
        self.reference = torch.optim.Adamax(self.twin.named_parameters(), **options)

    def gradients_of_ranks(self, step: int, backward: Backward) -> list[Gradients]:
        """What autograd leaves in the twin's gradients on each rank."""
        of_ranks: list[Gradients] = []
        for rank in range(dist.get_world_size()):
            self.twin.zero_grad()
            backward(self.twin, step, rank)
            of_ranks.append([param.grad for param in self.twin.parameters()])
        self.twin.zero_grad()
        return of_ranks

    def feed_twin(self, step: int, backward: Backward) -> None:
        """Put the mean over the ranks into the twin's gradients."""
        for param, mean in zip(self.twin.parameters(), self.mean_of(step, backward), strict=True):
            param.grad = mean

    def mean_of(self, step: int, backward: Backward) -> Gradients:
        return mean_over_ranks(self.gradients_of_ranks(step, backward))

    def train(self, num_steps: int, backward: Backward = straight_backward, first_step: int = 0) -> None:
        """Train both and compare them after each step."""
        for step in range(first_step, first_step + num_steps):
            self.feed_twin(step, backward)
            backward(self.model, step, dist.get_rank())
            self.step_both(step)

    def step_both(self, step: int) -> None:
        self.optimizer.step()
        self.reference.step()
        self.optimizer.zero_grad()
        self.reference.zero_grad()
        self.compare(f"after step {step}")

    def compare(self, when: str) -> None:
        compare_models(self.model, self.twin, when)

    def compare_state(self) -> None:
        """Collective. The states, every element, on the first rank."""
        full = self.optimizer.full_state_dict()
        if full is not None:
            assert_same_state(full, self.reference, step_zero_may_miss=True)


def compare_models(model: nn.Module, expected: nn.Module, when: str) -> None:
    """Compare all parameters and buffers, by name, bit for bit."""
    pairs = chain(
        zip(model.named_parameters(), expected.named_parameters(), strict=True),
        zip(model.named_buffers(), expected.named_buffers(), strict=True),
    )
    for (name, value), (other_name, other) in pairs:
        assert name.removeprefix("_orig_mod.") == other_name.removeprefix("_orig_mod.")
        assert_same_bits(value, other, f"{name} {when}")


def compare_groups(optimizer: torch.optim.Optimizer, reference: torch.optim.Optimizer, when: str) -> None:
    """Compare everything in ``param_groups`` but the parameters: the same keys, types and values."""
    assert len(optimizer.param_groups) == len(reference.param_groups)
    for index, (group, expected) in enumerate(zip(optimizer.param_groups, reference.param_groups, strict=True)):
        what = f"rank {rank_or_zero()}: group {index} {when}"
        assert set(group) == set(expected), what
        assert len(group["params"]) == len(expected["params"]), what
        for key in set(group) - {"params"}:
            assert type(group[key]) is type(expected[key]), (what, key, group[key], expected[key])
            if isinstance(group[key], Tensor):
                assert_same_bits(group[key], expected[key], f"{key} of {what}")
            else:
                assert group[key] == expected[key], (what, key, group[key], expected[key])
