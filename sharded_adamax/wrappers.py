"""Frameworks put an optimizer of theirs around the user's; here it is taken off."""

from __future__ import annotations

from torch.optim import Optimizer


def unwrapped(optimizer: Optimizer) -> Optimizer:
    """Return the optimizer inside the wrappers of Accelerate, Lightning Fabric and Lightning.

    All of them are Optimizers that call what they wrap ``optimizer``.
    """
    while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = inner
    return optimizer
