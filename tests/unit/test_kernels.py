"""Each kernel has the bits of torch.optim.Adamax for the same flags, on slices of any flat cut."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sharded_adamax.kernels import Hyper, Kernel, choose, eager, foreach
from sharded_adamax.kernels.chunked import in_chunks

# Kernel, and torch's foreach flag. 256 bytes are chunks of 64 elements per thread: each of the tensors here is cut.
KERNELS = {
    "eager": (eager.update_, False),
    "foreach": (foreach.update_, True),
    "eager in chunks": (in_chunks(eager.update_, chunk_bytes=256), False),
    "foreach in chunks": (in_chunks(foreach.update_, chunk_bytes=256), True),
}
FLAGS: list[dict[str, Any]] = [
    {},
    {"weight_decay": 0.1},
    {"maximize": True},
    {"maximize": True, "weight_decay": 0.1},
    {"betas": (0.0, 0.5)},
    {"betas": (0.4, 0.0)},  # beta1 < 0.5 takes the other branch of lerp
    {"eps": 1e-3, "lr": 1e-2},
    {"lr": torch.tensor(3e-3)},
    {"lr": torch.tensor([3e-3])},
]

HYPER = Hyper(2e-3, 0.9, 0.999, 1e-8, 0.0, False)


def _cut(tensor: Tensor) -> list[Tensor]:
    return [tensor[:64], tensor[64:704], tensor[704:]]


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("flags", FLAGS, ids=str)
def test_kernel_has_the_bits_of_torch(name: str, dtype: torch.dtype, flags: dict[str, Any]) -> None:
    update_, use_foreach = KERNELS[name]
    generator = torch.Generator().manual_seed(0)
    param = torch.randn(1000, generator=generator, dtype=dtype)
    expected = torch.nn.Parameter(param.clone())
    exp_avg, exp_inf = torch.zeros_like(param), torch.zeros_like(param)
    reference = torch.optim.Adamax([expected], foreach=use_foreach, **flags)
    hyper = Hyper.of(reference.param_groups[0])
    for step in range(1, 21):
        gradient = torch.randn(1000, generator=generator, dtype=dtype) * 10.0 ** (step % 7 - 3)
        gradient[::17] = 0
        expected.grad = gradient.clone()
        reference.step()
        parts = [_cut(tensor) for tensor in (param, gradient, exp_avg, exp_inf)]
        update_(*parts, [float(step)] * 3, hyper)
        state = reference.state[expected]
        assert torch.equal(param, expected), f"step {step}"
        assert torch.equal(exp_avg, state["exp_avg"])
        assert torch.equal(exp_inf, state["exp_inf"])


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_low_precision_has_the_bits_of_torch_when_cut_at_multiples_of_64(name: str, dtype: torch.dtype) -> None:
    update_, use_foreach = KERNELS[name]
    generator = torch.Generator().manual_seed(0)
    param = torch.randn(1000, generator=generator).to(dtype)
    expected = torch.nn.Parameter(param.clone())
    exp_avg, exp_inf = torch.zeros_like(param), torch.zeros_like(param)
    reference = torch.optim.Adamax([expected], foreach=use_foreach, eps=1e-3)
    for step in range(1, 11):
        gradient = torch.randn(1000, generator=generator).to(dtype)
        expected.grad = gradient.clone()
        reference.step()
        parts = [_cut(tensor) for tensor in (param, gradient, exp_avg, exp_inf)]
        update_(*parts, [float(step)] * 3, Hyper.of(reference.param_groups[0]))
        assert torch.equal(param, expected), f"step {step}"


def test_an_infinite_gradient_and_eps_zero_end_where_torch_ends() -> None:
    for update_, use_foreach in KERNELS.values():
        _check_hazards(update_, use_foreach)


def _check_hazards(update_: Kernel, use_foreach: bool) -> None:
    gradient = torch.tensor([float("inf"), 0.0, 1.0, float("nan")])
    expected = torch.nn.Parameter(torch.ones(4))
    expected.grad = gradient.clone()
    reference = torch.optim.Adamax([expected], eps=0.0, foreach=use_foreach)
    reference.step()
    param, exp_avg, exp_inf = torch.ones(4), torch.zeros(4), torch.zeros(4)
    update_([param], [gradient], [exp_avg], [exp_inf], [1.0], Hyper.of(reference.param_groups[0]))
    assert torch.equal(param.isnan(), expected.isnan())
    assert param[2] == expected[2]


@pytest.mark.parametrize("name", ["eager in chunks", "foreach in chunks"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.complex64], ids=str)
@pytest.mark.parametrize("lr", [2e-3, torch.tensor(2e-3)], ids=["float lr", "tensor lr"])
def test_what_must_not_be_cut_has_the_bits_of_the_whole(name: str, dtype: torch.dtype, lr: float | Tensor) -> None:
    whole, _ = KERNELS[name.removesuffix(" in chunks")]
    in_pieces, _ = KERNELS[name]
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(50_001, generator=generator).abs().to(dtype) for _ in range(4)]
    expected = [tensor.clone() for tensor in tensors]
    hyper = Hyper(lr, 0.9, 0.999, 1e-3, 0.1, False)
    whole(*([tensor] for tensor in expected), [3.0], hyper)
    in_pieces(*([tensor] for tensor in tensors), [3.0], hyper)
    for index in (0, 2, 3):
        assert torch.equal(torch.view_as_real(tensors[index]) if dtype.is_complex else tensors[index],
                           torch.view_as_real(expected[index]) if dtype.is_complex else expected[index])  # fmt: skip


@pytest.mark.parametrize("threads", [1, 2])
def test_a_chunk_fits_the_cache_of_the_threads_that_work_on_it(threads: int) -> None:
    sizes: list[list[int]] = []

    def note_sizes(params: Any, grads: Any, exp_avgs: Any, exp_infs: Any, steps: Any, hyper: Hyper) -> None:
        assert len(params) == len(grads) == len(exp_avgs) == len(exp_infs) == len(steps)
        sizes.append([param.numel() for param in params])

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        tensors = [torch.zeros(numel) for numel in (10, 20, 500, 64, 0, 64)]
        in_chunks(note_sizes, chunk_bytes=256)(tensors, tensors, tensors, tensors, [1.0] * 6, HYPER)
    finally:
        torch.set_num_threads(before)
    chunks = {
        1: [[10, 20], *[[64]] * 7, [52], [64, 0], [64]],
        2: [[10, 20], *[[128]] * 3, [116], [64, 0, 64]],
    }
    assert sizes == chunks[threads]


def test_the_default_on_the_cpu_goes_in_chunks_and_the_plain_loop_does_not() -> None:
    cpu = torch.device("cpu")
    assert choose(False, cpu) is eager.update_
    assert choose(None, cpu) is not eager.update_
    assert choose(None, torch.device("cuda")) is foreach.update_
    numel = 3_000_000
    gradient = torch.randn(numel, generator=torch.Generator().manual_seed(0))
    results = []
    for use_foreach in (False, None, True):
        param, exp_avg, exp_inf = torch.ones(numel), torch.zeros(numel), torch.zeros(numel)
        choose(use_foreach, cpu)([param], [gradient.clone()], [exp_avg], [exp_inf], [1.0], HYPER)
        results.append((param, exp_avg, exp_inf))
    for result in results[1:]:
        assert all(torch.equal(*pair) for pair in zip(result, results[0], strict=True))
