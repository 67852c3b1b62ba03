"""Ranks whose gradients become ready in different orders: the same numbers, the same collectives in the same order."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from sharded_adamax import ShardedAdamax
from sharded_adamax.pending import Pending
from tests.distributed.models import Backward, Batch, Gradients, Twins, fill_
from tests.distributed.pool import Pool
from tests.distributed.problems import mean_over_ranks

NUM_BLOCKS = 7
WIDTH = 6


class Scrambled(nn.Module):
    """Blocks of different sizes, run in the order and as often as the caller says: a dynamic graph."""

    def __init__(self, seed: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        # One weight each, larger than a bucket: so many buckets, and the numel of what is sent tells them apart.
        self.blocks = nn.ModuleList(
            nn.Linear(WIDTH, WIDTH * 16 * (index + 1), bias=False, dtype=dtype) for index in range(NUM_BLOCKS)
        )
        fill_(self, seed)

    def forward(self, x: Tensor, order: Sequence[int]) -> Tensor:
        for index in order:
            x = x + self.blocks[index](x).tanh().unflatten(-1, (WIDTH, -1)).mean(-1)
        return x


def _scrambled64(seed: int) -> Scrambled:
    return Scrambled(seed, torch.float64)


def _loss(model: nn.Module, step: int, rank: int, order: Sequence[int]) -> Tensor:
    batch = Batch(step, rank, next(model.parameters()).dtype)
    return F.mse_loss(model(batch.x, order), batch.x.flip(0))


def _choose(step: int, rank: int) -> random.Random:
    return random.Random(1_000 * step + rank)


def _permuted(model: nn.Module, step: int, rank: int) -> None:
    """Every block once, in an order of the rank's own: the last block run is the first whose gradients are ready."""
    order = list(range(NUM_BLOCKS))
    _choose(step, rank).shuffle(order)
    _loss(model, step, rank, order).backward()


def _repeated(model: nn.Module, step: int, rank: int) -> None:
    """Every block once or more."""
    choose = _choose(step, rank)
    order = list(range(NUM_BLOCKS)) + [choose.randrange(NUM_BLOCKS) for _ in range(3)]
    choose.shuffle(order)
    _loss(model, step, rank, order).backward()


def _branches(model: nn.Module, step: int, rank: int) -> None:
    """Some of the blocks; on some ranks and at some steps none at all."""
    choose = _choose(step, rank)
    order = choose.sample(range(NUM_BLOCKS), choose.randrange(NUM_BLOCKS))
    loss = _loss(model, step, rank, order)
    if loss.requires_grad:
        loss.backward()


def _two_losses(model: nn.Module, step: int, rank: int) -> None:
    """Two graphs that share nothing, in one call of backward."""
    order = list(range(NUM_BLOCKS))
    _choose(step, rank).shuffle(order)
    losses = [_loss(model, step, rank, order[:3]), _loss(model, step + 50, rank, order[3:])]
    torch.autograd.backward(losses)


def _halves(model: nn.Module, step: int, rank: int) -> None:
    """Two backward passes over parameters that overlap in nothing, in the rank's own order."""
    order = list(range(NUM_BLOCKS))
    _choose(step, rank).shuffle(order)
    _loss(model, step, rank, order[:4]).backward()
    _loss(model, step + 50, rank, order[4:]).backward()


ROADS: dict[str, Backward] = {
    "permuted": _permuted,
    "repeated": _repeated,
    "branches": _branches,
    "two losses": _two_losses,
    "halves": _halves,
}


