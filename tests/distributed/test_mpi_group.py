"""The process group over MPI, by itself: every collective, dtype and size; order, errors, and ranks that leave."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from functools import reduce
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DeviceMesh, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from sharded_adamax import ShardedAdamax
from sharded_adamax.collectives import ProcessGroup, data_plane
from sharded_adamax.pending import LostRankError
from tests.distributed.mpi_pool import MpiPool
from tests.distributed.pool import Pool
from tests.distributed.problems import assert_same_bits, backward, local_gradients, make_params

FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
WHOLE = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8]
DTYPES = [*FLOATS, *WHOLE, torch.bool, torch.complex64]
SHAPES: list[tuple[int, ...]] = [
    (),
    (0,),
    (3,),
    (5, 7),
    (70_001,),
]  # the last one is large, and no multiple of the ranks


def _value(rank: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The value of a rank, computed wherever it is asked for; sums of floats depend on their order."""
    generator = torch.Generator().manual_seed(rank)
    if dtype in WHOLE or dtype == torch.bool:
        return torch.randint(0, 2 if dtype == torch.bool else 9, shape, generator=generator).to(dtype)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def _in_rank_order(shape: tuple[int, ...], dtype: torch.dtype, combine: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    return reduce(combine, [_value(rank, shape, dtype) for rank in range(dist.get_world_size())])


def _combinations() -> None:
    size, world = dist.get_world_size(), dist.group.WORLD
    assert world is not None
    operations: list[tuple[Any, Callable[[Tensor, Tensor], Tensor], list[torch.dtype]]] = [
        (dist.ReduceOp.SUM, torch.add, DTYPES),
        (dist.ReduceOp.PRODUCT, torch.mul, [*FLOATS, *WHOLE, torch.bool]),
        (dist.ReduceOp.MIN, torch.minimum, [*FLOATS, *WHOLE, torch.bool]),
        (dist.ReduceOp.MAX, torch.maximum, [*FLOATS, *WHOLE, torch.bool]),
        (dist.ReduceOp.BAND, torch.bitwise_and, [*WHOLE, torch.bool]),
        (dist.ReduceOp.BOR, torch.bitwise_or, [*WHOLE, torch.bool]),
        (dist.ReduceOp.BXOR, torch.bitwise_xor, [*WHOLE, torch.bool]),
    ]
    for operation, combine, dtypes in operations:
        for dtype in dtypes:
            for shape in SHAPES:
                expected = _in_rank_order(shape, dtype, combine)
                what = f"{operation} of {dtype} {shape}"
                everywhere = _value(dist.get_rank(), shape, dtype)
                dist.all_reduce(everywhere, operation)
                assert_same_bits(torch.view_as_real(everywhere) if dtype.is_complex else everywhere,
                                 torch.view_as_real(expected) if dtype.is_complex else expected, what)  # fmt: skip
    average = _value(dist.get_rank(), (70_001,), torch.float32)
    dist.all_reduce(average, dist.ReduceOp.AVG)
    assert_same_bits(average, _in_rank_order((70_001,), torch.float32, torch.add) / size, "the average")
    root_only = _value(dist.get_rank(), (70_001,), torch.bfloat16)
    dist.reduce(root_only, size - 1)
    mine = dist.get_rank() == size - 1
    expected = (
        _in_rank_order((70_001,), torch.bfloat16, torch.add)
        if mine
        else _value(dist.get_rank(), (70_001,), torch.bfloat16)
    )
    assert_same_bits(root_only, expected, "reduce")


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_every_reduction_of_every_dtype_is_torchs_own_in_the_order_of_the_ranks(
    mpi_ranks: Pool, world_size: int
) -> None:
    mpi_ranks.run(world_size, _combinations)


def _movements() -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    for dtype in (torch.bfloat16, torch.bool, torch.float8_e4m3fn, torch.complex64):
        for numel in (0, 1, 70_001):
            values = [_value(peer, (numel,), torch.float32).to(dtype).view(torch.uint8) for peer in range(size)]
            typed = [value.view(dtype) for value in values]
            one = typed[rank].clone()
            dist.broadcast(one, size - 1)
            assert torch.equal(one.view(torch.uint8), values[-1])
            outputs = [torch.empty(numel, dtype=dtype) for _ in range(size)]
            dist.all_gather(outputs, typed[rank])
            assert all(torch.equal(o.view(torch.uint8), v) for o, v in zip(outputs, values, strict=True))
            outputs = [torch.empty(numel, dtype=dtype) for _ in range(size)]
            dist.gather(typed[rank], outputs if rank == 1 else None, dst=1)
            assert rank != 1 or all(torch.equal(o.view(torch.uint8), v) for o, v in zip(outputs, values, strict=True))
            one = torch.empty(numel, dtype=dtype)
            dist.scatter(one, typed if rank == 0 else None, src=0)
            assert torch.equal(one.view(torch.uint8), values[rank])
            dist.all_to_all(outputs, [typed[rank]] * size)
            assert all(torch.equal(o.view(torch.uint8), v) for o, v in zip(outputs, values, strict=True))
    uneven = torch.empty(sum(range(1, size + 1)) * (rank + 1), dtype=torch.int64)  # rank q sends (q + 1) * (r + 1) to r
    sizes = [(peer + 1) * (rank + 1) for peer in range(size)]
    dist.all_to_all_single(uneven, torch.full((sum(sizes),), rank), sizes, sizes)
    assert uneven.tolist() == [peer for peer in range(size) for _ in range((peer + 1) * (rank + 1))]
    objects: list[Any] = [None] * size
    dist.all_gather_object(objects, {"rank": rank, "text": "x" * 1000 * rank})
    assert [one["rank"] for one in objects] == list(range(size))


@pytest.mark.parametrize("world_size", [2, 3])
def test_every_dtype_travels_as_it_is(mpi_ranks: Pool, world_size: int) -> None:
    mpi_ranks.run(world_size, _movements)


def _pieces() -> None:
    """The limits of 1 GiB and of a piece, brought down to sizes that a test can send."""
    from sharded_adamax.mpi import transport

    rank, size = dist.get_rank(), dist.get_world_size()
    limits = ("MAX_MESSAGE_BYTES", "MIN_PIECE_BYTES", "MAX_PIECE_BYTES", "SMALL_BYTES")
    before = {name: getattr(transport, name) for name in limits}
    try:
        for limit in (1, 7, 4096):
            transport.MAX_MESSAGE_BYTES = limit
            transport.MIN_PIECE_BYTES = transport.MAX_PIECE_BYTES = 24  # 6 elements: the last piece is ragged
            transport.SMALL_BYTES = 16
            numel = 1000
            rows = [_value(peer, (size * numel,), torch.float32) for peer in range(size)]
            shard = torch.empty(numel)
            dist.reduce_scatter_single(shard, rows[rank])
            expected = reduce(torch.add, [row[rank * numel : (rank + 1) * numel] for row in rows])
            assert_same_bits(shard, expected, f"reduce-scatter in pieces, limit {limit}")
            whole = torch.empty(size * numel)
            dist.all_gather_single(whole, _value(rank, (numel,), torch.float32))
            assert_same_bits(
                whole, torch.cat([_value(peer, (numel,), torch.float32) for peer in range(size)]), "all-gather"
            )
            dist.broadcast(one := _value(rank, (numel,), torch.float32), 0)
            assert_same_bits(one, _value(0, (numel,), torch.float32), "broadcast")
            dist.all_reduce(everywhere := rows[rank].clone())
            assert_same_bits(everywhere, reduce(torch.add, rows), "all-reduce")
            received = torch.empty(numel)
            works = [dist.isend(_value(rank, (numel,), torch.float32), (rank + 1) % size)]
            works.append(dist.irecv(received, (rank - 1) % size))
            for work in works:
                assert work is not None
                work.wait()
            assert_same_bits(received, _value((rank - 1) % size, (numel,), torch.float32), "a message")
    finally:
        for name, value in before.items():
            setattr(transport, name, value)


@pytest.mark.parametrize("world_size", [2, 3])
def test_what_is_too_large_for_one_message_travels_in_pieces(mpi_ranks: Pool, world_size: int) -> None:
    mpi_ranks.run(world_size, _pieces)


def _in_order() -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    whole, total = torch.zeros(size * 50_000), torch.empty(50_000)
    works = []
    for step in range(20):  # each needs the result of the one before; nothing waits in between
        works.append(dist.reduce_scatter_single(total, whole, async_op=True))
        works.append(dist.all_gather_single(whole, total, async_op=True))
        works.append(dist.broadcast(whole, step % size, async_op=True))
        one = torch.ones(1)
        works.append(dist.all_reduce(one, async_op=True))
    if rank == 0:
        time.sleep(0.3)
        assert works[-1] is not None
    for work in works:
        assert work is not None
        work.wait()
        assert work.is_completed()
    assert whole.abs().max() == 0 and one.item() == size
    bucket = torch.full((size * 50_000,), float(rank + 1))
    shard = bucket[rank * 50_000 : (rank + 1) * 50_000]
    dist.reduce_scatter_single(shard, bucket)  # in place: the result is a part of what is summed
    assert_same_bits(shard, torch.full((50_000,), size * (size + 1) / 2), "in place")


def test_collectives_run_in_the_order_in_which_they_were_called(mpi_ranks: Pool) -> None:
    mpi_ranks.run(3, _in_order)


def _send_first() -> list[int]:
    rank, size = dist.get_rank(), dist.get_world_size()
    large = torch.full((1 << 20,), float(rank))
    arrived = torch.empty(1 << 20)
    works = [dist.isend(large, (rank + 1) % size, tag=5), dist.irecv(arrived, (rank - 1) % size, tag=5)]
    for work in reversed(works):
        assert work is not None
        work.wait()
    assert arrived[-1].item() == (rank - 1) % size
    if rank > 0:
        dist.send(torch.tensor([rank]), 0)
        return []
    sources = []
    for _ in range(size - 1):
        source = dist.recv(message := torch.empty(1, dtype=torch.int64))
        assert message.item() == source
        sources.append(source)
    return sources


def test_ranks_that_all_send_first_do_not_wait_for_each_other(mpi_ranks: Pool) -> None:
    assert sorted(mpi_ranks.run(3, _send_first)[0]) == [1, 2]


def _groups() -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    pairs = [dist.new_group([first, first + 1]) for first in range(size - 1)]
    for first, group in enumerate(pairs):
        if rank in (first, first + 1):
            assert isinstance(group, dist.ProcessGroup)
            dist.all_reduce(one := torch.tensor([10.0**rank]), group=group)
            assert one.item() == 10.0**first + 10.0 ** (first + 1)
    backwards = dist.new_group([2, 0])  # torch sorts them
    if rank != 1:
        gathered: list[Any] = [None, None]
        dist.all_gather_object(gathered, rank, group=backwards)
        assert gathered == [0, 2]
    mesh = DeviceMesh("cpu", torch.arange(size))
    whole = torch.arange(12.0)
    assert torch.equal(distribute_tensor(whole, mesh, [Shard(0)]).full_tensor(), whole)  # type: ignore[no-untyped-call]


def test_groups_of_some_ranks_and_device_meshes(mpi_ranks: Pool) -> None:
    mpi_ranks.run(3, _groups)


def _same_as_ddp(reduce_gradients: bool) -> None:
    """Over MPI DDP sums in the order of the ranks too, and both divide by a power of two: not a bit differs."""
    rank = dist.get_rank()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 8))
    expected = DistributedDataParallel(
        nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 8)), bucket_cap_mb=0.01
    )
    expected.module.load_state_dict(model.state_dict())
    sharded = model if reduce_gradients else DistributedDataParallel(model, bucket_cap_mb=0.02)
    optimizer = ShardedAdamax(sharded.parameters(), reduce_gradients=reduce_gradients, bucket_mib=0.01)
    reference = torch.optim.Adamax(expected.parameters())
    generator = torch.Generator().manual_seed(rank)
    for step in range(5):
        inputs = torch.randn(16, 64, generator=generator)
        for net, either in ((sharded, optimizer), (expected, reference)):
            net(inputs).pow(2).mean().backward()
            either.step()
            either.zero_grad()
        for index, (param, other) in enumerate(zip(sharded.parameters(), expected.parameters(), strict=True)):
            assert_same_bits(param, other, f"parameter {index} after step {step}")


