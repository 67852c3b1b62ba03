"""torchrun jobs that a test starts, hurts and must leave nothing of."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

import psutil

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "launch" / "torchrun.sh"
PROGRAM = ROOT / "launch" / "train.py"
TINY = (
    "--context=16",
    "--width=16",
    "--layers=1",
    "--heads=2",
    "--table-rows=128",
    "--bucket-mib=0.01",
    "--threads=1",
)
MARK = "SHARDED_ADAMAX_TEST_JOB"
_POLL_SECONDS = 0.02


@dataclass
class Life:
    """What one life of a run wrote to metrics.jsonl."""

    world_size: int
    start_step: int
    losses: dict[int, float] = field(default_factory=dict)

    @property
    def last_step(self) -> int:
        return max(self.losses, default=self.start_step)


def read_lives(out: Path) -> list[Life]:
    path = out / "metrics.jsonl"
    lives: list[Life] = []
    for line in path.read_text().splitlines(keepends=True) if path.exists() else []:
        if not line.endswith("\n"):  # it is being written right now
            continue
        event = json.loads(line)
        if event["event"] == "start":
            lives.append(Life(event["world_size"], event["start_step"]))
            assert event["life"] == len(lives), f"two jobs at once write to {path}"
        elif event["event"] == "step":
            lives[event["life"] - 1].losses[event["step"]] = event["loss"]
    return lives


class Agent:
    """One torchrun: a host of the job, or all of it. ``log`` gets everything that it and its workers print."""

    def __init__(self, process: psutil.Popen, log: Path) -> None:
        self.process = process
        self.log = log

    def workers(self) -> dict[int, psutil.Process]:
        """Return the ranks that run under this agent right now."""
        found = {}
        for child in self.process.children():
            with contextlib.suppress(psutil.Error, KeyError):
                if child.status() != psutil.STATUS_ZOMBIE:
                    found[int(child.environ()["RANK"])] = child
        return found

    def kill_host(self) -> None:
        """End the agent and its workers as the loss of their host does."""
        workers = self.workers()
        self.process.kill()  # first: it must not start others
        for worker in workers.values():
            worker.kill()
        self.process.wait(10)

    def wait(self, timeout_s: float) -> int:
        """Return the exit status.

        Raises:
            AssertionError: The agent did not end in time.
        """
        try:
            return int(self.process.wait(timeout_s))
        except psutil.TimeoutExpired:
            raise AssertionError(f"torchrun did not end within {timeout_s} s\n{self.output()}") from None

    def output(self) -> str:
        return self.log.read_text(errors="replace")


class Job:
    """The torchrun agents of one job. On leaving, all its processes are killed, those without a parent, too."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory
        self._mark = uuid.uuid4().hex
        self._agents: list[Agent] = []

    def start(self, *arguments: str, prefix: Sequence[str] = (), **environment: str) -> Agent:
        """Start launch/torchrun.sh with the arguments of train.py; ``prefix`` starts it somewhere else."""
        return self.start_command([*prefix, "bash", str(SCRIPT), *arguments], **environment)

    def start_command(self, command: Sequence[str], **environment: str) -> Agent:
        """Start another launcher, in the root of the repository."""
        log = self._directory / f"agent{len(self._agents)}.log"
        with log.open("wb") as output:
            process = psutil.Popen(
                command,
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=os.environ | {"PYTHON": sys.executable, MARK: self._mark} | environment,
            )
        agent = Agent(process, log)
        self._agents.append(agent)
        return agent

    def processes(self) -> list[psutil.Process]:
        """Return every process of the job. Workers of torchrun live in sessions of their own and outlive it."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.status() != psutil.STATUS_ZOMBIE and process.environ().get(MARK) == self._mark:
                    found.append(process)
        return found

    def wait_until(self, condition: Callable[[], bool], what: str, timeout_s: float = 60) -> None:
        """Wait for something to happen in the job.

        Raises:
            AssertionError: It did not happen in time, or all agents ended before.
        """
        deadline = time.monotonic() + timeout_s
        while not condition():
            ended = all(agent.process.poll() is not None for agent in self._agents)
            if ended or time.monotonic() > deadline:
                outputs = "\n".join(f"--- {agent.log}\n{agent.output()[-6000:]}" for agent in self._agents)
                raise AssertionError(f"the job {'ended' if ended else 'did not come'} before {what}\n{outputs}")
            time.sleep(_POLL_SECONDS)

    def __enter__(self) -> Job:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for agent in self._agents:  # first: they must not start others
            with contextlib.suppress(psutil.NoSuchProcess):
                agent.process.kill()
        while processes := self.processes():
            for process in processes:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(processes, timeout=10)
        for agent in self._agents:
            agent.process.wait(10)
