"""Streams, events, an allocator and a process group for pretended CUDA: they compute nothing and write down a trace.

What a program does with FakeTensors under `Recording` is what races.py needs to know. A collective runs on a stream of
its own that waits for the current one, and ``work.wait()`` makes the current stream wait for it, as with NCCL. More is
asked of the package than with NCCL in two points. NCCL runs the collectives of a group one after another; here each has
its own stream, or one wait would hide that another is missing. And a work holds no memory until it is over.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import sharded_adamax
from tests.without_gpu.races import Access, Allocate, Event, Free, Hold, Mark, Wait

PACKAGE = Path(sharded_adamax.__file__).parent


class Stream:
    """What the package uses of a torch.Stream."""

    def __init__(self, name: str) -> None:
        self.name = name

    def wait_stream(self, other: Stream) -> None:
        timeline.wait(self, timeline.mark(other))


class Timeline:
    """The trace that is being written, and the current stream."""

    def __init__(self) -> None:
        self.default = Stream("default")
        self.current = self.default
        self.events: list[Event] = []
        self._operation = ""
        self._ids = count()
        self._storages: dict[int, int] = {}  # address of the storage -> its number
        self._records = False

    @contextmanager
    def recording(self) -> Iterator[list[Event]]:
        """Begin a new trace."""
        self.current = self.default
        self.events, self._storages, self._records = [], {}, True
        try:
            yield self.events
        finally:
            self._records = False

    @contextmanager
    def on(self, stream: Stream) -> Iterator[None]:
        """Make ``stream`` the current one, as torch.cuda.stream does."""
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    @contextmanager
    def named(self, operation: str) -> Iterator[None]:
        """Call all operations so in the trace."""
        self._operation = operation
        try:
            yield
        finally:
            self._operation = ""

    def mark(self, stream: Stream) -> int:
        event = next(self._ids)
        self.events.append(Mark(stream.name, event))
        return event

    def wait(self, stream: Stream, event: int) -> None:
        self.events.append(Wait(stream.name, event, _site()))

    def hold(self, tensor: Tensor, stream: Stream) -> None:
        if self._records:
            self.events.append(Hold(stream.name, self._number(tensor), _site()))

    def allocated(self, tensor: Tensor) -> None:
        """Number the memory of a new tensor; nothing if it is a view of memory that is known."""
        storage = tensor.untyped_storage()
        if storage._cdata in self._storages:
            return
        number = self._storages[storage._cdata] = next(self._ids)
        self.events.append(Allocate(self.current.name, number))
        weakref.finalize(storage, self._freed, self.events, storage._cdata, number).atexit = False

    def accessed(self, tensor: Tensor, *, writes: bool, operation: str, stream: Stream | None = None) -> None:
        if tensor.numel() == 0:
            return
        extent = 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
        start = tensor.storage_offset() * tensor.element_size()
        where = (stream or self.current).name
        stop = start + extent * tensor.element_size()
        operation = self._operation or operation
        self.events.append(Access(where, self._number(tensor), start, stop, writes, operation))

    def _number(self, tensor: Tensor) -> int:
        return self._storages[tensor.untyped_storage()._cdata]

    def _freed(self, events: list[Event], address: int, number: int) -> None:
        if events is self.events and self._records:
            del self._storages[address]
            events.append(Free(number))


timeline = Timeline()  # of this process: torch asks for the current stream without saying of whom


def pretend_streams() -> None:
    """Let the package see the current stream of `timeline`, and the allocator be told."""
    torch.accelerator.current_stream = lambda device=None: timeline.current  # type: ignore[assignment, misc]
    Tensor.record_stream = lambda tensor, stream: timeline.hold(tensor, stream)  # type: ignore


def _site() -> str:
    """Return the lines of the package on the way here, the innermost first; empty where the caller is someone else."""
    lines = []
    frame = sys._getframe(2)
    while frame.f_back is not None:
        path = Path(frame.f_code.co_filename)
        if path.parent == PACKAGE:
            lines.append(f"{path.name}:{frame.f_lineno}:{frame.f_code.co_name}")
        frame = frame.f_back
    return " < ".join(lines)


def _reads_nothing(name: str) -> bool:
    """Return whether an operation takes no more than shape and dtype from its arguments."""
    return name.startswith("aten::new_") or name.endswith("_like")


def _writes_nothing(name: str) -> bool:
    """Return whether an operation leaves the new memory as it is."""
    return name.startswith(("aten::empty", "aten::new_empty"))


class Recording(TorchDispatchMode):
    """Writes down the memory that operations on the pretended device allocate, read and write."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        schema = func._schema
        outputs = func(*args, **kwargs)
        if any(result.alias_info is not None and not result.alias_info.is_write for result in schema.returns):
            return outputs  # a view: nothing happens on the device
        if schema.name.startswith("prim::"):  # asks for metadata
            return outputs
        arguments = dict(zip((argument.name for argument in schema.arguments), args, strict=False)) | kwargs
        written: list[Tensor] = []
        for argument in schema.arguments:
            tensors = _on_device(arguments.get(argument.name))
            if argument.alias_info is not None and argument.alias_info.is_write:
                written += tensors
            elif not _reads_nothing(schema.name):
                for tensor in tensors:
                    timeline.accessed(tensor, writes=False, operation=schema.name)
        for tensor in _on_device(outputs):
            if not any(tensor is other for other in written):
                timeline.allocated(tensor)
                if not _writes_nothing(schema.name):
                    written.append(tensor)
        for tensor in written:
            timeline.accessed(tensor, writes=True, operation=schema.name)
        return outputs


def _on_device(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor) and leaf.device.type == "cuda"]


class Work:
    """A collective on its way."""

    def __init__(self, event: int) -> None:
        self._event = event

    def wait(self, timeout: object = None) -> bool:
        timeline.wait(timeline.current, self._event)
        return True


class StreamedGroup(dist.ProcessGroup):
    """Rank 0 of a process group that moves nothing and whose collectives run on streams of their own."""

    def __init__(self, size: int) -> None:
        super().__init__(0, size)  # type: ignore[call-arg]
        self._num_collectives = 0

    def _start(self, kind: str, *, reads: list[Tensor], writes: list[Tensor]) -> Work:
        stream = Stream(f"the stream of collective {self._num_collectives}")
        self._num_collectives += 1
        launched = timeline.mark(timeline.current)
        timeline.events.append(Wait(stream.name, launched, site=""))
        for tensor in reads:
            timeline.accessed(tensor, writes=False, operation=kind, stream=stream)
        for tensor in writes:
            timeline.accessed(tensor, writes=True, operation=kind, stream=stream)
        return Work(timeline.mark(stream))

    def reduce_scatter_single(self, output: Tensor, bucket: Tensor, options: object) -> Work:
        return self._start("reduce_scatter", reads=[bucket], writes=[output])

    def all_gather_single(self, output: Tensor, shard: Tensor, options: object) -> Work:
        return self._start("all_gather", reads=[shard], writes=[output])

    def allreduce(self, tensors: list[Tensor], options: object) -> Work:  # type: ignore[override]
        return self._start("all_reduce", reads=tensors, writes=tensors)

    def broadcast(self, tensors: list[Tensor], options: object) -> Work:  # type: ignore[override]
        return self._start("broadcast", reads=tensors, writes=tensors)

    # As releases before 2.13 name them.
    _reduce_scatter_base = reduce_scatter_single  # type: ignore[assignment]
    _allgather_base = all_gather_single  # type: ignore[assignment]
