"""Parameters out: every rank's updated shard into the flat tensors that the model uses.

[Note: overlapped gathering]  Without overlap an all-gather starts as soon as its bucket is updated, and `step` waits
for all. With it, all-gathers start when every bucket is updated, the one that the forward pass needs first goes first,
and `step` waits for none. Until a bucket has arrived its parameters are late, see [Note: late parameter] in late.py:
whoever needs one waits for its bucket. The next step waits for what nobody needed.

The order is that in which buckets were awaited since the last step on the first rank; the vote of the step tells the
others, so that all issue their all-gathers in one order, also where ranks run different modules.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial

from torch.profiler import record_function

from sharded_adamax.buckets import Bucket
from sharded_adamax.collectives import Group
from sharded_adamax.late import make_late, make_plain
from sharded_adamax.pending import LostRankError, Pending


class ParameterGathering:
    """The all-gathers of a step. They are over when `complete` returns."""

    order: Sequence[int] = ()  # in which the ranks have agreed to gather buckets; those that are not in it come last

    def __init__(self, group: Group) -> None:
        self.group = group
        self._under_way: dict[int, Pending[None]] = {}  # by index of the bucket, in the order of launching
        self._step = 0

    def updated(self, index: int, bucket: Bucket, step: int) -> None:
        """Take note that this rank's shard of ``bucket``, the ``index``-th, is new. Collective."""
        self._step = step
        self._launch(index, bucket)

    def complete(self) -> None:
        """Finish a step: all buckets are updated. Collective."""
        self.settle()

    def settle(self) -> None:
        """Wait until all parameters are new. Local.

        Raises:
            LostRankError: A rank is missing; some parameters are partly old.
        """
        for index in list(self._under_way):
            self._wait(index)

    def wanted_order(self) -> list[int]:
        """Return buckets in the order in which this rank needed them since the last step."""
        return []

    def line(self) -> str:
        """Describe what must be the same on all ranks."""
        return "overlap_forward not called"

    def _launch(self, index: int, bucket: Bucket) -> None:
        with record_function(f"sharded_adamax::all_gather bucket {index}"):
            self._under_way[index] = self.group.all_gather(bucket.flat_param)

    def _wait(self, index: int) -> None:
        with record_function(f"sharded_adamax::wait gather bucket {index}"):
            self._under_way[index].wait(f"the all-gather of bucket {index}, step {self._step}")
        del self._under_way[index]


class OverlappedGathering(ParameterGathering):
    """All-gathers that go on after `step`. See [Note: overlapped gathering]."""

    def __init__(self, group: Group) -> None:
        super().__init__(group)
        self._buckets: dict[int, Bucket] = {}  # updated in this step
        self._awaited: list[int] = []  # since the last step, in this order
        self._lock = threading.RLock()  # autograd's threads may be the first to look at a parameter
        self._error: LostRankError | None = None

    def updated(self, index: int, bucket: Bucket, step: int) -> None:
        self._step = step
        self._buckets[index] = bucket

    def complete(self) -> None:
        self._awaited.clear()
        for index in sorted(self._buckets, key=_places(self.order)):
            self._launch(index, self._buckets[index])
            make_late(self._buckets[index].params, partial(self.wait, index))

    def settle(self) -> None:
        for index in list(self._under_way):
            self.wait(index)

    def wanted_order(self) -> list[int]:
        return self._awaited

    def line(self) -> str:
        return "overlap_forward called"

    def wait(self, index: int) -> None:
        """Wait until the parameters of a bucket are new; returns at once where they are. Local.

        Raises:
            LostRankError: A rank is missing. Whoever looks at one of these parameters later gets the same error.
        """
        with self._lock:
            if index not in self._under_way:
                return
            if self._error is not None:
                raise self._error
            try:
                self._wait(index)
            except LostRankError as error:
                self._error = error
                raise
            make_plain(self._buckets.pop(index).params)
            self._awaited.append(index)


def _places(order: Sequence[int]) -> Callable[[int], tuple[int, int]]:
    """Return a key that sorts buckets by ``order``; those that are not in it come last, the later ones first.

    The first bucket has the last parameters of the model, so the reverse is a good guess before the first forward.
    """
    place = {index: position for position, index in enumerate(order)}
    return lambda index: (place.get(index, len(place)), -index)
