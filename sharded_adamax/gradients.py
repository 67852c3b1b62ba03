"""Where the mean gradients come from: the interface, and the source for gradients that arrive reduced already.

The other source, which reduces them itself while backward runs, is in reduction.py.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakIdKeyDictionary

from sharded_adamax.buckets import Bucket
from sharded_adamax.collectives import Group

SPARSE = "Adamax does not support sparse gradients"  # torch's own words

# The hook that feeds each parameter's gradient to an optimizer. A parameter that is given to a new optimizer leaves the
# old one: two hooks would fight for one gradient.
hooks: WeakIdKeyDictionary = WeakIdKeyDictionary()


def sparse_problem(params: Iterable[Tensor]) -> str | None:
    """Return what is wrong with the gradients, if one is sparse."""
    return SPARSE if any(param.grad is not None and param.grad.is_sparse for param in params) else None


def unhook(param: Tensor) -> None:
    """Take ``param`` away from the optimizer that its gradients go to, if there is one."""
    previous: RemovableHandle | None = hooks.pop(param, None)  # type: ignore[no-untyped-call]
    if previous is not None:
        previous.remove()


@dataclass(frozen=True)
class LocalView:
    """What this rank can say of its gradients before anything is agreed."""

    used: list[bool]  # per slot, over all buckets: this rank has, or had, a gradient
    again: list[bool]  # per bucket: gradients arrived after it was launched
    fingerprints: Tensor  # uint8: equal on all ranks if the gradients should be, see ReducedGradients
    num_rounds: int  # of reductions that are over: equal on all ranks if they are in the same step
    problem: str | None  # what is wrong with them


@dataclass
class Peaks:
    """The most bytes held at any one time since construction."""

    shard_bytes: int = 0
    bucket_bytes: int = 0


class TakenShard(NamedTuple):
    """The mean gradient of one shard, for its update."""

    values: Tensor  # (shard_numel,)
    scale: Tensor | None  # 0-d: what they are still to be multiplied by


class GradientSource(ABC):
    """Where the shards of the mean gradients come from."""

    gradients_agree: bool  # must all ranks hold the same gradients?

    def __init__(self, group: Group) -> None:
        self.group = group
        self.buckets: list[Bucket] = []
        self.peaks = Peaks()
        self.step = 1  # the step that gradients are collected for, for messages
        self.num_rounds = 0  # of reductions that are over, dropped ones among them
        self.must_agree_first = False  # whether the ranks may be in different rounds, so that nothing may be launched

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
    def take_shard(self, index: int) -> TakenShard:
        """Wait for bucket ``index`` and hand over its mean gradient shard, to be consumed."""

    @abstractmethod
    def scale_(self, factor: Tensor) -> None:
        """Multiply all mean gradients by a 0-d tensor, now or when they are next needed."""

    def missing(self) -> list[int]:
        """Return the ranks that reductions under way still wait for. For use after a failure only."""
        return []

    @abstractmethod
    def drop(self) -> None:
        """Forget all gradients taken since the last step and be ready for the next. Local."""

    @abstractmethod
    def discard(self, *, set_to_none: bool) -> None:
        """Undo what backward did since the last step, for `zero_grad`. Collective where gradients were taken.

        Args:
            set_to_none: False: parameters that had a gradient have one of zeros from now on, as in torch.
        """


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
            unhook(param)
        self._used.append([param.grad is not None for param in bucket.params])

    def view(self) -> LocalView:
        self._used = [[param.grad is not None for param in bucket.params] for bucket in self.buckets]
        params = list(chain.from_iterable(bucket.params for bucket in self.buckets))
        problem = sparse_problem(params)
        check = self._checks.due() and self.group.size > 1 and not _is_capturing()
        fingerprints = _fingerprints(params) if check else torch.zeros(0, dtype=torch.uint8)
        used = list(chain.from_iterable(self._used))
        return LocalView(used, [False] * len(self.buckets), fingerprints, self.num_rounds, problem)

    def flush(self) -> None:
        pass

    def launch_again(self, index: int) -> None:
        raise AssertionError("gradients that are already reduced have no rounds")

    def shard(self, index: int) -> Tensor:
        shard = self.buckets[index].collect_gradient_shard(self._used[index])
        self.peaks.shard_bytes = max(self.peaks.shard_bytes, shard.nbytes)
        return shard

    def take_shard(self, index: int) -> TakenShard:
        return TakenShard(self.shard(index), None)

    def scale_(self, factor: Tensor) -> None:
        params = chain.from_iterable(bucket.params for bucket in self.buckets)
        torch._foreach_mul_([param.grad for param in params if param.grad is not None], factor)

    def drop(self) -> None:
        pass

    def discard(self, *, set_to_none: bool) -> None:
        pass


def _is_capturing() -> bool:
    """Return whether launches go into a CUDA graph: there is nothing to compare then, and reading it is forbidden."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _fingerprints(params: list[Tensor]) -> Tensor:
    """Return 8 bytes per gradient, uint8 on the CPU: the sum of its bits as integers. Exact, and NaN equals NaN."""
    sums = []
    for param in params:
        if param.grad is None or param.grad.is_sparse:
            sums.append(param.detach().new_zeros((), dtype=torch.int64))
        else:
            gradient = param.grad.detach().resolve_conj().contiguous()
            gradient = torch.view_as_real(gradient) if gradient.is_complex() else gradient
            integer = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[gradient.element_size()]
            bits = gradient.reshape(-1).view(integer)
            sums.append(bits.sum(dtype=torch.int64))
    return torch.stack(sums).cpu().view(torch.uint8)
