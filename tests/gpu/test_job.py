"""What only GPUs can tell of a whole job; tests/gpu/README.md says what each test would verify.

Nothing here has ever run on a GPU. `python -m tests.gpu.jobs` runs the programs on the CPU.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.gpu import jobs

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: nothing here can be tried"),
    pytest.mark.timeout(600),
]
two_gpus = pytest.mark.skipif(
    torch.cuda.device_count() < 2 or not dist.is_nccl_available(), reason="needs two GPUs and NCCL"
)

DEVICE = torch.device("cuda", 0)
WIDTH = 2048  # a layer is 16 MiB
OPTIONS: list[dict[str, Any]] = [{}, {"weight_decay": 0.1, "maximize": True}, {"foreach": False}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_one_gpu_trains_to_torchs_bits(options: dict[str, Any]) -> None:
    jobs.train_beside_torch(DEVICE, 256, options)


def test_a_grad_scaler_skips_where_torch_skips() -> None:
    jobs.train_with_scaler_beside_torch(DEVICE)


@pytest.mark.parametrize("overlap", [False, True])
def test_the_host_never_waits_on_one_gpu(overlap: bool) -> None:
    jobs.step_without_waiting(DEVICE, 256, overlap)


def test_memory_of_one_gpu_is_that_of_the_formula() -> None:
    _check(jobs.measure_memory(DEVICE, WIDTH))


@pytest.mark.parametrize("overlap", [False, True])
def test_other_streams_change_no_bit_on_one_gpu(overlap: bool) -> None:
    jobs.same_on_other_streams(DEVICE, overlap)


@two_gpus
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_two_gpus_train_to_torchs_bits(options: dict[str, Any], overlap: bool) -> None:
    jobs.on_ranks(2, jobs.train_beside_torch, 256, options, overlap)


@two_gpus
@pytest.mark.parametrize("overlap", [False, True])
def test_the_host_never_waits_on_two_gpus(overlap: bool) -> None:
    jobs.on_ranks(2, jobs.step_without_waiting, 256, overlap)


@two_gpus
def test_memory_of_two_gpus_is_that_of_the_formula() -> None:
    for memory in jobs.on_ranks(2, jobs.measure_memory, WIDTH):
        _check(memory)


@two_gpus
@pytest.mark.parametrize("overlap", [False, True])
def test_other_streams_change_no_bit_on_two_gpus(overlap: bool) -> None:
    jobs.on_ranks(2, jobs.same_on_other_streams, overlap)


@two_gpus
def test_reduce_scatters_run_under_backward() -> None:
    for kernels in jobs.on_ranks(2, jobs.profile_kernels, WIDTH, False):
        assert _runs_under_computation(kernels, "reducescatter")


@two_gpus
def test_all_gathers_run_under_the_next_forward() -> None:
    for kernels in jobs.on_ranks(2, jobs.profile_kernels, WIDTH, True):
        assert _runs_under_computation(kernels, "allgather")


def _check(memory: jobs.Memory) -> None:
    print(f"peak {memory.peak / 2**20:.0f} MiB, expected {memory.expected / 2**20:.0f} MiB")
    # The gradients of a bucket and the buffer they are copied into exist at the same time.
    assert abs(memory.peak - memory.expected) <= 1.5 * memory.layer


def _runs_under_computation(kernels: list[jobs.Kernel], collective: str) -> bool:
    """Return whether a matrix is multiplied while a collective is under way; updates and copies do not count."""
    sent = [k for k in kernels if k.is_communication and collective in k.name.lower().replace("_", "")]
    multiplied = [k for k in kernels if any(word in k.name.lower() for word in ("gemm", "cutlass", "nvjet"))]
    assert sent and multiplied, sorted({kernel.name for kernel in kernels})
    return any(one.overlaps(other) for one in sent for other in multiplied)
