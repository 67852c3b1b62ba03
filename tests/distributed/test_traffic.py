"""The collectives of a step are counted, and so are the bytes: ours as handed over, and the kernel's as sent."""

from __future__ import annotations

import time

import pytest
import torch
import torch.distributed as dist

from sharded_adamax import ShardedAdamax
from sharded_adamax.engine import Engine
from tests.distributed.pool import Pool
from tests.distributed.problems import assert_same_params, backward, gradient, local_gradients, make_params
from tests.distributed.wire import bytes_between, tcp_bytes_sent

# About 4.4 MB in buckets of 0.5 MiB; padding is well below 1 %.
SHAPES: list[tuple[int, ...]] = [
    (257, 513),
    (40_001,),
    (700, 300),
    (3,),
    (90_000,),
    (500, 1001),
    (),
    (129,),
    (150_000,),
]


def _engine(optimizer: ShardedAdamax) -> Engine:
    assert optimizer._engine is not None
    return optimizer._engine


def _step(optimizer: ShardedAdamax, params: list[torch.nn.Parameter], step: int) -> None:
    backward(params, local_gradients(step, params))
    optimizer.step()
    optimizer.zero_grad()


def _count() -> None:
    world_size = dist.get_world_size()
    params = make_params(torch.float32, SHAPES)
    optimizer = ShardedAdamax(params, bucket_mib=0.5)
    engine = _engine(optimizer)
    num_buckets = len(optimizer.layout.buckets)
    assert num_buckets > 5
    param_bytes = sum(param.nbytes for param in params)
    for step in range(3):  # the first step, and the ones after it
        engine.group.traffic.calls.clear()
        engine.group.traffic.sent_bytes.clear()
        engine.control.traffic.calls.clear()
        _settle()
        before = tcp_bytes_sent()
        _step(optimizer, params, step)
        _settle()
        on_the_wire = bytes_between(before, tcp_bytes_sent())
        dist.barrier()  # a rank that is through closes its connections, and a closed one cannot be looked at
        assert engine.group.traffic.calls == {"reduce_scatter": num_buckets, "all_gather": num_buckets}
        assert engine.control.traffic.calls == {"maximum": 1}
        limit = 2 * (world_size - 1) / world_size * param_bytes
        handed_over = engine.group.traffic.sent_bytes.total()
        assert 0.99 * limit < handed_over <= 1.02 * limit, (handed_over / limit, "handed over")
        # Everything counts here: headers of the messages, the vote and the barriers of _settle.
        assert handed_over < on_the_wire <= 1.02 * limit, (on_the_wire / limit, "on the wire")


def _settle() -> None:
    """Let all ranks finish and the kernel acknowledge."""
    dist.barrier()
    time.sleep(0.1)


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_a_step_is_one_reduce_scatter_and_one_all_gather_per_bucket_and_one_vote(ranks: Pool, world_size: int) -> None:
    ranks.run(world_size, _count)


def _ready_in_any_order() -> list[str]:
    """Every rank makes its gradients ready in an order of its own."""
    rank = dist.get_rank()
    params, expected = make_params(torch.float32, SHAPES), make_params(torch.float32, SHAPES)
    optimizer, straight = ShardedAdamax(params, bucket_mib=0.5), ShardedAdamax(expected, bucket_mib=0.5)
    order: list[str] = []
    group = _engine(optimizer).group
    reduce_scatter = group.reduce_scatter

    def recording(bucket: torch.Tensor):  # type: ignore[no-untyped-def]
        order.append(f"{bucket.numel()}")
        return reduce_scatter(bucket)

    group.reduce_scatter = recording  # type: ignore[method-assign]
    for step in range(5):
        gradients = local_gradients(step, params)
        shuffled = torch.randperm(len(params), generator=torch.Generator().manual_seed(17 * step + rank)).tolist()
        for index in shuffled:  # one backward each: autograd delivers exactly in this order
            (params[index] * gradients[index]).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        backward(expected, gradients)
        straight.step()
        straight.zero_grad()
        assert_same_params(params, expected, f"after step {step}")
    return order


def test_the_order_of_collectives_does_not_depend_on_the_order_of_gradients(ranks: Pool) -> None:
    orders = ranks.run(3, _ready_in_any_order)
    assert orders[0] == orders[1] == orders[2]
    assert len(orders[0]) == 5 * len(set(orders[0]))


def _overlap() -> tuple[int, int]:
    params = make_params(torch.float32, SHAPES)
    optimizer = ShardedAdamax(params, bucket_mib=0.5)
    calls = _engine(optimizer).group.traffic.calls
    rank = dist.get_rank()
    launched_at: list[int] = []
    for param in params:
        param.register_post_accumulate_grad_hook(lambda _: launched_at.append(calls["reduce_scatter"]))
    total = None
    for i, p in enumerate(params):  # a chain: autograd walks it from the last parameter to the first
        term = (p * gradient(0, rank, i, p)).sum()
        total = term if total is None else total * 0.5 + term
    assert total is not None
    total.backward()
    launched_in_backward = calls["reduce_scatter"]
    optimizer.step()
    return launched_at[len(params) // 2], launched_in_backward


def test_buckets_are_launched_while_backward_runs(ranks: Pool) -> None:
    for in_the_middle, at_the_end in ranks.run(2, _overlap):
        assert 0 < in_the_middle < at_the_end
