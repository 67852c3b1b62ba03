"""Frameworks put an optimizer of theirs around the user's; here it is taken off."""

from __future__ import annotations

from torch.optim import Optimizer

_FRAMEWORKS = ("accelerate", "lightning", "lightning_fabric", "pytorch_lightning")


def unwrapped(optimizer: Optimizer) -> Optimizer:
    """Return the optimizer inside the wrappers of Accelerate, Lightning Fabric and Lightning.

    They only pass calls on. Any other wrapper stays: it may have a state of its own, as Lookahead has.
    """
    while type(optimizer).__module__.partition(".")[0] in _FRAMEWORKS:
        inner = getattr(optimizer, "optimizer", None)
        if not isinstance(inner, Optimizer):
            break
        optimizer = inner
    return optimizer
