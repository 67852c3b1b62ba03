"""The update rule, once per implementation, all with one contract.

[Note: kernel]  A kernel is a function ``kernel(params, grads, exp_avgs, exp_infs, steps, hyper)``. It updates lists of
equally long, equally typed tensors in place, with the bits of torch.optim.Adamax for the same flags. The gradients are
its scratch: their values are undefined afterwards. ``steps`` counts the update that is being made, so the first is 1.

    g   = -grad if maximize else grad;  g = g + weight_decay * param
    m   = m + (1 - beta1) * (g - m)
    u   = max(beta2 * u, |g| + eps)
    param = param - lr / (1 - beta1 ** step) * m / u

Source: Kingma and Ba, Adam: A Method for Stochastic Optimization, section 7.1; bit for bit, torch/optim/adamax.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sharded_adamax.kernels import captured, compiled, cuda, eager, foreach
from sharded_adamax.kernels.captured import capture_problem
from sharded_adamax.kernels.chunked import in_chunks
from sharded_adamax.kernels.contract import Hyper, Kernel, longest_merged_gap, refuse_flags
from sharded_adamax.kernels.notices import say_once

__all__ = ["Hyper", "Kernel", "capture_problem", "choose", "folded", "longest_merged_gap", "prepare", "refuse_flags"]

_EAGER_IN_CHUNKS = in_chunks(eager.update_)
_FOREACH_IN_CHUNKS = in_chunks(foreach.update_)


def choose(
    use_foreach: bool | None,
    device: torch.device,
    *,
    dtype: torch.dtype = torch.float32,
    fused: bool = False,
    capturable: bool = False,
) -> Kernel:
    """Return the kernel for a group's ``foreach``; None picks as torch does: foreach on CUDA, else the loop.

    On the CPU the loop goes chunk by chunk, with the same bits; ``foreach=False`` says that it must not.

    Args:
        dtype: That of the update.
        fused: One pass over memory, where there is such a kernel; goes before ``use_foreach``.
        capturable: One that takes its steps as tensors. See [Note: capturable].
    """
    if fused and device.type == "cpu" and not capturable:
        return compiled.update_
    if fused and device.type == "cuda" and cuda.can_update(dtype):
        return cuda.update_capturable_ if capturable else cuda.update_
    if fused and device.type not in ("cpu", "cuda"):
        say_once(f"has no kernel for {device.type}")
    if device.type == "cpu" and not capturable:
        if use_foreach is None:
            return _EAGER_IN_CHUNKS
        return _FOREACH_IN_CHUNKS if use_foreach else eager.update_
    if use_foreach is None:
        use_foreach = device.type in ("cuda", "xpu")
    if capturable:
        return captured.foreach_ if use_foreach else captured.loop_
    return foreach.update_ if use_foreach else eager.update_


def folded(kernel: Kernel, *, grad_scale: Tensor | None, rounded: Sequence[Tensor] | None) -> Kernel:
    """Return ``kernel`` with what comes before and after it: in its own pass where it can, else in further ones.

    Args:
        grad_scale: 0-d, on the device of the gradients, which are multiplied by it first.
        rounded: Where the new parameters go as well, in another dtype: one tensor for each of them.
    """
    if kernel in (cuda.update_, cuda.update_capturable_):
        return partial(kernel, grad_scale=grad_scale, rounded=rounded)

    def update_(
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        exp_avgs: Sequence[Tensor],
        exp_infs: Sequence[Tensor],
        steps: Sequence[Any],
        hyper: Hyper,
    ) -> None:
        if grad_scale is not None:
            torch._foreach_mul_(list(grads), grad_scale)
        kernel(params, grads, exp_avgs, exp_infs, steps, hyper)
        if rounded is not None:
            torch._foreach_copy_(list(rounded), list(params))

    return update_


def prepare(dtype: torch.dtype, device: torch.device, hyper: Hyper) -> None:
    """Get the kernel that ``fused=True`` needs ready, and say now where it cannot be had. May take seconds."""
    if device.type == "cpu":
        compiled.prepare(dtype, hyper)
