"""Draw the log of a run: its loss, the memory of its ranks, and who owns what.

python launch/pictures.py demo_out/run/metrics.jsonl demo_out
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # files only: no window system is needed

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Patch

from run_log import Bucket, Held, Life, read_lives

MIB = 2**20
LIFE_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9")
RANK_COLOURS = ("#8da0cb", "#fc8d62", "#66c2a5", "#e78ac3", "#a6d854", "#ffd92f")
# Label and colour of each field of `Held`, in the order in which they are stacked.
HELD_STYLES = (
    ("parameters", "#4c72b0"),
    ("gradients (peak)", "#dd8452"),
    ("optimizer state (exp_avg, exp_inf)", "#55a868"),
    ("buckets in flight (peak)", "#b0b0b0"),
    ("masters", "#8172b3"),
)


def draw_all(log_path: Path, out: Path) -> list[Path]:
    """Draw every picture of a log into a directory; returns their paths."""
    lives = read_lives(log_path)
    if not lives:
        raise SystemExit(f"expected the log of a run in {log_path}, got none; run launch/demo.sh first")
    plt.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False})
    out.mkdir(parents=True, exist_ok=True)
    return [
        draw_loss(lives, out / "loss.png"),
        draw_memory(lives, out / "memory.png"),
        draw_ownership(lives, out / "ownership.png"),
    ]


def draw_loss(lives: list[Life], path: Path) -> Path:
    """Draw the loss of each step; steps that were lost in a kill lie faint under those done again."""
    figure, axes = plt.subplots(figsize=(11, 5.5), layout="constrained")
    for life, successor in zip(lives, [*lives[1:], None], strict=True):
        colour = LIFE_COLOURS[(life.number - 1) % len(LIFE_COLOURS)]
        kept_until = successor.start_step if successor else life.last_step
        kept = [step for step in life.steps if step.step <= kept_until]
        lost = [step for step in life.steps if step.step > kept_until]
        label = f"life {life.number}: {ranks_text(life)}, steps {life.start_step + 1} to {life.last_step}"
        axes.plot([s.step for s in kept], [s.loss for s in kept], color=colour, linewidth=1.5, label=label)
        if successor:
            axes.plot([s.step for s in lost], [s.loss for s in lost], color=colour, linewidth=6, alpha=0.3)
            mark_kill(axes, life, colour)
            axes.axvline(successor.start_step, color="grey", linewidth=0.8, linestyle=":")
    axes.plot([], [], color="grey", linewidth=6, alpha=0.3, label="lost in the kill, done again in the next life")
    axes.plot(
        [],
        [],
        color="grey",
        linewidth=0.8,
        linestyle=":",
        label="checkpoint from which the next life resumed",
    )
    axes.set_xlabel("training step")
    axes.set_ylabel("training loss (nats per byte, mean over the global batch)")
    axes.set_title("One training run, killed twice, on a different number of ranks in each life")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def mark_kill(axes: Axes, life: Life, colour: str) -> None:
    """Mark the last step that a killed life finished."""
    if not life.steps:
        return
    last = life.steps[-1]
    axes.plot(last.step, last.loss, marker="X", markersize=11, color=colour, markeredgecolor="black")
    axes.annotate(
        f"{' '.join(life.endings)} after step {last.step}",
        (last.step, last.loss),
        xytext=(0, 42),
        textcoords="offset points",
        ha="center",
        arrowprops={"arrowstyle": "-", "color": "grey"},
    )


def draw_memory(lives: list[Life], path: Path) -> Path:
    """Draw the measured bytes of the fullest rank of each life, beside DDP + torch.optim.Adamax computed."""
    figure, axes = plt.subplots(figsize=(11, 5.5), layout="constrained")
    bars = [
        (f"life {life.number}\n{ranks_text(life)}\nmeasured", max(life.held, key=lambda held: held.total))
        for life in lives
        if life.held
    ]
    p = 4 * lives[0].num_parameters
    unsharded = Held(parameters=p, gradient_shards_peak=p, state=2 * p, buckets_peak=0, masters=0)
    bars.append(("DDP + torch.optim.Adamax\nany number of ranks\ncomputed: 4P + 4P + 8P", unsharded))
    for x, (_, held) in enumerate(bars):
        draw_held(axes, x, held, hatch="//" if held is unsharded else "")
    axes.set_xticks(range(len(bars)), [label for label, _ in bars])
    axes.set_ylabel("MiB on the fullest rank of the life")
    axes.set_title(f"Memory per rank for P = {lives[0].num_parameters:,} fp32 parameters, without activations")
    axes.margins(y=0.15)  # room for the legend
    handles = [
        Patch(color=colour, label=label)
        for kind, (label, colour) in enumerate(HELD_STYLES)
        if any(held[kind] for _, held in bars)
    ]
    axes.legend(handles=handles, frameon=False, loc="upper center", ncols=len(handles))
    axes.set_xlabel(
        "The two peaks need not fall together: the total is an upper bound of what a rank held at one time.",
        fontsize=9,
        color="dimgrey",
    )
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def draw_held(axes: Axes, x: int, held: Held, *, hatch: str) -> None:
    """Draw what one rank holds as a stacked bar, with its parts and its total in MiB."""
    bottom_mib = 0.0
    for num_bytes, (_, colour) in zip(held, HELD_STYLES, strict=True):
        if num_bytes == 0:
            continue
        height_mib = num_bytes / MIB
        axes.bar(x, height_mib, 0.6, bottom=bottom_mib, color=colour, edgecolor="white", hatch=hatch)
        box = {"boxstyle": "round,pad=0.15", "facecolor": colour, "edgecolor": "none"}
        middle_mib = bottom_mib + height_mib / 2
        axes.text(x, middle_mib, f"{height_mib:.1f}", ha="center", va="center", color="white", bbox=box)
        bottom_mib += height_mib
    axes.text(x, bottom_mib, f"{bottom_mib:.1f} MiB", ha="center", va="bottom", fontweight="bold")


def draw_ownership(lives: list[Life], path: Path) -> Path:
    """Draw for each life which rank owns which part of which bucket."""
    num_rows = sum(len(life.buckets) for life in lives)
    figure, panels = plt.subplots(
        len(lives),
        figsize=(15, 1.3 * len(lives) + 0.42 * num_rows),
        layout="constrained",
        squeeze=False,
        height_ratios=[len(life.buckets) + 1 for life in lives],
    )
    for axes, life in zip(panels[:, 0], lives, strict=True):
        draw_buckets(axes, life)
    gaps = [stop - start for life in lives for bucket in life.buckets for start, stop in padding(bucket)]
    panels[-1, 0].set_xlabel(
        "position in the bucket (% of its elements); hatched: padding, "
        f"at most {max(gaps, default=0)} elements in one place"
    )
    figure.suptitle(
        "Which rank owns which part of which bucket: its gradient shard, exp_avg and exp_inf live there only"
    )
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def draw_buckets(axes: Axes, life: Life) -> None:
    """Draw the buckets of one life, one row each."""
    for row, bucket in enumerate(life.buckets):
        draw_bucket(axes, row, bucket, life.world_size)
    labels = [f"bucket {i}: {4 * bucket.numel / MIB:.2f} MiB" for i, bucket in enumerate(life.buckets)]
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_title(f"life {life.number}: {ranks_text(life)}", loc="left")
    handles = [Patch(color=rank_colour(rank), label=f"rank {rank}") for rank in range(life.world_size)]
    axes.legend(handles=handles, frameon=False, ncols=len(handles), loc="lower right", bbox_to_anchor=(1, 1))
    axes.spines[:].set_visible(False)


def draw_bucket(axes: Axes, row: int, bucket: Bucket, world_size: int) -> None:
    """Draw one bucket as a row: shards as colours, parameters as borders with names where they fit."""
    percent = 100 / bucket.numel
    shard_percent = bucket.shard_numel * percent
    for rank in range(world_size):
        axes.barh(row, shard_percent, 0.8, left=rank * shard_percent, color=rank_colour(rank))
    for start, stop in padding(bucket):
        width = (stop - start) * percent
        axes.barh(row, width, 0.8, left=start * percent, color="none", hatch="////", linewidth=0)
    for slot in bucket.slots:
        left, width = slot.start * percent, slot.numel * percent
        axes.vlines([left, left + width], row - 0.4, row + 0.4, "black", linewidth=0.7)
        # At this size of figure a letter takes less than half a percent of the width.
        if width > 0.5 * len(slot.name):
            axes.text(left + width / 2, row, slot.name, ha="center", va="center", fontsize=8)


def padding(bucket: Bucket) -> Iterator[tuple[int, int]]:
    """Find the elements of a bucket that belong to no parameter, as (start, stop)."""
    stop = 0
    for slot in sorted(bucket.slots, key=lambda slot: slot.start):
        if slot.start > stop:
            yield stop, slot.start
        stop = slot.start + slot.numel
    if bucket.numel > stop:
        yield stop, bucket.numel


def rank_colour(rank: int) -> str:
    """Give each rank a colour, over and over where there are many."""
    return RANK_COLOURS[rank % len(RANK_COLOURS)]


def ranks_text(life: Life) -> str:
    """Say on how many ranks a life ran."""
    return f"{life.world_size} rank" + ("s" if life.world_size > 1 else "")


def main() -> None:
    """Draw the pictures of the log that the command line names."""
    parser = argparse.ArgumentParser(description="Draw the loss, the memory and the ownership of a run.")
    parser.add_argument("log", type=Path, help="metrics.jsonl of the run")
    parser.add_argument("out", type=Path, help="directory for the PNGs")
    options = parser.parse_args()
    for path in draw_all(options.log, options.out):
        print(path)


if __name__ == "__main__":
    main()
