"""Real ranks for the tests, over gloo or MPI: processes that are started once and run one function after another."""

from __future__ import annotations

import datetime
import multiprocessing
import os
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal, Protocol

MAX_RANKS = 5


@dataclass
class Failure:
    """An exception on a rank, in a form that travels."""

    type_name: str
    message: str
    traceback: str


class RankFailed(AssertionError):
    """At least one rank raised or did not come back."""


def serve(connection: Connection, backend: str, environment: Mapping[str, str]) -> None:
    """Run what comes over the connection, each in a process group of its own; ends when None comes."""
    os.environ.update(environment)
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    while True:
        task = connection.recv()
        if task is None:
            return
        function, args, rank, world_size, store = task
        try:
            torch.manual_seed(0)
            dist.init_process_group(
                backend,
                init_method=f"file://{store}",
                rank=rank,
                world_size=world_size,
                timeout=datetime.timedelta(seconds=30),
            )
            result = function(*args)
        except BaseException as error:  # also SystemExit of a program under test
            result = Failure(type(error).__name__, str(error), traceback.format_exc())
        if dist.is_initialized():
            dist.destroy_process_group()
        connection.send(result)


class Worker(Protocol):
    """A process of a pool; those of one mpirun live and die together."""

    @property
    def exitcode(self) -> int | None: ...

    def is_alive(self) -> bool: ...

    def join(self) -> None: ...

    def kill(self) -> None: ...


class Pool:
    """``run(world_size, function, *args)`` calls ``function(*args)`` on that many ranks of a fresh process group.

    ``environment`` is added to that of the ranks. They are forked by a process that has imported torch, which takes
    seconds; with ``method="spawn"`` each begins by itself, for what is read from the environment only then.
    """

    def __init__(
        self, environment: Mapping[str, str] | None = None, *, method: Literal["forkserver", "spawn"] = "forkserver"
    ) -> None:
        self._environment = environment or {}
        self._context = multiprocessing.get_context(method)
        # The second is imported by the first step of an optimizer otherwise. Where nothing is forked it is not read.
        self._context.set_forkserver_preload(["torch", "torch._dynamo"])
        self._workers: list[tuple[Worker, Connection]] = []
        self._directory = tempfile.TemporaryDirectory()
        self._num_runs = 0

    def run(self, world_size: int, function: Callable[..., Any], *args: Any, timeout_s: float = 60) -> list[Any]:
        """Return the results by rank.

        Raises:
            RankFailed: With the tracebacks of all ranks that raised, or the ranks that did not come back in time.
        """
        results = self.run_expecting_failures(world_size, function, *args, timeout_s=timeout_s)
        failures = {rank: result for rank, result in enumerate(results) if isinstance(result, Failure)}
        if failures:
            texts = [f"--- rank {rank} ---\n{failure.traceback}" for rank, failure in failures.items()]
            raise RankFailed("\n".join(texts))
        return results

    def run_expecting_failures(
        self, world_size: int, function: Callable[..., Any], *args: Any, timeout_s: float = 60
    ) -> list[Any]:
        """As `run`, but a rank that raises gives a Failure as its result."""
        assert world_size <= MAX_RANKS
        self._start_workers(world_size)
        self._num_runs += 1
        store = Path(self._directory.name) / f"store{self._num_runs}"
        for rank in range(world_size):
            self._workers[rank][1].send((function, args, rank, world_size, str(store)))
        deadline = time.monotonic() + timeout_s
        results: list[Any] = []
        for rank in range(world_size):
            process, connection = self._workers[rank]
            if not connection.poll(max(0.0, deadline - time.monotonic())):
                alive = process.is_alive()
                self.close()
                raise RankFailed(f"rank {rank} of {world_size} did not come back within {timeout_s} s (alive: {alive})")
            try:
                results.append(connection.recv())
            except EOFError:
                process.join()
                code = process.exitcode
                self.close()
                raise RankFailed(f"rank {rank} of {world_size} died with exit code {code}") from None
        return results

    def _start_workers(self, world_size: int) -> None:
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        while len(self._workers) < world_size:
            ours, theirs = self._context.Pipe()
            process = self._context.Process(target=serve, args=(theirs, "gloo", self._environment), daemon=True)
            process.start()
            theirs.close()
            self._workers.append((process, ours))

    def close(self) -> None:
        for process, connection in self._workers:
            process.kill()
            process.join()
            connection.close()
        self._workers.clear()
