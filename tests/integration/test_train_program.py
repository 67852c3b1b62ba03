"""launch/train.py, started as a user starts it: plain python and torchrun."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = ROOT / "launch" / "train.py"
TINY = [
    "--steps=6",
    "--batch=6",
    "--context=16",
    "--width=16",
    "--layers=1",
    "--heads=2",
    "--table-rows=128",
    "--bucket-mib=0.01",
    "--checkpoint-every=3",
    "--threads=1",
]
LAUNCH_TIMEOUT_SECONDS = 60


def run_program(*arguments: str | Path, ranks: int) -> subprocess.CompletedProcess[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    return subprocess.run(
        [sys.executable, *launcher, str(PROGRAM), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=LAUNCH_TIMEOUT_SECONDS,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=False,
    )


def train(out: Path, *arguments: str, ranks: int) -> list[dict[str, float]]:
    """Train and return what this life wrote of its steps."""
    result = run_program(*TINY, "--out", out, *arguments, ranks=ranks)
    assert result.returncode == 0, result.stderr
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if record["event"] == "step"]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, float]]]:
    out = tmp_path_factory.mktemp("uninterrupted")
    return out, train(out, ranks=2)


@pytest.fixture
def interrupted(uninterrupted: tuple[Path, list[dict[str, float]]], tmp_path: Path) -> Path:
    """Hold what a kill after step 3 leaves behind."""
    checkpoint = "checkpoints/00000003"
    shutil.copytree(uninterrupted[0] / checkpoint, tmp_path / checkpoint)
    return tmp_path


def test_a_run_logs_every_step_and_checkpoints_in_between_and_at_the_end(
    uninterrupted: tuple[Path, list[dict[str, float]]],
) -> None:
    out, steps = uninterrupted
    assert [step["step"] for step in steps] == [1, 2, 3, 4, 5, 6]
    assert all(step["world_size"] == 2 and step["life"] == 1 for step in steps)
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == [".lock", "00000003", "00000006", "latest"]


def test_resumed_on_as_many_ranks_the_losses_are_the_same_bits(
    uninterrupted: tuple[Path, list[dict[str, float]]], interrupted: Path
) -> None:
    resumed = train(interrupted, "--resume", ranks=2)
    assert [(step["step"], step["loss"]) for step in resumed] == [
        (step["step"], step["loss"]) for step in uninterrupted[1][3:]
    ]


@pytest.mark.parametrize("ranks", [1, 3])
def test_resumed_on_another_number_of_ranks_it_goes_on_from_the_checkpoint(
    uninterrupted: tuple[Path, list[dict[str, float]]], interrupted: Path, ranks: int
) -> None:
    resumed = train(interrupted, "--resume", ranks=ranks)
    assert [step["step"] for step in resumed] == [4, 5, 6]
    # Not the same bits: the loss is a mean of means, and the gradient a sum in another order.
    expected = [step["loss"] for step in uninterrupted[1][3:]]
    assert [step["loss"] for step in resumed] == pytest.approx(expected, rel=1e-5)


def test_a_batch_that_the_ranks_cannot_share_evenly_trains_as_on_one_rank(tmp_path: Path) -> None:
    # 7 rows on 3 ranks: 3, 2 and 2. An elastic job cannot choose its number of ranks.
    losses = [
        [step["loss"] for step in train(tmp_path / str(ranks), "--batch=7", "--lr=0.05", ranks=ranks)]
        for ranks in (1, 3)
    ]
    # Not the same bits: sums in another order. Were each rank's mean to count the same, the first loss would differ
    # by 1e-3 and the later ones by more.
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_a_batch_smaller_than_the_number_of_ranks_is_refused_with_a_remedy(tmp_path: Path) -> None:
    result = run_program(*TINY, "--batch=1", "--out", tmp_path, ranks=2)
    assert result.returncode != 0
    assert "expected --batch to be at least the world size, got --batch 1 for 2 ranks; try --batch 2" in result.stderr
    assert not list(tmp_path.iterdir())


def test_a_new_run_does_not_start_among_the_checkpoints_of_another(interrupted: Path) -> None:
    result = run_program(*TINY, "--out", interrupted, ranks=1)
    assert result.returncode != 0
    assert "pass --resume" in result.stderr


def test_help_names_the_options_and_their_defaults() -> None:
    result = run_program("--help", ranks=1)
    assert result.returncode == 0, result.stderr
    assert "--checkpoint-every" in result.stdout
    assert "(default: 24)" in result.stdout
