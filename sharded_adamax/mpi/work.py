"""Operations under way, and the two threads that carry them out. See [Note: one thread per group]."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from mpi4py import MPI
from torch import Tensor
from torch._C._distributed_c10d import Store

POLL_SECONDS = 50e-6
ATTENDANCE_SECONDS = 1.0
SHUTDOWN_SECONDS = 2.0


class RankLeft(RuntimeError):
    """A rank has destroyed the group, and the others wait for it in a collective that it never called."""


class Attendance:
    """Which ranks have left a group, and after how many collectives: told through torch's store.

    MPI lets a rank wait for ever for one that is not coming. gloo's connections break in such a case; here a rank that
    leaves says so, and one that has waited for a while looks.

    Args:
        store: Of the group, so that its keys are the group's own.
        with_host: Whether the rank that keeps the store is one of the group: if the store is gone, so is that rank.
    """

    def __init__(self, store: Store, rank: int, size: int, *, with_host: bool) -> None:
        self._store = store
        self._rank = rank
        self._size = size
        self._with_host = with_host

    def leave(self, num_collectives: int) -> None:
        """Tell the others that this rank takes part in no more than its first ``num_collectives``."""
        try:
            self._store.set(f"left/{self._rank}", str(num_collectives))
            self._store.set("left", "")
        except RuntimeError:  # the store's host has left before us
            pass

    def missing(self, number: int) -> str | None:
        """Return who will not come to the collective with this number; the first is 1."""
        try:
            if not self._store.check(["left"]):
                return None
            for rank in range(self._size):
                if self._store.check([f"left/{rank}"]) and int(self._store.get(f"left/{rank}")) < number:
                    return f"rank {rank} of the group"
        except RuntimeError:
            return "rank 0, which kept the store," if self._with_host else None
        return None


class MpiWork(dist.Work):
    """An operation under way. `wait` raises what went wrong, on the rank where it went wrong.

    Args:
        what: For errors: "rank 1 of 4: broadcast".
        missing: Returns who is not coming; asked now and then while somebody waits.
    """

    def __init__(
        self, what: str, result: Any, timeout: timedelta, missing: Callable[[], str | None] = lambda: None
    ) -> None:
        super().__init__()
        self._what = what
        self._result = result
        self._timeout = timeout
        self._missing = missing
        self._finished = threading.Event()
        self._error: Exception | None = None
        self._future: torch.futures.Future[Any] = torch.futures.Future()
        self.source = -1  # of a message from any rank: the sender

    def finish(self, error: Exception | None = None) -> None:
        """Let the waiting go on. Called once, by the thread that did the work."""
        self._error = error
        self._finished.set()
        if error is None:
            self._future.set_result(self._result)
        else:
            self._future.set_exception(error)

    def wait(self, timeout: timedelta | None = None) -> bool:
        # torch says zero, or less, where it means the group's own.
        limit = timeout if timeout is not None and timeout > timedelta() else self._timeout
        deadline = time.monotonic() + limit.total_seconds()
        while not self._finished.wait(min(ATTENDANCE_SECONDS, max(0.0, deadline - time.monotonic()))):
            if (missing := self._missing()) is not None and not self._finished.is_set():
                raise RankLeft(
                    f"{self._what} cannot finish: {missing} has left; look for the first error in the output"
                )
            if time.monotonic() >= deadline:
                raise RuntimeError(
                    f"{self._what} did not finish within {limit.total_seconds():g} s: expected every rank of the group "
                    "to take part. A rank hangs, or calls other collectives, or in another order; look for the first "
                    "error in the output"
                )
        if self._error is not None:
            raise RuntimeError(f"{self._what} failed: {self._error}") from self._error
        return True

    def is_completed(self) -> bool:
        return self._finished.is_set()

    def is_success(self) -> bool:
        return self._finished.is_set() and self._error is None

    def exception(self) -> Exception | None:
        return self._error

    def result(self) -> Any:
        return self._result

    def get_future(self) -> torch.futures.Future[Any]:
        return self._future

    def source_rank(self) -> int:
        return self.source

    _source_rank = source_rank


class Task(NamedTuple):
    """A collective, waiting for its turn."""

    action: Callable[[], None]
    work: MpiWork


class Message(NamedTuple):
    """A message that MPI has been told of."""

    requests: list[MPI.Request]
    work: MpiWork
    keep_alive: Tensor


class Threads:
    """One thread that runs collectives one after another, and one, where there are messages, that watches those."""

    def __init__(self) -> None:
        self._tasks: queue.SimpleQueue[Task | None] = queue.SimpleQueue()
        self._messages: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        self._collectives = threading.Thread(target=self._run_tasks, name="mpi-collectives", daemon=True)
        self._collectives.start()
        self._watch: threading.Thread | None = None

    def queue(self, task: Task) -> None:
        """Run a collective when those before it are done."""
        self._tasks.put(task)

    def watch(self, message: Message) -> None:
        """Finish a message's work when the message has arrived."""
        if self._watch is None:
            self._watch = threading.Thread(target=self._run_messages, name="mpi-messages", daemon=True)
            self._watch.start()
        self._messages.put(message)

    def stop(self) -> bool:
        """Finish what is under way, within SHUTDOWN_SECONDS; False if it did not end: another rank is not coming."""
        self._tasks.put(None)
        self._messages.put(None)
        threads = [self._collectives] if self._watch is None else [self._collectives, self._watch]
        deadline = time.monotonic() + SHUTDOWN_SECONDS
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        return not any(thread.is_alive() for thread in threads)

    @torch.no_grad()
    def _run_tasks(self) -> None:
        while (task := self._tasks.get()) is not None:
            action, work = task
            error: Exception | None = None
            try:
                action()
            except Exception as caught:  # raised again where it is waited for
                error = caught
            del task, action  # who waits may count on it: after `wait` the tensors are the caller's alone
            work.finish(error)
            del work

    def _run_messages(self) -> None:
        # Watched by asking, not by waiting: a thread that waits inside MPI could not be given the next message.
        under_way: list[Message] = []
        stopping = False
        while under_way or not stopping:
            try:
                new = self._messages.get(block=not under_way)
                stopping = stopping or new is None
                if new is not None:
                    under_way.append(new)
            except queue.Empty:
                new = None
            still = [message for message in under_way if not _try_finish(message)]
            if len(still) == len(under_way):
                time.sleep(POLL_SECONDS)
            under_way = still


def _try_finish(message: Message) -> bool:
    statuses = [MPI.Status() for _ in message.requests]
    try:
        if not MPI.Request.Testall(message.requests, statuses):
            return False
        message.work.source = statuses[0].source
        message.work.finish()
    except MPI.Exception as error:
        message.work.finish(error)
    return True
