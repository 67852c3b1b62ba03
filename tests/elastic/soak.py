"""Kill random ranks of a job under `torchrun --max-restarts`, and see that each kill costs only what it may.

    python -m tests.elastic.soak --kills 10

One job trains from its first to its last step. Each life of it is killed, some before their first step, by SIGKILL to
one rank. torchrun restarts all ranks, and they resume. Every loss of every life must have the bits of a run that nobody
interrupts, and a life may go back no further than to the last checkpoint before the kill.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.crash.nursery import Nursery
from tests.elastic.reference import References
from tests.elastic.torchrun import TINY, Agent, Job, Life, read_lives

RANKS = 2
CHECKPOINT_EVERY = 10
LONGEST_LIFE_STEPS = 25  # a life is killed at the latest this long after its first step
STEPS_AFTER_LAST_KILL = 20
START_SHARE = 0.3  # of the kills fall before the life's first step
LONGEST_START_SECONDS = 2.5


@dataclass
class Tally:
    """What came of it."""

    kills_by_rank: Counter[int] = field(default_factory=Counter)
    num_early: int = 0  # before the life's first step
    lives: list[Life] = field(default_factory=list)
    outages_s: list[float] = field(default_factory=list)  # from a kill to the next finished step
    num_steps_again: int = 0
    seconds: float = 0.0


def program_arguments(steps: int) -> list[str]:
    return [*TINY, "--batch=12", f"--steps={steps}", f"--checkpoint-every={CHECKPOINT_EVERY}"]


class Soak:
    """A job, and the kills."""

    def __init__(self, job: Job, agent: Agent, out: Path, seed: int) -> None:
        self.tally = Tally()
        self._job = job
        self._agent = agent
        self._out = out
        self._random = random.Random(seed)
        self._dead: set[int] = set()  # processes of the lives before
        self._num_lives_before = 0  # those that got as far as to say so in metrics.jsonl
        self._killed_at: float | None = None

    def kill_once(self) -> None:
        """Wait for all ranks of a new life, let it be for a while, and kill one of them."""
        self._job.wait_until(self._all_ranks_are_new, "all ranks of a new life")
        workers = self._agent.workers()
        # The first life is to reach a checkpoint: there must be something to lose.
        if self._killed_at is not None and self._random.random() < START_SHARE:
            time.sleep(self._random.uniform(0, LONGEST_START_SECONDS))
        else:
            self._wait_for_step(1)
            if self._killed_at is not None:
                self.tally.outages_s.append(time.monotonic() - self._killed_at)
            first_life = self._killed_at is None
            self._wait_for_step(CHECKPOINT_EVERY + 3 if first_life else self._random.randint(1, LONGEST_LIFE_STEPS))
        victim = self._random.randrange(RANKS)
        assert workers[victim].is_running(), f"rank {victim} ended before its kill\n{self._agent.output()}"
        workers[victim].kill()
        self._killed_at = time.monotonic()
        self.tally.kills_by_rank[victim] += 1
        _, alive = psutil.wait_procs(list(workers.values()), timeout=15)
        assert not alive, f"outlived the kill of rank {victim} by 15 s: {alive}\n{self._agent.output()}"
        self._dead |= {worker.pid for worker in workers.values()}
        lives = read_lives(self._out)
        self.tally.num_early += len(lives) == self._num_lives_before or not lives[-1].losses
        self._num_lives_before = len(lives)

    def finish(self, timeout_s: float) -> None:
        """Let the job train to its end."""
        exit_code = self._agent.wait(timeout_s)
        assert exit_code == 0, f"torchrun ended with {exit_code}\n{self._agent.output()}"
        assert self._job.processes() == [], "processes of a finished job are left"
        self.tally.lives = read_lives(self._out)

    def _all_ranks_are_new(self) -> bool:
        pids = {worker.pid for worker in self._agent.workers().values()}
        return len(pids) == RANKS and pids.isdisjoint(self._dead)

    def _wait_for_step(self, num_steps: int) -> None:
        def is_there() -> bool:
            lives = read_lives(self._out)
            return len(lives) > self._num_lives_before and len(lives[-1].losses) >= num_steps

        self._job.wait_until(is_there, f"step {num_steps} of a life")


def check_lives(lives: list[Life], steps: int, uninterrupted: Life) -> int:
    """Compare all lives of a run with the run that nobody interrupted; return how many steps were done again."""
    num_again = 0
    for number, life in enumerate(lives):
        assert life.world_size == uninterrupted.world_size
        assert list(life.losses) == list(range(life.start_step + 1, life.last_step + 1))
        for step, loss in life.losses.items():
            assert loss == uninterrupted.losses[step], f"life {number}, step {step}: not the uninterrupted run's bits"
        if number:
            before = lives[number - 1]
            # Each step is logged before it is saved, so the kill may have met the save of the last one.
            oldest = max(before.start_step, (before.last_step - 1) // CHECKPOINT_EVERY * CHECKPOINT_EVERY)
            assert oldest <= life.start_step <= before.last_step, f"life {number} went on from {life.start_step}"
            num_again += before.last_step - life.start_step
    assert lives[-1].last_step == steps
    return num_again


def run(num_kills: int, *, seed: int, directory: Path, nursery: Nursery) -> Tally:
    """Kill ``num_kills`` times; raise AssertionError at the first harm."""
    started = time.monotonic()
    steps = CHECKPOINT_EVERY + num_kills * LONGEST_LIFE_STEPS + STEPS_AFTER_LAST_KILL
    arguments = program_arguments(steps)
    out = directory / "run"
    with Job(directory / "job") as job:
        limits = {"PET_NPROC_PER_NODE": str(RANKS), "PET_MAX_RESTARTS": str(num_kills)}
        agent = job.start(*arguments, f"--out={out}", **limits)
        soak = Soak(job, agent, out, seed)
        for number in range(num_kills):
            soak.kill_once()
            if sys.stderr.isatty():
                print(f"\r{number + 1}/{num_kills} kills", end="", file=sys.stderr, flush=True)
        soak.finish(timeout_s=60 + steps / 5)
    uninterrupted = References(nursery, directory, arguments).life(RANKS)
    soak.tally.num_steps_again = check_lives(soak.tally.lives, steps, uninterrupted)
    soak.tally.seconds = time.monotonic() - started
    return soak.tally


def table(tally: Tally) -> str:
    """Return the figures for a person."""
    victims = ", ".join(f"rank {rank} {n} times" for rank, n in sorted(tally.kills_by_rank.items()))
    num_losses = sum(len(life.losses) for life in tally.lives)
    outages = tally.outages_s or [math.nan]
    again = f"{tally.num_steps_again} of a step that was done again"
    longest = f"longest {max(outages):.1f}"
    lines = [
        f"{tally.kills_by_rank.total():>6}  kills: {victims}; {tally.num_early} before the life's first step",
        f"{len(tally.lives):>6}  lives came as far as to train, in one run of {tally.lives[-1].last_step} steps",
        f"{num_losses:>6}  losses, all with the bits of the uninterrupted run; {again}",
        f"{statistics.median(outages):>6.1f}  seconds from a kill to the next finished step ({longest})",
        f"{tally.seconds:>6.0f}  seconds in all",
    ]
    return "\n".join(lines)


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0, help="of the moments; the machine's own timing adds to it")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory, Nursery() as nursery:
        print(table(run(options.kills, seed=options.seed, directory=Path(directory), nursery=nursery)))


if __name__ == "__main__":
    main()
