"""A plan as a picture. Needs matplotlib."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sharded_adamax.planning.footprint import Footprint
from sharded_adamax.planning.plans import SCHEMES, Plan
from sharded_adamax.planning.report import GIB
from sharded_adamax.planning.sources import SourceError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LABELS = {"sharded_adamax": "sharded", "ddp": "DDP", "zero": "ZeRO"}
# Colours that stay apart for the colour-blind, in the order in which they are stacked.
_PARTS = {
    "parameters": "#4c72b0",
    "state and master": "#55a868",
    "gradients": "#dd8452",
    "buckets and copies": "#b0b0b0",
}
_BAR_WIDTH = 0.27


def check_picture(path: Path) -> None:
    """Raise SourceError where a picture cannot be drawn to ``path``, before anything is computed."""
    if find_spec("matplotlib") is None:
        raise SourceError("--picture needs matplotlib: pip install sharded-adamax[plan]")
    if path.suffix.lower() not in (".png", ".pdf", ".svg"):
        raise SourceError(f"expected --picture to end in .png, .pdf or .svg, got {path}")
    if not path.absolute().parent.is_dir():
        raise SourceError(f"there is no directory {path.absolute().parent} for --picture")


def draw(plans: dict[str, Plan], path: Path, gpu_bytes: float | None) -> None:
    """Draw what a rank holds at its peak: a panel for each precision, three bars for each world size."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    num_sizes = len(next(iter(plans.values())).rows)
    figure = Figure(figsize=(max(5.5, 1.5 * num_sizes + 1.5), 3.1 * len(plans) + 0.6), layout="constrained")
    panels = figure.subplots(len(plans), squeeze=False, sharey=True)[:, 0]
    for axes, (precision, plan) in zip(panels, plans.items(), strict=True):
        _draw_panel(axes, plan, gpu_bytes)
        axes.set_title(precision, loc="left", fontsize=10, fontweight="bold")
    figure.suptitle(f"GiB per rank at the peak, {plan.model.num_params:,} parameters, without activations", fontsize=10)
    handles: list[Any] = [Patch(color=colour, label=part) for part, colour in _PARTS.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)


def _draw_panel(axes: Axes, plan: Plan, gpu_bytes: float | None) -> None:
    ticks, labels = [], []
    for group, row in enumerate(plan.rows):
        for offset, scheme in enumerate(SCHEMES, start=-1):
            footprint = row.of(scheme)
            if footprint is None:
                continue
            x = group + offset * (_BAR_WIDTH + 0.03)
            bottom = 0.0
            for part, size in _parts(footprint).items():
                axes.bar(x, size / GIB, _BAR_WIDTH, bottom, color=_PARTS[part], edgecolor="white", linewidth=0.5)
                bottom += size / GIB
            axes.annotate(f"{bottom:.3g}", (x, bottom), (0, 2), textcoords="offset points", ha="center", fontsize=7)
            ticks.append(x)
            labels.append(_LABELS[scheme])
        axes.annotate(
            f"{row.world_size} rank" + "s" * (row.world_size > 1),
            (group, 0),
            (0, -26),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            ha="center",
            fontsize=9,
        )
    axes.set_xticks(ticks, labels, fontsize=7)
    axes.tick_params(axis="x", length=0)
    axes.tick_params(axis="y", labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(y=0.12)
    if gpu_bytes:
        axes.axhline(gpu_bytes / GIB, color="#c44e52", linestyle="--", linewidth=1)
        axes.annotate(
            f"{gpu_bytes / GIB:g} GiB",
            (1, gpu_bytes / GIB),
            (-2, 2),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            ha="right",
            fontsize=8,
            color="#c44e52",
        )


def _parts(footprint: Footprint) -> dict[str, int]:
    return {
        "parameters": footprint.parameters + footprint.frozen,
        "state and master": footprint.state + footprint.masters,
        "gradients": footprint.gradients + footprint.gradient_shards,
        "buckets and copies": footprint.buckets + footprint.temporaries,
    }
