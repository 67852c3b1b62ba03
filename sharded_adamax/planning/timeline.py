"""ShardedAdamax, moment by moment: what a rank holds while the buckets go through backward and `step`.

This follows buckets.py, collectives, reduction.py and engine.py allocation by allocation. Where memory comes to be
held for longer there, or for less long, the counts of tests/distributed/test_plan.py disagree.
"""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass
from itertools import chain

import torch

from sharded_adamax.buckets import Precision
from sharded_adamax.layout import BucketLayout, Layout
from sharded_adamax.planning.footprint import Footprint
from sharded_adamax.planning.model import ModelShape
from sharded_adamax.reduction import MAX_IN_FLIGHT


@dataclass(frozen=True)
class _BucketBytes:
    """What one bucket costs a rank, at the stations of its way."""

    parameters: int
    state: int
    master: int
    buffer: int  # the gradients, in the dtype of the wire
    in_flight: int  # the buffer, and where results of other ranks arrive
    counted_in_flight: int  # the same as `held_bytes` counts it: without what is to be the shard
    at_mean: int  # when the sum is divided and cast
    shard: int  # the mean gradient, as the update takes it
    at_update: int  # beside the shard, when the master takes over what was written to the parameters
    sent: int

    @classmethod
    def of(cls, bucket: BucketLayout, precision: Precision, *, on_gloo: bool) -> _BucketBytes:
        wire, update = precision.on_wire(bucket.dtype), precision.of_update(bucket.dtype)
        wide = torch.promote_types(wire, update)
        of_wire, of_update = bucket.shard_numel * wire.itemsize, bucket.shard_numel * update.itemsize
        num_peers = bucket.world_size - 1
        has_master = update != bucket.dtype
        buffer = bucket.numel * wire.itemsize
        # gloo: the rows of the other ranks arrive, and one of them becomes the sum. Others: the sum arrives.
        received = of_wire * (num_peers if on_gloo else min(num_peers, 1))
        in_flight = buffer + received
        casts = (wide.itemsize if wide != wire else 0) + (update.itemsize if update != wide else 0)
        # The rounded master, the comparison, the parameters as the master has them, and what is taken of both.
        compared = bucket.shard_numel * (bucket.dtype.itemsize + 1 + 2 * update.itemsize)
        return cls(
            parameters=bucket.nbytes,
            state=2 * of_update,
            master=of_update if has_master else 0,
            buffer=buffer,
            in_flight=in_flight,
            counted_in_flight=in_flight - of_wire if num_peers else 0,
            at_mean=of_wire + bucket.shard_numel * casts,
            shard=of_update,
            at_update=compared if has_master else 0,
            sent=num_peers * bucket.shard_numel * (wire.itemsize + bucket.dtype.itemsize),
        )


@dataclass(frozen=True)
class _Moment:
    gradients: int
    shards: int
    buckets: int
    temporaries: int
    when: str

    @property
    def total(self) -> int:
        return self.gradients + self.shards + self.buckets + self.temporaries


