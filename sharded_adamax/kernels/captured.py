"""The update with ``capturable=True``: nothing in it needs a number that only the device knows.

[Note: capturable]  A CUDA graph replays what was launched while it was captured, with the arguments of then. The other
kernels compute the step size on the host; a replay would use the one of the captured step for ever. Here ``steps`` are
0-d tensors on the device of the parameters, the bias correction is computed there, and so is its quotient with a tensor
lr, which the host does not read. It is torch's formula for this flag, whose roundings are others:

    param = param + m / (u * ((beta1 ** step - 1) / lr))

What is a Python number (betas, eps, weight decay, an lr that is no tensor) is part of the graph, as in torch.

Source: torch/optim/adamax.py, the branches ``if capturable``, operation by operation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import optimizer as of_torch

from sharded_adamax.kernels import eager, foreach
from sharded_adamax.kernels.contract import Hyper


def loop_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_infs: Sequence[Tensor],
    steps: Sequence[Tensor],
    hyper: Hyper,
) -> None:
    """Update each tensor in its turn. See [Note: capturable]."""
    for param, grad, exp_avg, exp_inf, step in zip(params, grads, exp_avgs, exp_infs, steps, strict=True):
        param, grad, exp_avg, exp_inf = eager.moments_(param, grad, exp_avg, exp_inf, hyper)
        correction = (hyper.beta1**step - 1).div_(hyper.lr)
        param.addcdiv_(exp_avg, torch.mul(exp_inf, correction, out=grad))


def foreach_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_infs: Sequence[Tensor],
    steps: Sequence[Tensor],
    hyper: Hyper,
) -> None:
    """Update all tensors together. See [Note: capturable]."""
    params, grads, exp_avgs, exp_infs = foreach.moments_(params, grads, exp_avgs, exp_infs, hyper)
    # torch's _foreach_mul makes new tensors, one by one because the factors are 0-d. These are the same products.
    for exp_inf, correction, scratch in zip(exp_infs, corrections(steps, hyper), grads, strict=True):
        torch.mul(exp_inf, correction, out=scratch)
    torch._foreach_addcdiv_(params, exp_avgs, grads)


def corrections(steps: Sequence[Tensor], hyper: Hyper) -> list[Tensor]:
    """Return for each step, 0-d, what u is multiplied by to be the denominator of the update: a negative number."""
    found = list(torch._foreach_pow(hyper.beta1, list(steps)))
    torch._foreach_sub_(found, 1)
    torch._foreach_div_(found, hyper.lr)
    return found


def capture_problem(groups: Sequence[dict[str, Any]], device: torch.device, *, capturable: bool) -> str | None:
    """Return why no step can be taken, if so.

    Args:
        device: That of the parameters.
        capturable: What the optimizer was built with.
    """
    for index, group in enumerate(groups):
        if bool(group["capturable"]) != capturable:
            return (
                f"group {index} has capturable={group['capturable']}, expected {capturable}, with which ShardedAdamax "
                "was built: it decides where the state `step` lives. Build a new optimizer with the other flag"
            )
    supported = of_torch._get_capturable_supported_devices()
    if capturable and device.type not in supported:
        return (
            f"If capturable=True, params and state_steps must be on supported devices: {supported}. The parameters are "
            f"on {device.type}: build ShardedAdamax with capturable=False"
        )
    return None