class Recorder:
    """Notes what the optimizer asks of its group, as (kind, numel): the sizes of all buckets differ."""

    def __init__(self, optimizer: ShardedAdamax) -> None:
        engine = optimizer._get_engine()
        self.calls: list[tuple[str, int]] = []
        self.numels = [bucket.numel for bucket in optimizer.layout.buckets]
        assert len(set(self.numels)) == len(self.numels) == NUM_BLOCKS
        engine.group.reduce_scatter = self._noting("reduce_scatter", engine.group.reduce_scatter)  # type: ignore
        engine.group.all_gather = self._noting("all_gather", engine.group.all_gather)  # type: ignore

    def _noting(
        self, kind: str, call: Callable[[Tensor], Pending[Tensor | None]]
    ) -> Callable[[Tensor], Pending[Tensor | None]]:
        def noted(bucket: Tensor) -> Pending[Tensor | None]:
            self.calls.append((kind, bucket.numel()))
            return call(bucket)

        return noted

    def of(self, kind: str) -> list[int]:
        """The indices of the buckets for which ``kind`` was called, in the order of the calls."""
        return [self.numels.index(numel) for other, numel in self.calls if other == kind]

    def assert_same_on_all_ranks(self) -> None:
        """The group's collectives, of both kinds, in one order. Collective itself."""
        everywhere: list[list[tuple[str, int]]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(everywhere, self.calls)
        assert all(calls == everywhere[0] for calls in everywhere), everywhere


def _train(road: str) -> None:
    twins = Twins(Scrambled)
    recorder = Recorder(twins.optimizer)
    num_buckets = len(recorder.numels)
    for step in range(6):
        recorder.calls.clear()
        twins.feed_twin(step, ROADS[road])
        ROADS[road](twins.model, step, dist.get_rank())
        in_backward = recorder.of("reduce_scatter")
        assert in_backward == list(range(len(in_backward))), "in the order of the buckets, while backward runs"
        twins.step_both(step)
        assert recorder.of("reduce_scatter") == list(range(num_buckets)), "each once, in the order of the buckets"
        gathered = recorder.of("all_gather")
        assert gathered == sorted(set(gathered))
        assert road == "branches" or (gathered == list(range(num_buckets)) == in_backward)
        recorder.assert_same_on_all_ranks()
    twins.compare_state()


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("road", ROADS)
def test_gradients_that_are_ready_in_any_order_give_the_numbers_and_collectives_of_one_order(
    ranks: Pool, road: str, world_size: int
) -> None:
    ranks.run(world_size, _train, road)


def _several_passes() -> None:
    """Rank r runs one to three passes in its own order: later ones are reduced in a round of their own, in step.

    A pass over all parameters launches all buckets, so what the reference adds up is known: the mean of the first
    passes plus the mean of the sums of the others.
    """
    twins = Twins(Scrambled)
    recorder = Recorder(twins.optimizer)
    world_size = dist.get_world_size()
    for step in range(5):
        recorder.calls.clear()
        num_passes = [1 + _choose(step, rank).randrange(3) for rank in range(world_size)]
        first = twins.mean_of(step, _permuted)
        late = mean_over_ranks([_sum_of_late_passes(twins, step, rank, num_passes[rank]) for rank in range(world_size)])
        for param, one, other in zip(twins.twin.parameters(), first, late, strict=True):
            assert one is not None
            param.grad = one if other is None else one + other
        for index in range(num_passes[dist.get_rank()]):
            _permuted(twins.model, step + 100 * index, dist.get_rank())
        twins.step_both(step)
        rounds = 1 if max(num_passes) == 1 else 2
        assert recorder.of("reduce_scatter") == list(range(len(recorder.numels))) * rounds
        recorder.assert_same_on_all_ranks()
    twins.compare_state()


def _sum_of_late_passes(twins: Twins, step: int, rank: int, num_passes: int) -> Gradients:
    twins.twin.zero_grad()
    for index in range(1, num_passes):
        _permuted(twins.twin, step + 100 * index, rank)
    late: Gradients = [param.grad for param in twins.twin.parameters()]
    twins.twin.zero_grad()
    return late


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_several_passes_in_any_order_give_the_documented_sum_of_two_rounds(ranks: Pool, world_size: int) -> None:
    ranks.run(world_size, _several_passes)


def _random_branches_in_several_passes() -> None:
    twins = Twins(_scrambled64)
    recorder = Recorder(twins.optimizer)

    def passes(model: nn.Module, step: int, rank: int) -> None:
        for index in range(_choose(step, rank).randrange(4)):
            _branches(model, step + 100 * index, rank)

    for step in range(8):
        recorder.calls.clear()
        twins.feed_twin(step, passes)
        passes(twins.model, step, dist.get_rank())
        in_backward = recorder.of("reduce_scatter")
        assert in_backward == list(range(len(in_backward)))
        twins.optimizer.step()
        twins.reference.step()
        first_round = recorder.of("reduce_scatter")[: len(recorder.numels)]
        assert first_round == list(range(len(recorder.numels)))
        again = recorder.of("reduce_scatter")[len(recorder.numels) :]
        assert again == sorted(set(again))
        recorder.assert_same_on_all_ranks()
        for (name, param), other in zip(twins.model.named_parameters(), twins.twin.parameters(), strict=True):
            # Which of the two rounds a gradient travels in depends on what else was ready: sums in another order, and
            # Adamax divides by their magnitude, so a few ulp of fp64 in the gradient are as many in the update.
            torch.testing.assert_close(param, other, rtol=1e-11, atol=1e-13, msg=f"{name} after step {step}")
        twins.optimizer.zero_grad()
        twins.reference.zero_grad()


@pytest.mark.parametrize("world_size", [2, 3])
def test_random_branches_in_random_numbers_of_passes_agree_to_rounding(ranks: Pool, world_size: int) -> None:
    ranks.run(world_size, _random_branches_in_several_passes)
