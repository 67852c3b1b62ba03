"""Collectives under way, and what can be said of the ranks when one fails."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import timedelta
from typing import Generic, NamedTuple, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from sharded_adamax.streams import take_over

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

# How long to look whether a message is there after all, once it is known that the job has failed.
GLANCE = timedelta(milliseconds=50)


class LostRankError(RuntimeError):
    """Another rank did not take part in a collective: it raised, died or hangs. The job cannot go on."""

    def __init__(self, rank: int, lost: Sequence[int], doing: str, cause: object) -> None:
        who = f"rank{'s' if len(lost) > 1 else ''} {', '.join(map(str, lost))}" if lost else "another rank"
        super().__init__(
            f"rank {rank} waited in vain for {who} in {doing}. A rank that is missing has raised, died or hangs, and "
            f"its own output says why; end the job and start it again from the last checkpoint ({cause})"
        )
        self.rank = rank
        self.lost = tuple(lost)  # empty: not known
        self.doing = doing
        self.cause = cause

    def naming(self, lost: Sequence[int]) -> LostRankError:
        """Return the same error with other culprits."""
        return LostRankError(self.rank, lost, self.doing, self.cause)


class Pending(Protocol[T_co]):
    """A collective under way."""

    @property
    def held_bytes(self) -> int:
        """Bytes that live only until ``wait``: what is being sent, and where others' messages arrive."""

    def wait(self, doing: str) -> T_co:
        """Return the result. May be called once; where there are streams, once on each.

        Args:
            doing: For the message: "the all-gather of bucket 3, step 12".

        Raises:
            LostRankError: Another rank did not take part, or not in time.
        """

    def missing(self) -> list[int]:
        """Return the ranks whose messages are not there yet, as far as this is known. For use after a failure only."""


@dataclass
class Done(Generic[T]):
    """Nothing to wait for."""

    result: T

    @property
    def held_bytes(self) -> int:
        return 0

    def wait(self, doing: str) -> T:
        return self.result

    def missing(self) -> list[int]:
        return []


@dataclass
class Queued:
    """Not sent anywhere, but perhaps not there yet: ``stream`` has what makes it. None: there are no streams."""

    result: Tensor
    stream: torch.Stream | None

    @property
    def held_bytes(self) -> int:
        return 0

    def wait(self, doing: str) -> Tensor:
        take_over([self.result], after=[self.stream])
        return self.result

    def missing(self) -> list[int]:
        return []


@dataclass
class Native(Generic[T]):
    """A collective of torch.distributed. Holds the tensors it works on until waited for.

    On a GPU it is the current stream that waits, not the host. Before that the memory is held by reference: torch
    promises no more, and its own NCCL group lets go when `wait` returns (pytorch/pytorch#188655). From then on the
    allocator has to know that the stream which waited is not the one that allocated.
    """

    rank: int
    work: dist.Work
    result: T
    keep_alive: Tensor | None = None

    @property
    def held_bytes(self) -> int:
        return 0 if self.keep_alive is None else self.keep_alive.nbytes

    def wait(self, doing: str) -> T:
        try:
            self.work.wait()
        except RuntimeError as error:
            raise LostRankError(self.rank, [], doing, error) from error
        take_over([tensor for tensor in (self.result, self.keep_alive) if isinstance(tensor, Tensor)])
        self.keep_alive = None
        return self.result

    def missing(self) -> list[int]:
        return []


class Work(Protocol):
    """What there is to wait for of a ``torch.distributed.Work``."""

    def wait(self, timeout: timedelta = ...) -> bool: ...


@dataclass(frozen=True)
class Refused:
    """A message that could not be posted, because the connection to the other rank is gone."""

    error: RuntimeError

    def wait(self, timeout: timedelta = GLANCE) -> bool:
        raise self.error


class Message(NamedTuple):
    """A message to or from another rank."""

    peer: int
    is_arrival: bool
    work: Work


class Part(NamedTuple):
    """The messages that carry the same part of every row, and what is to be done when they are through."""

    messages: list[Message]
    then: Callable[[], None]


@dataclass
class Messages(Generic[T]):
    """Point-to-point messages under way, or about to be. ``result`` is one when all parts are through."""

    rank: int
    posted: Future[list[Part]]
    result: T
    held_bytes: int

    def wait(self, doing: str) -> T:
        parts = self.posted.result()
        for part in parts:
            for message in part.messages:
                try:
                    message.work.wait()
                except RuntimeError as error:
                    raise LostRankError(self.rank, [message.peer], doing, error) from error
            part.then()
        parts.clear()
        return self.result

    def missing(self) -> list[int]:
        found: list[int] = []
        for message in itertools.chain.from_iterable(part.messages for part in self.posted.result()):
            if message.is_arrival and message.peer not in found:
                try:
                    message.work.wait(GLANCE)
                except RuntimeError:
                    found.append(message.peer)
        return sorted(found)
