"""The rank processes of the contenders in the benchmark of the step.

Each contender has processes of its own: libraries that patch torch do not meet, and memory is that of one contender.
All are alive at once, so that contenders can take turns: one team trains while the others wait for a command.
"""

from __future__ import annotations

import ctypes
import datetime
import functools
import multiprocessing
import os
import tempfile
import time
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from tests.benchmarks.contenders import BY_NAME, Training, Unavailable
from tests.benchmarks.memory import allocated, growth
from tests.distributed.wire import bytes_between, tcp_bytes_sent
from tests.hosts import Host

if TYPE_CHECKING:
    from byte_model import ModelSizes

NUM_BATCHES = 8  # that are trained on in turn
MEMORY_STEPS = 3
ACKNOWLEDGED_SECONDS = 0.1
ANSWER_SECONDS = 600


class TeamFailed(RuntimeError):
    """A rank raised, or did not answer."""


@dataclass(frozen=True)
class Work:
    """What is trained on."""

    sizes: ModelSizes
    batch: int  # sequences of sizes.context bytes per rank and step
    bucket_mib: float


class Block(NamedTuple):
    """Some steps of one rank, one after another without a barrier."""

    seconds: float  # per step, from the end of the warm-up to the end of the last step
    cpu_seconds: float  # per step, all threads of the rank
    sent_bytes: int  # per step, on TCP connections
    losses: list[float]  # of each step


class Memory(NamedTuple):
    """Bytes of one rank above those before the model was built, after three steps."""

    peak_bytes: int
    end_bytes: int


class Outcome(NamedTuple):
    """What the parameters are after training; equal on all ranks."""

    loss: float  # on the first batch of rank 0
    norm: float  # of all parameters


class _Rank:
    """What a team's process does, method by method, when the coordinator says so."""

    def __init__(self, contender: str, work: Work) -> None:
        self._contender = contender
        self._work = work
        self._training: Training | None = None
        self._num_steps = 0

    def batch(self, rank: int, number: int) -> tuple[Tensor, Tensor]:
        """Return random bytes to continue, the same for every contender."""
        generator = torch.Generator().manual_seed(1000 * rank + number % NUM_BATCHES)
        text = torch.randint(256, (self._work.batch, self._work.sizes.context + 1), generator=generator)
        return text[:, :-1], text[:, 1:]

    def _build(self) -> Training:
        return BY_NAME[self._contender].build(self._work.sizes, self._work.bucket_mib)

    def _build_and_train(self) -> Training:
        training = self._build()
        for number in range(MEMORY_STEPS):
            training.step(*self.batch(dist.get_rank(), number))
        return training

    def count_memory(self) -> Memory:
        """Forget what was trained, train something new a little, and count what torch allocates for that."""
        self._training = None
        return Memory(*allocated(self._build_and_train))

    def build(self) -> Memory:
        """Build what is trained from now on. Returns the growth of resident memory."""
        self._training, grown = growth(self._build_and_train)
        self._num_steps = MEMORY_STEPS
        return Memory(*grown)

    def train(self, num_warm_up: int, num_steps: int) -> Block:
        """Train, and time the steps after the first ones."""
        assert self._training is not None
        batches = [self.batch(dist.get_rank(), self._num_steps + i) for i in range(num_warm_up + num_steps)]
        losses = []
        before = _sent_so_far()
        for number, batch in enumerate(batches):
            if number == num_warm_up:
                began, cpu_began = time.perf_counter(), time.process_time()
            losses.append(self._training.step(*batch))
        ended, cpu_ended = time.perf_counter(), time.process_time()
        sent_bytes = bytes_between(before, _sent_so_far())
        dist.barrier()  # a rank that is through closes its connections
        self._num_steps += len(batches)
        return Block(
            seconds=(ended - began) / num_steps,
            cpu_seconds=(cpu_ended - cpu_began) / num_steps,
            sent_bytes=sent_bytes // len(batches),
            losses=[loss.item() for loss in losses],
        )

    def outcome(self) -> Outcome:
        """Look at the parameters through the model, and at their norm."""
        assert self._training is not None
        with torch.no_grad():
            loss = self._training.module(*self.batch(0, 0)).item()
            square = 0.0
            for param in self._training.module.parameters():
                whole = param.full_tensor() if isinstance(param, DTensor) else param
                square += whole.double().square().sum().item()
        return Outcome(loss, square**0.5)


