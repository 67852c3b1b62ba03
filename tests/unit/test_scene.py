"""What the benchmark of the step does beside measuring: it finds contenders that train wrongly or cannot be built."""

from __future__ import annotations

import argparse
import importlib.util
import re

import pytest

from tests.benchmarks.contenders import BY_NAME, COMPUTE, DDP, DEEPSPEED_2, OURS, OVERLAPPING, Unavailable, sizes_of
from tests.benchmarks.scene import LOSS_TOLERANCE, Scene
from tests.benchmarks.teams import Block


def _blocks(*rounds: tuple[list[float], list[float]]) -> list[list[Block]]:
    """Return blocks of two ranks with these losses; the second rank takes a second longer."""
    return [
        [
            Block(seconds=number + rank, cpu_seconds=1.0, sent_bytes=1, losses=losses)
            for rank, losses in enumerate(ranks)
        ]
        for number, ranks in enumerate(rounds, start=1)
    ]


def test_losses_are_means_over_the_ranks_and_times_those_of_the_slowest_rank() -> None:
    scene = Scene(2, None, blocks={DDP: _blocks(([5.0, 4.0], [7.0, 6.0]), ([3.0, 2.0], [3.0, 1.0]))})
    assert scene.losses(DDP) == [6.0, 5.0, 3.0, 1.5]
    assert scene.seconds(DDP) == [2.0, 3.0]


def test_a_contender_that_trains_otherwise_than_ddp_is_found() -> None:
    right, wrong = ([5.0, 4.0], [5.0, 4.0]), ([5.0, 4.0], [5.0, 4.0 + 2.5 * LOSS_TOLERANCE])
    almost = ([5.0, 4.0], [5.0, 4.0 + 1.5 * LOSS_TOLERANCE])
    scene = Scene(
        2, None, blocks={COMPUTE: _blocks(([9.0, 9.0], [9.0, 9.0])), DDP: _blocks(right), OURS: _blocks(almost)}
    )
    scene.check()
    for losses in (wrong, ([5.0, 4.0], [5.0, float("nan")])):
        scene.blocks[OVERLAPPING] = _blocks(losses)
        with pytest.raises(
            RuntimeError, match=re.escape(f"{OVERLAPPING} does not train as {DDP} does: its loss in step 1")
        ):
            scene.check()


def test_the_bytes_of_a_step_take_what_the_rate_says() -> None:
    # 4 ranks, a million float32 parameters: 2 * 3/4 * 4 MB = 6 MB = 48 Mbit
    assert Scene(4, rate_mbit=1000.0).wire_seconds(1_000_000) == pytest.approx(0.048)
    assert Scene(4, rate_mbit=None).wire_seconds(1_000_000) == 0


def test_without_deepspeed_the_table_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = sizes_of(argparse.Namespace(context=8, width=8, layers=1, heads=1, table_rows=8))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(Unavailable, match=r"not installed: pip install .\[bench\]"):
        BY_NAME[DEEPSPEED_2].build(sizes, 1.0)
