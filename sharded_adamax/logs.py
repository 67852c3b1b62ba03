"""What the package tells its loggers, ``sharded_adamax.<room>``.

No handler is installed, not even logging.NullHandler: with it a program that has not configured logging would not see
that a step was skipped or a checkpoint damaged. Python prints warnings and errors to stderr by itself.
"""

from __future__ import annotations

import logging


def log_for_all(logger: logging.Logger, rank: int, level: int, message: str, *args: object) -> None:
    """Log what every rank has to say: at ``level`` on the first rank of the group, at DEBUG on the others.

    Args:
        args: Those that are functions are called for their value, and only if somebody hears it.
    """
    level = level if rank == 0 else logging.DEBUG
    if logger.isEnabledFor(level):
        values = (arg() if callable(arg) else arg for arg in args)
        logger.log(level, f"rank %d: {message}", rank, *values, stacklevel=2)
