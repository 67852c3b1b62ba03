"""Gradients in: from ``param.grad`` to this rank's shard of their mean over the ranks.

[Note: round]  Backward makes gradients ready in some order. When all gradients of a bucket are there, and all buckets
before it are on their way, the bucket is reduce-scattered while backward goes on. The order of the collectives is the
order of the buckets, on every rank, whatever the order in which gradients become ready. What a rank does not have is
sent as zeros when `step` flushes. So in a step every rank issues each bucket's reduce-scatter exactly once: a *round*.

Rounds are counted. A rank that ran backward or `zero_grad` where the others did not is in another round than they are,
and the vote of the step finds it before gradients of different steps are mixed. After a round was dropped without a
step, the next begins only when the vote has found all ranks in it: until then a rank could wait for messages that the
others are not going to send.

A gradient that arrives after its bucket was launched (a second backward pass before `step`) stays in ``param.grad``
and is accumulated there by autograd. The vote of the step tells all ranks which buckets need a second round.

[Note: in flight]  At most MAX_IN_FLIGHT buckets are being reduced. Launching one more first waits for the oldest, in
the middle of backward if need be: this is what bounds the memory of gradients to the shard and a few buckets.
"""

from __future__ import annotations

import weakref
from collections import deque
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from sharded_adamax import streams
from sharded_adamax.buckets import Bucket
from sharded_adamax.collectives import Group
from sharded_adamax.gradients import SPARSE, GradientSource, LocalView, TakenShard, hooks, unhook
from sharded_adamax.pending import Pending

MAX_IN_FLIGHT = 2


@dataclass
class _Progress:
    """How far one bucket is within one step."""

    fired: list[int]  # per slot: gradients that autograd accumulated since the last step
    used: list[bool]  # per slot: a gradient went into the bucket whenever it was launched
    ready: set[int] = field(default_factory=set)  # slots whose gradient waits for the launch
    streams: set[torch.Stream | None] = field(default_factory=set)  # that gradients were accumulated on
    launched: bool = False
    shard: Tensor | None = None  # (shard_numel,), mean over the ranks, accumulated over rounds


@dataclass
class _Zeros:
    """Which slots of one bucket would have a ``param.grad`` of zeros, if gradients stayed where torch has them.

    After ``zero_grad(set_to_none=False)`` torch updates a parameter that had a gradient before, though no new one came.
    """

    had_gradient: list[bool]  # since the last zero_grad(set_to_none=True)
    count: list[bool]  # as zeros in the next step

    def note(self, used: list[bool]) -> None:
        self.had_gradient = [before or now for before, now in zip(self.had_gradient, used, strict=True)]

    def clear(self, *, set_to_none: bool) -> None:
        if set_to_none:
            self.had_gradient = [False] * len(self.had_gradient)
        self.count = list(self.had_gradient)


