"""Half-open ranges of elements, and a flat range seen as N-dimensional boxes.

[Note: range]  ``Range(start, stop)`` holds the elements ``start, start + 1, ..., stop - 1``. ``start == stop`` is the
empty range. A range says nothing of what it indexes: a bucket, a shard or a flattened parameter; the name of the
variable does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple


class Range(NamedTuple):
    """The elements from ``start`` up to, but not including, ``stop``."""

    start: int
    stop: int

    @property
    def numel(self) -> int:
        return self.stop - self.start

    def intersect(self, other: Range) -> Range:
        """Return the elements in both; the empty range ``(start, start)`` where there are none."""
        start = max(self.start, other.start)
        return Range(start, max(start, min(self.stop, other.stop)))

    def shift(self, offset: int) -> Range:
        """Return the same number of elements, ``offset`` further on."""
        return Range(self.start + offset, self.stop + offset)

    def as_slice(self) -> slice:
        return slice(self.start, self.stop)


class Box(NamedTuple):
    """An axis-aligned block of an N-dimensional tensor: its first corner and its extent in each dimension."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.sizes)


def round_up(value: int, multiple: int) -> int:
    """Return the smallest multiple of ``multiple`` that is at least ``value``."""
    return -(-value // multiple) * multiple


def dim_order(strides: Sequence[int]) -> tuple[int, ...]:
    """Return the dimensions of a dense tensor from the outermost in memory to the innermost.

    Example: a channels_last tensor of shape (2, 3, 4, 5) has strides (60, 1, 15, 3) and order (0, 2, 3, 1).
    """
    return tuple(sorted(range(len(strides)), key=lambda dim: -strides[dim]))


def cut_at_rows(shape: Sequence[int], flat: Range, max_numel: int) -> list[Range]:
    """Cut a range of a row-major tensor into ranges of at most ``max_numel`` elements.

    Whole rows stay together where they are that small. The cuts are at the same elements whatever the range, so shards
    of different world sizes are cut along one grid.

    Example: rows of 4, at most 10 elements: cuts at 0, 8, 16, ..., so Range(2, 17) gives 2..8, 8..16 and 16..17.
    """
    row_numel = math.prod(shape[1:])
    step = max_numel // row_numel * row_numel if 0 < row_numel <= max_numel else max_numel
    first = flat.start // step
    cuts = [flat.start, *(n * step for n in range(first + 1, -(-flat.stop // step))), flat.stop]
    return [Range(start, stop) for start, stop in pairwise(cuts) if start < stop]


def boxes(shape: Sequence[int], flat: Range) -> list[Box]:
    """Cut a range of a row-major tensor into boxes, in the order of their elements.

    File formats speak of boxes, shards are flat ranges. At most ``2 * len(shape) - 1`` boxes are needed: a ragged head,
    whole rows, a ragged tail, and the same again inside a ragged row.

    Example: rows of 4, elements 2..10 are the tail of row 0, the whole of row 1 and the head of row 2::

        . . X X      Box((0, 2), (1, 2))
        X X X X      Box((1, 0), (1, 4))
        X X . .      Box((2, 0), (1, 2))

    Args:
        shape: The tensor's shape; ``()`` for a 0-d tensor.
        flat: Elements of the flattened tensor.

    Returns:
        The boxes; none for an empty range. Their sizes add up to ``flat.numel``.
    """
    if flat.numel == 0:
        return []
    if len(shape) == 0:
        return [Box((), ())]
    if len(shape) == 1:
        return [Box((flat.start,), (flat.numel,))]

    row_shape = tuple(shape[1:])
    row_numel = math.prod(row_shape)
    first_row, head = divmod(flat.start, row_numel)
    last_row, tail = divmod(flat.stop, row_numel)

    def inside_row(row: int, start: int, stop: int) -> list[Box]:
        return [Box((row, *offsets), (1, *sizes)) for offsets, sizes in boxes(row_shape, Range(start, stop))]

    if first_row == last_row:
        return inside_row(first_row, head, tail)
    found: list[Box] = []
    if head:
        found += inside_row(first_row, head, row_numel)
        first_row += 1
    if first_row < last_row:
        found.append(Box((first_row, *(0 for _ in row_shape)), (last_row - first_row, *row_shape)))
    if tail:
        found += inside_row(last_row, 0, tail)
    return found
