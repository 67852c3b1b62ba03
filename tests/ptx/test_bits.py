"""The kernels that are compiled for GPUs, executed on the CPU: torch's bits, and each byte touched once.

The CPU's order of roundings is compared with torch.optim.Adamax itself. For CUDA's order there is no torch to ask here:
it is compared with a model of torch's CUDA kernels, written from their source. tests/gpu asks the real ones.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from sharded_adamax.kernels import Hyper, captured, eager
from sharded_adamax.kernels.cuda import BLOCK
from sharded_adamax.kernels.triton_source import adamax
from tests.ptx.aot import compiled
from tests.ptx.controls import approximate, two_passes
from tests.ptx.emulator import Array, Memory, Program, fma32

NUMEL = 16 * 151  # several programs, the last of them not full
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
FLAGS: list[dict[str, Any]] = [
    {},
    {"weight_decay": 0.1, "maximize": True},
    {"betas": (0.4, 0.99), "eps": 1e-3},
    {"eps": 0.0},
]


def _gradient(step: int, numel: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(step)
    gradient = torch.randn(numel, generator=generator) * (3 * torch.randn(numel, generator=generator)).exp()
    if step == 3:
        gradient[:6] = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, 1e-42, 3e38])
    return gradient.to(dtype)


def _bits(array: Array) -> Array:
    """Return the bits of float32 numbers; every NaN has the same."""
    return np.where(np.isnan(array), np.uint32(0x7FC00000), array.view(np.uint32))


class Shard:
    """p, m and u, as arrays that the emulator works on."""

    def __init__(self, numel: int = NUMEL) -> None:
        values = torch.randn(numel, generator=torch.Generator().manual_seed(0))
        self.param, self.exp_avg, self.exp_inf = values.numpy(), np.zeros(numel, "f4"), np.zeros(numel, "f4")
        self.rounded: Array | None = None

    def update(
        self,
        program: Program,
        gradient: Array,
        step: int,
        hyper: Hyper,
        scale: float | None = None,
        correction: float | None = None,
    ) -> None:
        """Run the program once, and check that it reads and writes each byte once."""
        memory = Memory()
        held = [memory.add(array) for array in (self.param, gradient, self.exp_avg, self.exp_inf)]
        pointers = [buffer.address for buffer in held]
        if self.rounded is not None:
            written = memory.add(self.rounded)
            pointers.append(written.address)
        pointers += [memory.add(np.array([x], "f4")).address for x in (scale, correction) if x is not None]
        neg_step_size = -(float(hyper.lr) / (1 - hyper.beta1**step)) if correction is None else math.nan
        numbers = (neg_step_size, 1 - hyper.beta1, hyper.beta2, hyper.eps, hyper.weight_decay)
        arguments = [*pointers, len(self.param), *map(float, numbers)]
        program.run(-(-len(self.param) // BLOCK), memory, arguments)
        for buffer, writes in zip(held, (1, 0, 1, 1), strict=True):
            assert (buffer.reads == 1).all() and (buffer.writes == writes).all()
        if self.rounded is not None:
            assert (written.reads == 0).all() and (written.writes == 1).all()

    def assert_same(self, param: torch.Tensor, exp_avg: torch.Tensor, exp_inf: torch.Tensor) -> None:
        for ours, expected in zip((self.param, self.exp_avg, self.exp_inf), (param, exp_avg, exp_inf), strict=True):
            np.testing.assert_array_equal(_bits(ours), _bits(expected.detach().numpy()))


def _variant(hyper: Hyper, **flags: Any) -> Program:
    variant = {"decays": hyper.weight_decay != 0, "maximize": hyper.maximize, "near": 1 - hyper.beta1 < 0.5}
    return Program(compiled(adamax, **{"arch": 90, **variant, **flags}).ptx)


@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("flags", FLAGS, ids=str)
def test_with_the_roundings_of_a_cpu_the_bits_are_torchs(flags: dict[str, Any], arch: int) -> None:
    shard = Shard()
    expected = torch.nn.Parameter(torch.from_numpy(shard.param.copy()))
    reference = torch.optim.Adamax([expected], foreach=True, **flags)
    hyper = Hyper.of(reference.param_groups[0])
    program = _variant(hyper, arch=arch, cuda_order=False)
    for step in range(1, 6):
        expected.grad = _gradient(step, NUMEL)
        reference.step()
        shard.update(program, _gradient(step, NUMEL).numpy(), step, hyper)
    state = reference.state[expected]
    shard.assert_same(expected, state["exp_avg"], state["exp_inf"])


@pytest.mark.usefixtures("capturable_on_cpu")
@pytest.mark.parametrize("flags", FLAGS, ids=str)
def test_with_a_correction_from_the_device_the_bits_are_those_of_torchs_capturable(flags: dict[str, Any]) -> None:
    """CUDA and the CPU round this formula alike: a product, a quotient and a sum, of which none are fused."""
    shard = Shard()
    expected = torch.nn.Parameter(torch.from_numpy(shard.param.copy()))
    reference = torch.optim.Adamax([expected], foreach=True, capturable=True, **flags)
    hyper = Hyper.of(reference.param_groups[0])
    program = _variant(hyper, capturable=True)
    for step in range(1, 6):
        expected.grad = _gradient(step, NUMEL)
        reference.step()
        (correction,) = captured.corrections([reference.state[expected]["step"]], hyper)
        shard.update(program, _gradient(step, NUMEL).numpy(), step, hyper, correction=correction.item())
    state = reference.state[expected]
    shard.assert_same(expected, state["exp_avg"], state["exp_inf"])


def _cuda_model(shard: Shard, gradient: Array, step: int, hyper: Hyper) -> None:
    """The operations of _multi_tensor_adamax, each with the rounding of torch's CUDA kernels."""
    one = np.float32(1)
    weight = np.float32(1 - hyper.beta1)
    with np.errstate(all="ignore"):
        g = -gradient if hyper.maximize else gradient
        if hyper.weight_decay:
            g = fma32(np.float32(hyper.weight_decay), shard.param, g)
        difference = g - shard.exp_avg
        if weight < 0.5:
            shard.exp_avg = fma32(weight, difference, shard.exp_avg)
        else:
            shard.exp_avg = fma32(-difference, one - weight, g)
        shard.exp_inf = np.maximum(shard.exp_inf * np.float32(hyper.beta2), np.abs(g) + np.float32(hyper.eps))
        neg_step_size = np.float32(-(float(hyper.lr) / (1 - hyper.beta1**step)))
        shard.param = fma32(neg_step_size, shard.exp_avg / shard.exp_inf, shard.param)