@pytest.mark.parametrize("reduce_gradients", [True, False])
def test_ddp_runs_over_it_and_ends_at_the_same_bits(mpi_ranks: Pool, reduce_gradients: bool) -> None:
    mpi_ranks.run(4, _same_as_ddp, reduce_gradients)


def _reduced_twice(bucket_mib: float) -> list[Tensor]:
    params = make_params(torch.float32)
    optimizer = ShardedAdamax(params, bucket_mib=bucket_mib)
    for step in range(4):
        backward(params, local_gradients(step, params))
        optimizer.step()
        optimizer.zero_grad()
    return [param.detach().clone() for param in params]


def _kind() -> str:
    group = data_plane(None, torch.device("cpu"))
    assert type(group) is ProcessGroup
    return dist.get_backend()


def test_the_bits_are_those_of_gloo_and_of_any_packing_into_buckets(mpi_ranks: Pool) -> None:
    assert mpi_ranks.run(3, _kind) == ["mpi4py"] * 3
    over_mpi = [mpi_ranks.run(3, _reduced_twice, bucket_mib)[0] for bucket_mib in (0.001, 25)]
    gloo = Pool()
    try:
        over_gloo = gloo.run(3, _reduced_twice, 0.01)[0]
    finally:
        gloo.close()
    for index, expected in enumerate(over_gloo):
        for params in over_mpi:
            assert_same_bits(params[index], expected, f"parameter {index}")


