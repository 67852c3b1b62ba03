"""What the optimizer has made of a model: its buckets, who owns what of them, their bytes, and what a step sends.

All of it follows from the layout, so every rank gets the same, and a summary for 4,096 ranks can be made on a laptop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING

import torch

from sharded_adamax.buckets import Precision
from sharded_adamax.layout import BucketLayout, Layout
from sharded_adamax.ranges import Range

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
# Colours that stay apart for the colour-blind, and light enough for black letters. With more ranks they come again.
_RANK_COLOURS = ("#8da0cb", "#fc8d62", "#66c2a5", "#e78ac3", "#a6d854", "#ffd92f", "#e5c494", "#b3b3b3")
_MAX_IN_TABLE = 4
_HEADER = (
    *("bucket", "dtype", "tensors", "elements", "padding", "parameters", "state", "masters"),
    *("bits", "reduce-scatter", "all-gather"),
)


@dataclass(frozen=True)
class ParamRow:
    """The place of one parameter in its bucket."""

    name: str
    shape: tuple[int, ...]
    in_bucket: Range
    owners: dict[int, Range]  # rank -> elements of the parameter that it owns, in the order of memory


@dataclass(frozen=True)
class BucketRow:
    """One bucket. Bytes and elements are those of one rank where they say so, and the same on every rank."""

    params: tuple[ParamRow, ...]
    dtype: torch.dtype
    wire_dtype: torch.dtype | None  # of the gradients; None: they arrive reduced
    numel: int  # with padding
    padding_numel: int
    owners: tuple[Range, ...]  # by rank: the elements of the bucket that it owns
    param_bytes: int  # with padding; on each rank
    state_bytes: int  # exp_avg and exp_inf; on each rank
    master_bytes: int  # on each rank
    reduce_scatter_bytes: int  # that each rank sends in a step
    all_gather_bytes: int  # that each rank sends in a step

    @property
    def wire_bits(self) -> tuple[int, int]:
        """Return the bits of an element on the wire: as a gradient (0: it is not sent), and as a parameter."""
        return 8 * self.wire_dtype.itemsize if self.wire_dtype else 0, 8 * self.dtype.itemsize


@dataclass(frozen=True)
class Summary:
    """The buckets, in the order in which they are reduced. ``str`` of it is a table.

    Parameters that are frozen and never had a gradient have no bucket and are not in it.
    """

    world_size: int
    buckets: tuple[BucketRow, ...]

    @property
    def num_params(self) -> int:
        """Elements of all parameters, without padding."""
        return sum(bucket.numel - bucket.padding_numel for bucket in self.buckets)

    @property
    def bytes_per_rank(self) -> int:
        """Bytes that each rank holds between steps: parameters, state and masters."""
        return sum(bucket.param_bytes + bucket.state_bytes + bucket.master_bytes for bucket in self.buckets)

    @property
    def sent_bytes_per_step(self) -> int:
        """Bytes that each rank sends in a step, without the vote (a few bytes for each parameter)."""
        return sum(bucket.reduce_scatter_bytes + bucket.all_gather_bytes for bucket in self.buckets)

    @property
    def headline(self) -> str:
        """The summary in one line."""
        num_tensors = sum(len(bucket.params) for bucket in self.buckets)
        counts = ((num_tensors, "tensor"), (len(self.buckets), "bucket"), (self.world_size, "rank"))
        return (
            f"{self.num_params:,} parameters in {', '.join(_count(*count) for count in counts)}; each rank holds "
            f"{_size(self.bytes_per_rank)} between steps and sends {_size(self.sent_bytes_per_step)} per step"
        )

    def __str__(self) -> str:
        rows = [_cells(f"{index}", bucket) for index, bucket in enumerate(self.buckets)]
        owners = [_owner_cells(f"{index}", bucket) for index, bucket in enumerate(self.buckets)]
        table = _table(_HEADER, [*rows, self._totals()])
        return "\n".join(
            [
                self.headline,
                "",
                "Parameters, state and masters: bytes that each rank holds. reduce-scatter and all-gather: bytes that",
                "each rank sends in a step, with the bits of a gradient and of a parameter on the wire.",
                *(*table[:-1], table[1], table[-1]),
                "",
                "Elements of each bucket that a rank owns:",
                *_table(("bucket", *_owner_header(self.world_size), "parameters"), owners, last=str.ljust),
            ]
        )

    def _totals(self) -> tuple[str, ...]:
        def total(field: str) -> int:
            return sum(getattr(bucket, field) for bucket in self.buckets)

        return (
            *("all", "", f"{sum(len(bucket.params) for bucket in self.buckets):,}"),
            *(f"{total('numel'):,}", f"{total('padding_numel'):,}"),
            *(_size(total(field)) for field in ("param_bytes", "state_bytes", "master_bytes")),
            *("", _size(total("reduce_scatter_bytes")), _size(total("all_gather_bytes"))),
        )

    def draw(self, path: str | PathLike[str]) -> None:
        """Draw each bucket as a bar, cut into shards in the colours of their ranks. Needs matplotlib.

        Args:
            path: Where the picture goes; its ending says in which format: .png, .svg, .pdf.

        Raises:
            ModuleNotFoundError: matplotlib is not installed.
        """
        try:
            from matplotlib.figure import Figure
            from matplotlib.patches import Patch
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "a picture of a summary needs matplotlib: pip install 'sharded-adamax[demo]'", name="matplotlib"
            ) from error
        # Not pyplot: it would open windows, and change the backend that the program has chosen.
        figure = Figure(figsize=(13, 1.6 + min(0.45 * len(self.buckets), 60)), layout="constrained")
        axes = figure.subplots()
        for row, bucket in enumerate(self.buckets):
            _draw_bucket(axes, row, bucket)
        labels = [f"{index}: {_size(bucket.param_bytes)}" for index, bucket in enumerate(self.buckets)]
        axes.set_yticks(range(len(labels)), labels)
        axes.set_ylabel("bucket")
        axes.set_xlim(0, 100)
        axes.set_ylim(max(len(self.buckets), 1) - 0.5, -0.5)
        axes.spines[:].set_visible(False)
        axes.set_xlabel("position in the bucket (% of its elements); lines: borders of parameters; hatched: padding")
        axes.set_title(self.headline, loc="left", fontsize=10)
        num_colours = len(_RANK_COLOURS)
        handles = [
            Patch(color=_colour(rank), label=f"rank {rank}" + (f", {rank + num_colours}, ..." if is_shared else ""))
            for rank in range(min(self.world_size, num_colours))
            for is_shared in [rank + num_colours < self.world_size]
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=9)
        figure.savefig(path, dpi=120)


def summarize(layout: Layout, precision: Precision, *, reduce_gradients: bool) -> Summary:
    """Return the summary of a layout. Local; no tensor is needed."""
    buckets = tuple(_row(layout, bucket, precision, reduce_gradients) for bucket in layout.buckets)
    return Summary(layout.world_size, buckets)


def _row(layout: Layout, bucket: BucketLayout, precision: Precision, reduce_gradients: bool) -> BucketRow:
    update = precision.of_update(bucket.dtype)
    wire = precision.on_wire(bucket.dtype) if reduce_gradients else None
    params = []
    for slot in bucket.slots:
        spec = layout.specs[slot.param]
        params.append(ParamRow(spec.name, spec.shape, slot.in_bucket, _owners(bucket, slot.in_bucket)))
    return BucketRow(
        params=tuple(params),
        dtype=bucket.dtype,
        wire_dtype=wire,
        numel=bucket.numel,
        padding_numel=bucket.numel - sum(slot.numel for slot in bucket.slots),
        owners=tuple(bucket.shard(rank) for rank in range(bucket.world_size)),
        param_bytes=bucket.nbytes,
        state_bytes=2 * bucket.shard_numel * update.itemsize,
        master_bytes=bucket.shard_numel * update.itemsize if update != bucket.dtype else 0,
        reduce_scatter_bytes=bucket.sent_bytes(wire) if wire else 0,
        all_gather_bytes=bucket.sent_bytes(bucket.dtype),
    )


def _owners(bucket: BucketLayout, in_bucket: Range) -> dict[int, Range]:
    """Return which rank owns which elements of the parameter at ``in_bucket``.

    Example: with shards of 128 elements a parameter at [64, 264) belongs to ranks 0, 1 and 2: [0, 64), [64, 192) and
    [192, 200) of it.
    """
    if in_bucket.numel == 0:
        return {}
    ranks = range(in_bucket.start // bucket.shard_numel, (in_bucket.stop - 1) // bucket.shard_numel + 1)
    return {rank: in_bucket.intersect(bucket.shard(rank)).shift(-in_bucket.start) for rank in ranks}


def _cells(name: str, bucket: BucketRow) -> tuple[str, ...]:
    of_gradient, of_param = bucket.wire_bits
    return (
        *(name, str(bucket.dtype).removeprefix("torch."), f"{len(bucket.params):,}"),
        *(f"{bucket.numel:,}", f"{bucket.padding_numel:,}"),
        *(_size(bucket.param_bytes), _size(bucket.state_bytes), _size(bucket.master_bytes)),
        f"{of_gradient or '-'} / {of_param}",
        *(_size(bucket.reduce_scatter_bytes), _size(bucket.all_gather_bytes)),
    )


def _shown_ranks(world_size: int) -> list[int | None]:
    """Return the ranks that a table has room for, None for those between."""
    return list(range(world_size)) if world_size <= _MAX_IN_TABLE else [0, 1, None, world_size - 1]


def _owner_header(world_size: int) -> list[str]:
    return ["..." if rank is None else f"rank {rank}" for rank in _shown_ranks(world_size)]


def _owner_cells(name: str, bucket: BucketRow) -> tuple[str, ...]:
    owned = [None if rank is None else bucket.owners[rank] for rank in _shown_ranks(len(bucket.owners))]
    first, last = bucket.params[0].name, bucket.params[-1].name
    names = first if len(bucket.params) == 1 else f"{first} ... {last}"
    return (name, *("" if part is None else f"{part.start}:{part.stop}" for part in owned), names)


def _table(
    header: Sequence[str], rows: Sequence[Sequence[str]], last: Callable[[str, int], str] = str.rjust
) -> list[str]:
    """Return lines: the header, a rule, and the rows, right-justified but for the ``last`` column, which is free."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    justify = [str.rjust] * (len(widths) - 1) + [last]
    lines = [
        "  ".join(to(cell, width) for to, cell, width in zip(justify, cells, widths, strict=True)).rstrip()
        for cells in (header, *rows)
    ]
    return [lines[0], "-" * max(map(len, lines)), *lines[1:]]


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _size(nbytes: int) -> str:
    size = float(nbytes)
    for unit in _UNITS[:-1]:
        if size < 1024:
            return f"{nbytes} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} {_UNITS[-1]}"


