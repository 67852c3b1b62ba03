"""Seeing it run: the summary against what is counted, metrics against values by hand, who says what in the log."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from sharded_adamax import ShardedAdamax
from sharded_adamax.collectives import Traffic
from sharded_adamax.engine import Engine
from tests.distributed.pool import Pool
from tests.distributed.problems import backward, local_gradients, make_params, mean_gradients

SMALL_BUCKET_MIB = 0.001
DELAY_SECONDS = 0.1


def _engine(optimizer: ShardedAdamax) -> Engine:
    assert optimizer._engine is not None
    return optimizer._engine


def _step(optimizer: ShardedAdamax, params: list[nn.Parameter], step: int = 0) -> None:
    backward(params, local_gradients(step, params))
    optimizer.step()


def _compare_summary(dtype: torch.dtype, options: dict[str, Any]) -> None:
    params = make_params(dtype)
    optimizer = ShardedAdamax(params, bucket_mib=SMALL_BUCKET_MIB, **options)
    traffic = _engine(optimizer).group.traffic
    traffic.sent_bytes.clear()
    if options.get("reduce_gradients", True):
        _step(optimizer, params)
    else:
        for param, gradient in zip(params, mean_gradients(0, params, dist.get_world_size()), strict=True):
            param.grad = gradient
        optimizer.step()
    summary = optimizer.summary()
    assert len(summary.buckets) > 1
    assert traffic.sent_bytes["reduce_scatter"] == sum(row.reduce_scatter_bytes for row in summary.buckets)
    assert traffic.sent_bytes["all_gather"] == sum(row.all_gather_bytes for row in summary.buckets)
    assert traffic.sent_bytes.total() == summary.sent_bytes_per_step > 0
    held = optimizer.held_bytes()
    assert held.parameters == sum(row.param_bytes for row in summary.buckets)
    assert held.state == sum(row.state_bytes for row in summary.buckets)
    assert held.masters == sum(row.master_bytes for row in summary.buckets)
    assert held.parameters + held.state + held.masters == summary.bytes_per_rank
    assert summary.num_params == sum(param.numel() for param in params)
    rank = dist.get_rank()
    for row, bucket in zip(summary.buckets, _engine(optimizer).buckets, strict=True):
        assert row.owners[rank].numel == bucket.exp_avg.numel()
        for owned, param in zip(row.params, bucket.params, strict=True):
            assert owned.shape == param.shape
            part = optimizer.state[param]["exp_avg"].owned
            assert owned.owners.get(rank, part) == part
            assert (rank in owned.owners) == (part.numel > 0)


def _compare_summaries() -> None:
    _compare_summary(torch.float32, {})
    _compare_summary(torch.bfloat16, {"master_dtype": torch.float32, "reduce_dtype": torch.float32})
    _compare_summary(torch.complex64, {})
    _compare_summary(torch.float32, {"reduce_gradients": False})


@pytest.mark.parametrize("world_size", [2, 3])
def test_the_summary_is_what_is_held_and_sent_to_the_byte(ranks: Pool, world_size: int) -> None:
    ranks.run(world_size, _compare_summaries)


class Writer:
    """Takes what TensorBoard and W&B take."""

    def __init__(self) -> None:
        self.logged: list[dict[str, float]] = []

    def add_scalars(self, main_tag: str, tag_scalar_dict: dict[str, float], global_step: int) -> None:
        for tag, value in tag_scalar_dict.items():
            assert tag.isidentifier()
            assert type(value) is float
        self.logged.append(tag_scalar_dict)


def _metrics() -> list[dict[str, float]]:
    """Steps without a norm, clipped, and skipped, on parameters real and complex; returns the shared metrics."""
    writer, shared = Writer(), []
    world_size = dist.get_world_size()
    params = [*make_params(torch.float32), nn.Parameter(torch.randn(9, dtype=torch.complex64))]
    optimizer = ShardedAdamax(params, bucket_mib=SMALL_BUCKET_MIB, skip_nonfinite=True)
    for step in range(4):
        gradients = local_gradients(step, params)
        if step == 3 and dist.get_rank() == 0:
            gradients[4] = torch.full_like(params[4], math.inf)
        backward(params, gradients)
        if step % 2:
            optimizer.clip_grad_norm_(0.1)
        optimizer.step()
        writer.add_scalars("optimizer", optimizer.metrics(), step)
        assert optimizer.metrics() == writer.logged[-1], "reading twice gives the same"
        shared.append(optimizer.metrics_of_all_ranks())
        state = optimizer.full_state_dict()
        if state is not None:
            whole = [_real(of_param["exp_inf"]) for of_param in state["state"].values()]
            assert shared[-1]["exp_inf_max"] == max(exp_inf.max().item() for exp_inf in whole if exp_inf.numel()) > 0
        if step == 1:
            mean = [g for g in mean_gradients(step, params, world_size) if g is not None]
            by_hand = math.sqrt(sum(g.abs().double().square().sum().item() for g in mean))
            # The norm is rounded to float32 for each parameter and once more.
            assert writer.logged[1]["grad_norm"] == pytest.approx(by_hand, rel=1e-6)
    assert [metrics["skipped_steps"] for metrics in writer.logged] == [0, 0, 0, 1]
    assert ["grad_norm" in metrics for metrics in writer.logged] == [False, True, False, True]
    assert writer.logged[3]["grad_norm"] == math.inf
    own = [_real(bucket.exp_inf).max().item() for bucket in _engine(optimizer).buckets]
    assert writer.logged[3]["shard_exp_inf_max"] == max(own)
    assert shared[3]["exp_inf_max"] == shared[2]["exp_inf_max"], "a step that was skipped changes nothing"
    # NaN is not lost, whichever rank has it.
    if dist.get_rank() == world_size - 1:
        _engine(optimizer).buckets[0].exp_inf[0] = math.nan
    assert math.isnan(optimizer.metrics_of_all_ranks()["exp_inf_max"])
    return shared


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def test_metrics_are_those_that_one_gets_by_hand_and_the_shared_ones_are_the_same_on_all_ranks(ranks: Pool) -> None:
    shared = ranks.run(3, _metrics)
    assert shared[0] == shared[1] == shared[2]
    assert shared[0][1].keys() == {
        *("skipped_steps", "grad_norm", "exp_inf_max", "host_wait_seconds_min", "host_wait_seconds_max")
    }


def _while_the_other_waits(flag: Path, call: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``call``, put off until the other rank waits for it, and then some more."""

    def late(*args: Any) -> Any:
        while not flag.exists():
            time.sleep(0.001)
        time.sleep(DELAY_SECONDS)
        return call(*args)

    return late


