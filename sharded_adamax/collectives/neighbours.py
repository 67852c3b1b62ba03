"""Rows of collectives between the ranks of one host, each read straight out of the other's memory.

[Note: neighbours]  In a collective a rank *offers* each neighbour the row that is meant for it: an address and a size.
The neighbour copies it to where it belongs and says that it has *taken* it; until then the row must not change. A
thread reads, so that rows travel while nobody waits, as messages do. Offer and row are matched by the kind of
collective and its number, so the order in which ranks post different kinds is free.

Whoever waits for a neighbour whose process has ended is told at once, otherwise after the timeout of the process group,
as with messages. One that has only hung up may be on its way to its end: a rank that fails hangs up first, and if the
others ended before it did, their launcher would take them for the cause.
"""

from __future__ import annotations

import os
import select
import struct
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import NamedTuple

from torch import Tensor

from sharded_adamax.collectives.lines import Line

# What is read between two looks at whether the neighbour lives, and before whoever waits may use it.
PIECE_BYTES = 4 << 20

_NOTICE = struct.Struct("=BBQQQ")  # offer or taken, kind, number; of an offer address and bytes
_OFFER, _TAKEN = range(2)
_KINDS = ("reduce_scatter", "all_gather")


class _Key(NamedTuple):
    """Says which row of which collective."""

    peer: int
    kind: int
    number: int


@dataclass(eq=False)
class _Transfer:
    """A row to a neighbour and the row from it, in one collective. Lets go of each when it is through."""

    outgoing: Tensor | None
    incoming: Tensor | None
    num_bytes: int
    arrived_bytes: int = 0
    error: Exception | None = None

    @property
    def is_over(self) -> bool:
        return self.outgoing is None and self.incoming is None


@dataclass(frozen=True)
class Wait:
    """As a ``torch.distributed.Work``: raises RuntimeError where what is waited for does not come."""

    reading: _Reading
    transfer: _Transfer
    is_done: Callable[[], bool]

    def wait(self, timeout: timedelta | None = None) -> bool:
        self.reading.wait(self.transfer, self.is_done, timeout)
        return True


@dataclass(frozen=True)
class Rows:
    """The rows to and from one neighbour in one collective, to be waited for."""

    reading: _Reading
    transfer: _Transfer

    def arrival(self, stop: int) -> Wait:
        """Return the wait for the first ``stop`` bytes of the row from the neighbour."""
        return Wait(self.reading, self.transfer, lambda: self.transfer.arrived_bytes >= stop)

    def departure(self) -> Wait:
        """Return the wait until the neighbour has taken the row that is meant for it."""
        return Wait(self.reading, self.transfer, lambda: self.transfer.outgoing is None)


class Neighbours:
    """The neighbours of this rank in one group. They are left when this object goes, or the program ends."""

    def __init__(self, lines: Mapping[int, Line], timeout: timedelta) -> None:
        self.ranks = frozenset(lines)
        self._lines = lines
        self._numbers = dict.fromkeys(_KINDS, 0)
        self._reading = _Reading(lines, timeout)
        # A daemon: whoever is interrupted while this rank is alone in waiting can end the program.
        thread = threading.Thread(target=self._reading.run, name="sharded_adamax reading", daemon=True)
        thread.start()
        # Before the interpreter is finalised, because a thread that wakes up then ends the process badly.
        self.close = weakref.finalize(self, _leave, self._reading, thread)

    def post(self, kind: str, send: Callable[[int], Tensor], receive: Callable[[int], Tensor]) -> dict[int, Rows]:
        """Offer each neighbour its row and start reading the row from it; the rest is as in `GlooGroup`.

        Args:
            kind: "reduce_scatter" or "all_gather".
            send: The row for a rank, contiguous; must not change before its departure.
            receive: Where the row of a rank is to go, as large.
        """
        number = self._numbers[kind]
        self._numbers[kind] += 1
        rows = {}
        for peer, line in self._lines.items():
            outgoing = send(peer)
            address, num_bytes = outgoing.data_ptr(), outgoing.nbytes
            transfer = _Transfer(outgoing, receive(peer), num_bytes)
            key = _Key(peer, _KINDS.index(kind), number)
            self._reading.expect(key, transfer)
            # Where it fails, the thread that reads finds that out as well, and whoever waits is told.
            with suppress(OSError):
                line.tell(_NOTICE.pack(_OFFER, key.kind, number, address, num_bytes))
            rows[peer] = Rows(self._reading, transfer)
        return rows


def _leave(reading: _Reading, thread: threading.Thread) -> None:
    # In a child made by fork there is no such thread, and nobody hangs up.
    reading.stop()
    if thread is not threading.current_thread():  # which drops the last reference by chance
        thread.join()
        reading.close()


