"""How much memory an action takes beyond what was there before, as the kernel counts it. Linux only."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeVar

T = TypeVar("T")


class Growth(NamedTuple):
    """Bytes of resident memory above those before: at most, and in the end with the result still alive."""

    peak_bytes: int
    end_bytes: int


def growth(action: Callable[[], T]) -> tuple[T, Growth]:
    """Run ``action`` and return its result and how the resident memory of this process grew."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # memory that the allocator kept would hide what the action takes
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts at what is resident now
    before = _status_bytes("VmRSS")
    result = action()
    peak = _status_bytes("VmHWM")
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return result, Growth(peak - before, _status_bytes("VmRSS") - before)


def _status_bytes(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {key}")
