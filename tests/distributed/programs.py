"""Jobs of a program that is given as text, for ranks that end, which those of a pool must not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_SECONDS = 50


class Ended(NamedTuple):
    """How a rank ended."""

    status: int
    output: str
    errors: str


def start_rank(program: str, rank: int, folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """Start ``program`` with the arguments rank, path of a new store that the ranks share, and ``arguments``."""
    return subprocess.Popen(
        [sys.executable, "-c", program, str(rank), str(folder / "store"), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
    )


def run_ranks(program: str, folder: Path, *arguments: str, world_size: int = 2) -> list[Ended]:
    """Run the program on all ranks to its end."""
    processes = [start_rank(program, rank, folder, *arguments) for rank in range(world_size)]
    ended = []
    try:
        for process in processes:
            output, errors = process.communicate(timeout=TIMEOUT_SECONDS)
            ended.append(Ended(process.returncode, output, errors))
    finally:
        for process in processes:
            process.kill()
    return ended
