"""A rank dies between any two system calls of a save: there is a whole checkpoint, and training on from it is exact."""

from __future__ import annotations

import pickle
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from sharded_adamax import CheckpointManager
from sharded_adamax.checkpoint.directory import open_checkpoint
from tests.crash.faults import CALLS, Points, distinct
from tests.crash.nursery import Nursery, Outcome
from tests.crash.program import Job, Uninterrupted, rank_and_world_size, strangers

OLDEST, PREVIOUS, NEW = 2, 4, 6  # with keep_last=2 the save of NEW, which is under test, also removes OLDEST
COMMIT = f"rename .{NEW:08d}.ID.incomplete"


@dataclass(frozen=True)
class Recovered:
    """What a life finds after a crash, and where training on from it leads."""

    step: int | None
    digest: str | None  # of everything; first rank only
    digest_of_model: str
    strangers: list[str]
    latest_after_save: str
    steps_after_save: list[int]
    digest_after_training: str | None


def _manager(root: Path, *, async_save: bool) -> CheckpointManager:
    return CheckpointManager(root, keep_last=2, async_save=async_save)


def _first_life(root: Path) -> None:
    manager = _manager(root, async_save=False)
    job = Job()
    for _ in (OLDEST, PREVIOUS):
        job.train(2)
        job.save(manager)


def _save_and_die(root: Path, dying_rank: int, dies_at: int | None, async_save: bool) -> list[str]:
    """Make the save under test; the chosen rank dies at the point, if there is one. Return the points passed."""
    manager = _manager(root, async_save=async_save)
    job = Job(seed=5)
    assert job.restore(manager) == PREVIOUS
    job.train(NEW - PREVIOUS)
    with Points(dies_at if job.rank == dying_rank else None) as points:
        points.armed = True
        job.save(manager)
        manager.wait()
    manager.close()
    return points.names


def _recover(root: Path) -> None:
    """Restore, train on, and say in a file what was seen: the process itself is about to be killed."""
    seen_by_others = [path.name for path in root.iterdir() if path.name.isdigit()]
    for name in seen_by_others:
        open_checkpoint(root / name, verify=True)  # half a checkpoint must not be seen under a real name
    assert (root / "latest").read_text().strip() in seen_by_others
    if rank_and_world_size()[1] > 1:
        torch.distributed.barrier()  # the manager sweeps up
    manager = _manager(root, async_save=False)
    job = Job(seed=7)
    step = job.restore(manager)
    found = job.digest(), job.digest_of_model(), strangers(root)
    job.train(1)
    job.save(manager)
    recovered = Recovered(step, *found, (root / "latest").read_text(), manager.steps(), job.digest())
    manager.close()
    _report(root, job.rank).write_bytes(pickle.dumps(recovered))


def _recover_then_die(crashed: Path | None, root: Path, dying_rank: int, dies_at: int | None, async_save: bool) -> None:
    """Recover from one crash, then go to meet the next: two jobs in one life need half as many process groups."""
    if crashed is not None:
        _recover(crashed)
    if dies_at is not None:
        _save_and_die(root, dying_rank, dies_at, async_save)


def _report(root: Path, rank: int) -> Path:
    return root.with_name(f"{root.name}.seen_by_{rank}")


def _check_recovery(root: Path, truth: Uninterrupted, world_size: int) -> int:
    """Compare what every rank found with the uninterrupted run; return the step that was found."""
    seen = [pickle.loads(_report(root, rank).read_bytes()) for rank in range(world_size)]
    step: int = seen[0].step
    assert step in (PREVIOUS, NEW)
    assert seen[0].digest == truth.digest(step)
    assert seen[0].digest_after_training == truth.digest(step + 1)
    for recovered in seen:
        assert recovered.step == step
        assert recovered.digest_of_model == truth.digest_of_model(step)
        assert recovered.strangers == []
        assert recovered.steps_after_save == [step, step + 1]
        assert recovered.latest_after_save == f"{step + 1:08d}\n"
    return step


def _check_deaths(outcomes: list[Outcome], dying_rank: int) -> None:
    for rank, outcome in enumerate(outcomes):
        if rank == dying_rank:
            assert outcome.was_killed, outcome
        else:  # it must notice, and end by itself
            assert outcome.exit_code == 0, outcome
            assert outcome.error_type is not None


@pytest.mark.timeout(300)  # a hundred processes: long on a machine that does other things, too
@pytest.mark.parametrize(
    ("world_size", "dying_rank", "async_save"),
    [(1, 0, False), (1, 0, True), (2, 0, False), (2, 1, True)],
    ids=["alone", "alone async", "first of two", "second of two async"],
)
def test_a_death_at_any_point_of_a_save_loses_nothing(
    nursery: Nursery, tmp_path: Path, world_size: int, dying_rank: int, async_save: bool
) -> None:
    template = tmp_path / "template"
    nursery.run(world_size, _first_life, template)
    rehearsal = tmp_path / "rehearsal"
    shutil.copytree(template, rehearsal)
    points = nursery.run(world_size, _save_and_die, rehearsal, dying_rank, None, async_save)[dying_rank]

    truth = Uninterrupted(world_size)
    crashed: Path | None = None
    found = []
    # Every point once; for the other cases the moments that differ on the disk are enough.
    numbers = list(range(len(points))) if (world_size, async_save) == (1, False) else distinct(points)
    for number in [*numbers, None]:
        root = tmp_path / str(number)
        if number is not None:
            shutil.copytree(template, root)
        life = nursery.start(world_size, _recover_then_die, crashed, root, dying_rank, number, async_save)
        outcomes = life.join()
        try:
            if crashed is not None:
                found.append(_check_recovery(crashed, truth, world_size))
            if number is not None:
                _check_deaths(outcomes, dying_rank)
        except (AssertionError, OSError) as error:
            raise AssertionError(f"point {points[numbers[len(found)]]!r}: {outcomes}") from error
        crashed = root

    assert len(found) == len(numbers)
    if dying_rank == 0:
        # Before the rename there is the previous checkpoint, after it the new one.
        commit = points.index(f"before {COMMIT}")
        assert found == [PREVIOUS if number <= commit else NEW for number in numbers]
        assert {call for call in CALLS if not any(f"before {call} " in point for point in points)} == set()
    else:
        assert set(found[:-1]) == {PREVIOUS}  # at the last point its part is complete, and the first rank may commit


def test_every_kind_of_moment_is_among_the_points(nursery: Nursery, tmp_path: Path) -> None:
    """Else the test above would pass by looking away."""
    nursery.run(1, _first_life, tmp_path)
    points = nursery.run(1, _save_and_die, tmp_path, 0, None, False)[0]
    for name in ("__0_0.distcp", ".__0.part", ".metadata", "manifest.json", ".latest"):
        for moment in ("before open", "half of write 0 to", "before flush of", "after write_file"):
            assert f"{moment} {name}" in points
    assert points.count("before the system call fsync") == points.count("after the system call fsync") == 8
    assert f"after {COMMIT}" in points
    assert f"before rename {OLDEST:08d}" in points
    assert f"before remove_directory .{OLDEST:08d}.incomplete" in points
    assert "after the system call unlink" in points[points.index(f"before rename {OLDEST:08d}") :]
