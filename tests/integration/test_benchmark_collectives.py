"""The benchmark of the collectives runs on this machine and, where there can be hosts, over a link of a given rate."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.benchmarks.collectives import KINDS, MESSAGES, MPI, NATIVE, OURS, row

ROOT = Path(__file__).parents[2]
MBIT = 100
OVER_GLOO = {row(kind, group) for kind in KINDS for group in (NATIVE, OURS)}


class Outcome(NamedTuple):
    written: dict[str, Any]
    printed: str


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    path = tmp_path_factory.mktemp("benchmark") / "collectives.json"
    command = [sys.executable, "-m", "tests.benchmarks.collectives", "--ranks", "2", "--mib", "1", "--rounds", "2"]
    command += ["--mbit", str(MBIT), "--json", str(path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return Outcome(json.loads(path.read_text()), result.stdout)


def test_the_benchmark_reports_every_collective_on_this_machine(outcome: Outcome) -> None:
    rows = outcome.written["2 ranks, loopback, 1 MiB fp32"]["rows"]
    assert rows.keys() == OVER_GLOO | {row(kind, group) for kind in KINDS for group in (MESSAGES, MPI)}
    for kind in KINDS:
        assert rows[row(kind, NATIVE)]["time/gloo's own"]["rounds"] == [1, 1]
        assert rows[row(kind, OURS)]["time/gloo's own"]["median"] > 0
    for name in rows:
        assert name in outcome.printed
    assert {"cpu", "torch", "load_before", "load_after"} <= outcome.written["machine"].keys()


def test_the_benchmark_reports_every_collective_over_a_link_beside_the_time_of_the_wire(outcome: Outcome) -> None:
    if why := re.search(r"2 ranks, 100 Mbit/s: not measured: (.*)", outcome.printed):
        pytest.skip(why[1])
    table = outcome.written["2 ranks, 100 Mbit/s, 1 MiB fp32"]
    # Half a MiB in each direction.
    assert table["wire_ms"] == pytest.approx(2**19 * 8 / (MBIT * 1e6) * 1e3)
    assert 0 < table["carried_mbit"] <= MBIT, "the link lets through what it should"
    assert table["rows"].keys() == OVER_GLOO
    for name in OVER_GLOO:
        assert table["rows"][name]["time/wire"]["median"] > 0