# --- What goes wrong


def _refused() -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    world, five, three = dist.group.WORLD, torch.ones(5), torch.ones(3)
    assert world is not None
    refusals: list[tuple[type[Exception], str, Callable[[], object]]] = [
        (ValueError, "expected a contiguous CPU tensor", lambda: dist.all_reduce(torch.ones(4, 4).t())),
        (ValueError, "all_gather expected 2 x 3 elements", lambda: dist.all_gather_single(five, three)),
        (ValueError, "reduce_scatter expected 2 x 3 elements", lambda: dist.reduce_scatter_single(three, five)),
        (ValueError, "expected a tag in", lambda: dist.isend(five, (rank + 1) % size, tag=1 << 40)),
        (RuntimeError, "all_reduce failed: ", lambda: dist.all_reduce(three, dist.ReduceOp.BOR)),
        (RuntimeError, "No backend type associated", lambda: world._get_backend(torch.device("cuda"))),
    ]
    for kind, text, action in refusals:
        with pytest.raises(kind, match=text):
            action()
    dist.all_reduce(one := torch.ones(1))  # and goes on
    assert one.item() == size


def test_what_cannot_be_done_is_an_error_where_it_is_waited_for_and_the_group_goes_on(mpi_ranks: Pool) -> None:
    mpi_ranks.run(2, _refused)


