"""The benchmark of the step runs, checks that contenders train alike, and counts time, bytes and memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sharded_adamax.collectives.lines import SWITCH
from tests.benchmarks.contenders import COMPUTE, DDP, OURS, ZERO
from tests.benchmarks.scene import LOSS_TOLERANCE, Scene
from tests.benchmarks.teams import Block

ROOT = Path(__file__).parents[2]
SMALL = ["--context=8", "--width=32", "--layers=1", "--heads=2", "--table-rows=8", "--batch=2", "--bucket-mib=0.02"]
ROUNDS, STEPS = 2, 2


@pytest.mark.timeout(240)
def test_the_benchmark_of_the_step_reports_time_bytes_and_memory(tmp_path: Path) -> None:
    path, picture = tmp_path / "step.json", tmp_path / "step.png"
    command = [sys.executable, "-m", "tests.benchmarks.step", *SMALL, "--ranks=2", "--links=loopback", "--tiny=20"]
    command += ["--contenders", COMPUTE, OURS, DDP, f"--rounds={ROUNDS}", f"--steps={STEPS}", "--warm-up=1"]
    result = subprocess.run(
        [*command, f"--json={path}", f"--picture={picture}"],
        cwd=ROOT,
        env=os.environ | {SWITCH: "0"},  # bytes are counted where they are sent: over TCP
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    written = json.loads(path.read_text())
    assert written["work"]["batch"] == 2 and written["schedule"]["rounds"] == ROUNDS and written[OURS]
    times, rest = (written[f"{what}: 2 ranks, loopback"]["rows"] for what in ("step", "bytes"))
    assert times.keys() == rest.keys() == {COMPUTE, OURS, DDP}
    for name, row in times.items():
        assert len(row["seconds"]) == ROUNDS and min(row["seconds"]) > 0
        assert len(row["ours / this"]["rounds"]) == len(row["this / limit"]["rounds"]) == ROUNDS
        held = {key: rest[name][key] for key in ("CPU ms", "MiB held", "RSS MiB")}
        assert min(held.values()) > 0, (name, held)
    assert times[OURS]["ours / this"]["median"] == times[COMPUTE]["this / limit"]["median"] == 1
    # An all-reduce and a reduce-scatter with an all-gather send the same bytes; the computation sends none.
    assert rest[COMPUTE]["MiB sent"] < 1e-3  # the barriers before and after
    assert rest[OURS]["MiB sent"] == pytest.approx(rest[DDP]["MiB sent"], rel=0.1)
    assert rest[OURS]["MiB held"] < rest[DDP]["MiB held"]
    for name in ("loss", "norm"):
        assert rest[OURS][name] == pytest.approx(rest[DDP][name], rel=1e-4)
    assert rest[COMPUTE]["norm"] != pytest.approx(rest[DDP]["norm"], rel=1e-4), "they were trained"
    for world in ("1 rank", "2 ranks"):
        assert len(written[f"backward: 20 parameters of 512 elements, {world}"]["rows"]) == 3
    assert picture.stat().st_size > 10_000


@pytest.mark.parametrize("loss", [1 + 2 * LOSS_TOLERANCE, float("nan")])
def test_a_contender_that_trains_in_another_way_has_no_figures(loss: float) -> None:
    scene = Scene(ranks=2, rate_mbit=None)

    def train(name: str, *losses: float) -> None:
        by_rank = [Block(seconds=1, cpu_seconds=1, sent_bytes=0, losses=[one]) for one in losses]
        scene.blocks[name] = [by_rank]

    train(COMPUTE, 3, 3)
    train(OURS, 1, 1 + LOSS_TOLERANCE)
    train(DDP, 1, 1)
    train(ZERO, 1, 1 + 2 * (loss - 1))  # the mean over the ranks counts
    scene.check()
    assert list(scene.blocks) == [COMPUTE, OURS, DDP]
    assert scene.left_out.keys() == {ZERO} and "does not train as DDP + Adamax does" in scene.left_out[ZERO]
    train(OURS, 1, 1 + 2 * (loss - 1))
    with pytest.raises(RuntimeError, match=r"^ours does not train as"):
        scene.check()
