"""Gradients in: from ``param.grad`` to this rank's shard of their mean over the ranks.

[Note: round]  Backward makes gradients ready in some order. When all gradients of a bucket are there, and all buckets
before it are on their way, the bucket is reduce-scattered while backward goes on. The order of the collectives is the
order of the buckets, on every rank, whatever the order in which gradients become ready. What a rank does not have is
sent as zeros when `step` flushes. So in a step every rank issues each bucket's reduce-scatter exactly once: a *round*.

A gradient that arrives after its bucket was launched (a second backward pass before `step`) stays in ``param.grad``
and is accumulated there by autograd. The vote of the step tells all ranks which buckets need a second round.

[Note: in flight]  At most MAX_IN_FLIGHT buckets are being reduced. Launching one more first waits for the oldest, in
the middle of backward if need be: this is what bounds the memory of gradients to the shard and a few buckets.
"""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections import deque
from dataclasses import dataclass, field
from functools import partial
from itertools import chain

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakIdKeyDictionary

from sharded_adamax.buckets import Bucket
from sharded_adamax.collectives import Group, Pending

MAX_IN_FLIGHT = 2

# The hook that feeds each parameter's gradient to an optimizer. A parameter that is given to a new optimizer leaves the
# old one: two hooks would fight for one gradient.
_hooks: WeakIdKeyDictionary = WeakIdKeyDictionary()


@dataclass(frozen=True)
class LocalView:
    """What this rank can say of its gradients before anything is agreed."""

    used: list[bool]  # per slot, over all buckets: this rank has, or had, a gradient
    again: list[bool]  # per bucket: gradients arrived after it was launched
    fingerprints: Tensor  # uint8: equal on all ranks if the gradients should be, see ReducedGradients
    problem: str | None  # what is wrong with them


@dataclass
class Peaks:
    """The most bytes held at any one time since construction."""

    shard_bytes: int = 0
    bucket_bytes: int = 0


class GradientSource(ABC):
    """Where the shards of the mean gradients come from."""

    gradients_agree: bool  # must all ranks hold the same gradients?

    def __init__(self, group: Group) -> None:
        self.group = group
        self.buckets: list[Bucket] = []
        self.peaks = Peaks()

    def add(self, bucket: Bucket, names: list[str]) -> None:
        """Take over the gradients of one more bucket. The same order on every rank."""
        self.buckets.append(bucket)

    @abstractmethod
    def view(self) -> LocalView:
        """Return what this rank knows. Local."""

    @abstractmethod
    def flush(self) -> None:
        """Launch every bucket that is not on its way yet. Collective."""

    @abstractmethod
    def launch_again(self, index: int) -> None:
        """Reduce the gradients that arrived after bucket ``index`` was launched. Collective."""

    @abstractmethod
    def shard(self, index: int) -> Tensor:
        """Wait for bucket ``index`` and return its mean gradient shard, shape (shard_numel,), to be read."""

    @abstractmethod
    def take_shard(self, index: int) -> Tensor:
        """Wait for bucket ``index`` and hand over its mean gradient shard, shape (shard_numel,), to be consumed."""

    @abstractmethod
    def scale_(self, factor: Tensor) -> None:
        """Multiply all mean gradients by a 0-d tensor."""

    @abstractmethod
    def drop(self) -> None:
        """Forget all gradients taken since the last step and be ready for the next. Local."""

    @abstractmethod
    def discard(self) -> None:
        """Undo what backward did since the last step, for `zero_grad`. Collective where gradients were taken."""


@dataclass
class _Progress:
    """How far one bucket is within one step."""

    fired: list[int]  # per slot: gradients that autograd accumulated since the last step
    used: list[bool]  # per slot: a gradient went into the bucket when it was launched
    ready: set[int] = field(default_factory=set)  # slots whose gradient waits for the launch
    launched: bool = False
    shard: Tensor | None = None  # (shard_numel,), mean over the ranks, accumulated over rounds


