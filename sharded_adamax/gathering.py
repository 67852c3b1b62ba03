"""Parameters out: every rank's updated shard into the flat tensors that the model uses.

[Note: overlapped gathering]  An all-gather starts as soon as its bucket is updated. Without overlap buckets are updated
in the order in which their gradients arrive, and `step` waits for all gathers. With it the bucket that the forward pass
needs first is updated first, the others under its gather, and `step` waits for none. Until a bucket has arrived its
parameters are late, see [Note: late parameter] in late.py: whoever needs one waits for its bucket. The next step waits
for what nobody needed, and so does the end of the program, because other ranks may go on, and need this rank's shards.
On a GPU it is a stream that waits, see [Note: stream] in streams.py; another follows when it runs a module.

The order is that in which buckets were awaited since the last step on the first rank; the vote of the step tells the
others, so that all issue their all-gathers in one order, also where ranks run different modules.
"""

from __future__ import annotations

import atexit
import threading
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial

import torch
from torch.profiler import record_function

from sharded_adamax import streams
from sharded_adamax.buckets import Bucket
from sharded_adamax.collectives import Group
from sharded_adamax.late import ask_to_follow, make_late, make_plain
from sharded_adamax.pending import LostRankError, Pending


@dataclass
class _Gather:
    """The latest all-gather of one bucket."""

    index: int
    bucket: Bucket
    pending: Pending[None]
    step: int
    streams: set[torch.Stream | None] = field(default_factory=set)  # that have waited for it


class ParameterGathering:
    """The all-gathers of a step. They are over when `complete` returns."""

    order: Sequence[int] = ()  # in which the ranks have agreed to gather buckets; those that are not in it come last

    def __init__(self, group: Group) -> None:
        self.group = group
        self._gathers: dict[int, _Gather] = {}  # by index of the bucket

    def sequence(self, num_buckets: int) -> Sequence[int]:
        """Return the order in which to update buckets, the same on all ranks: that of their gradients."""
        return range(num_buckets)

    def updated(self, index: int, bucket: Bucket, step: int) -> None:
        """Take note that this rank's shard of ``bucket``, the ``index``-th, is new. Collective."""
        self._launch(index, bucket, step)

    def complete(self) -> None:
        """Finish a step: all buckets are updated. Collective."""
        self.settle()

    def settle(self) -> None:
        """Wait until all parameters are new. Local.

        Raises:
            LostRankError: A rank is missing; some parameters are partly old.
        """
        for gather in self._gathers.values():
            self._wait_for(gather)
        self._gathers.clear()

    def wanted_order(self) -> list[int]:
        """Return buckets in the order in which this rank needed them since the last step."""
        return []

    def line(self) -> str:
        """Describe what must be the same on all ranks."""
        return "overlap_forward not called"

    def _launch(self, index: int, bucket: Bucket, step: int) -> None:
        with record_function(f"sharded_adamax::all_gather bucket {index}"):
            self._gathers.pop(index, None)  # so that they are in the order of launching
            self._gathers[index] = _Gather(index, bucket, self.group.all_gather(bucket.flat_param), step)

    def _wait_for(self, gather: _Gather) -> None:
        with self.group.traffic.waiting("all_gather", f"gather bucket {gather.index}"):
            gather.pending.wait(f"the all-gather of bucket {gather.index}, step {gather.step}")


class OverlappedGathering(ParameterGathering):
    """All-gathers that go on after `step`. See [Note: overlapped gathering]."""

    def __init__(self, group: Group) -> None:
        super().__init__(group)
        self._awaited: list[int] = []  # since the last step, in this order
        self._abreast: set[torch.Stream | None] = set()  # streams that have waited for all that any has waited for
        self._lock = threading.RLock()  # autograd's threads may be the first to look at a parameter
        self._error: LostRankError | None = None
        atexit.register(_finish, weakref.ref(self))

    def sequence(self, num_buckets: int) -> list[int]:
        return sorted(range(num_buckets), key=_places(self.order))

    def updated(self, index: int, bucket: Bucket, step: int) -> None:
        self._launch(index, bucket, step)
        make_late(bucket.params, partial(self.wait, index))

    def complete(self) -> None:
        self._awaited.clear()
        if self._gathers and self._here() is not None:
            ask_to_follow(self)

    def settle(self) -> None:
        for index in self._gathers:
            self.wait(index)

    def wanted_order(self) -> list[int]:
        return self._awaited

    def line(self) -> str:
        return "overlap_forward called"

    def wait(self, index: int) -> None:
        """Wait until the parameters of a bucket are new; returns at once where this stream has waited. Local.

        Raises:
            LostRankError: A rank is missing. Whoever looks at one of these parameters later gets the same error.
        """
        gather = self._gathers[index]
        here = self._here()
        with self._lock:
            if here in gather.streams:
                return
            if self._error is not None:
                raise self._error
            try:
                self._wait_for(gather)
            except LostRankError as error:
                self._error = error
                raise
            if not gather.streams:
                self._awaited.append(index)
                self._abreast &= {here}
                make_plain(gather.bucket.params)
            gather.streams.add(here)

    def follow(self) -> None:
        """Make the current stream wait for all that other streams have waited for. Local."""
        here = self._here()
        if here in self._abreast:
            return
        with self._lock:
            for gather in self._gathers.values():
                if gather.streams:
                    self.wait(gather.index)
            self._abreast.add(here)

    def _here(self) -> torch.Stream | None:
        """Return the current stream of the device that all parameters are on."""
        first = next(iter(self._gathers.values()))
        return streams.current(first.bucket.flat_param.device)


def _finish(gathering: weakref.ref[OverlappedGathering]) -> None:
    """Wait for what is under way when the program ends. On a GPU the host waits, too."""
    alive = gathering()
    if alive is None or not alive._gathers:
        return
    with suppress(LostRankError):  # nobody here needs it any more
        alive.settle()
    here = alive._here()
    if here is not None:
        here.synchronize()


def _places(order: Sequence[int]) -> Callable[[int], tuple[int, int]]:
    """Return a key that sorts buckets by ``order``; those that are not in it come last, the later ones first.

    The first bucket has the last parameters of the model, so the reverse is a good guess before the first forward.
    """
    place = {index: position for position, index in enumerate(order)}
    return lambda index: (place.get(index, len(place)), -index)
