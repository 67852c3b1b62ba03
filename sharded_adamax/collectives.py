"""The only room that talks to other ranks, and the only one that knows backends.

[Note: data plane and control plane]  Gradients and parameters travel on the *data plane*: the process group of the
parameters' device (NCCL on CUDA, gloo on the CPU). What ranks must agree on travels on the *control plane*: a CPU
group, so that a decision taken on the host never waits for a device. A gloo group serves as both. Beside any other, a
CPU group over the same ranks is made: the two planes are not in the same order on all ranks (a rank without a gradient
launches its bucket after the vote), and only gloo matches collectives by kind and not by their order.

[Note: why gloo does not get its own reduce-scatter]  gloo's reduce-scatter is an all-reduce and a slice, twice the
traffic, and its broadcasts and all_to_all leave one direction of a full-duplex link idle. Point-to-point messages of
about 1 MiB keep both directions busy and land where they belong. Summing in the order of the ranks makes the result
independent of how parameters are packed into buckets.

[Note: posting thread]  gloo guards a connection with a lock, and its own thread holds it while it copies to or from
the socket. Whoever posts a message waits for that. So a thread of the group posts, in the order of the collectives, and
backward goes on meanwhile: in a step of 190 ms posting took 17.
"""

from __future__ import annotations

import functools
import time
from abc import ABC, abstractmethod
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal, TypeVar
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import record_function

from sharded_adamax import objects, streams
from sharded_adamax.pending import GLANCE, Done, Message, Messages, Native, Part, Pending, Queued, Refused, Work

T = TypeVar("T")

MESSAGE_BYTES = 1 << 20
# Tags of our messages stay in blocks of their own, out of the way of small tags in the user's own send and recv. Each
# kind has its block: a rank that is a step behind the others must not take a gradient for a parameter.
FIRST_TAG = {"reduce_scatter": 1 << 24, "all_gather": 3 << 23}
NUM_TAGS = 1 << 23
PROBE_TAG = 1 << 25


@dataclass
class Traffic:
    """What this rank asked of a group, by kind: calls, bytes handed over to be sent to other ranks, and waiting for it.

    The time is that of the host: over NCCL it hardly waits, because the device does.
    """

    calls: Counter[str] = field(default_factory=Counter)
    sent_bytes: Counter[str] = field(default_factory=Counter)
    waited_seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    def record(self, kind: str, sent_bytes: int) -> None:
        self.calls[kind] += 1
        self.sent_bytes[kind] += sent_bytes

    @contextmanager
    def waiting(self, kind: str, what: str) -> Iterator[None]:
        """Count the time inside, and name it to the profiler: "wait reduce bucket 3"."""
        with record_function(f"sharded_adamax::wait {what}"):
            start = time.perf_counter()
            try:
                yield
            finally:
                self.waited_seconds[kind] += time.perf_counter() - start

    def take_waited_seconds(self) -> dict[str, float]:
        """Return the time waited since the last call, by kind."""
        waited, self.waited_seconds = self.waited_seconds, defaultdict(float)
        return waited


class ControlPlane:
    """Small messages between the hosts of all ranks; a world of one where ``process_group`` is None."""

    def __init__(self, process_group: dist.ProcessGroup | None) -> None:
        self._process_group = process_group
        self.rank = 0 if process_group is None else process_group.rank()
        self.size = 1 if process_group is None else process_group.size()
        self.traffic = Traffic()

    def maximum(self, ballot: Tensor) -> Pending[Tensor]:
        """Start the element-wise maximum of a small uint8 CPU tensor over the ranks. Modifies ``ballot`` in place."""
        self.traffic.record("maximum", ballot.nbytes if self.size > 1 else 0)
        if self._process_group is None:
            return Done(ballot)
        work = dist.all_reduce(ballot, op=dist.ReduceOp.MAX, group=self._process_group, async_op=True)
        assert work is not None  # None is for ranks outside the group; control_plane refuses those
        return Native(self.rank, work, ballot)

    def dead_ranks(self) -> list[int]:
        """Return the ranks that take no message any more. For use after a failure only; gloo only knows."""
        if self._process_group is None or _backend_name(self._process_group, torch.device("cpu")) != "gloo":
            return []
        found = []
        for peer in range(self.size):
            if peer != self.rank:
                try:
                    self._process_group.send([torch.zeros(1, dtype=torch.uint8)], peer, PROBE_TAG).wait(GLANCE)
                except RuntimeError:
                    found.append(peer)
        return found

    def exchange(self, value: T) -> list[T]:
        """Return the values of all ranks, by rank. Small picklable objects only."""
        self.traffic.record("exchange", 0)
        if self._process_group is None:
            return [value]
        return objects.all_gather(value, self._process_group)

    def gather(self, value: T) -> list[T] | None:
        """Return the values of all ranks on the first one, by rank; None elsewhere. Picklable objects."""
        self.traffic.record("gather", 0)
        if self._process_group is None:
            return [value]
        return objects.gather(value, self._process_group)

    def scatter(self, values: list[T] | None) -> T:
        """Return the value that the first rank has for this one; ``values`` counts there only. Picklable objects."""
        self.traffic.record("scatter", 0)
        if self._process_group is None:
            assert values is not None
            return values[0]
        return objects.scatter(values, self._process_group)