def _say_when_waiting(flag: Path, kind: str, traffic: Traffic) -> None:
    waiting = traffic.waiting

    @contextmanager
    def told(waited_for: str, what: str) -> Iterator[None]:
        with waiting(waited_for, what):
            if waited_for == kind:
                flag.touch()
            yield

    traffic.waiting = told  # type: ignore[method-assign]


def _slow_rank(kind: str, directory: str) -> tuple[dict[str, float], dict[str, float]]:
    """Rank 1 is late with a collective of ``kind``: it begins it only when rank 0 has begun to wait for it."""
    flag = Path(directory) / kind
    params = make_params(torch.float32, [(64,)] * 6)
    optimizer = ShardedAdamax(params, bucket_mib=0.0001)  # more buckets than may be in flight: backward waits
    engine = _engine(optimizer)
    assert len(engine.buckets) == 6
    where, name = (engine.control, "maximum") if kind == "vote" else (engine.group, kind)
    if dist.get_rank() == 0:
        _say_when_waiting(flag, kind, where.traffic)
    else:
        setattr(where, name, _while_the_other_waits(flag, getattr(where, name)))
    backward(params, local_gradients(0, params))
    if kind == "all_reduce":
        optimizer.clip_grad_norm_(1.0)
    optimizer.step()
    return optimizer.metrics(), optimizer.metrics_of_all_ranks()


@pytest.mark.parametrize("kind", ["reduce_scatter", "vote", "all_reduce", "all_gather"])
def test_time_spent_waiting_for_a_slow_rank_is_counted_where_it_was_spent(
    ranks: Pool, tmp_path: Path, kind: str
) -> None:
    (waited, shared), (of_slow_rank, _) = ranks.run(2, _slow_rank, kind, str(tmp_path))
    # Not a matter of luck: the clock of rank 0 runs before rank 1 begins to sleep.
    assert waited[f"host_wait_{kind}_seconds"] >= DELAY_SECONDS
    kinds = [value for name, value in waited.items() if name.startswith("host_wait_") and name != "host_wait_seconds"]
    assert len(kinds) == 4
    assert waited["host_wait_seconds"] == sum(kinds)
    assert shared["host_wait_seconds_max"] == max(waited["host_wait_seconds"], of_slow_rank["host_wait_seconds"])
    assert shared["host_wait_seconds_min"] == min(waited["host_wait_seconds"], of_slow_rank["host_wait_seconds"])


class Records(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[tuple[str, int, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append((record.name, record.levelno, record.getMessage()))


def _log() -> list[tuple[str, int, str]]:
    package, records = logging.getLogger("sharded_adamax"), Records()
    assert package.handlers == [], "handlers are the program's"
    package.addHandler(records)
    package.setLevel(logging.DEBUG)
    try:
        param = nn.Parameter(torch.ones(200))
        optimizer = ShardedAdamax([param], skip_nonfinite=True)
        optimizer.skip_grad_norm_above = 1.0
        (param * math.inf).sum().backward()
        optimizer.step()
        (param * 2).sum().backward()
        optimizer.step()
    finally:
        package.removeHandler(records)
        package.setLevel(logging.NOTSET)
    assert optimizer.skipped_steps == 2
    # The collectives speak of one rank, each for itself.
    return [said for said in records.said if not said[0].startswith("sharded_adamax.collectives")]


def test_the_first_rank_speaks_for_all_and_the_others_only_at_debug(ranks: Pool) -> None:
    for rank, said in enumerate(ranks.run(2, _log)):
        info, warning = (logging.INFO, logging.WARNING) if rank == 0 else (logging.DEBUG, logging.DEBUG)
        built = (
            f"rank {rank}: 200 parameters in 1 tensor, 1 bucket, 2 ranks; each rank holds 2.0 KiB between steps and "
            "sends 1.0 KiB per step"
        )
        assert said == [
            ("sharded_adamax.optimizer", info, built),
            ("sharded_adamax.engine", warning, f"rank {rank}: step 1 is skipped: the mean gradient has Inf or NaN"),
            (
                "sharded_adamax.engine",
                warning,
                f"rank {rank}: step 2 is skipped: the norm of the mean gradient is above 1.0, or NaN",
            ),
        ]
