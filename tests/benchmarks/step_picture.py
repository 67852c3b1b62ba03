"""Draw the scenes of the benchmark of the step: a row for each number of ranks, a column for each link, and memory."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.benchmarks.contenders import COMPUTE, OURS, OVERLAPPING
from tests.benchmarks.links import name_of
from tests.benchmarks.scene import Scene

MIB = 1 << 20
OURS_COLOR, PEER_COLOR, LIMIT_COLOR = "#e08e79", "#9ecae1", "#333333"
STYLES = {"forward and backward": ":", "its bytes at the rate of the link": "--"}


def draw(scenes: Sequence[Scene], num_params: int, path: Path) -> None:
    """Write the picture to ``path``."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.lines import Line2D

    all_ranks = sorted({scene.ranks for scene in scenes})
    rates = list(dict.fromkeys(scene.rate_mbit for scene in scenes))
    num_columns = len(rates) + 1
    figure, grid = pyplot.subplots(
        len(all_ranks), num_columns, figsize=(3.1 * num_columns, 2.9 * len(all_ranks)), squeeze=False, sharey=True
    )
    for row, ranks in zip(grid, all_ranks, strict=True):
        by_rate = {scene.rate_mbit: scene for scene in scenes if scene.ranks == ranks}
        for axis, rate in zip(row, rates, strict=False):
            if rate in by_rate:
                _draw_times(axis, by_rate[rate], num_params)
            axis.set_title(f"{ranks} ranks, {name_of(rate)}", fontsize=9)
        _draw_memory(row[-1], next(iter(by_rate.values())), num_params)
    grid[0][0].invert_yaxis()
    lines = [Line2D([], [], color=LIMIT_COLOR, linestyle=style, linewidth=1) for style in STYLES.values()]
    figure.legend(lines, list(STYLES), fontsize=8, loc="lower center", ncols=2, title="No step is faster than")
    figure.tight_layout(rect=(0, 0.15 / len(all_ranks), 1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def _bars(axis: Any, names: Sequence[str], values: Sequence[float]) -> None:
    colors = [OURS_COLOR if name in (OURS, OVERLAPPING) else PEER_COLOR for name in names]
    axis.barh(names, values, color=colors, height=0.7)
    for name, value in zip(names, values, strict=True):
        axis.text(0, name, f" {value:.0f}", va="center", fontsize=7)
    axis.tick_params(labelsize=7)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


def _draw_times(axis: Any, scene: Scene, num_params: int) -> None:
    names = [name for name in scene.blocks if name != COMPUTE]
    milliseconds = {name: [1e3 * one for one in scene.seconds(name)] for name in scene.blocks}
    medians = [statistics.median(milliseconds[name]) for name in names]
    _bars(axis, names, medians)
    for name, median in zip(names, medians, strict=True):
        low, high = min(milliseconds[name]), max(milliseconds[name])
        axis.errorbar(median, name, xerr=[[median - low], [high - median]], color=LIMIT_COLOR, linewidth=0.8)
    compute = statistics.median(milliseconds.get(COMPUTE, [0.0]))
    limits = dict(zip(STYLES, (compute, 1e3 * scene.wire_seconds(num_params)), strict=True))
    for what, limit in limits.items():
        if limit:
            axis.axvline(limit, color=LIMIT_COLOR, linestyle=STYLES[what], linewidth=1)
    axis.set_xlabel("ms a step", fontsize=8)


def _draw_memory(axis: Any, scene: Scene, num_params: int) -> None:
    names = [name for name in scene.blocks if name != COMPUTE]
    _bars(axis, names, [scene.held_bytes(name) / MIB for name in names])
    axis.set_title(f"{scene.ranks} ranks, peak memory", fontsize=9)
    axis.set_xlabel(f"MiB per rank (parameters: {4 * num_params / MIB:.0f})", fontsize=8)