class BackwardReduction(GradientSource):
    """Takes gradients from hooks while backward runs. See [Note: round]."""

    gradients_agree = False

    def __init__(self, group: Group) -> None:
        super().__init__(group)
        self.enabled = True  # False inside no_sync
        self._progress: list[_Progress] = []
        self._zeros: list[_Zeros] = []
        self._names: list[list[str]] = []
        self._num_launched = 0  # buckets 0 .. _num_launched - 1 are launched
        self._is_unscaled = False  # by a GradScaler, for the step that should come next
        self._scale: Tensor | None = None  # what all shards are still to be multiplied by, see scale_
        self._in_flight: deque[tuple[int, Pending[Tensor]]] = deque()

    def add(self, bucket: Bucket, names: list[str]) -> None:
        index = len(self.buckets)
        super().add(bucket, names)
        self._names.append(names)
        self._progress.append(_fresh(bucket))
        self._zeros.append(_Zeros([False] * len(bucket.params), [False] * len(bucket.params)))
        # A weak reference: an optimizer that the user has dropped must neither live on nor take gradients.
        this = weakref.ref(self)
        for slot, param in enumerate(bucket.params):
            unhook(param)
            # A gradient set by hand on a parameter that requires none is found by the flush.
            if param.requires_grad:
                hook = partial(_on_gradient, this, index, slot)
                hooks[param] = param.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]

    def on_gradient(self, index: int, slot: int, *, may_take: bool) -> None:
        """Note that autograd has accumulated a gradient, and launch what is complete.

        Args:
            may_take: Whether the gradient is final. Others wait until the next one, or the flush.
        """
        if self._is_unscaled:
            # The scaler found Inf and skipped the step. `zero_grad` of the optimizer would have said so; that of the
            # model cannot. torch allows no backward between unscale_ and step, so these gradients are of a new step.
            self._drop_without_step()
        progress = self._progress[index]
        progress.fired[slot] += 1
        progress.streams.add(streams.current(self.buckets[index].flat_param.device))
        if not self.enabled or self.must_agree_first or progress.launched:
            return
        if not may_take:
            self._launch_complete()
        progress.ready.add(slot)
        if may_take:
            self._launch_complete()

    def _launch_complete(self) -> None:
        while self._num_launched < len(self.buckets) and self._is_complete(self._num_launched):
            self._launch_next()

    def view(self) -> LocalView:
        used, again = [], []
        problem = None
        for index, (bucket, progress) in enumerate(zip(self.buckets, self._progress, strict=True)):
            remaining = [param.grad is not None for param in bucket.params]
            present = zip(progress.used, remaining, self._zeros[index].count, strict=True)
            used += [any(flags) for flags in present]
            again.append(progress.launched and any(remaining))
            for slot, param in enumerate(bucket.params):
                if remaining[slot] and problem is None:
                    problem = self._problem_of(param, progress, self._names[index][slot], slot)
        return LocalView(used, again, torch.zeros(0, dtype=torch.uint8), self.num_rounds, problem)

    def flush(self) -> None:
        while self._num_launched < len(self.buckets):
            self._launch_next()

    def launch_again(self, index: int) -> None:
        self._settle_scale()  # it is not for the gradients of this round
        self._note_used(index)
        self._launch(index)

    def shard(self, index: int) -> Tensor:
        self._settle_scale()
        return self._unscaled_shard(index)

    def _unscaled_shard(self, index: int) -> Tensor:
        while any(launched == index for launched, _ in self._in_flight):
            self._settle_oldest()
        shard = self._progress[index].shard
        assert shard is not None
        streams.take_over([shard])  # from the hook, perhaps, that waited for it
        if self._scale is not None:
            streams.take_over([self._scale])  # from whoever clipped
        return shard

    def take_shard(self, index: int) -> TakenShard:
        shard = self._unscaled_shard(index)
        self._progress[index].shard = None
        return TakenShard(shard, self._scale)

    def scale_(self, factor: Tensor) -> None:
        # Clipping is most often the last thing before the update, which may multiply in its own pass over the shards.
        self._settle_scale()
        self._scale = factor

    def _settle_scale(self) -> None:
        if self._scale is not None:
            for index in range(len(self.buckets)):
                self._unscaled_shard(index).mul_(self._scale)
            self._scale = None

    def unscale_(self, inv_scale: Tensor, found_inf: Tensor) -> None:
        """Multiply all mean gradients by ``inv_scale``; set ``found_inf`` to 1 if one is not finite on this rank.

        Args:
            inv_scale, found_inf: float32, 0-d, on the device of the gradients.

        Source: torch/amp/grad_scaler.py, ``_unscale_grads_``: the same operation, on the same mean gradients.
        """
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for index in range(len(self.buckets)):
            shard = self.shard(index)
            by_dtype.setdefault(shard.dtype, []).append(shard)
        for shards in by_dtype.values():
            torch._amp_foreach_non_finite_check_and_unscale_(shards, found_inf, inv_scale)
        self._is_unscaled = True

    def missing(self) -> list[int]:
        return sorted({rank for _, pending in self._in_flight for rank in pending.missing()})

    def drop(self) -> None:
        while self._in_flight:
            self._settle_oldest()
        self._progress = [_fresh(bucket) for bucket in self.buckets]
        self._num_launched = 0
        self.num_rounds += 1
        self._is_unscaled = False
        self._scale = None
        self.must_agree_first = False

    def _drop_without_step(self) -> None:
        self.drop()
        self.must_agree_first = self.group.size > 1

    def discard(self, *, set_to_none: bool) -> None:
        # Ranks may have launched different numbers of buckets: complete the round, so that all are at the same place.
        if any(progress.launched or any(progress.fired) for progress in self._progress):
            self.flush()
            self._drop_without_step()
        for zeros in self._zeros:
            zeros.clear(set_to_none=set_to_none)

    def _is_complete(self, index: int) -> bool:
        return len(self._progress[index].ready) == len(self.buckets[index].params)

    def _launch_next(self) -> None:
        index = self._num_launched
        self._note_used(index)
        self._launch(index)
        self._progress[index].launched = True
        self._num_launched += 1

    def _note_used(self, index: int) -> None:
        progress = self._progress[index]
        progress.used = [
            before or param.grad is not None
            for before, param in zip(progress.used, self.buckets[index].params, strict=True)
        ]
        self._zeros[index].note(progress.used)

    def _launch(self, index: int) -> None:
        while len(self._in_flight) >= MAX_IN_FLIGHT:
            self._settle_oldest()
        with torch.no_grad(), torch.profiler.record_function(f"sharded_adamax::reduce_scatter bucket {index}"):
            self._take_over_gradients(index)
            gradients = self.buckets[index].collect_gradients()
            self._in_flight.append((index, self.group.reduce_scatter(gradients)))
        self._note_peaks()

    def _take_over_gradients(self, index: int) -> None:
        """Make the current stream wait for gradients of a bucket that come from others, and free to drop them."""
        bucket, progress = self.buckets[index], self._progress[index]
        elsewhere = progress.streams - {streams.current(bucket.flat_param.device)}
        # Where no hook has run, the gradient was set by hand, on an unknown stream, or there is none.
        if elsewhere or 0 in progress.fired:
            gradients = [param.grad for param in bucket.params if param.grad is not None and not param.grad.is_sparse]
            streams.take_over(gradients, after=elsewhere)

    def _settle_oldest(self) -> None:
        index, pending = self._in_flight[0]
        with torch.no_grad():
            with self.group.traffic.waiting("reduce_scatter", f"reduce bucket {index}"):
                total = pending.wait(f"the reduce-scatter of bucket {index}, step {self.step}")
            mean = self.buckets[index].mean_shard(total, self.group.size)
        # Only now: if waiting fails, messages under way still use its memory.
        self._in_flight.popleft()
        progress = self._progress[index]
        progress.shard = mean if progress.shard is None else progress.shard.add_(mean)
        self._note_peaks()

    def _note_peaks(self) -> None:
        # A bucket in flight counts with its shard, too: the result exists already or is about to.
        in_flight = {index for index, _ in self._in_flight}
        shards = sum(
            bucket.exp_avg.nbytes
            for index, (bucket, progress) in enumerate(zip(self.buckets, self._progress, strict=True))
            if progress.shard is not None or index in in_flight
        )
        self.peaks.shard_bytes = max(self.peaks.shard_bytes, shards)
        self.peaks.bucket_bytes = max(
            self.peaks.bucket_bytes, sum(pending.held_bytes for _, pending in self._in_flight)
        )

    def _problem_of(self, param: Tensor, progress: _Progress, name: str, slot: int) -> str | None:
        """Return what is wrong with a gradient that is still in ``param.grad`` at the time of `step`."""
        assert param.grad is not None
        if param.grad.is_sparse:
            return SPARSE
        if progress.launched and progress.fired[slot] <= 1:
            return (
                f"rank {self.group.rank}: {name} got a new .grad after its gradient had been taken in backward. If "
                "DistributedDataParallel (or another wrapper that reduces gradients) holds the model, build "
                "ShardedAdamax with reduce_gradients=False; to change gradients by hand, do so in a hook of the "
                "parameter"
            )
        return None


def _fresh(bucket: Bucket) -> _Progress:
    num_slots = len(bucket.params)
    return _Progress(fired=[0] * num_slots, used=[False] * num_slots)


def _on_gradient(source: weakref.ref[BackwardReduction], index: int, slot: int, param: Tensor) -> None:
    this = source()
    if this is None:
        return
    # The user's hooks on the same parameter see and change param.grad before it is taken: ours is to be the last.
    # Where one was added since, ours goes behind it for the next time, and this time the gradient is not taken yet.
    of_param = param._post_accumulate_grad_hooks
    ours = hooks[param].id
    is_last = next(reversed(of_param)) == ours
    if not is_last:
        of_param[ours] = of_param.pop(ours)
    this.on_gradient(index, slot, may_take=is_last)