def _sent_so_far() -> dict[str, int]:
    """Let all ranks finish and the kernel acknowledge, and look at the counters."""
    dist.barrier()
    time.sleep(ACKNOWLEDGED_SECONDS)
    return tcp_bytes_sent()


def _serve(
    connection: Connection, host: Host, rank: int, world_size: int, store: str, contender: str, work: Work
) -> None:
    """Be one rank: call methods of `_Rank` by name until this process is killed."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if host.namespace is not None:
        _enter(host.namespace)
    os.environ |= {"GLOO_SOCKET_IFNAME": host.interface, "RANK": str(rank), "WORLD_SIZE": str(world_size)}
    os.environ |= {"LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"}
    served = _Rank(contender, work)
    while True:
        try:
            name, arguments = connection.recv()
        except EOFError:  # the coordinator is gone
            os._exit(1)
        try:
            if not dist.is_initialized():
                timeout = datetime.timedelta(seconds=ANSWER_SECONDS)
                dist.init_process_group(
                    "gloo", init_method=f"file://{store}", rank=rank, world_size=world_size, timeout=timeout
                )
            answer = getattr(served, name)(*arguments)
        except Unavailable as reason:
            answer = reason
        except Exception:
            answer = TeamFailed(f"{contender}, rank {rank}: {name}\n{traceback.format_exc()}")
        connection.send(answer)


def _enter(namespace: str) -> None:
    """Move this thread, and those it will start, to a network namespace. ``os.setns`` came with Python 3.12."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open(f"/run/netns/{namespace}") as file:
        if libc.setns(file.fileno(), 0) != 0:
            raise OSError(ctypes.get_errno(), f"setns {namespace}")


@functools.cache
def _context() -> multiprocessing.context.ForkServerContext:
    """Processes are forked off one that has imported torch: starting them takes a moment instead of seconds each."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


class Team:
    """The ranks of one contender, one on each host."""

    def __init__(self, contender: str, hosts: Sequence[Host], work: Work) -> None:
        self.contender = contender
        self._directory = tempfile.TemporaryDirectory()
        store = str(Path(self._directory.name) / "store")
        self._ranks: list[tuple[Any, Connection]] = []
        for rank, host in enumerate(hosts):
            ours, theirs = _context().Pipe()
            arguments = (theirs, host, rank, len(hosts), store, contender, work)
            process = _context().Process(target=_serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self._ranks.append((process, ours))

    def ask(self, method: str, *arguments: object) -> list[Any]:
        """Have all ranks do something, and return their answers by rank.

        Raises:
            Unavailable: All ranks say so.
            TeamFailed: With the traceback.
        """
        for _, connection in self._ranks:
            connection.send((method, arguments))
        answers = []
        for rank, (_, connection) in enumerate(self._ranks):
            try:
                if not connection.poll(ANSWER_SECONDS):
                    raise TeamFailed(f"{self.contender}, rank {rank}: no answer to {method} in {ANSWER_SECONDS} s")
                answer = connection.recv()
            except EOFError:
                raise TeamFailed(f"{self.contender}, rank {rank} died; its output is above") from None
            if isinstance(answer, TeamFailed):
                raise answer
            answers.append(answer)
        if isinstance(answers[0], Unavailable):
            raise answers[0]
        return answers

    def close(self) -> None:
        for process, connection in self._ranks:
            process.kill()
            process.join()
            connection.close()
        self._directory.cleanup()
