"""What is asked of a group, counted."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch.profiler import record_function


@dataclass
class Traffic:
    """What this rank asked of a group, by kind: calls, bytes handed over to be sent to other ranks, and waiting for it.

    The time is that of the host: over NCCL it hardly waits, because the device does.
    """

    calls: Counter[str] = field(default_factory=Counter)
    sent_bytes: Counter[str] = field(default_factory=Counter)
    waited_seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    def record(self, kind: str, sent_bytes: int) -> None:
        self.calls[kind] += 1
        self.sent_bytes[kind] += sent_bytes

    @contextmanager
    def waiting(self, kind: str, what: str) -> Iterator[None]:
        """Count the time inside, and name it to the profiler: "wait reduce bucket 3"."""
        with record_function(f"sharded_adamax::wait {what}"):
            start = time.perf_counter()
            try:
                yield
            finally:
                self.waited_seconds[kind] += time.perf_counter() - start

    def take_waited_seconds(self) -> dict[str, float]:
        """Return the time waited since the last call, by kind."""
        waited, self.waited_seconds = self.waited_seconds, defaultdict(float)
        return waited
