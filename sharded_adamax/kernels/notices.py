"""What a user who asked for ``fused=True`` is told where something else runs."""

from __future__ import annotations

import logging
import warnings

LOGGER = logging.getLogger("sharded_adamax.kernels")
_said: set[str] = set()


def say_once(reason: str) -> None:
    """Say why ``fused=True`` is not what runs, to the log and as a warning; the same reason once per process."""
    if reason not in _said:
        _said.add(reason)
        text = f"fused=True {reason}. The update runs without it: slower, with the same result"
        LOGGER.warning(text)
        warnings.warn(text, RuntimeWarning, stacklevel=2)
