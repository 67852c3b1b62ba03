"""Bytes that an action allocates, counted by torch's allocator."""

from __future__ import annotations

import gc
from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile


def count(action: Callable[[], object]) -> tuple[int, int]:
    """Return the most bytes allocated at one time while ``action`` runs, and those left while its result lives.

    The profiler records every allocation of the CPU allocator, also those that no Python object shows (the buckets of
    DistributedDataParallel).
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
    return peak, now
