"""Hugging Face Trainer: it writes the optimizer on rank 0 alone, so the state is gathered there first."""

from __future__ import annotations

from torch import nn
from torch.optim import Optimizer
from transformers import Trainer

from sharded_adamax.optimizer import ShardedAdamax
from sharded_adamax.wrappers import unwrapped


class ShardedTrainer(Trainer):
    """A Trainer whose checkpoints hold the whole state of a ShardedAdamax; with any other optimizer, a Trainer.

    The files are those of a Trainer with torch.optim.Adamax and go both ways. Rank 0 holds the whole state in host
    memory while it is written.

    Example:
        >>> trainer = ShardedTrainer(
        ...     model, args, optimizer_cls_and_kwargs=(ShardedAdamax, {"lr": 2e-3, "reduce_gradients": False})
        ... )
        >>> class ShardedSftTrainer(ShardedTrainer, trl.SFTTrainer): ...
    """

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        """Build the optimizer as the Trainer does, on a model that will not move any more."""
        # The Trainer moves the model when it is built, and Accelerate once more when the optimizer is there. On a GPU
        # that does nothing. On the CPU, with several ranks, ``to("cpu:0")`` copies each parameter out of its bucket.
        self.accelerator.device_placement = False
        return super().create_optimizer(model)

    # Not a callback: between its decision to save and the save, the Trainer has no event for one.
    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        optimizer = None if self.optimizer is None else unwrapped(self.optimizer)
        if not isinstance(optimizer, ShardedAdamax):
            super()._save_optimizer_and_scheduler(output_dir)
            return
        optimizer.consolidate_state_dict()
        try:
            super()._save_optimizer_and_scheduler(output_dir)
        finally:
            optimizer.forget_consolidated_state()
