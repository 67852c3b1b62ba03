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
        if isinstance(lr, Tensor):
            # A 1-element tensor that is not 0-d would broadcast the arithmetic on it to one dimension.
            lr = lr.squeeze()
            # One on a device is read by the host, as by torch: here once per step, and not once per bucket.
            lr = lr if group["capturable"] else lr.cpu()
        return cls(lr, beta1, beta2, group["eps"], group["weight_decay"], group["maximize"])

    @property
    def near(self) -> bool:
        """Whether lerp starts from exp_avg; from 1 - beta1 = 0.5 on torch starts from the gradient."""
        return 1 - self.beta1 < 0.5


class Kernel(Protocol):
    """See [Note: kernel]. The lists have at least one tensor.

    ``steps`` are numbers; for the kernels of [Note: capturable] 0-d tensors.
    """

    def __call__(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        exp_avgs: Sequence[Tensor],
        exp_infs: Sequence[Tensor],
        steps: Sequence[Any],
        hyper: Hyper,
    ) -> None: ...


def is_cuttable(dtype: torch.dtype) -> bool:
    """Return whether an update has the same bits on a tensor and on any cut of it, with any kernel here."""
    return dtype in (torch.float32, torch.float64)


def longest_merged_gap(dtype: torch.dtype, eps: float) -> int:
    """Return over how many elements of padding neighbours may be updated as one tensor; -1: they may not be merged.

    Padding is zeros in all four operands, and stays so: m = 0, u = eps, p = 0 - step_size * 0 / eps. With an eps that
    is zero in ``dtype``, or loses digits in it, that could be 0 / 0: neighbours are then merged only where nothing is
    between them. (A NaN in padding would be read by nobody, but a promise that has no exception is easier to keep.)

    A gradient that is not finite times a clip factor of 0 is the one way to a NaN there, when the parameters
    themselves are NaN.
    """
    if not is_cuttable(dtype):
        return -1
    # Less than ALIGNMENT_NUMEL of layout.py: in a gap of 64 elements or more another parameter could lie.
    return 63 if eps >= torch.finfo(dtype).tiny else 0


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