def _draw_bucket(axes: Axes, row: int, bucket: BucketRow) -> None:
    percent = 100 / bucket.numel
    height = (row - 0.4, 0.8)
    shards = [(owned.start * percent, owned.numel * percent) for owned in bucket.owners]
    axes.broken_barh(shards, height, facecolors=[_colour(rank) for rank in range(len(shards))])
    gaps = [(gap.start * percent, gap.numel * percent) for gap in _padding(bucket)]
    axes.broken_barh(gaps, height, facecolors="none", hatch="////", linewidth=0)
    borders = [edge * percent for param in bucket.params for edge in param.in_bucket]
    axes.vlines(borders, row - 0.4, row + 0.4, "black", linewidth=0.7)
    for param in bucket.params:
        width = param.in_bucket.numel * percent
        # At this size of figure a letter takes less than half a percent of the width.
        if width > 0.5 * len(param.name):
            middle = (param.in_bucket.start + param.in_bucket.stop) / 2 * percent
            axes.text(middle, row, param.name, ha="center", va="center", fontsize=8)


def _padding(bucket: BucketRow) -> Iterator[Range]:
    """Find what belongs to no parameter."""
    starts: Sequence[int] = [0, *(param.in_bucket.stop for param in bucket.params)]
    stops: Sequence[int] = [*(param.in_bucket.start for param in bucket.params), bucket.numel]
    return (Range(start, stop) for start, stop in zip(starts, stops, strict=True) if start < stop)


def _colour(rank: int) -> str:
    return _RANK_COLOURS[rank % len(_RANK_COLOURS)]
