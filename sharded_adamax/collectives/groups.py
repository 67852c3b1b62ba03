"""The data plane: what every backend does by itself, and a world of one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from sharded_adamax import streams
from sharded_adamax.collectives.control import ControlPlane
from sharded_adamax.collectives.loans import lend
from sharded_adamax.collectives.traffic import Traffic
from sharded_adamax.pending import Done, Native, Pending, Queued

_OPERATIONS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}
# torch 2.13 renamed both and warns on the old names; earlier releases have only those.
_reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def as_real(tensor: Tensor) -> Tensor:
    """Return complex numbers as twice as many real ones, which every backend carries; others as they are."""
    return torch.view_as_real(tensor).view(-1) if tensor.is_complex() else tensor


class Group(ABC):
    """The ranks that share the optimizer's work. Every method is collective: all ranks call it, in the same order."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank = rank
        self.size = size
        self.traffic = Traffic()

    @abstractmethod
    def meet(self, control: ControlPlane) -> None:
        """Find out what the ranks can do for each other. Once, before all else; ``control`` has the same ranks."""

    @abstractmethod
    def reduce_scatter(self, bucket: Tensor) -> Pending[Tensor]:
        """Start the sum of ``bucket``, shape (size * shard_numel,), over the ranks.

        ``bucket`` must not change until the result was waited for.

        Returns:
            Pending; its result is this rank's shard of the sum, shape (shard_numel,), the caller's to modify.
        """

    @abstractmethod
    def all_gather(self, bucket: Tensor) -> Pending[None]:
        """Start filling ``bucket``, shape (size * shard_numel,), in place: each rank provides its own shard."""

    @abstractmethod
    def broadcast(self, tensor: Tensor) -> None:
        """Overwrite ``tensor`` in place with that of the group's first rank."""

    @abstractmethod
    def all_reduce(self, tensor: Tensor, operation: Literal["sum", "max", "min"]) -> None:
        """Combine a small tensor over the ranks, in place; the same bits on all of them."""

    @abstractmethod
    def gather(self, shard: Tensor, to: int) -> Tensor | None:
        """Return the shards of all ranks, one after another, on rank ``to``; None elsewhere."""


class LocalGroup(Group):
    """A world of one: the same code, no process group, nothing sent."""

    def __init__(self) -> None:
        super().__init__(rank=0, size=1)

    def meet(self, control: ControlPlane) -> None:
        pass  # nobody

    def reduce_scatter(self, bucket: Tensor) -> Pending[Tensor]:
        self.traffic.record("reduce_scatter", 0)
        return Queued(bucket, streams.current(bucket.device))

    def all_gather(self, bucket: Tensor) -> Pending[None]:
        self.traffic.record("all_gather", 0)
        return Done(None)

    def broadcast(self, tensor: Tensor) -> None:
        self.traffic.record("broadcast", 0)

    def all_reduce(self, tensor: Tensor, operation: Literal["sum", "max", "min"]) -> None:
        self.traffic.record("all_reduce", 0)

    def gather(self, shard: Tensor, to: int) -> Tensor | None:
        self.traffic.record("gather", 0)
        return shard


class ProcessGroup(Group):
    """A torch.distributed process group and its own collectives: NCCL, XCCL and every backend but gloo."""

    def __init__(self, process_group: dist.ProcessGroup) -> None:
        super().__init__(rank=process_group.rank(), size=process_group.size())
        self._process_group = process_group

    def meet(self, control: ControlPlane) -> None:
        pass  # the backend has done so

    def reduce_scatter(self, bucket: Tensor) -> Pending[Tensor]:
        shard = bucket.new_empty(bucket.numel() // self.size)
        self.traffic.record("reduce_scatter", shard.nbytes * (self.size - 1))
        # SUM, and the caller divides: ReduceOp.AVG was silently wrong on some releases (pytorch/pytorch#162338).
        work = _reduce_scatter_single(as_real(shard), as_real(bucket), group=self._process_group, async_op=True)
        return Native(self.rank, work, shard, keep_alive=bucket)

    def all_gather(self, bucket: Tensor) -> Pending[None]:
        shard_numel = bucket.numel() // self.size
        shard = bucket.narrow(0, self.rank * shard_numel, shard_numel)
        self.traffic.record("all_gather", shard.nbytes * (self.size - 1))
        # In place: the output's own shard is the input. The parameters outlive the call, so nothing is kept alive here.
        work = _all_gather_single(as_real(bucket), as_real(shard), group=self._process_group, async_op=True)
        return Native(self.rank, work, None)

    def broadcast(self, tensor: Tensor) -> None:
        self.traffic.record("broadcast", tensor.nbytes if self.rank == 0 else 0)
        dist.broadcast(lend(as_real(tensor)), group_src=0, group=self._process_group)

    def all_reduce(self, tensor: Tensor, operation: Literal["sum", "max", "min"]) -> None:
        self.traffic.record("all_reduce", tensor.nbytes)
        with self.traffic.waiting("all_reduce", "all_reduce"):
            dist.all_reduce(lend(tensor), op=_OPERATIONS[operation], group=self._process_group)

    def gather(self, shard: Tensor, to: int) -> Tensor | None:
        if self.rank != to:
            self.traffic.record("gather", shard.nbytes)
            dist.gather(lend(as_real(shard)), None, group_dst=to, group=self._process_group)
            return None
        self.traffic.record("gather", 0)
        whole = shard.new_empty(self.size * shard.numel())
        rows = as_real(whole).view(self.size, -1)
        dist.gather(lend(as_real(shard)), [lend(row) for row in rows], group_dst=to, group=self._process_group)
        return whole
