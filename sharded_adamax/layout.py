"""Who owns what: the plan by which parameters are packed into buckets and buckets are cut into shards.

[Note: bucket, slot, shard, piece]

- A *bucket* is a flat tensor that holds several parameters of one dtype, one after another. Its size is what one
  reduce-scatter and one all-gather move.
- A *slot* is the place of one parameter in its bucket. Slots start at multiples of 64 elements, so that every parameter
  is aligned for vector loads and so that low-precision kernels see the same lanes as an unsharded parameter would.
- A *shard* is the part of a bucket that one rank owns. All shards of a bucket have the same number of elements, a
  multiple of 64: the bucket is padded at its end.
- A *piece* is the part of one parameter inside one shard. The pieces of all ranks cover each parameter exactly once.
- Elements of a parameter are counted in the order in which they lie in memory. That is the row-major order unless the
  model is in channels_last or another dense format, which a bucket keeps: it is what convolutions are fast with.

::

    bucket   |-- weight ------------------|pad|-- bias --|pad|-- scale --|pad .... pad|
    shards   |------- rank 0 -------|------- rank 1 -------|------- rank 2 ----------|
    pieces    weight[0:128]          weight[128:200] bias[0:..] ...

Everything here is frozen and made of plain integers. The rank is an argument, never looked up, so a layout for 4,096
ranks is built on a laptop, and no process group is needed.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sharded_adamax.ranges import Range, dim_order, round_up

ALIGNMENT_NUMEL = 64


@dataclass(frozen=True, slots=True)
class ParamSpec:
    """What the layout needs to know of a parameter."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    dim_order: tuple[int, ...] = ()  # dimensions as they lie in memory, outermost first; () is the row-major order

    @classmethod
    def of(cls, name: str, param: torch.Tensor) -> ParamSpec:
        order = dim_order(dense_strides(param))
        row_major = order == tuple(range(param.dim()))
        return cls(name, tuple(param.shape), param.dtype, () if row_major else order)

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def dense_strides(param: torch.Tensor) -> tuple[int, ...]:
    """Return the strides of ``param``; where it overlaps itself or has gaps, those that torch would give a copy."""
    return torch.empty_like(param, device="meta").stride()


@dataclass(frozen=True, slots=True)
class Slot:
    """The place of one parameter in its bucket."""

    param: int  # index into Layout.specs
    start: int  # first element in the bucket
    numel: int

    @property
    def in_bucket(self) -> Range:
        return Range(self.start, self.start + self.numel)


@dataclass(frozen=True, slots=True)
class Piece:
    """The part of one parameter that lies in one rank's shard."""

    param: int  # index into Layout.specs
    slot: int  # index into BucketLayout.slots
    in_param: Range  # elements of the parameter, in memory order
    in_shard: Range  # the same elements, counted from the start of the shard


@dataclass(frozen=True, slots=True)
class BucketLayout:
    """One bucket: its slots, and how it is cut into ``world_size`` equal shards."""

    dtype: torch.dtype
    slots: tuple[Slot, ...]
    world_size: int
    shard_numel: int

    @property
    def numel(self) -> int:
        """Elements with padding."""
        return self.shard_numel * self.world_size

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    def shard(self, rank: int) -> Range:
        """Return the elements of this bucket that ``rank`` owns."""
        return Range(rank * self.shard_numel, (rank + 1) * self.shard_numel)

    def sent_bytes(self, dtype: torch.dtype) -> int:
        """Return what each rank sends when this bucket is reduce-scattered, or all-gathered, in ``dtype``."""
        return (self.world_size - 1) * self.shard_numel * dtype.itemsize

    def pieces(self, rank: int) -> list[Piece]:
        """Return a piece for every slot, in the order of the slots; empty where ``rank`` owns nothing of it.

        Example: shard 1 of 128 elements is [128, 256). A slot at [64, 264) has there the bucket range [128, 256),
        which is [64, 192) of the parameter and [0, 128) of the shard.
        """
        shard = self.shard(rank)
        found = []
        for index, slot in enumerate(self.slots):
            owned = slot.in_bucket.intersect(shard)
            if owned.numel:
                found.append(Piece(slot.param, index, owned.shift(-slot.start), owned.shift(-shard.start)))
            else:
                found.append(Piece(slot.param, index, Range(0, 0), Range(0, 0)))
        return found


@dataclass(frozen=True, slots=True)
class Layout:
    """The whole plan: the parameters and the buckets, in the order in which they are reduced and gathered."""

    world_size: int
    specs: tuple[ParamSpec, ...]
    buckets: tuple[BucketLayout, ...]

    @property
    def padded_numel(self) -> int:
        return sum(bucket.numel for bucket in self.buckets)

    def digest(self) -> str:
        """Return 64 hex digits that differ where two layouts differ."""
        return hashlib.sha256(repr(self).encode()).hexdigest()

    def extended(self, other: Layout) -> Layout:
        """Return this layout with the parameters and buckets of ``other`` behind its own."""
        if other.world_size != self.world_size:
            raise ValueError(f"expected a layout for {self.world_size} ranks, got one for {other.world_size}")
        offset = len(self.specs)
        moved = tuple(
            BucketLayout(
                bucket.dtype,
                tuple(Slot(slot.param + offset, slot.start, slot.numel) for slot in bucket.slots),
                bucket.world_size,
                bucket.shard_numel,
            )
            for bucket in other.buckets
        )
        return Layout(self.world_size, self.specs + other.specs, self.buckets + moved)


def build(specs: Sequence[ParamSpec], *, world_size: int, bucket_bytes: int) -> Layout:
    """Pack parameters into buckets of at most ``bucket_bytes`` and cut each into ``world_size`` shards.

    The last parameter comes first: backward makes gradients ready roughly in the reverse of the order in which the
    forward pass uses the parameters, so the first bucket fills first. A parameter larger than ``bucket_bytes`` gets a
    bucket of its own; it is never cut into several buckets, because its tensor must stay one view of one flat tensor.

    Args:
        specs: The parameters, in the order of the optimizer's groups.
        world_size: Number of shards.
        bucket_bytes: Upper limit of a bucket, without its padding; at least 1.

    Returns:
        The layout. The same arguments give the same layout on every rank.
    """
    if world_size < 1 or bucket_bytes < 1:
        raise ValueError(
            f"expected a world size and a bucket size of at least 1, got {world_size} ranks and {bucket_bytes} bytes"
        )
    closed: list[BucketLayout] = []
    filling: dict[torch.dtype, list[Slot]] = {}

    def used_numel(slots: list[Slot]) -> int:
        return round_up(slots[-1].in_bucket.stop, ALIGNMENT_NUMEL) if slots else 0

    def close(dtype: torch.dtype) -> None:
        slots = filling.pop(dtype)
        # At least one unit, so that a bucket of empty parameters is no special case to anybody.
        numel = max(used_numel(slots), 1)
        shard_numel = round_up(numel, ALIGNMENT_NUMEL * world_size) // world_size
        closed.append(BucketLayout(dtype, tuple(slots), world_size, shard_numel))

    for index in reversed(range(len(specs))):
        spec = specs[index]
        start = used_numel(filling.get(spec.dtype, []))
        if start and (start + spec.numel) * spec.dtype.itemsize > bucket_bytes:
            close(spec.dtype)
            start = 0
        filling.setdefault(spec.dtype, []).append(Slot(index, start, spec.numel))
    for dtype in list(filling):
        close(dtype)
    return Layout(world_size, tuple(specs), tuple(closed))