@pytest.mark.parametrize("flags", FLAGS, ids=str)
def test_with_the_roundings_of_cuda_the_bits_are_those_of_a_model_of_torchs_kernels(flags: dict[str, Any]) -> None:
    shard, expected = Shard(), Shard()
    hyper = Hyper.of(torch.optim.Adamax([torch.nn.Parameter(torch.ones(1))], **flags).param_groups[0])
    program = _variant(hyper, cuda_order=True)
    differs_from_cpu = False
    for step in range(1, 6):
        gradient = _gradient(step, NUMEL)
        on_cpu = [torch.from_numpy(array.copy()) for array in (expected.param, expected.exp_avg, expected.exp_inf)]
        eager.update_([on_cpu[0]], [gradient.clone()], [on_cpu[1]], [on_cpu[2]], [float(step)], hyper)
        shard.update(program, gradient.numpy(), step, hyper)
        _cuda_model(expected, gradient.numpy(), step, hyper)
        differs_from_cpu |= not np.array_equal(_bits(expected.param), _bits(on_cpu[0].numpy()))
    shard.assert_same(*(torch.from_numpy(array) for array in (expected.param, expected.exp_avg, expected.exp_inf)))
    assert differs_from_cpu, "a test in which both orders give the same shows nothing of the order"


@pytest.mark.parametrize("scale", [None, 1 / 3])
@pytest.mark.parametrize("rounded", ["bf16", "fp16"])
@pytest.mark.parametrize("grad", ["bf16", "fp16", "fp32"])
def test_sixteen_bits_with_a_master_are_the_master_rounded(grad: str, rounded: str, scale: float | None) -> None:
    shard = Shard()
    shard.rounded = np.zeros(NUMEL, np.uint16)
    expected = torch.nn.Parameter(torch.from_numpy(shard.param.copy()))
    reference = torch.optim.Adamax([expected], weight_decay=0.1)
    hyper = Hyper.of(reference.param_groups[0])
    program = _variant(hyper, grad=grad, rounded=rounded, scales=scale is not None, cuda_order=False)
    for step in range(1, 4):
        gradient = _gradient(step, NUMEL, DTYPES[grad])
        expected.grad = gradient.float() if scale is None else gradient.float() * scale
        reference.step()
        bits = gradient.numpy() if grad == "fp32" else gradient.view(torch.int16).numpy().view(np.uint16)
        shard.update(program, bits, step, hyper, scale)
    state = reference.state[expected]
    shard.assert_same(expected, state["exp_avg"], state["exp_inf"])
    of_ours = torch.from_numpy(shard.rounded.view(np.int16)).view(DTYPES[rounded])
    of_torch = expected.detach().to(DTYPES[rounded])
    assert torch.equal(of_ours.isnan(), of_torch.isnan())
    assert torch.equal(of_ours[~of_ours.isnan()], of_torch[~of_torch.isnan()])


