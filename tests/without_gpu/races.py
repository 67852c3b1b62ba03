"""Which operations of several streams may run at the same time: vector clocks over what a program put into them.

A trace lists, in the order in which the host did it, what was put into each stream and what the allocator was told.
The host's order does not depend on the order in which the device works, so one trace stands for all runs, and a trace
in which one event is left out stands for the same program without it. `findings` says what can go wrong:

- a race: two streams touch the same bytes, one writes, and neither waits for the other;
- a hazard: memory is freed while a stream may still use it that the stream it was allocated on does not wait for and
  that the allocator was not told of (``record_stream``). The next owner of the memory and the old one would meet there.

Nothing is taken for ordered but what a wait orders: not what follows because the host has read a value, not collectives
that are run one after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

Clock = dict[str, int]  # stream -> how many of its accesses are over


class Access(NamedTuple):
    """An operation reads or writes some bytes."""

    stream: str
    storage: int
    start: int
    stop: int
    writes: bool
    operation: str


class Mark(NamedTuple):
    """An event is recorded: it is over when all that the stream has so far is."""

    stream: str
    event: int


class Wait(NamedTuple):
    """What comes next in a stream waits for an event. ``site`` is the package's line that asked for it, or empty."""

    stream: str
    event: int
    site: str


class Allocate(NamedTuple):
    """Memory is handed out, for use on one stream."""

    stream: str
    storage: int


class Hold(NamedTuple):
    """The allocator is told of another stream that uses the memory. ``site`` as in `Wait`."""

    stream: str
    storage: int
    site: str


class Free(NamedTuple):
    """Nobody holds the memory any more."""

    storage: int


Event = Access | Mark | Wait | Allocate | Hold | Free


@dataclass
class _Memory:
    owner: str  # the stream it was allocated on
    holders: set[str] = field(default_factory=set)
    accesses: list[tuple[Access, int]] = field(default_factory=list)  # with the time in their stream


class _Replay:
    def __init__(self) -> None:
        self.clocks: dict[str, Clock] = {}
        self.events: dict[int, Clock] = {}
        self.memory: dict[int, _Memory] = {}
        self.found: list[str] = []

    def clock(self, stream: str) -> Clock:
        return self.clocks.setdefault(stream, {stream: 0})

    def changes_something(self, event: Wait | Hold) -> bool:
        """Return whether a wait is for more than was awaited before, or the allocator is told something new."""
        if isinstance(event, Wait):
            known = self.clock(event.stream)
            return any(known.get(stream, 0) < time for stream, time in self.events[event.event].items())
        memory = self.memory[event.storage]
        return event.stream != memory.owner and event.stream not in memory.holders

    def apply(self, event: Event) -> None:
        match event:
            case Access():
                self._access(event)
            case Mark():
                self.events[event.event] = dict(self.clock(event.stream))
            case Wait():
                known = self.clock(event.stream)
                for stream, time in self.events[event.event].items():
                    known[stream] = max(known.get(stream, 0), time)
            case Allocate():
                self.memory[event.storage] = _Memory(event.stream)
            case Hold():
                self.memory[event.storage].holders.add(event.stream)
            case Free():
                self._free(event)

    def _access(self, new: Access) -> None:
        clock = self.clock(new.stream)
        clock[new.stream] += 1
        memory = self.memory[new.storage]
        kept = []
        for old, time in memory.accesses:
            overlaps = old.start < new.stop and new.start < old.stop
            is_over = clock.get(old.stream, 0) >= time
            if overlaps and not is_over and (old.writes or new.writes):
                self.found.append(f"race: {_text(new)} while {_text(old)}")
            # Whoever waits for the new one waits for the old one, too.
            is_covered = is_over and new.start <= old.start and old.stop <= new.stop
            if not (is_covered and (new.writes or (new.stream == old.stream and not old.writes))):
                kept.append((old, time))
        memory.accesses = [*kept, (new, clock[new.stream])]

    def _free(self, event: Free) -> None:
        memory = self.memory.pop(event.storage)
        known = [self.clock(stream) for stream in (memory.owner, *memory.holders)]
        for access, time in memory.accesses:
            if all(clock.get(access.stream, 0) < time for clock in known):
                self.found.append(f"hazard: memory of stream {memory.owner} is freed while {_text(access)}")


def _text(access: Access) -> str:
    does = "writes" if access.writes else "reads"
    return f"{access.operation} on {access.stream} {does} bytes {access.start}:{access.stop} of #{access.storage}"


def findings(trace: Sequence[Event], without: frozenset[int] = frozenset()) -> list[str]:
    """Return the races and hazards of a program, in the order in which it meets them.

    Args:
        without: Places of events in the trace that are left out.
    """
    replay = _Replay()
    for place, event in enumerate(trace):
        if place not in without:
            replay.apply(event)
    return replay.found


def precautions(trace: Sequence[Event]) -> list[frozenset[int]]:
    """Return the waits and holds of the package, each as the places of the events that are one.

    Those that change nothing are left out: waiting again for what was awaited, telling the allocator what it knows.
    """
    replay = _Replay()
    found = []
    for place, event in enumerate(trace):
        if isinstance(event, Wait | Hold) and event.site and replay.changes_something(event):
            places = {place}
            if isinstance(event, Hold):  # said again later, it would be in time, too
                places |= {i for i, other in enumerate(trace) if isinstance(other, Hold) and other[:2] == event[:2]}
            found.append(frozenset(places))
        replay.apply(event)
    return found
