"""Kernels that the checks have to refuse: controls of the checks."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def two_passes(
    param_ptr, grad_ptr, exp_avg_ptr, exp_inf_ptr, rounded_ptr, scale_ptr,
    numel, neg_step_size, weight, beta2, eps, weight_decay,
    decays: tl.constexpr, maximize: tl.constexpr, near: tl.constexpr, cuda_order: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """Right numbers, but m and u are written and then read again for the parameters, as separate operations do."""
    offsets = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    mask = offsets < numel
    g = tl.load(grad_ptr + offsets, mask=mask)
    m = tl.load(exp_avg_ptr + offsets, mask=mask)
    u = tl.load(exp_inf_ptr + offsets, mask=mask)
    tl.store(exp_avg_ptr + offsets, tl.fma(g - m, weight, m), mask=mask)
    u = tl.maximum(u * beta2, tl.abs(g) + eps, propagate_nan=tl.PropagateNan.ALL)
    tl.store(exp_inf_ptr + offsets, u, mask=mask)
    tl.debug_barrier()  # without it the compiler keeps the numbers in registers
    m = tl.load(exp_avg_ptr + offsets, mask=mask)
    u = tl.load(exp_inf_ptr + offsets, mask=mask)
    p = tl.load(param_ptr + offsets, mask=mask)
    tl.store(param_ptr + offsets, tl.fma(tl.div_rn(m, u), neg_step_size, p), mask=mask)


@triton.jit
def approximate(
    param_ptr, grad_ptr, exp_avg_ptr, exp_inf_ptr, rounded_ptr, scale_ptr,
    numel, neg_step_size, weight, beta2, eps, weight_decay,
    decays: tl.constexpr, maximize: tl.constexpr, near: tl.constexpr, cuda_order: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """Triton's own division: up to two units in the last place off."""
    offsets = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    mask = offsets < numel
    m = tl.load(exp_avg_ptr + offsets, mask=mask)
    u = tl.load(exp_inf_ptr + offsets, mask=mask)
    tl.store(param_ptr + offsets, m / u, mask=mask)
