"""How much memory an action takes beyond what was there before, as the kernel and as torch count it."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeVar

from torch.profiler import ProfilerActivity, profile

T = TypeVar("T")


class Growth(NamedTuple):
    """Bytes above those before: at most, and in the end with the result still alive."""

    peak_bytes: int
    end_bytes: int


def growth(action: Callable[[], T]) -> tuple[T, Growth]:
    """Run ``action`` and return its result and how the resident memory of this process grew. Linux only."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # memory that the allocator kept would hide what the action takes
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts at what is resident now
    before = _status_bytes("VmRSS")
    result = action()
    peak = _status_bytes("VmHWM")
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return result, Growth(peak - before, _status_bytes("VmRSS") - before)


def allocated(action: Callable[[], object]) -> Growth:
    """Run ``action`` and return what torch's CPU allocator gave out meanwhile.

    The profiler records every allocation, also those that no Python object shows (the buckets of
    DistributedDataParallel). It does not see a tensor freed that was allocated before.
    """
    gc.collect()  # what earlier runs left would be freed, and counted, in the middle of this one
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        result = action()
    events = recorded.profiler.kineto_results.events()
    now = peak = 0
    for _, nbytes in sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"):
        now += nbytes
        peak = max(peak, now)
    del result
    return Growth(peak, now)


def _status_bytes(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {key}")
