"""Checkpoints of model and optimizer: whole or not there, verified, for any number of ranks."""

from sharded_adamax.checkpoint.api import load, save
from sharded_adamax.checkpoint.errors import CheckpointDamagedError, CheckpointError
from sharded_adamax.checkpoint.manager import CheckpointManager

__all__ = ["CheckpointDamagedError", "CheckpointError", "CheckpointManager", "load", "save"]
