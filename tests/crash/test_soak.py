"""A few of the kills that `python -m tests.crash.soak` makes by the hundred."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.crash import soak

NUM_KILLS = 20


def test_killed_at_random_moments_nothing_is_lost(tmp_path: Path) -> None:
    tally = soak.run(NUM_KILLS, num_ranks=2, seed=1, slow_down_s=0.002, root=tmp_path)
    print(soak.table(tally))
    assert sum(tally.phases.values()) == NUM_KILLS
    assert tally.num_checks >= NUM_KILLS / 2  # a life that is killed at its start leaves its check to the next


@pytest.mark.parametrize(
    ("names", "phase"),
    [
        ([], "records"),
        (["__0_0.distcp", "__0.part"], "records"),
        (["__0.part", "__1.part"], "parts"),
        (["__0.part", "__1.part", ".metadata"], "metadata"),
        (["__1.part", ".metadata", "manifest.json"], "manifest"),
        ([".metadata", "manifest.json"], "before rename"),
    ],
)
def test_the_phase_of_a_kill_is_read_from_the_disk(tmp_path: Path, names: list[str], phase: str) -> None:
    unfinished = tmp_path / f".00000003.{'0' * 32}.incomplete"
    unfinished.mkdir()
    for name in names:
        (unfinished / name).touch()
    assert soak.phase_of(tmp_path, 2) == phase


def test_the_phases_after_the_rename_are_told_apart(tmp_path: Path) -> None:
    for step in (1, 2):
        (tmp_path / f"{step:08d}").mkdir()
    (tmp_path / "latest").write_text("00000001\n")
    assert soak.phase_of(tmp_path, 2) == "before latest"
    (tmp_path / "latest").write_text("00000002\n")
    assert soak.phase_of(tmp_path, 2) == "training"
    (tmp_path / ".00000000.incomplete").mkdir()
    assert soak.phase_of(tmp_path, 2) == "removing"
