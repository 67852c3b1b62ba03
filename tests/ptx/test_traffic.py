"""What the kernels that are compiled for GPUs move: 28 bytes per element, 128 bits at a time, nothing spilled."""

from __future__ import annotations

from typing import Any

import pytest

from sharded_adamax.kernels.triton_source import adamax
from tests.ptx.aot import compiled
from tests.ptx.controls import two_passes

ARCHS = [80, 90, 100]  # A100, H100, B200
VARIANTS: dict[str, tuple[dict[str, Any], int]] = {
    "fp32": ({}, 4 * 4 + 3 * 4),
    "weight decay, maximize": ({"decays": True, "maximize": True}, 28),
    "far lerp": ({"near": False}, 28),
    "bf16 gradients and parameters, master": ({"grad": "bf16", "rounded": "bf16"}, 2 + 3 * 4 + 3 * 4 + 2),
    "fp16 gradients and parameters, master": ({"grad": "fp16", "rounded": "fp16"}, 28),
    "fp32 gradients, bf16 parameters, master": ({"grad": "fp32", "rounded": "bf16"}, 30),
}


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("name", VARIANTS)
def test_one_pass_in_wide_accesses_without_spills(name: str, arch: int) -> None:
    flags, num_bytes = VARIANTS[name]
    kernel = compiled(adamax, arch, **flags)
    assert kernel.bytes_per_element() == num_bytes
    assert {size for _, size in kernel.accesses()} == {16}
    assert kernel.sass_accesses(), "the machine code was not understood"
    assert {access.split(".", 1)[0] for access in kernel.sass_accesses()} == {"LDG", "STG"}, "spills or atomics"
    assert all(access.endswith(".128") for access in kernel.sass_accesses())
    assert kernel.stack_bytes == kernel.local_bytes == 0
    # 65,536 registers per multiprocessor: at least half of the 2,048 threads that it can hold find room.
    assert kernel.registers <= 64


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("flag", ["scales", "capturable"])
def test_a_scale_and_a_correction_from_the_device_cost_one_scalar_load(flag: str, arch: int) -> None:
    without, with_scalar = compiled(adamax, arch), compiled(adamax, arch, **{flag: True})
    assert sorted(with_scalar.accesses()) == sorted([*without.accesses(), ("ld", 4)])
    assert with_scalar.stack_bytes == with_scalar.local_bytes == 0
    assert with_scalar.registers <= 64


def test_a_second_pass_would_be_noticed() -> None:
    assert compiled(two_passes, 90).bytes_per_element() == 36


def test_a_length_that_is_no_multiple_of_16_would_lose_the_wide_accesses() -> None:
    # Why runs of a bucket end with their padding.
    assert {size for _, size in compiled(adamax, 90, is_multiple_of_16=False).accesses()} == {4}