class Group(ABC):
    """The ranks that share the optimizer's work. Every method is collective: all ranks call it, in the same order."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank = rank
        self.size = size
        self.traffic = Traffic()

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

    def reduce_scatter(self, bucket: Tensor) -> Pending[Tensor]:
        shard = bucket.new_empty(bucket.numel() // self.size)
        self.traffic.record("reduce_scatter", shard.nbytes * (self.size - 1))
        # SUM, and the caller divides: ReduceOp.AVG was silently wrong on some releases (pytorch/pytorch#162338).
        work = _reduce_scatter_single(_as_real(shard), _as_real(bucket), group=self._process_group, async_op=True)
        return Native(self.rank, work, shard, keep_alive=bucket)

    def all_gather(self, bucket: Tensor) -> Pending[None]:
        shard_numel = bucket.numel() // self.size
        shard = bucket.narrow(0, self.rank * shard_numel, shard_numel)
        self.traffic.record("all_gather", shard.nbytes * (self.size - 1))
        # In place: the output's own shard is the input. The parameters outlive the call, so nothing is kept alive here.
        work = _all_gather_single(_as_real(bucket), _as_real(shard), group=self._process_group, async_op=True)
        return Native(self.rank, work, None)

    def broadcast(self, tensor: Tensor) -> None:
        self.traffic.record("broadcast", tensor.nbytes if self.rank == 0 else 0)
        dist.broadcast(_as_real(tensor), group_src=0, group=self._process_group)

    def all_reduce(self, tensor: Tensor, operation: Literal["sum", "max", "min"]) -> None:
        self.traffic.record("all_reduce", tensor.nbytes)
        with self.traffic.waiting("all_reduce", "all_reduce"):
            dist.all_reduce(tensor, op=_OPERATIONS[operation], group=self._process_group)

    def gather(self, shard: Tensor, to: int) -> Tensor | None:
        if self.rank != to:
            self.traffic.record("gather", shard.nbytes)
            dist.gather(_as_real(shard), None, group_dst=to, group=self._process_group)
            return None
        self.traffic.record("gather", 0)
        whole = shard.new_empty(self.size * shard.numel())
        rows = _as_real(whole).view(self.size, -1)
        dist.gather(_as_real(shard), list(rows), group_dst=to, group=self._process_group)
        return whole


class GlooGroup(ProcessGroup):
    """gloo on CPU tensors: reduce-scatter and all-gather made of point-to-point messages. See the notes above."""

    def __init__(self, process_group: dist.ProcessGroup) -> None:
        super().__init__(process_group)
        # By kind; the same on all ranks, because every rank cuts every collective into the same messages.
        self._num_messages: Counter[str] = Counter()
        # One thread, so that messages are posted in the order of the collectives. It ends with this object.
        self._posting = ThreadPoolExecutor(max_workers=1, thread_name_prefix="sharded_adamax posting")

    def reduce_scatter(self, bucket: Tensor) -> Pending[Tensor]:
        rows = _as_real(bucket).view(self.size, -1)  # row q is meant for rank q
        # Each row that arrives has memory of its own, so that one of them can become the result and the others go.
        values = {peer: torch.empty_like(rows[peer]) for peer in self._peers()}
        held_bytes = bucket.nbytes + (self.size - 2) * rows[0].nbytes
        # The result takes the place of what the first other rank sends: a + b has the bits of b + a, and fresh memory
        # would cost more than the sum, because the kernel has to clear it page by page.
        values[self.rank] = rows[self.rank]
        total, second = (values[1], values[0]) if self.rank == 0 else (values[0], values[1])
        others = [second, *(values[peer] for peer in range(2, self.size))]

        def add(part: slice) -> None:
            for other in others:
                total[part].add_(other[part])

        self.traffic.record("reduce_scatter", rows[0].nbytes * (self.size - 1))
        posted = self._posting.submit(self._post, "reduce_scatter", rows.__getitem__, values.__getitem__, add)
        result = torch.view_as_complex(total.view(-1, 2)) if bucket.is_complex() else total
        return Messages(self.rank, posted, result, held_bytes)

    def all_gather(self, bucket: Tensor) -> Pending[None]:
        rows = _as_real(bucket).view(self.size, -1)  # row q comes from rank q
        self.traffic.record("all_gather", rows[0].nbytes * (self.size - 1))
        own = rows[self.rank]
        posted = self._posting.submit(self._post, "all_gather", lambda peer: own, rows.__getitem__, lambda part: None)
        return Messages(self.rank, posted, None, held_bytes=0)

    def _peers(self) -> list[int]:
        """Return the other ranks, the next one first, so that not all ranks send to rank 0 at once."""
        return [(self.rank + distance) % self.size for distance in range(1, self.size)]

    def _post(
        self, kind: str, send: Callable[[int], Tensor], receive: Callable[[int], Tensor], then: Callable[[slice], None]
    ) -> list[Part]:
        """Start sending a row to, and receiving a row from, every other rank, in messages of ``MESSAGE_BYTES``.

        Args:
            send: The row for a rank.
            receive: Where the row of a rank is to go.
            then: Called while waiting, with each part of a row, in order, when it has come from all ranks.
        """
        row = send(self._peers()[0])
        message_numel = MESSAGE_BYTES // row.element_size()
        parts = []
        # All at once: gloo sends nothing that the other rank does not receive yet.
        for start in range(0, row.numel(), message_numel):
            part = slice(start, start + message_numel)
            tag = FIRST_TAG[kind] + self._num_messages[kind] % NUM_TAGS
            self._num_messages[kind] += 1
            messages = []
            for peer in self._peers():
                arrival = _posted(self._process_group.recv, receive(peer)[part], peer, tag)
                messages.append(Message(peer, is_arrival=True, work=arrival))
                departure = _posted(self._process_group.send, send(peer)[part], peer, tag)
                messages.append(Message(peer, is_arrival=False, work=departure))
            parts.append(Part(messages, functools.partial(then, part)))
        return parts


def _posted(post: Callable[[list[Tensor], int, int], dist.Work], message: Tensor, peer: int, tag: int) -> Work:
    try:
        return post([message], peer, tag)
    except RuntimeError as error:  # the connection is gone: whoever waits is to know which one
        return Refused(error)


_OPERATIONS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}
# torch 2.13 renamed both and warns on the old names; earlier releases have only those.
_reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def _as_real(tensor: Tensor) -> Tensor:
    """Return complex numbers as twice as many real ones, which every backend carries; others as they are."""
    return torch.view_as_real(tensor).view(-1) if tensor.is_complex() else tensor


# The CPU groups made beside groups of other backends than gloo: one for each, however often it is asked for.
_cpu_groups: WeakKeyDictionary[dist.ProcessGroup, dist.ProcessGroup] = WeakKeyDictionary()


def control_plane(process_group: dist.ProcessGroup | None) -> ControlPlane:
    """Return the control plane of ``process_group``. Collective where a CPU group has to be made.

    Args:
        process_group: The ranks that share the state; None for all. With torch.distributed not initialised: a world of
            one.

    Raises:
        ValueError: This rank is not in ``process_group``, or torch.distributed is not initialised.
    """
    group = _resolve(process_group)
    backend = None if group is None else _backend_name(group, torch.device("cpu"))
    if group is None or backend == "gloo":
        return ControlPlane(group)
    if group not in _cpu_groups:
        ranks = dist.get_process_group_ranks(group)
        cpu_group = dist.new_group(
            ranks, backend=backend or "gloo", use_local_synchronization=True, group_desc="sharded_adamax"
        )
        assert isinstance(cpu_group, dist.ProcessGroup)
        _cpu_groups[group] = cpu_group
    return ControlPlane(_cpu_groups[group])


def data_plane(process_group: dist.ProcessGroup | None, device: torch.device) -> Group:
    """Return the group that carries tensors of ``device``, with the fastest primitives of its backend. Local.

    Raises:
        ValueError: The group's backend cannot reduce tensors of ``device``.
    """
    group = _resolve(process_group)
    if group is None:
        return LocalGroup()
    backend = _backend_name(group, device)
    if backend is None or (backend == "gloo" and device.type != "cpu"):
        raise ValueError(
            f"rank {group.rank()}: the parameters are on {device}, but the process group "
            f"({dist.get_backend(group)}) has no backend for such tensors: initialise it with init_distributed(), "
            "or move the model to the group's device before the optimizer is built"
        )
    return GlooGroup(group) if backend == "gloo" else ProcessGroup(group)


def _resolve(process_group: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    """Return the process group to use; None for a world of one."""
    if not (dist.is_available() and dist.is_initialized()):
        if process_group is not None:
            raise ValueError(
                "process_group was given, but torch.distributed is not initialised: call init_distributed() first"
            )
        return None
    group = process_group if process_group is not None else dist.group.WORLD
    if not isinstance(group, dist.ProcessGroup):
        raise ValueError(
            f"rank {dist.get_rank()} is not a member of process_group (got {group!r}): build the optimizer only on "
            "the ranks of the group, or pass the group that this rank belongs to"
        )
    return group if group.size() > 1 else None


def _backend_name(group: dist.ProcessGroup, device: torch.device) -> str | None:
    try:
        return str(group._get_backend(device).name())
    except RuntimeError:  # "No backend type associated with device type ..."
        return None
