"""One launch and one pass on a GPU: the kernel of triton_source.py, started on the runs of a shard.

Written without a GPU. What is known of it is what its compiled code says and does when it is executed on the CPU:
tests/ptx. See docs/design/kernels.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import repeat
from typing import Any

import torch
from torch import Tensor

from sharded_adamax.kernels import captured
from sharded_adamax.kernels.contract import Hyper
from sharded_adamax.kernels.notices import say_once

BLOCK = 1024  # elements per program: eight per thread, two 128-bit accesses of each operand
OPTIONS: dict[str, Any] = {"num_warps": 4, "enable_fp_fusion": False}


@cache
def is_available() -> bool:
    """Return whether Triton can be imported. It is an extra: importing this module does not need it."""
    try:
        import sharded_adamax.kernels.triton_source  # noqa: F401
    except ImportError:
        return False
    return True


def can_update(dtype: torch.dtype) -> bool:
    """Return whether there is a kernel for updates in ``dtype``; say it once where there is none."""
    if not is_available():
        say_once("needs Triton: pip install triton")
    elif dtype != torch.float32:
        say_once(f"has no one-pass kernel for {dtype} on CUDA")
    return is_available() and dtype == torch.float32


def update_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_infs: Sequence[Tensor],
    steps: Sequence[float],
    hyper: Hyper,
    *,
    grad_scale: Tensor | None = None,
    rounded: Sequence[Tensor] | None = None,
) -> None:
    """Update each tensor, float32, in one launch. See [Note: kernel], and `launch_` for the last two arguments."""
    # The host numbers are computed in double and rounded once, as torch does before it launches its own kernels.
    lr = float(hyper.lr)
    step_sizes = [lr / (1 - hyper.beta1**step) for step in steps]
    _launch_each((params, grads, exp_avgs, exp_infs), step_sizes, hyper, grad_scale, rounded)


def update_capturable_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_infs: Sequence[Tensor],
    steps: Sequence[Tensor],
    hyper: Hyper,
    *,
    grad_scale: Tensor | None = None,
    rounded: Sequence[Tensor] | None = None,
) -> None:
    """Update each tensor in one launch, after three small ones for all steps. See [Note: capturable]."""
    step_sizes = captured.corrections(steps, hyper)
    _launch_each((params, grads, exp_avgs, exp_infs), step_sizes, hyper, grad_scale, rounded)


def _launch_each(
    operands: tuple[Sequence[Tensor], ...],
    step_sizes: Sequence[float | Tensor],
    hyper: Hyper,
    grad_scale: Tensor | None,
    rounded: Sequence[Tensor] | None,
) -> None:
    outputs = repeat(None, len(step_sizes)) if rounded is None else rounded
    for *tensors, step_size, output in zip(*operands, step_sizes, outputs, strict=True):
        launch_(*tensors, step_size=step_size, hyper=hyper, rounded=output, grad_scale=grad_scale)


def launch_(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_inf: Tensor,
    *,
    step_size: float | Tensor,
    hyper: Hyper,
    rounded: Tensor | None = None,
    grad_scale: Tensor | None = None,
) -> None:
    """Update one tensor. ``grad`` is read only.

    Args:
        param, exp_avg, exp_inf: float32, 1-D, modified in place. Fastest where they start at multiples of 16 bytes and
            have a multiple of 16 elements, as the runs of a bucket do.
        grad: float32, bfloat16 or float16.
        step_size: lr / (1 - beta1 ** step); or what stands for it on the device, one of `captured.corrections`.
        rounded: bfloat16 or float16: also gets the new parameters, rounded.
        grad_scale: 0-d, on the device: a clip factor or an inverse loss scale. Gradients are multiplied by it
            before anything else; the host does not wait for its value.
    """
    import triton

    from sharded_adamax.kernels import triton_source

    numel = param.numel()
    correction = step_size if isinstance(step_size, Tensor) else None
    with torch.cuda.device_of(param):  # type: ignore[no-untyped-call]
        triton_source.adamax[(triton.cdiv(numel, BLOCK),)](
            param,
            grad,
            exp_avg,
            exp_inf,
            rounded,
            grad_scale,
            correction,
            numel,
            0.0 if isinstance(step_size, Tensor) else -step_size,
            1 - hyper.beta1,
            hyper.beta2,
            hyper.eps,
            hyper.weight_decay,
            decays=hyper.weight_decay != 0,
            maximize=hyper.maximize,
            near=hyper.near,
            cuda_order=True,
            block=BLOCK,
            **OPTIONS,
        )
