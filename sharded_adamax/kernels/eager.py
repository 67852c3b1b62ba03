"""The plain loop: the formula, one tensor at a time. The oracle of the other kernels.

Source: ``_single_tensor_adamax`` in torch/optim/adamax.py, operation by operation.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sharded_adamax.kernels.contract import Hyper, as_real


def update_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_infs: Sequence[Tensor],
    steps: Sequence[float],
    hyper: Hyper,
) -> None:
    """Update each tensor in its turn. See [Note: kernel]."""
    for param, grad, exp_avg, exp_inf, step in zip(params, grads, exp_avgs, exp_infs, steps, strict=True):
        param, grad, exp_avg, exp_inf = moments_(param, grad, exp_avg, exp_inf, hyper)
        # A tensor lr is divided in its own precision here, in double by foreach: so does torch.
        step_size = hyper.lr / (1 - hyper.beta1**step)
        param.addcdiv_(exp_avg, exp_inf, value=-step_size)


def moments_(
    param: Tensor, grad: Tensor, exp_avg: Tensor, exp_inf: Tensor, hyper: Hyper
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Bring m and u up to date. Returns all four, real; the gradient is free from here on."""
    if hyper.maximize:
        grad.neg_()
    if hyper.weight_decay != 0:
        grad.add_(param, alpha=hyper.weight_decay)
    # After the weight decay, in foreach before it: so does torch, and the last bit depends on it.
    param, grad, exp_avg, exp_inf = as_real(param), as_real(grad), as_real(exp_avg), as_real(exp_inf)
    exp_avg.lerp_(grad, 1 - hyper.beta1)
    torch.maximum(exp_inf.mul_(hyper.beta2), grad.abs_().add_(hyper.eps), out=exp_inf)
    return param, grad, exp_avg, exp_inf
