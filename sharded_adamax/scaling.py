"""torch.amp.GradScaler, unchanged, on gradients that are not in ``param.grad``.

[Note: GradScaler]  ``scaler.unscale_(optimizer)`` and ``scaler.step(optimizer)`` go through ``param.grad``, where
nothing is left: the gradients are in the shards, or on their way there. GradScaler has no door for optimizers of
another kind (``_step_supports_amp_scaling`` concerns ``step`` only, and its bookkeeping stays empty), so the one method
in which it looks at gradients is taught to ask the optimizer first. For every other optimizer nothing changes.

The optimizer completes the reduction, unscales the mean gradients with the very operation that GradScaler uses, and
tells all ranks of an Inf on any: the scaler of each then skips the step and lowers its scale, as those of the others.
"""

from __future__ import annotations

from functools import wraps
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler


@runtime_checkable
class UnscalesItself(Protocol):
    """An optimizer whose gradients may be elsewhere than in ``param.grad``."""

    def unscale_for_grad_scaler(
        self, inv_scale: Tensor, found_inf: Tensor, *, allow_fp16: bool
    ) -> dict[torch.device, Tensor] | None:
        """Unscale the gradients and return where Inf or NaN was found, by device; None if they are in ``param.grad``.

        Args:
            inv_scale, found_inf: float32, 0-d.
        """


def teach_grad_scaler() -> None:
    """Make every GradScaler of this process ask optimizers that unscale themselves. Any number of times."""
    original: Any = GradScaler._unscale_grads_
    if hasattr(original, "__wrapped__"):
        return

    @wraps(original)
    def unscale_grads_(
        self: GradScaler, optimizer: torch.optim.Optimizer, inv_scale: Tensor, found_inf: Tensor, allow_fp16: bool
    ) -> Any:
        if isinstance(optimizer, UnscalesItself):
            found = optimizer.unscale_for_grad_scaler(inv_scale, found_inf, allow_fp16=allow_fp16)
            if found is not None:
                return found
        return original(self, optimizer, inv_scale, found_inf, allow_fp16)

    GradScaler._unscale_grads_ = unscale_grads_  # type: ignore[method-assign]
