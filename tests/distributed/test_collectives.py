"""The collectives over gloo, by reading and by messages: bits of the sum, what is under way together, and memory."""

from __future__ import annotations

import time
import weakref
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from sharded_adamax.collectives import GlooGroup, control_plane, gloo
from tests.distributed.pool import Pool
from tests.distributed.problems import assert_same_bits
from tests.distributed.wire import bytes_between, tcp_bytes_received

MESSAGE_BYTES = 256
# Elements of a shard: less than a message, one, several, several and a bit. In the largest dtype a message has 32.
SHARD_NUMELS = [1, 32, 64, 100, 128, 193, 640]
DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.complex64]


def _group() -> GlooGroup:
    world = dist.group.WORLD
    assert world is not None
    group = GlooGroup(world)
    group.meet(control_plane(None))
    return group


def _bucket(rank: int, numel: int, dtype: torch.dtype) -> Tensor:
    # Of very different sizes, so that another order of the sum has other bits.
    generator = torch.Generator().manual_seed(1000 * rank + numel)
    scale = torch.pow(10.0, torch.randint(-3, 4, (numel,), generator=generator))
    return torch.randn(numel, dtype=dtype if dtype.is_complex else None, generator=generator).mul(scale).to(dtype)


def _sum_in_rank_order(numel: int, dtype: torch.dtype) -> Tensor:
    rank, size = dist.get_rank(), dist.get_world_size()
    total = _bucket(0, size * numel, dtype)
    for other in range(1, size):
        total = total + _bucket(other, size * numel, dtype)
    return total[rank * numel : (rank + 1) * numel]


def _compare_sums() -> None:
    group = _group()
    for dtype in DTYPES:
        for numel in SHARD_NUMELS:
            bucket = _bucket(group.rank, group.size * numel, dtype)
            before = bucket.clone()
            with patch.object(gloo, "MESSAGE_BYTES", MESSAGE_BYTES):
                total = group.reduce_scatter(bucket).wait("a test")
            assert_same_bits(total, _sum_in_rank_order(numel, dtype), f"the sum of {numel} {dtype}")
            assert_same_bits(bucket, before, "the bucket")


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_the_sum_has_the_bits_of_rank_0_plus_rank_1_and_so_on(ranks: Pool, world_size: int) -> None:
    ranks.run(world_size, _compare_sums)


def _many_at_once() -> None:
    group = _group()
    rank, size = group.rank, group.size
    numels = [640, 193, 64, 640]
    reducing, gathering, wholes = [], [], []
    with patch.object(gloo, "MESSAGE_BYTES", MESSAGE_BYTES):
        for numel in numels:
            reducing.append(group.reduce_scatter(_bucket(rank, size * numel, torch.float32)))
            whole = torch.full((size * numel,), -1.0)
            whole[rank * numel : (rank + 1) * numel] = _bucket(7, size * numel, torch.float32)[rank * numel :][:numel]
            wholes.append(whole)
            gathering.append(group.all_gather(whole))
        totals: dict[int, Tensor] = {}
        order = [2, 0, 3, 1] if rank % 2 else [3, 2, 1, 0]  # the order of the waits is each rank's own affair
        for index in order:
            gathering[index].wait("a test")
            totals[index] = reducing[index].wait("a test")
    for index, numel in enumerate(numels):
        assert_same_bits(totals[index], _sum_in_rank_order(numel, torch.float32), f"sum {index}")
        assert_same_bits(wholes[index], _bucket(7, size * numel, torch.float32), f"bucket {index}")


@pytest.mark.parametrize("world_size", [2, 3])
def test_collectives_under_way_together_keep_out_of_each_others_memory(ranks: Pool, world_size: int) -> None:
    ranks.run(world_size, _many_at_once)


def _hold() -> None:
    group = _group()
    bucket = torch.ones(group.size * 1000)
    shard_bytes = bucket.nbytes // group.size
    pending = group.reduce_scatter(bucket)
    # What arrives from the other ranks; the result takes the place of one of them.
    assert pending.held_bytes == bucket.nbytes + (group.size - 2) * shard_bytes
    total = pending.wait("a test")
    assert total.untyped_storage().nbytes() == shard_bytes, "nothing else lives on with the result"


@pytest.mark.parametrize("world_size", [2, 4])
def test_the_result_of_a_reduce_scatter_keeps_no_other_memory_alive(ranks: Pool, world_size: int) -> None:
    ranks.run(world_size, _hold)


class _Clinging(ThreadPoolExecutor):
    """Never lets go of what was submitted. Others do so soon, but perhaps after the result was taken."""

    def __init__(self) -> None:
        super().__init__(max_workers=1)
        self.submitted: list[object] = []

    def submit(self, *call: Any, **options: Any) -> Future[Any]:
        self.submitted.append((call, options))
        return super().submit(*call, **options)


def _let_go() -> None:
    group = _group()
    with patch.object(group, "_posting", _Clinging()):
        bucket = torch.ones(group.size * 1000)
        memory = weakref.ref(bucket.untyped_storage())
        pending = group.reduce_scatter(bucket)
        del bucket
        pending.wait("a test")
        assert memory() is None, "the bucket outlives the wait"


def test_the_thread_that_posts_holds_no_memory_after_the_wait(ranks: Pool) -> None:
    ranks.run(2, _let_go)


def _travel_unattended() -> None:
    group = _group()
    dist.barrier()
    before = tcp_bytes_received()
    bucket = torch.ones(group.size << 21)  # rows of 8 MiB: more than sockets hold
    row_bytes = bucket.nbytes // group.size
    pending = group.reduce_scatter(bucket)
    gives_up = time.monotonic() + 20
    while bytes_between(before, tcp_bytes_received()) < row_bytes * (group.size - 1):
        assert time.monotonic() < gives_up, "messages stand still until somebody waits"
        time.sleep(0.005)
    dist.barrier()  # nobody waits before everything has come everywhere
    assert_same_bits(pending.wait("a test"), torch.full((1 << 21,), float(group.size)), "the sum")


def test_messages_travel_while_nobody_waits(ranks: Pool) -> None:
    ranks.run(3, _travel_unattended)
