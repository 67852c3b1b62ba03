"""Processes that are cheap enough to kill: a server that has torch loaded forks ranks, which then make a gloo group.

The server itself never computes and never has a thread or a process group, so its children start from a clean slate.
"""

from __future__ import annotations

import datetime
import gc
import multiprocessing
import os
import pickle
import signal
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

_NEVER_SECONDS = 60.0


@dataclass(frozen=True)
class Outcome:
    """How a rank ended. ``value`` is what its function returned; ``error`` what it raised."""

    exit_code: int  # minus the signal where one killed it
    value: Any
    error_type: str | None
    error: str
    traceback: str

    @property
    def was_killed(self) -> bool:
        return self.exit_code == -signal.SIGKILL


class Hang(AssertionError):
    """A rank did not end by itself."""


class RankFailed(AssertionError):
    """A rank raised where none should."""


def _rank_main(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    rank: int,
    world_size: int,
    directory: str,
    group_timeout_s: float,
) -> None:
    import torch
    import torch.distributed as dist

    # What a dying rank says is expected; it is kept for the case that it was not.
    log = os.open(f"{directory}/stderr{rank}", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    warnings.simplefilter("ignore")
    torch.manual_seed(1000 + rank)
    result: tuple[Any, ...]
    try:
        if world_size > 1:
            dist.init_process_group(
                "gloo",
                init_method=f"file://{directory}/store",
                rank=rank,
                world_size=world_size,
                timeout=datetime.timedelta(seconds=group_timeout_s),
            )
        result = (function(*args), None, "", "")
    except BaseException as error:
        result = (None, type(error).__name__, str(error), traceback.format_exc())
    unfinished = Path(directory) / f".outcome{rank}"
    unfinished.write_bytes(pickle.dumps(result))
    unfinished.rename(Path(directory) / f"outcome{rank}")
    # multiprocessing ends the process as the interpreter does: it waits for threads, such as that of an asynchronous
    # save.


def _serve(connection: Connection) -> None:
    import torch
    import torch._dynamo  # imported by the first step of an optimizer otherwise, in every child anew

    import tests.crash.program

    assert tests.crash.program
    torch.set_num_threads(1)
    gc.freeze()  # else the first collection in a child copies every page of the modules
    fork = multiprocessing.get_context("fork")
    children: dict[int, BaseProcess] = {}
    while True:
        try:
            command, *rest = connection.recv()
        except EOFError:
            break
        if command == "start":
            child = fork.Process(target=_rank_main, args=tuple(rest))
            child.start()
            assert child.pid is not None
            children[child.pid] = child
            connection.send(child.pid)
        else:
            pid, timeout_s = rest
            children[pid].join(timeout_s)
            connection.send(children[pid].exitcode)
            if children[pid].exitcode is not None:
                children.pop(pid).close()
    for process in children.values():
        process.kill()


class Ranks:
    """The ranks of one life of a job."""

    def __init__(self, nursery: Nursery, pids: list[int], directory: Path) -> None:
        self.pids = pids
        self._nursery = nursery
        self._directory = directory

    def kill(self, rank: int) -> None:
        """Send SIGKILL; a rank that has ended and was not joined is still there to receive it."""
        os.kill(self.pids[rank], signal.SIGKILL)

    def join(self, timeout_s: float = _NEVER_SECONDS) -> list[Outcome]:
        """Wait until all ranks have ended by themselves.

        Raises:
            Hang: One did not within ``timeout_s``.
        """
        deadline = time.monotonic() + timeout_s
        codes = [self._nursery.exit_code(pid, max(0.0, deadline - time.monotonic())) for pid in self.pids]
        late = [rank for rank, code in enumerate(codes) if code is None]
        for rank in late:
            self.kill(rank)
            self._nursery.exit_code(self.pids[rank], _NEVER_SECONDS)
        if late:
            raise Hang(f"ranks {late} of {len(codes)} did not end within {timeout_s} s")
        return [self._outcome(rank, code) for rank, code in enumerate(codes) if code is not None]

    def join_one(self, rank: int, timeout_s: float = _NEVER_SECONDS) -> Outcome:
        """As `join` for a rank whose peers may not end."""
        code = self._nursery.exit_code(self.pids[rank], timeout_s)
        if code is None:
            raise Hang(f"rank {rank} did not end within {timeout_s} s")
        return self._outcome(rank, code)

    def _outcome(self, rank: int, code: int) -> Outcome:
        path = self._directory / f"outcome{rank}"
        if path.exists():
            return Outcome(code, *pickle.loads(path.read_bytes()))
        log = self._directory / f"stderr{rank}"  # not there yet where it was killed at once
        return Outcome(code, None, None, "", log.read_text() if log.exists() else "")


class Nursery:
    """Starts lives. Close it, or use it as a context manager."""

    def __init__(self) -> None:
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._server = context.Process(target=_serve, args=(theirs,))
        self._server.start()
        theirs.close()
        self._directory = tempfile.TemporaryDirectory()
        self._num_lives = 0

    def start(self, world_size: int, function: Callable[..., Any], *args: Any, group_timeout_s: float = 20.0) -> Ranks:
        """Start ``function(*args)`` on every rank of a fresh process group; none for a world of one."""
        self._num_lives += 1
        directory = Path(self._directory.name) / str(self._num_lives)
        directory.mkdir()
        pids = []
        for rank in range(world_size):
            self._connection.send(("start", function, args, rank, world_size, str(directory), group_timeout_s))
            pids.append(self._connection.recv())
        return Ranks(self, pids, directory)

    def run(self, world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Return what the function returns on each rank.

        Raises:
            RankFailed: A rank raised or died.
        """
        outcomes = self.start(world_size, function, *args).join()
        bad = [f"--- rank {rank}: {o.exit_code}\n{o.traceback}" for rank, o in enumerate(outcomes) if failed(o)]
        if bad:
            raise RankFailed("\n".join(bad))
        return [outcome.value for outcome in outcomes]

    def exit_code(self, pid: int, timeout_s: float) -> int | None:
        """Wait for a process; None if it does not end."""
        self._connection.send(("join", pid, timeout_s))
        code: int | None = self._connection.recv()
        return code

    def close(self) -> None:
        self._connection.close()
        self._server.join()
        self._directory.cleanup()

    def __enter__(self) -> Nursery:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def failed(outcome: Outcome) -> bool:
    """Whether a rank raised or died."""
    return outcome.error_type is not None or outcome.exit_code != 0