@pytest.mark.parametrize("numel", [1, 777, 1025, 2 * BLOCK])
def test_any_length_is_updated_to_its_end_and_no_further(numel: int) -> None:
    shard = Shard(numel)
    expected = torch.nn.Parameter(torch.from_numpy(shard.param.copy()))
    expected.grad = _gradient(1, numel)
    reference = torch.optim.Adamax([expected])
    reference.step()
    hyper = Hyper.of(reference.param_groups[0])
    shard.update(_variant(hyper, cuda_order=False, is_multiple_of_16=False), _gradient(1, numel).numpy(), 1, hyper)
    shard.assert_same(expected, reference.state[expected]["exp_avg"], reference.state[expected]["exp_inf"])


def test_a_second_pass_is_caught() -> None:
    hyper = Hyper(2e-3, 0.9, 0.999, 1e-8, 0.0, False)
    shard = Shard()
    with pytest.raises(AssertionError):
        shard.update(Program(compiled(two_passes, 90).ptx), _gradient(1, NUMEL).numpy(), 1, hyper)
    expected = Shard()
    _cuda_model(expected, _gradient(1, NUMEL).numpy(), 1, hyper)
    np.testing.assert_array_equal(shard.param, expected.param)  # caught by its traffic, not by its numbers


def test_an_approximate_division_is_refused() -> None:
    with pytest.raises(NotImplementedError, match=r"div\.full\.f32"):
        Shard().update(
            Program(compiled(approximate, 90).ptx), _gradient(1, NUMEL).numpy(), 1, Hyper(1e-3, 0.9, 0.9, 1.0, 0, False)
        )


def test_an_access_outside_of_the_tensors_is_refused() -> None:
    hyper = Hyper(2e-3, 0.9, 0.999, 1e-8, 0.0, False)
    with pytest.raises(IndexError, match="expected addresses in one buffer"):
        Shard().update(_variant(hyper), _gradient(1, NUMEL - 16).numpy(), 1, hyper)


def test_the_emulators_fma_rounds_once() -> None:
    generator = np.random.default_rng(0)
    a, b, c = (generator.standard_normal((3, 3000)) * np.exp(5 * generator.standard_normal((3, 3000)))).astype("f4")
    c[::3] = -(a * b)[::3]  # where a second rounding would lose everything
    for x, y, z, ours in zip(a, b, c, fma32(a, b, c), strict=True):
        exact = Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z))
        neighbours = (np.nextafter(ours, np.float32(np.inf)), np.nextafter(ours, np.float32(-np.inf)))
        assert all(abs(Fraction(float(ours)) - exact) <= abs(Fraction(float(other)) - exact) for other in neighbours)
