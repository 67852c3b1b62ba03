"""Horizontally fused: each operation once over the whole list of tensors. torch's own default on CUDA.

Source: ``_multi_tensor_adamax`` in torch/optim/adamax.py, operation by operation.
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
    """Update all tensors together. See [Note: kernel]."""
    params, grads, exp_avgs, exp_infs = moments_(params, grads, exp_avgs, exp_infs, hyper)
    # The scalar is computed in double, as torch does: float(lr) of a tensor lr is its exact value.
    lr = float(hyper.lr)
    step_sizes = [(lr / (1 - hyper.beta1**step)) * -1 for step in steps]
    torch._foreach_addcdiv_(params, exp_avgs, exp_infs, step_sizes)


def moments_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_infs: Sequence[Tensor],
    hyper: Hyper,
) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    """Bring m and u up to date. Returns all four lists, real; the gradients are free from here on."""
    params, grads, exp_avgs, exp_infs = (
        [as_real(tensor) for tensor in tensors] for tensors in (params, grads, exp_avgs, exp_infs)
    )
    if hyper.maximize:
        torch._foreach_neg_(grads)
    if hyper.weight_decay != 0:
        torch._foreach_add_(grads, params, alpha=hyper.weight_decay)
    torch._foreach_lerp_(exp_avgs, grads, 1 - hyper.beta1)
    torch._foreach_mul_(exp_infs, hyper.beta2)
    torch._foreach_abs_(grads)
    torch._foreach_add_(grads, hyper.eps)
    torch._foreach_maximum_(exp_infs, grads)
    return params, grads, exp_avgs, exp_infs
