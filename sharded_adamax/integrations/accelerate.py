"""Hugging Face Accelerate: `save_state` writes the optimizer on rank 0 alone, so the state is gathered there first."""

from __future__ import annotations

from typing import Any

from accelerate import Accelerator
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from sharded_adamax.optimizer import ShardedAdamax
from sharded_adamax.wrappers import unwrapped


def gather_on_save(accelerator: Accelerator, *optimizers: Optimizer) -> RemovableHandle:
    """Make ``accelerator.save_state``, called on all ranks, write the whole state of ``optimizers``.

    The file is that of torch.optim.Adamax. Rank 0 holds the whole state in host memory until the next step.

    Args:
        optimizers: Each a ShardedAdamax, before or after ``accelerator.prepare``.

    Returns:
        A handle whose ``remove()`` undoes this.

    Raises:
        TypeError: One is another optimizer.
    """
    found = [unwrapped(optimizer) for optimizer in optimizers]
    sharded = [optimizer for optimizer in found if isinstance(optimizer, ShardedAdamax)]
    if len(sharded) < len(found) or not found:
        raise TypeError(f"expected ShardedAdamax optimizers, got {[type(optimizer).__name__ for optimizer in found]}")

    def gather(models: Any, weights: Any, output_dir: str) -> None:
        for optimizer in sharded:
            optimizer.consolidate_state_dict()

    handle: RemovableHandle = accelerator.register_save_state_pre_hook(gather)
    return handle