class _Reading:
    """What the thread does, and what it shares with those who post and wait."""

    def __init__(self, lines: Mapping[int, Line], timeout: timedelta) -> None:
        self._lines = lines
        self._timeout = timeout
        self._wake = os.eventfd(0)
        self._stopping = False
        # What the thread waits for; the one neighbour that a file number belongs to; whom it does not hear any more.
        self._poll = select.poll()
        self._connections = {line.connection: peer for peer, line in lines.items()}
        self._processes = {line.process: peer for peer, line in lines.items()}
        self._deaf_to: set[int] = set()
        for fileno in (self._wake, *self._connections, *self._processes):
            self._poll.register(fileno, select.POLLIN)
        # Guards all below, and is notified when a transfer gets on.
        self._changed = threading.Condition()
        self._transfers: dict[_Key, _Transfer] = {}
        self._offers: dict[_Key, tuple[int, int]] = {}  # address and bytes
        self._lost: dict[int, Exception] = {}

    def expect(self, key: _Key, transfer: _Transfer) -> None:
        with self._changed:
            transfer.error = self._lost.get(key.peer)
            if transfer.error is None:
                self._transfers[key] = transfer
            offered = key in self._offers
        if offered:
            os.eventfd_write(self._wake, 1)

    def wait(self, transfer: _Transfer, is_done: Callable[[], bool], timeout: timedelta | None) -> None:
        timeout = self._timeout if timeout is None else timeout
        with self._changed:
            self._changed.wait_for(lambda: is_done() or transfer.error is not None, timeout.total_seconds())
            if not is_done():
                raise RuntimeError(str(transfer.error or f"nothing was heard of it within {timeout}"))

    def stop(self) -> None:
        self._stopping = True
        os.eventfd_write(self._wake, 1)

    def close(self) -> None:
        os.close(self._wake)

    def run(self) -> None:
        try:
            while not self._stopping:
                ready = {fileno for fileno, _ in self._poll.poll()}
                if self._wake in ready:
                    os.eventfd_read(self._wake)
                for fileno in ready & self._connections.keys():
                    peer = self._connections[fileno]
                    with self._while_heard(peer):
                        self._listen(peer)
                while (key := self._next_offer()) is not None:
                    with self._while_heard(key.peer):
                        self._take(key)
                for fileno in ready & self._processes.keys():  # after its last words
                    self._poll.unregister(fileno)
                    self._lose(self._processes[fileno], ConnectionError("its process has ended"))
        except BaseException as error:
            for peer in self._lines:
                self._lose(peer, RuntimeError(f"the thread that reads has failed: {error!r}"))
            raise
        finally:
            for line in self._lines.values():
                line.close()

    @contextmanager
    def _while_heard(self, peer: int) -> Iterator[None]:
        """Where something fails with a neighbour, what is left is to see the end of its process."""
        try:
            yield
        except OSError:
            if peer not in self._deaf_to:
                self._deaf_to.add(peer)
                self._poll.unregister(self._lines[peer].connection)

    def _listen(self, peer: int) -> None:
        for notice in self._lines[peer].notices(_NOTICE.size):
            what, kind, number, address, num_bytes = _NOTICE.unpack(notice)
            key = _Key(peer, kind, number)
            with self._changed:
                if what == _OFFER:
                    self._offers[key] = (address, num_bytes)
                elif key in self._transfers:
                    self._transfers[key].outgoing = None
                    self._got_on(key)

    def _next_offer(self) -> _Key | None:
        """Return an offer of a row that is expected here."""
        with self._changed:
            return next((key for key in self._offers if key in self._transfers), None)

    def _take(self, key: _Key) -> None:
        line = self._lines[key.peer]
        with self._changed:
            transfer = self._transfers[key]
            address, num_bytes = self._offers.pop(key)
        if num_bytes != transfer.num_bytes:
            self._lose(key.peer, RuntimeError(f"expected a row of {transfer.num_bytes} bytes, got one of {num_bytes}"))
            return
        assert transfer.incoming is not None
        target = transfer.incoming.data_ptr()
        for start in range(0, num_bytes, PIECE_BYTES):
            stop = min(start + PIECE_BYTES, num_bytes)
            line.read(address, target, start, stop)
            if stop == num_bytes:
                break
            with self._changed:
                transfer.arrived_bytes = stop
                self._changed.notify_all()
        line.tell(_NOTICE.pack(_TAKEN, key.kind, key.number, 0, 0))
        with self._changed:
            transfer.arrived_bytes = num_bytes
            transfer.incoming = None
            self._got_on(key)

    def _got_on(self, key: _Key) -> None:
        if self._transfers[key].is_over:
            del self._transfers[key]
        self._changed.notify_all()

    def _lose(self, peer: int, error: Exception) -> None:
        with self._changed:
            self._lost.setdefault(peer, error)
            for key in [key for key in self._transfers if key.peer == peer]:
                self._transfers.pop(key).error = error
            self._changed.notify_all()
