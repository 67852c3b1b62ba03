"""Contenders that train in turn on a number of ranks with links between them, and what is measured of them."""

from __future__ import annotations

import contextlib
import os
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from tests.benchmarks.contenders import COMPUTE, DDP, OURS, OVERLAPPING, PEERS, Unavailable
from tests.benchmarks.links import name_of
from tests.benchmarks.teams import Block, Memory, Outcome, Team, Work
from tests.hosts import Host

# Sums in another order round differently, and training makes that grow. Training without the other ranks' gradients
# is off by 1e-2 within a few steps.
LOSS_TOLERANCE = 1e-3


class Schedule(NamedTuple):
    """How long contenders train."""

    rounds: int
    warm_up: int  # steps in each round before those that are timed
    steps: int  # timed in each round


@dataclass
class Scene:
    """A number of ranks with links between them, and what was measured there, by contender."""

    ranks: int
    rate_mbit: float | None  # None: loopback
    blocks: dict[str, list[list[Block]]] = field(default_factory=dict)  # by round, then rank
    resident: dict[str, list[Memory]] = field(default_factory=dict)  # by rank, as the kernel counts
    allocated: dict[str, list[Memory]] = field(default_factory=dict)  # by rank, as torch counts
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)  # and why
    load: tuple[float, float] = (0.0, 0.0)  # before and after

    @property
    def title(self) -> str:
        return f"{self.ranks} ranks, {name_of(self.rate_mbit)}"

    @property
    def ours(self) -> str:
        """Return the contender that the others are compared with."""
        return OVERLAPPING if OVERLAPPING in self.blocks else OURS

    def seconds(self, name: str) -> list[float]:
        """Return the time of a step in each round: that of the slowest rank."""
        return [max(block.seconds for block in ranks) for ranks in self.blocks[name]]

    def wire_seconds(self, num_params: int) -> float:
        """Return what the bytes of a step take on a link that carries nothing else, without headers."""
        if self.rate_mbit is None:
            return 0.0
        return 2 * (self.ranks - 1) / self.ranks * 4 * num_params * 8 / (self.rate_mbit * 1e6)

    def losses(self, name: str) -> list[float]:
        """Return the mean loss over the ranks of every step, in the order of training."""
        by_round = [zip(*(block.losses for block in ranks), strict=True) for ranks in self.blocks[name]]
        return [statistics.fmean(of_step) for steps in by_round for of_step in steps]

    def held_bytes(self, name: str) -> int:
        """Return the most bytes that a rank holds at one time, the model among them, as torch counts."""
        # The profiler misses what a gloo thread frees, which DDP's first buckets may be: the lower count is a peer's.
        choose = min if name in PEERS else max
        return choose(memory.peak_bytes for memory in self.allocated[name])

    def check(self) -> None:
        """Leave out each peer that did not train the same model in the same way as DDP.

        Raises:
            RuntimeError: One of ours did not.
        """
        trained = [name for name in self.blocks if name != COMPUTE]
        reference = DDP if DDP in trained else next(iter(trained), DDP)
        for name in trained:
            for step, (mine, its) in enumerate(zip(self.losses(name), self.losses(reference), strict=True)):
                if not abs(mine - its) < LOSS_TOLERANCE:  # NaN is not
                    problem = f"does not train as {reference} does: its loss in step {step} is {mine}, not {its}"
                    if name not in PEERS:
                        raise RuntimeError(f"{name} {problem}")
                    self.left_out[name] = problem
                    del self.blocks[name]
                    break


def measure(scene: Scene, hosts: Sequence[Host], work: Work, names: Sequence[str], schedule: Schedule) -> None:
    """Let all contenders train in turn, and fill in what there is to know of them."""
    before = os.getloadavg()[0]
    with _teams(scene, hosts, work, names) as teams:
        for number in range(schedule.rounds):
            _progress(f"{scene.title}: round {number + 1} of {schedule.rounds}")
            first = number % max(1, len(teams))  # so that no one is always the first
            for team in [*teams[first:], *teams[:first]]:
                scene.blocks[team.contender].append(team.ask("train", schedule.warm_up, schedule.steps))
        for team in teams:
            outcomes = team.ask("outcome")
            if team.contender != COMPUTE and len(set(outcomes)) > 1:
                raise RuntimeError(f"{team.contender}: the ranks' parameters differ: {outcomes}")
            scene.outcomes[team.contender] = outcomes[0]
            scene.allocated[team.contender] = team.ask("count_memory")
    scene.load = (before, os.getloadavg()[0])
    scene.check()


@contextlib.contextmanager
def _teams(scene: Scene, hosts: Sequence[Host], work: Work, names: Sequence[str]) -> Iterator[list[Team]]:
    """Start and build the contenders, one after another; note those that cannot be built."""
    with contextlib.ExitStack() as stack:
        teams = []
        for name in names:
            _progress(f"{scene.title}: building {name}")
            team = Team(name, hosts, work)
            stack.callback(team.close)
            try:
                scene.resident[name] = team.ask("build")
            except Unavailable as reason:
                scene.left_out[name] = str(reason)
            else:
                scene.blocks[name] = []
                teams.append(team)
        yield teams


def _progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
