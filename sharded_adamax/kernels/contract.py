"""The contract of a kernel. See [Note: kernel] in the package's docstring."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor


class Hyper(NamedTuple):
    """The hyper-parameters of one parameter group, as read at this step."""

    lr: float | Tensor
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    maximize: bool

    @classmethod
    def of(cls, group: dict[str, Any]) -> Hyper:
        beta1, beta2 = group["betas"]
        lr = group["lr"]
        # A 1-element tensor that is not 0-d would broadcast the arithmetic on it to one dimension. One on a device is
        # read by the host in any case, as by torch: here once per step, and not once per bucket.
        lr = lr.squeeze().cpu() if isinstance(lr, Tensor) else lr
        return cls(lr, beta1, beta2, group["eps"], group["weight_decay"], group["maximize"])


class Kernel(Protocol):
    """See [Note: kernel]."""

    def __call__(
        self,
        params: list[Tensor],
        grads: list[Tensor],
        exp_avgs: list[Tensor],
        exp_infs: list[Tensor],
        steps: Sequence[float],
        hyper: Hyper,
    ) -> None: ...


def as_real(tensor: Tensor) -> Tensor:
    """Return a complex tensor as pairs of real numbers, which Adamax treats as independent; others as they are."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def refuse_flags(group: dict[str, Any]) -> None:
    """Raise NotImplementedError for flags of torch.optim.Adamax that no kernel here has."""
    if group["differentiable"]:
        raise NotImplementedError(
            "differentiable=True is not supported: autograd cannot follow the update through the reduce-scatter of the "
            "gradients and the all-gather of the parameters. Use torch.optim.Adamax"
        )
    if group["capturable"]:
        raise NotImplementedError("capturable=True is not implemented yet: expected False")
