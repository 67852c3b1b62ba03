"""The one-pass kernel for GPUs, in Triton's language. Imported by cuda.py alone, and only when it is needed.

[Note: GPU kernel]  Each program reads ``block`` elements of p, g, m and u once and writes p, m and u once: 28 bytes per
element in float32, where torch's foreach moves 64 in six launches. Every fused multiply-add is written as one, and the
compiler must be told to make no others (``enable_fp_fusion=False``): the bits are then those of torch's CUDA kernels
with ``cuda_order``, and of its CPU kernels without. They differ in the last operation only:

    CUDA   fma(-step_size, m / u, p)
    CPU    p + (-step_size * m) / u

With a correction, computed on the device (see [Note: capturable] in captured.py), both are p + m / (correction * u).
``div_rn`` because Triton's ``/`` is an approximation of the quotient.

Source: torch/optim/adamax.py; the order of operations on CUDA from ATen/native/cuda (Lerp.cuh, PointwiseOps).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def adamax(
    param_ptr,  # float32: the parameters or their master
    grad_ptr,  # float32, bfloat16 or float16
    exp_avg_ptr,  # float32
    exp_inf_ptr,  # float32
    rounded_ptr,  # 16 bits: where the master goes, rounded to nearest even; or None
    scale_ptr,  # 0-d: gradients are multiplied by it, first of all; or None
    correction_ptr,  # 0-d: (beta1 ** step - 1) / lr, instead of neg_step_size; or None
    numel,
    neg_step_size,
    weight,
    beta2,
    eps,
    weight_decay,
    decays: tl.constexpr,
    maximize: tl.constexpr,
    near: tl.constexpr,  # lerp starts from m; from weight = 0.5 on torch starts from g
    cuda_order: tl.constexpr,
    block: tl.constexpr,
):
    """Update ``numel`` elements; see [Note: GPU kernel]."""
    offsets = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    mask = offsets < numel
    p = tl.load(param_ptr + offsets, mask=mask)
    g = tl.load(grad_ptr + offsets, mask=mask).to(tl.float32)
    m = tl.load(exp_avg_ptr + offsets, mask=mask)
    u = tl.load(exp_inf_ptr + offsets, mask=mask)
    if scale_ptr is not None:
        g = g * tl.load(scale_ptr).to(tl.float32)
    if maximize:
        g = -g
    if decays:
        g = tl.fma(p, weight_decay, g)
    if near:  # noqa: SIM108, constants choose between statements, as in CUDA's if constexpr
        m = tl.fma(g - m, weight, m)
    else:
        m = tl.fma(g - m, weight - 1.0, g)
    u = tl.maximum(u * beta2, tl.abs(g) + eps, propagate_nan=tl.PropagateNan.ALL)
    if correction_ptr is not None:
        p = p + tl.div_rn(m, u * tl.load(correction_ptr).to(tl.float32))
    elif cuda_order:
        p = tl.fma(tl.div_rn(m, u), neg_step_size, p)
    else:
        p = p + tl.div_rn(m * neg_step_size, u)
    tl.store(param_ptr + offsets, p, mask=mask)
    tl.store(exp_avg_ptr + offsets, m, mask=mask)
    tl.store(exp_inf_ptr + offsets, u, mask=mask)
    if rounded_ptr is not None:
        tl.store(rounded_ptr + offsets, p.to(rounded_ptr.dtype.element_ty), mask=mask)
