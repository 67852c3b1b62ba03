"""What the guard check found unguarded: roads that only one rank takes, and messages of more than one piece."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn

from sharded_adamax import ShardedAdamax
from sharded_adamax.collectives import GlooGroup, Group, ProcessGroup, data_plane
from tests.distributed.pool import Pool
from tests.distributed.problems import (
    assert_same_bits,
    assert_same_params,
    backward,
    feed_mean,
    gradient,
    local_gradients,
    make_params,
)


def _in_several_messages() -> None:
    rank = dist.get_rank()
    shapes: list[tuple[int, ...]] = [(1_500_001,), (7,)]  # a row is 2 to 3 MiB: three messages, the last one ragged
    params, expected = make_params(torch.float32, shapes, seed=rank), make_params(torch.float32, shapes)
    optimizer, reference = ShardedAdamax(params), torch.optim.Adamax(expected)
    for step in range(2):
        backward(params, local_gradients(step, params))
        feed_mean(expected, step)
        optimizer.step()
        reference.step()
        assert_same_params(params, expected, f"after step {step}")


@pytest.mark.parametrize("world_size", [2, 3])
def test_shards_larger_than_a_message_travel_whole(ranks: Pool, world_size: int) -> None:
    ranks.run(world_size, _in_several_messages)


def _both_roads() -> None:
    """ProcessGroup is what NCCL takes. gloo has the same collectives, so the road can be walked without a GPU."""
    rank, size = dist.get_rank(), dist.get_world_size()
    world = dist.group.WORLD
    assert world is not None
    results = []
    for group in (GlooGroup(world), ProcessGroup(world)):
        assert isinstance(group, Group)
        bucket = torch.arange(64.0 * size) * (rank + 1)
        pending = group.reduce_scatter(bucket)
        assert pending.held_bytes >= bucket.nbytes
        shard = pending.wait("a test")
        assert pending.held_bytes == 0 or isinstance(group, GlooGroup)
        whole = torch.full((64 * size,), -1.0)
        whole[rank * 64 : (rank + 1) * 64] = shard
        group.all_gather(whole).wait("a test")
        group.broadcast(first := torch.full((3,), float(rank)))
        gathered = group.gather(shard, to=size - 1)
        assert (gathered is None) == (rank != size - 1)
        if gathered is not None:
            assert_same_bits(gathered, whole, "what was gathered")
        results.append((whole, first, dict(group.traffic.calls), dict(group.traffic.sent_bytes)))
    assert_same_bits(results[0][0], torch.arange(64.0 * size) * sum(range(1, size + 1)), "the sum")
    assert_same_bits(results[1][0], results[0][0], "the sum of the native road")
    assert results[0][1].tolist() == results[1][1].tolist() == [0.0] * 3
    assert results[0][2:] == results[1][2:], "both roads hand over the same traffic"


@pytest.mark.parametrize("world_size", [2, 3])
def test_the_native_collectives_do_what_the_messages_do(ranks: Pool, world_size: int) -> None:
    ranks.run(world_size, _both_roads)


def _another_device() -> str:
    dist.barrier()  # nobody leaves the group while another is still joining it
    try:
        data_plane(None, torch.device("cuda"))
    except ValueError as error:
        return str(error)
    return ""


def test_a_group_that_cannot_carry_the_parameters_is_refused(ranks: Pool) -> None:
    for rank, message in enumerate(ranks.run(2, _another_device)):
        assert message.startswith(f"rank {rank}: the parameters are on cuda") and "init_distributed()" in message


def _world_of_one() -> tuple[str, int]:
    optimizer = ShardedAdamax([nn.Parameter(torch.ones(3))])
    engine = optimizer._engine
    assert engine is not None
    return type(engine.group).__name__, engine.group.size


def test_a_process_group_of_one_rank_is_a_world_of_one(ranks: Pool) -> None:
    assert ranks.run(1, _world_of_one) == [("LocalGroup", 1)]


def _thawed_on_one_rank() -> None:
    """Only the last rank's loss reaches the layer that was frozen: the others send zeros, and get state too."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    params, expected = make_params(torch.float32), make_params(torch.float32)
    for either in (params, expected):
        either[7].requires_grad_(False)
    optimizer, reference = ShardedAdamax(params, bucket_mib=0.01), torch.optim.Adamax(expected)
    for step in range(4):
        if step == 1:
            for either in (params, expected):
                either[7].requires_grad_(True)

        def present(step: int, of_rank: int, index: int) -> bool:
            return index != 7 or (step >= 1 and of_rank == world_size - 1)

        gradients = [gradient(step, rank, i, p) if present(step, rank, i) else None for i, p in enumerate(params)]
        backward(params, gradients)
        feed_mean(expected, step, present)
        optimizer.step()
        reference.step()
        optimizer.zero_grad()
        assert_same_params(params, expected, f"after step {step}")


@pytest.mark.parametrize("world_size", [2, 3])
def test_a_parameter_that_thaws_on_one_rank_thaws_on_all(ranks: Pool, world_size: int) -> None:
    ranks.run(world_size, _thawed_on_one_rank)


def _one_gradient_differs(which: int) -> None:
    params = make_params(torch.float32)
    optimizer = ShardedAdamax(params, reduce_gradients=False, bucket_mib=0.01)
    backward(params, [gradient(0, dist.get_rank() if i == which else 0, i, p) for i, p in enumerate(params)])
    optimizer.step()


@pytest.mark.parametrize("which", [0, 4, 8])
def test_the_gradient_that_differs_is_named(ranks: Pool, which: int) -> None:
    failures = ranks.run_expecting_failures(2, _one_gradient_differs, which, timeout_s=20)
    for failure in failures:
        assert failure.message.startswith(f"the gradient of parameter {which} of group 0 differs between ranks")


def _launched_unevenly_then_cleared() -> None:
    """The first buckets hold the last parameters: with those alone each rank has launched another number of buckets."""
    rank = dist.get_rank()
    params, expected = make_params(torch.float32), make_params(torch.float32)
    optimizer, reference = ShardedAdamax(params, bucket_mib=0.0001), torch.optim.Adamax(expected)
    assert len(optimizer.layout.buckets) > 5
    for step in range(3):
        first = len(params) - 1 - 3 * rank
        stale = [gradient(90 + step, rank, i, p) if i >= first else None for i, p in enumerate(params)]
        backward(params, stale)
        optimizer.zero_grad()  # not these
        backward(params, local_gradients(step, params))
        feed_mean(expected, step)
        optimizer.step()
        reference.step()
        assert_same_params(params, expected, f"after step {step}")


@pytest.mark.parametrize("world_size", [2, 3])
def test_zero_grad_after_ranks_launched_different_numbers_of_buckets(ranks: Pool, world_size: int) -> None:
    ranks.run(world_size, _launched_unevenly_then_cleared)


def _count_fingerprints() -> list[int]:
    params = make_params(torch.float32)
    optimizer = ShardedAdamax(params, reduce_gradients=False)
    engine = optimizer._engine
    assert engine is not None
    sent = []
    for step in range(9):
        before = engine.control.traffic.sent_bytes["maximum"]
        backward(params, [gradient(step, 0, i, p) for i, p in enumerate(params)])
        optimizer.step()
        sent.append(engine.control.traffic.sent_bytes["maximum"] - before)
    return sent


def test_reduced_gradients_are_compared_at_steps_1_2_4_and_8_only(ranks: Pool) -> None:
    for sent in ranks.run(2, _count_fingerprints):
        compared = [step for step, nbytes in enumerate(sent, start=1) if nbytes > min(sent)]
        assert compared == [1, 2, 4, 8]
