"""Kill a job again and again while it saves, and see after each time that nothing was lost.

    python -m tests.crash.soak --kills 200 --ranks 2

A life restores, says what it found, and trains and saves until it is killed: all ranks at once, or one, whose peers
must then end by themselves. The next life must find a checkpoint that is whole, bit-equal to that step of a run that
nobody interrupts, and not older than the last one that the killed life knew to be complete. Since every life trains on
from what it found, each comparison also covers all resumes before it. Lives save in the foreground and in the
background by turns. The disk is slowed down a little at every point of `faults`, so that the short phases of a commit
are met, too. Where a kill fell is read from what is on the disk afterwards.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sharded_adamax import CheckpointManager
from sharded_adamax.checkpoint import directory
from tests.crash.faults import Points
from tests.crash.nursery import Nursery, Ranks
from tests.crash.program import Job, Uninterrupted, strangers

PHASES = {
    "start": "starting, tidying up or restoring",
    "training": "between saves, or planning one",
    "records": "directory there, not all parts: records are being written",
    "parts": "all parts there, no metadata yet",
    "metadata": ".metadata begun, no manifest yet",
    "manifest": "manifest begun, parts not all removed",
    "before rename": "parts removed, not renamed yet",
    "before latest": "renamed: it exists; latest not moved yet",
    "removing": "an old checkpoint is being removed",
}
KEEP_LAST = 2
START_SHARE = 0.1  # of the kills fall before the life has said what it restored
LONGEST_LIFE_SECONDS = 0.5
GROUP_TIMEOUT_SECONDS = 6.0  # so long a rank waits for one that was killed before they had met
EXIT_TIMEOUT_SECONDS = 20.0


@dataclass
class Tally:
    """What came of it."""

    phases: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    num_checks: int = 0
    found_newer: int = 0  # times that a checkpoint had become complete that the killed life had not heard of
    last_step: int = 0
    seconds: float = 0.0


def _live(root: Path, diary: Path, async_save: bool, slow_down_s: float) -> None:
    """One life: restore, report, then train and save until killed."""
    directory.EXIT_TIMEOUT_SECONDS = 0.5  # a rank whose peer was killed waits so long for its part when it ends
    manager = CheckpointManager(root, keep_last=KEEP_LAST, async_save=async_save)
    job = Job(seed=11 if manager.steps() else 0)  # other parameters: those it ends up with are the restored ones
    step = job.restore(manager)
    digest, digest_of_model = (job.digest(), job.digest_of_model()) if step is not None else ("", "")
    found = strangers(root)
    _write(diary, job.rank, {"restored": step, "digest": digest, "model": digest_of_model, "strangers": found})
    with Points(slow_down_s=slow_down_s) as points:
        points.armed = True
        while True:
            job.train(1)
            job.save(manager)
            known = job.step if not async_save else job.step - 1  # a second save waits for the first
            if not async_save or manager.steps():
                _write(diary, job.rank, {"complete": known})


def _write(diary: Path, rank: int, entry: dict[str, Any]) -> None:
    line = os.open(f"{diary}.{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(line, json.dumps(entry).encode() + b"\n")
    os.close(line)


def _read(diary: Path, rank: int) -> list[dict[str, Any]]:
    path = Path(f"{diary}.{rank}")
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def phase_of(root: Path, world_size: int) -> str:
    """Read from the disk what a killed life was about to do."""
    names = {path.name for path in root.iterdir()}
    steps = sorted(int(name) for name in names if name.isdigit())
    for name in sorted(names):
        if name.endswith(".incomplete"):
            if name.count(".") == 2:  # no ID: not a save, but a removal
                return "removing"
            return _phase_of_save({path.name for path in (root / name).iterdir()}, world_size)
    latest = (root / "latest").read_text().strip() if "latest" in names else ""
    if steps and latest != f"{steps[-1]:08d}":
        return "before latest"
    return "removing" if len(steps) > KEEP_LAST else "training"


def _phase_of_save(names: set[str], world_size: int) -> str:
    num_parts = sum(f"__{rank}.part" in names for rank in range(world_size))
    if "manifest.json" in names:
        return "manifest" if num_parts else "before rename"
    if ".metadata" in names:
        return "metadata"
    return "parts" if num_parts == world_size else "records"


class Soak:
    """A chain of lives on one directory."""

    def __init__(self, nursery: Nursery, root: Path, *, num_ranks: int, seed: int, slow_down_s: float) -> None:
        self.tally = Tally()
        self._nursery = nursery
        self._root = root / "checkpoints"
        self._diaries = root
        self._num_ranks = num_ranks
        self._random = random.Random(seed)
        self._slow_down_s = slow_down_s
        self._truth = Uninterrupted(num_ranks)
        self._known_complete: int | None = None  # what must not be lost
        self._num_lives = 0

    def kill_once(self) -> None:
        """Let a life be, kill it, see where; what it found at its start is compared before it dies."""
        self._num_lives += 1
        diary = self._diaries / f"life{self._num_lives}"
        async_save = self._num_lives % 2 == 0
        life = self._start(diary, async_save, self._slow_down_s)
        early = self._known_complete is not None and self._random.random() < START_SHARE
        if early:
            time.sleep(self._random.uniform(0.0, 0.2))
        else:
            self._wait_for_report(diary, life)
            self._check_report(diary)
            if self._known_complete is None:  # the first life: there must be something to lose
                self._wait_until(lambda: any("complete" in entry for entry in _read(diary, 0)), "its first save")
            time.sleep(self._random.uniform(0.0, LONGEST_LIFE_SECONDS))
        one_rank = self._random.random() < 0.5
        self._end(life, [self._random.randrange(self._num_ranks)] if one_rank else list(range(self._num_ranks)))
        if early and all(_read(diary, rank) for rank in range(self._num_ranks)):
            self._check_report(diary)  # it was quicker than the kill
        entries = _read(diary, 0)
        complete = [entry["complete"] for entry in entries if "complete" in entry]
        if complete:
            self._known_complete = max(complete)
        phase = phase_of(self._root, self._num_ranks) if entries else "start"
        self.tally.phases[phase] += 1
        self.tally.kinds["asynchronous" if async_save else "synchronous"] += 1
        self.tally.kinds["of one rank" if one_rank else "of all ranks"] += 1

    def last_life(self) -> None:
        """See that the last kill did no harm either."""
        self._num_lives += 1
        diary = self._diaries / f"life{self._num_lives}"
        life = self._start(diary, async_save=False, slow_down_s=0.0)
        self._wait_for_report(diary, life)
        self._check_report(diary)
        self._end(life, list(range(self._num_ranks)))

    def _start(self, diary: Path, async_save: bool, slow_down_s: float) -> Ranks:
        return self._nursery.start(
            self._num_ranks, _live, self._root, diary, async_save, slow_down_s, group_timeout_s=GROUP_TIMEOUT_SECONDS
        )

    def _end(self, life: Ranks, victims: list[int]) -> None:
        for rank in victims:
            life.kill(rank)
        for rank, outcome in enumerate(life.join(EXIT_TIMEOUT_SECONDS)):
            if rank in victims:
                assert outcome.was_killed, f"rank {rank} ended before it was killed: {outcome}"
            else:
                assert outcome.error_type is not None, outcome

    def _wait_for_report(self, diary: Path, life: Ranks) -> None:
        try:
            self._wait_until(lambda: all(_read(diary, rank) for rank in range(self._num_ranks)), "its report")
        except AssertionError as error:
            raise AssertionError(f"{error}; {life.join(1)}") from None

    def _check_report(self, diary: Path) -> None:
        reports = [_read(diary, rank)[0] for rank in range(self._num_ranks)]
        step = reports[0]["restored"]
        if self._known_complete is None:
            assert step is None, reports
            return
        assert step is not None and step >= self._known_complete, f"lost: {reports} after {self._known_complete}"
        assert reports[0]["digest"] == self._truth.digest(step), f"step {step} is not that of the uninterrupted run"
        for report in reports:
            assert report["restored"] == step, reports
            assert report["model"] == self._truth.digest_of_model(step), reports
            assert report["strangers"] == [], reports
        self.tally.num_checks += 1
        self.tally.found_newer += step > self._known_complete
        self.tally.last_step = step
        self._known_complete = step

    def _wait_until(self, condition: Any, what: str) -> None:
        deadline = time.monotonic() + 30
        while not condition():
            assert time.monotonic() < deadline, f"life {self._num_lives} did not get to {what}"
            time.sleep(0.005)


def run(num_kills: int, *, num_ranks: int, seed: int, slow_down_s: float, root: Path) -> Tally:
    """Kill ``num_kills`` times; raise AssertionError at the first harm."""
    started = time.monotonic()
    with Nursery() as nursery:
        soak = Soak(nursery, root, num_ranks=num_ranks, seed=seed, slow_down_s=slow_down_s)
        show = sys.stderr.isatty()
        for number in range(num_kills):
            soak.kill_once()
            if show:
                print(f"\r{number + 1}/{num_kills} kills", end="", file=sys.stderr, flush=True)
        soak.last_life()
    soak.tally.seconds = time.monotonic() - started
    return soak.tally


def table(tally: Tally) -> str:
    """Return the figures for a person."""
    lines = [f"{'kills':>6}  phase in which they fell"]
    lines += [f"{tally.phases[phase]:>6}  {text}" for phase, text in PHASES.items()]
    lines.append(f"{sum(tally.phases.values()):>6}  in all: " + ", ".join(f"{n} {k}" for k, n in tally.kinds.items()))
    lines.append(
        f"{tally.num_checks:>6}  restores compared with the uninterrupted run, the last at step {tally.last_step}; "
        f"{tally.found_newer} found a checkpoint that the killed life had not yet heard of"
    )
    lines.append(f"{tally.seconds:>6.0f}  seconds, {tally.seconds / max(1, sum(tally.phases.values())):.2f} a kill")
    return "\n".join(lines)


def main() -> int:
    """Return the exit code: 1 where a phase was never met."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0, help="of the moments; the machine's own timing adds to it")
    parser.add_argument("--slow-down-ms", type=float, default=2.0, help="at every point of a save")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        tally = run(
            arguments.kills,
            num_ranks=arguments.ranks,
            seed=arguments.seed,
            slow_down_s=arguments.slow_down_ms / 1000,
            root=Path(root),
        )
    print(table(tally))
    never = [phase for phase in PHASES if not tally.phases[phase]]
    if never:
        print(f"never met: {', '.join(never)}. More --kills, or another --seed")
    return 1 if never else 0


if __name__ == "__main__":
    sys.exit(main())
