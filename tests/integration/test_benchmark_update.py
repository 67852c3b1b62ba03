"""The benchmark of the update kernels runs, and what it writes can be read."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.benchmarks import update

ROOT = Path(__file__).parents[2]


@pytest.mark.timeout(300)
def test_the_benchmark_of_the_update_reports_every_kernel(tmp_path: Path) -> None:
    path = tmp_path / "update.json"
    command = [sys.executable, "-m", "tests.benchmarks.update", "--mi-elements", "1", "--tiny", "20", "--threads", "1"]
    result = subprocess.run(
        [*command, "--rounds", "2", "--json", str(path)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    written = json.loads(path.read_text())
    assert {"cpu", "torch", "python", "load_before", "load_after"} <= written["machine"].keys()
    large = written["1 Mi elements, float32, 1 threads"]["rows"]
    assert {update.TORCH, *update.KERNELS} < large.keys()
    assert large[update.TORCH]["speed of torch"]["rounds"] == [1, 1]
    for row in large.values():
        assert len(row["seconds"]) == 2 and row["time/bound"]["median"] > 0
    assert len(written["step() over 20 parameters of 512 elements, 1 threads"]["rows"]) == 3
    for name in (*update.KERNELS, "range", "load_after"):
        assert name in result.stdout