class _Timeline:
    """One backward pass and one step. Remembers the moment at which most is held."""

    def __init__(self, model: ModelShape, layout: Layout, buckets: list[_BucketBytes]) -> None:
        self._uses = model.uses
        self._gradient_bytes = model.gradient_bytes
        self._buckets = buckets
        self._bucket_of = {slot.param: index for index, bucket in enumerate(layout.buckets) for slot in bucket.slots}
        self._num_missing = [len(bucket.slots) for bucket in layout.buckets]
        self._bucket_gradients = [sum(self._gradient_bytes[slot.param] for slot in b.slots) for b in layout.buckets]
        self._in_flight: deque[int] = deque()
        self._num_launched = 0
        self._gradients = self._shards = self._in_buckets = 0
        self.peak = _Moment(0, 0, 0, 0, "between steps")
        self.counted_in_flight_peak = 0

    def run(self) -> None:
        self._backward()
        for index, bucket in enumerate(self._buckets):
            while index in self._in_flight:
                self._settle_oldest(f"step, before the update of bucket {index + 1}")
            self._note(f"step, update of bucket {index + 1}", bucket.at_update)
            self._shards -= bucket.shard

    def _backward(self) -> None:
        remaining = Counter(chain.from_iterable(self._uses))
        begun: set[int] = set()
        for params in reversed(self._uses):
            when = f"backward, gradients of bucket {self._bucket_of[params[0]] + 1}"
            # A tied weight: the next gradient, and a new tensor for the sum. Autograd adds in place where the first
            # gradient allows it; that of a linear layer, which is what most ties end with, does not.
            added = sum(2 * self._gradient_bytes[param] for param in params if param in begun)
            self._gradients += sum(self._gradient_bytes[param] for param in params if param not in begun)
            begun.update(params)
            self._note(when, added)
            for param in reversed(params):
                remaining[param] -= 1
                if not remaining[param]:
                    self._num_missing[self._bucket_of[param]] -= 1
                while self._num_launched < len(self._buckets) and not self._num_missing[self._num_launched]:
                    self._launch_next()

    def _launch_next(self) -> None:
        index = self._num_launched
        bucket = self._buckets[index]
        when = f"backward, launch of bucket {index + 1}"
        if len(self._in_flight) == MAX_IN_FLIGHT:
            self._settle_oldest(when)
        self._note(when, bucket.buffer)  # gradients are copied into it, and then freed
        self._gradients -= self._bucket_gradients[index]
        self._in_flight.append(index)
        self._num_launched += 1
        self._in_buckets += bucket.in_flight
        self._note(when)
        counted = sum(self._buckets[launched].counted_in_flight for launched in self._in_flight)
        self.counted_in_flight_peak = max(self.counted_in_flight_peak, counted)

    def _settle_oldest(self, when: str) -> None:
        bucket = self._buckets[self._in_flight.popleft()]
        self._in_buckets -= bucket.in_flight
        self._note(when, bucket.at_mean)
        self._shards += bucket.shard

    def _note(self, when: str, temporaries: int = 0) -> None:
        moment = _Moment(self._gradients, self._shards, self._in_buckets, temporaries, when)
        if moment.total > self.peak.total:
            self.peak = moment


def of_sharded_adamax(
    model: ModelShape, layout: Layout, precision: Precision, *, reduce_gradients: bool, on_gloo: bool
) -> Footprint:
    """Return what ShardedAdamax holds, the same on every rank.

    Args:
        layout: Of the parameters of ``model`` that are trained.
        reduce_gradients: False: DistributedDataParallel reduces, with ``gradient_as_bucket_view``.
        on_gloo: Whether gradients travel over gloo, on the CPU, or over NCCL.
    """
    buckets = [_BucketBytes.of(bucket, precision, on_gloo=on_gloo) for bucket in layout.buckets]
    if reduce_gradients:
        timeline = _Timeline(model, layout, buckets)
        timeline.run()
        peak, buckets_peak = timeline.peak, timeline.counted_in_flight_peak
        shards_peak = sum(bucket.shard for bucket in buckets)
        sent = sum(bucket.sent for bucket in buckets)
    else:
        peak = _peak_beside_ddp(model, buckets, layout.world_size)
        buckets_peak, shards_peak = 0, max(bucket.shard for bucket in buckets)
        gathered = sum((layout.world_size - 1) * bucket.parameters // layout.world_size for bucket in buckets)
        sent = gathered + all_reduce_bytes(sum(model.gradient_bytes), layout.world_size)
    return Footprint(
        parameters=sum(bucket.parameters for bucket in buckets),
        frozen=model.frozen_bytes,
        state=sum(bucket.state for bucket in buckets),
        masters=sum(bucket.master for bucket in buckets),
        gradients=peak.gradients,
        gradient_shards=peak.shards,
        buckets=peak.buckets,
        temporaries=peak.temporaries,
        peak_at=peak.when,
        sent_per_step=sent,
        gradient_shards_peak=shards_peak,
        buckets_peak=buckets_peak,
    )


def _peak_beside_ddp(model: ModelShape, buckets: list[_BucketBytes], world_size: int) -> _Moment:
    gradients = sum(model.gradient_bytes)
    moments = [_Moment(gradients, 0, 0, model.largest_in_autograd, "backward, before DDP copies a gradient")]
    if world_size > 1:  # its bits as 64-bit integers, to see whether all ranks have the same: steps 1, 2, 4, 8 ...
        checked = max(spec.numel * (8 if spec.dtype.is_floating_point else 16) for spec in model.trained)
        moments.append(_Moment(gradients, 0, 0, checked, "step, comparison of the gradients"))
    for index, bucket in enumerate(buckets):
        moments.append(_Moment(gradients, bucket.shard, 0, bucket.at_update, f"step, update of bucket {index + 1}"))
    return max(moments, key=lambda moment: moment.total)


def all_reduce_bytes(num_bytes: int, world_size: int) -> int:
    """Return what a rank sends in an all-reduce of ``num_bytes``, by the best of algorithms."""
    return 2 * (world_size - 1) * num_bytes // world_size
