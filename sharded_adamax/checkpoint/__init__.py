"""Checkpoints of model and optimizer, through torch.distributed.checkpoint: any number of ranks to any other."""

from sharded_adamax.checkpoint.directory import load, save

__all__ = ["load", "save"]