def _too_long() -> None:
    if dist.get_rank() == 0:
        dist.broadcast(torch.ones(100), 0)
    else:
        dist.broadcast(torch.ones(10), 0)


def test_an_error_of_mpi_names_the_rank_and_the_collective(mpi_ranks: Pool) -> None:
    failures = mpi_ranks.run_expecting_failures(2, _too_long, timeout_s=20)
    assert failures[1].type_name == "RuntimeError"
    assert "rank 1 of 2: broadcast failed" in failures[1].message and "truncate" in failures[1].message.lower()


def _alone() -> float:
    dist.all_reduce(torch.ones(3))
    if dist.get_rank() == 1:
        return 0.0
    began = time.monotonic()
    with pytest.raises(RuntimeError, match="rank 1 of the group has left"):
        dist.all_reduce(torch.ones(3))
    return time.monotonic() - began


def _echoes() -> None:
    """An optimizer that waits in vain lets the rank that failed first speak, as a bare collective does."""
    from sharded_adamax.mpi import meeting

    optimizer = ShardedAdamax(make_params(torch.float32))
    dist.all_reduce(torch.ones(3))
    if dist.get_rank() == 1:
        return
    with pytest.raises(LostRankError) as lost:
        optimizer.step()
    waited: list[float] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(meeting.time, "sleep", waited.append)
        meeting._wait_if_echo(lost.value)
        meeting._wait_if_echo(ValueError("the real reason"))
    assert waited == [meeting.ECHO_SECONDS]


def test_a_wait_in_vain_is_an_echo_of_what_the_lost_rank_has_to_say() -> None:
    pool = MpiPool(num_ranks=2)  # its threads wait, and turn, for ever
    try:
        pool.run(2, _echoes)
    finally:
        pool.close()


def _late() -> None:
    store = dist.distributed_c10d._get_default_store()
    work = dist.barrier(async_op=True)
    assert work is not None
    if dist.get_rank() == 1:
        with pytest.raises(
            RuntimeError, match=r"rank 1 of 2: all_reduce did not finish within 0.2 s: expected every rank"
        ):
            dist.all_reduce(torch.ones(3), async_op=True).wait(timedelta(seconds=0.2))  # type: ignore[union-attr]
        store.set("it was waited in vain", "")
    else:
        store.wait(["it was waited in vain"])
        dist.all_reduce(torch.ones(3))
    work.wait()


def test_a_wait_ends_when_its_time_is_over(mpi_ranks: Pool) -> None:
    mpi_ranks.run(2, _late)


def test_a_rank_that_leaves_is_noticed_by_those_that_wait_for_it() -> None:
    pool = MpiPool(num_ranks=3)  # its threads wait, and turn, for ever
    try:
        seconds = pool.run(3, _alone)
    finally:
        pool.close()
    assert seconds[1] == 0 and all(0 < seconds[rank] < 10 for rank in (0, 2))