class BackwardReduction(GradientSource):
    """Takes gradients from hooks while backward runs. See [Note: round]."""

    gradients_agree = False

    def __init__(self, group: Group) -> None:
        super().__init__(group)
        self.enabled = True  # False inside no_sync
        self._progress: list[_Progress] = []
        self._names: list[list[str]] = []
        self._num_launched = 0  # buckets 0 .. _num_launched - 1 are launched
        self._in_flight: deque[tuple[int, Pending[Tensor]]] = deque()

    def add(self, bucket: Bucket, names: list[str]) -> None:
        index = len(self.buckets)
        super().add(bucket, names)
        self._names.append(names)
        self._progress.append(_fresh(bucket))
        # A weak reference: an optimizer that the user has dropped must neither live on nor take gradients.
        this = weakref.ref(self)
        for slot, param in enumerate(bucket.params):
            _unhook(param)
            # A gradient set by hand on a parameter that requires none is found by the flush.
            if param.requires_grad:
                hook = partial(_on_gradient, this, index, slot)
                _hooks[param] = param.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]

    def on_gradient(self, index: int, slot: int) -> None:
        progress = self._progress[index]
        progress.fired[slot] += 1
        if not self.enabled or progress.launched:
            return
        progress.ready.add(slot)
        while self._num_launched < len(self.buckets) and self._is_complete(self._num_launched):
            self._launch_next()

    def view(self) -> LocalView:
        used, again = [], []
        problem = None
        for index, (bucket, progress) in enumerate(zip(self.buckets, self._progress, strict=True)):
            remaining = [param.grad is not None for param in bucket.params]
            if progress.launched:
                used += [was_used or left for was_used, left in zip(progress.used, remaining, strict=True)]
            else:
                used += remaining
            again.append(progress.launched and any(remaining))
            for slot, param in enumerate(bucket.params):
                if remaining[slot] and problem is None:
                    problem = self._problem_of(param, progress, self._names[index][slot], slot)
        return LocalView(used, again, torch.zeros(0, dtype=torch.uint8), problem)

    def flush(self) -> None:
        while self._num_launched < len(self.buckets):
            self._launch_next()

    def launch_again(self, index: int) -> None:
        self._launch(index)

    def shard(self, index: int) -> Tensor:
        while any(launched == index for launched, _ in self._in_flight):
            self._settle_oldest()
        shard = self._progress[index].shard
        assert shard is not None
        return shard

    def take_shard(self, index: int) -> Tensor:
        shard = self.shard(index)
        self._progress[index].shard = None
        return shard

    def scale_(self, factor: Tensor) -> None:
        for index in range(len(self.buckets)):
            self.shard(index).mul_(factor)

    def drop(self) -> None:
        while self._in_flight:
            self._settle_oldest()
        self._progress = [_fresh(bucket) for bucket in self.buckets]
        self._num_launched = 0

    def discard(self) -> None:
        # Ranks may have launched different numbers of buckets: complete the round, so that all are at the same place.
        if any(progress.launched or any(progress.fired) for progress in self._progress):
            self.flush()
            self.drop()

    def _is_complete(self, index: int) -> bool:
        return len(self._progress[index].ready) == len(self.buckets[index].params)

    def _launch_next(self) -> None:
        index = self._num_launched
        self._progress[index].used = [param.grad is not None for param in self.buckets[index].params]
        self._launch(index)
        self._progress[index].launched = True
        self._num_launched += 1

    def _launch(self, index: int) -> None:
        while len(self._in_flight) >= MAX_IN_FLIGHT:
            self._settle_oldest()
        with torch.no_grad(), torch.profiler.record_function(f"sharded_adamax::reduce_scatter bucket {index}"):
            gradients = self.buckets[index].collect_gradients()
            self._in_flight.append((index, self.group.reduce_scatter(gradients)))
        self._note_peaks()

    def _settle_oldest(self) -> None:
        index, pending = self._in_flight.popleft()
        with torch.no_grad(), torch.profiler.record_function(f"sharded_adamax::wait reduce bucket {index}"):
            mean = pending.wait().div_(self.group.size)
        progress = self._progress[index]
        progress.shard = mean if progress.shard is None else progress.shard.add_(mean)
        self._note_peaks()

    def _note_peaks(self) -> None:
        # A bucket in flight counts with its shard, too: the result exists already or is about to.
        in_flight = {index for index, _ in self._in_flight}
        shards = sum(
            bucket.param_shard.nbytes
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
            return "Adamax does not support sparse gradients"  # torch's own words
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


def _unhook(param: Tensor) -> None:
    previous: RemovableHandle | None = _hooks.pop(param, None)  # type: ignore[no-untyped-call]
    if previous is not None:
        previous.remove()


def _on_gradient(source: weakref.ref[BackwardReduction], index: int, slot: int, param: Tensor) -> None:
    this = source()
    if this is not None:
        this.on_gradient(index, slot)


@dataclass
class _Checks:
    """When to compare gradients between ranks: at calls 1, 2, 4, 8, ... of `step`.

    Comparing reads every gradient once. Doing so ever more rarely costs nothing in the long run, catches the forgotten
    wrapper at once, and a loop that changes its ways later.
    """

    num_steps: int = field(default=0)

    def due(self) -> bool:
        self.num_steps += 1
        return self.num_steps & (self.num_steps - 1) == 0


class ReducedGradients(GradientSource):
    """Takes gradients that something else (DistributedDataParallel) has reduced; leaves ``param.grad`` alone."""

    gradients_agree = True

    def __init__(self, group: Group) -> None:
        super().__init__(group)
        self._used: list[list[bool]] = []
        self._checks = _Checks()

    def add(self, bucket: Bucket, names: list[str]) -> None:
        super().add(bucket, names)
        for param in bucket.params:
            _unhook(param)
        self._used.append([param.grad is not None for param in bucket.params])

    def view(self) -> LocalView:
        self._used = [[param.grad is not None for param in bucket.params] for bucket in self.buckets]
        params = list(chain.from_iterable(bucket.params for bucket in self.buckets))
        sparse = any(param.grad is not None and param.grad.is_sparse for param in params)
        problem = "Adamax does not support sparse gradients" if sparse else None
        check = self._checks.due() and self.group.size > 1
        fingerprints = _fingerprints(params) if check else torch.zeros(0, dtype=torch.uint8)
        return LocalView(list(chain.from_iterable(self._used)), [False] * len(self.buckets), fingerprints, problem)

    def flush(self) -> None:
        pass

    def launch_again(self, index: int) -> None:
        raise AssertionError("gradients that are already reduced have no rounds")

    def shard(self, index: int) -> Tensor:
        shard = self.buckets[index].collect_gradient_shard(self._used[index])
        self.peaks.shard_bytes = max(self.peaks.shard_bytes, shard.nbytes)
        return shard

    def take_shard(self, index: int) -> Tensor:
        return self.shard(index)

    def scale_(self, factor: Tensor) -> None:
        params = chain.from_iterable(bucket.params for bucket in self.buckets)
        torch._foreach_mul_([param.grad for param in params if param.grad is not None], factor)

    def drop(self) -> None:
        pass

    def discard(self) -> None:
        pass


def _fingerprints(params: list[Tensor]) -> Tensor:
    """Return 8 bytes per gradient, uint8 on the CPU: the sum of its bits as integers. Exact, and NaN equals NaN."""
    sums = []
    for param in params:
        if param.grad is None or param.grad.is_sparse:
            sums.append(torch.zeros((), dtype=torch.int64, device=param.device))
        else:
            integer = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[param.grad.element_size()]
            bits = param.grad.detach().contiguous().reshape(-1).view(integer)
            sums.append(bits.sum(dtype=torch.int64))
    return torch.stack(sums).cpu().view(torch.uint8)
