"""On a GPU the host must not wait for the device in a step, except where the user asks for a value."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch

from sharded_adamax import metrics

NOTHING: dict[str, float] = {}
ONE_VALUE = {"value read": 1.0}

# What is done in a step -> what makes the host wait, per step.
CASES: dict[str, dict[str, float]] = {
    "plain": NOTHING,
    "plain loop": NOTHING,
    "weight decay, maximize": NOTHING,
    "bfloat16 with a master, float32 on the wire": NOTHING,
    "clipped": NOTHING,
    "unscaled by a GradScaler": NOTHING,
    "gradients that arrive reduced": NOTHING,
    # Asked for: the host decides about the step by a value.
    "skip_nonfinite": ONE_VALUE,
    "skip_grad_norm_above": ONE_VALUE,
    "clipped, error_if_nonfinite": ONE_VALUE,
    "lr as a tensor on the device, foreach": {"copy to the host": 1.0},  # torch reads it, too
    "lr as a tensor on the device, loop": {"copy to the host": 1.0},
    "metrics read": {"copy to the host": 1.0},
    # The count finds what it is there to find.
    "control: a value read": ONE_VALUE,
    "control: a copy to the host": {"copy to the host": 1.0},
}


def _waits(directory: Path) -> dict[str, dict[str, float]]:
    """Everything in one process, because pretending takes longer than the steps."""
    from tests.without_gpu.pretended_cuda import Job, pretend

    pretend(directory)
    f32, bf16 = torch.float32, torch.bfloat16
    found: dict[str, dict[str, float]] = {}
    found["plain"] = Job(f32).waits_per_step()
    found["plain loop"] = Job(f32, foreach=False).waits_per_step()
    found["weight decay, maximize"] = Job(f32, weight_decay=0.1, maximize=True).waits_per_step()
    job = Job(bf16, master_dtype=f32, reduce_dtype=f32)
    found["bfloat16 with a master, float32 on the wire"] = job.waits_per_step()
    job = Job(f32)
    found["clipped"] = job.waits_per_step(job.clip)
    job = Job(f32)
    found["unscaled by a GradScaler"] = job.waits_per_step(job.unscale)
    reduced = Job(f32, reduce_gradients=False)
    # Steps 1, 2, 4, 8, ... compare the gradients of the ranks, which waits: get past the first ones.
    for _ in range(9):
        reduced.engine.source.view()
    found["gradients that arrive reduced"] = reduced.waits_per_step()

    job = Job(f32, skip_nonfinite=True)
    found["skip_nonfinite"] = job.waits_per_step()
    job = Job(f32)
    job.engine.guards.set_norm_limit(1e9)
    found["skip_grad_norm_above"] = job.waits_per_step()
    job = Job(f32)
    found["clipped, error_if_nonfinite"] = job.waits_per_step(lambda: job.clip(error_if_nonfinite=True))
    for name, foreach in (("foreach", True), ("loop", False)):
        job = Job(f32, foreach=foreach)
        with job.fake:
            job.group["lr"] = torch.empty((), device="cuda")
        found[f"lr as a tensor on the device, {name}"] = job.waits_per_step()

    job = Job(f32)
    found["metrics read"] = job.waits_per_step(lambda: (job.clip(), metrics.of_rank(job.engine)))
    job = Job(f32)
    found["control: a value read"] = job.waits_per_step(lambda: job.inputs.sum().item())
    job = Job(f32)
    found["control: a copy to the host"] = job.waits_per_step(lambda: job.inputs.cpu())
    return found


def _in_process(directory: Path, connection: Any) -> None:
    connection.send(_waits(directory))


@pytest.fixture(scope="module")
def waits(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, float]]:
    ours, theirs = multiprocessing.Pipe()
    arguments = (tmp_path_factory.mktemp("guard"), theirs)
    process = multiprocessing.get_context("spawn").Process(target=_in_process, args=arguments)
    process.start()
    theirs.close()
    try:
        assert ours.poll(100), "no answer"
        result: dict[str, dict[str, float]] = ours.recv()
    finally:
        process.kill()
    return result


@pytest.mark.parametrize("case", CASES)
def test_the_host_waits_for_the_device_only_where_it_was_asked_to(
    waits: dict[str, dict[str, float]], case: str
) -> None:
    assert waits[case] == CASES[case]


def test_every_case_was_tried(waits: dict[str, dict[str, float]]) -> None:
    assert set(waits) == set(CASES)
