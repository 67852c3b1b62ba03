"""What can be wrong with a checkpoint."""

from __future__ import annotations


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or read. The message says which file, and what to do."""


class CheckpointDamagedError(CheckpointError):
    """A file of a checkpoint is not what was written: flipped, cut, missing, or of another save."""
