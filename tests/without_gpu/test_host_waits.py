"""What a step asks of a GPU: the host waits for it only where the user asks for a value, and launches are few."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from torch import Tensor

from sharded_adamax import metrics
from sharded_adamax.kernels import cuda
from tests.without_gpu.process import answer_of

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
    "capturable": NOTHING,
    "capturable, plain loop": NOTHING,
    "capturable, weight decay, maximize": NOTHING,
    "capturable, lr as a tensor on the device, foreach": NOTHING,
    "capturable, lr as a tensor on the device, loop": NOTHING,
    "capturable, a parameter without a gradient": NOTHING,
    "capturable, bfloat16 with a master, clipped": NOTHING,
    "capturable, gradients that arrive reduced": NOTHING,
    "metrics read": {"copy to the host": 1.0},
    # The count finds what it is there to find.
    "control: a value read": ONE_VALUE,
    "control: a copy to the host": {"copy to the host": 1.0},
    "control: a list of numbers for the device": {"copy to the device": 1.0},
}

UPDATE = ["_foreach_lerp_", "_foreach_mul_", "_foreach_abs_", "_foreach_add_", "_foreach_maximum_", "_foreach_addcdiv_"]
DECAY = ["_foreach_add_"]
FUSED = "_foreach_sinh_"  # which nothing else uses: it stands for a launch of the Triton kernel, on all its operands
REFRESH = ["_to_copy", "ne", "where", "copy_"]  # the master takes over what was written to the parameters
CORRECTION = ["_foreach_pow", "_foreach_sub_", "_foreach_div_"]


def _each(names: list[str], num_tensors: int) -> list[tuple[str, int]]:
    return [(name, num_tensors) for name in names]


# Four parameters in one bucket -> what the update of a step launches, and on how many tensors at once.
LAUNCHES: dict[str, list[tuple[str, int]]] = {
    "foreach": _each(UPDATE, 1),
    "foreach, weight decay": _each(DECAY + UPDATE, 1),
    "two groups": _each(UPDATE, 1) * 2,
    "one without a gradient": _each(UPDATE, 2),  # it lies between the others
    "one at another step": _each(UPDATE, 3),
    "bfloat16": _each(UPDATE, 4),  # where a cut would change bits, parameters stay apart
    "foreach, clipped": _each(["_foreach_mul_", *UPDATE], 1),
    "foreach, bfloat16 with a master": _each([*REFRESH, *UPDATE, "_foreach_copy_"], 1),
    "fused": [(FUSED, 4)],
    "fused, one without a gradient": [(FUSED, 4)] * 2,
    "fused, clipped": [(FUSED, 5)],  # the clip factor
    "fused, bfloat16 with a master": [*_each(REFRESH, 1), (FUSED, 5)],  # the parameters
    "capturable": [
        ("add_", 1), *_each(UPDATE[:-1] + CORRECTION, 4), *_each(["mul"], 1) * 4, *_each(UPDATE[-1:], 4)
    ],
    "capturable, fused": [("add_", 1), *_each(CORRECTION, 4), *[(FUSED, 4)] * 4],
    "capturable, one without a gradient": [
        ("_foreach_add_", 3), *_each(UPDATE[:-1] + CORRECTION, 3), *_each(["mul"], 1) * 3, *_each(UPDATE[-1:], 3)
    ],
}  # fmt: skip


class Observed(NamedTuple):
    waits: dict[str, dict[str, float]]
    launches: dict[str, list[tuple[str, int]]]


def _observe() -> Observed:
    """Everything in one process, because pretending takes longer than the steps."""
    return Observed({**_waits(), **dict(_waits_of_capturable())}, dict(_launches()))


def _waits() -> dict[str, dict[str, float]]:
    from tests.without_gpu.pretended_cuda import Job

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
    job = Job(f32)

    def send_numbers() -> None:
        with job.fake:
            torch.tensor([1.0, 2.0], device="cuda")

    found["control: a list of numbers for the device"] = job.waits_per_step(send_numbers)
    return found


def _waits_of_capturable() -> Iterator[tuple[str, dict[str, float]]]:
    from tests.without_gpu.pretended_cuda import Job

    f32, bf16 = torch.float32, torch.bfloat16
    yield "capturable", Job(f32, capturable=True).waits_per_step()
    yield "capturable, plain loop", Job(f32, capturable=True, foreach=False).waits_per_step()
    job = Job(f32, capturable=True, weight_decay=0.1, maximize=True)
    yield "capturable, weight decay, maximize", job.waits_per_step()
    for name, foreach in (("foreach", True), ("loop", False)):
        job = Job(f32, capturable=True, foreach=foreach)
        with job.fake:
            job.group["lr"] = torch.empty((), device="cuda")
        yield f"capturable, lr as a tensor on the device, {name}", job.waits_per_step()
    job = Job(f32, capturable=True, bucket_bytes=4400)  # 2.weight and 2.bias share a bucket
    job.without_gradient = {"2.bias"}
    yield "capturable, a parameter without a gradient", job.waits_per_step()
    job = Job(bf16, capturable=True, master_dtype=f32, reduce_dtype=f32)
    yield "capturable, bfloat16 with a master, clipped", job.waits_per_step(job.clip)
    job = Job(f32, capturable=True, reduce_gradients=False)
    for _ in range(9):
        job.engine.source.view()
    yield "capturable, gradients that arrive reduced", job.waits_per_step()


def _launches() -> Iterator[tuple[str, list[tuple[str, int]]]]:
    """For each case what the second step launches."""
    from tests.without_gpu.pretended_cuda import Job

    def second_step(
        dtype: torch.dtype = torch.float32, without: Sequence[str] = (), clips: bool = False, **settings: Any
    ) -> list[tuple[str, int]]:
        job = Job(dtype, bucket_bytes=1 << 20, **settings)
        assert len(job.engine.buckets) == 1
        job.launches_of_step()
        job.without_gradient = set(without)
        return job.launches_of_step(job.clip if clips else lambda: None)

    yield "foreach", second_step()
    yield "foreach, weight decay", second_step(weight_decay=0.1)
    yield "two groups", second_step(num_groups=2)
    yield "one without a gradient", second_step(without=["2.weight"])
    job = Job(torch.float32, bucket_bytes=1 << 20)
    job.without_gradient = {"2.weight"}
    job.launches_of_step()
    job.without_gradient = set()
    yield "one at another step", job.launches_of_step()
    yield "bfloat16", second_step(torch.bfloat16)
    yield "capturable", second_step(capturable=True)
    yield "capturable, one without a gradient", second_step(capturable=True, without=["2.weight"])

    def launch_(*operands: Tensor, rounded: Tensor | None, grad_scale: Tensor | None, **kwargs: Any) -> None:
        torch._foreach_sinh_([each for each in (*operands, rounded, grad_scale) if each is not None])

    yield "foreach, clipped", second_step(clips=True)
    yield "foreach, bfloat16 with a master", second_step(torch.bfloat16, master_dtype=torch.float32)
    with mock.patch.object(cuda, "launch_", launch_):
        yield "fused, clipped", second_step(fused=True, clips=True)
        yield "fused, bfloat16 with a master", second_step(torch.bfloat16, fused=True, master_dtype=torch.float32)
        yield "fused", second_step(fused=True)
        yield "fused, one without a gradient", second_step(fused=True, without=["2.weight"])
        yield "capturable, fused", second_step(fused=True, capturable=True)


@pytest.fixture(scope="module")
def observed(tmp_path_factory: pytest.TempPathFactory) -> Observed:
    return answer_of(_observe, tmp_path_factory.mktemp("guard"), seconds=100)


@pytest.mark.parametrize("case", CASES)
def test_the_host_waits_for_the_device_only_where_it_was_asked_to(observed: Observed, case: str) -> None:
    assert observed.waits[case] == CASES[case]


@pytest.mark.parametrize("case", LAUNCHES)
def test_parameters_that_share_step_and_presence_are_one_tensor_and_one_launch(observed: Observed, case: str) -> None:
    assert observed.launches[case] == LAUNCHES[case]


def test_every_case_was_tried(observed: Observed) -> None:
    assert set(observed.waits) == set(CASES)
    assert set(observed.launches) == set(LAUNCHES)
