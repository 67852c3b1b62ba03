"""One rank's part of a save: what it writes, decided by all ranks together, and how it is written.

[Note: plan, snapshot, write]  Planning is collective and fast: who writes what. After it a rank needs no other rank to
write its file. A snapshot copies what is planned to host memory, so that an asynchronous save can go on while training
changes the tensors. The file is then written record by record, each checksummed as it passes.
"""

from __future__ import annotations

import hashlib
import io
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import WriteItem, WriteItemType

from sharded_adamax.checkpoint.foreign import dtype_name
from sharded_adamax.checkpoint.manifest import Chunk, Record, StoredFile
from sharded_adamax.collectives import ControlPlane


@dataclass
class Item:
    """A record to be: what to write under which name."""

    name: str
    box: tuple[tuple[int, ...], tuple[int, ...]] | None  # offsets and sizes of a tensor's box
    data: Tensor | io.BytesIO


@dataclass(frozen=True)
class RankPlan:
    """What this rank writes, and (on the first rank) what the whole checkpoint will be."""

    items: list[Item]
    metadata: Metadata | None


@dataclass(frozen=True)
class Written:
    """What this rank has written: one file and where in it each record is."""

    file: str
    stored: StoredFile
    chunks: list[tuple[str, Chunk]]
    values: list[tuple[str, Record]]


def plan(control: ControlPlane, state: dict[str, Any]) -> RankPlan:
    """Decide which rank writes what. Collective. Tensors that all ranks hold are written once, spread over the ranks.

    Args:
        state: Keys as torch.distributed.checkpoint nests them; tensors, FlatShards, DTensors or picklable values.

    Raises:
        ValueError: On every rank, where the parts of a tensor overlap or leave a gap.
    """
    planner = DefaultSavePlanner()
    planner.set_up_planner(state, is_coordinator=control.rank == 0)
    local = planner.create_local_plan()
    plans = control.gather(local)
    error: Exception | None = None
    whole: Metadata | None = None
    mine: list[Any] | None = None
    if plans is not None:
        try:
            mine, whole = planner.create_global_plan(plans)
        except Exception as caught:
            error = caught
            mine = [None] * control.size
    assigned = control.scatter(mine)
    if error is not None:
        raise error
    if assigned is None:
        raise ValueError("the parts of a tensor that the ranks hold do not fit together; rank 0 says which")
    assigned = planner.finish_plan(assigned)
    return RankPlan([_item(planner, item) for item in assigned.items], whole)


def _item(planner: DefaultSavePlanner, item: WriteItem) -> Item:
    data = planner.resolve_data(item)
    if item.type == WriteItemType.BYTE_IO:
        assert isinstance(data, io.BytesIO)
        return Item(item.index.fqn, None, data)
    assert isinstance(data, Tensor)
    assert item.tensor_data is not None
    chunk = item.tensor_data.chunk
    return Item(item.index.fqn, (tuple(chunk.offsets), tuple(chunk.sizes)), data.detach())


def snapshot(items: list[Item]) -> list[Item]:
    """Copy every tensor to host memory of its own."""
    return [
        Item(item.name, item.box, item.data.to("cpu", copy=True) if isinstance(item.data, Tensor) else item.data)
        for item in items
    ]


class RecordStream:
    """Serialises items one at a time; afterwards knows the records and the checksum of their file."""

    def __init__(self, items: list[Item], file: str) -> None:
        self._items = items
        self.file = file
        self._chunks: list[tuple[str, Chunk]] = []
        self._values: list[tuple[str, Record]] = []
        self._sha256 = hashlib.sha256()
        self._offset = 0

    def __iter__(self) -> Iterator[memoryview]:
        for item in self._items:
            serialised = _serialise(item.data)
            record = Record(self.file, self._offset, len(serialised), zlib.crc32(serialised))
            if item.box is None:
                self._values.append((item.name, record))
            else:
                self._chunks.append((item.name, Chunk(*item.box, record)))
            self._sha256.update(serialised)
            self._offset += len(serialised)
            yield serialised

    def written(self) -> Written:
        """Return what was written; call when the iteration is over."""
        stored = StoredFile(self._offset, self._sha256.hexdigest())
        return Written(self.file, stored, self._chunks, self._values)


def _serialise(data: Tensor | io.BytesIO) -> memoryview:
    if isinstance(data, io.BytesIO):
        return data.getbuffer()
    buffer = io.BytesIO()
    tensor = data.cpu()
    # torch.save writes the whole storage of a view: of a shard's piece, the whole shard. And it keeps strides, by which
    # the bytes of a file would depend on the memory format of the model.
    if tensor.untyped_storage().nbytes() != tensor.nbytes or not tensor.is_contiguous():
        tensor = tensor.clone(memory_format=torch.contiguous_format)
    torch.save(tensor, buffer)
    return buffer.getbuffer()


def shapes_and_dtypes(whole: Metadata) -> dict[str, tuple[tuple[int, ...], str]]:
    """Return the global shape and dtype of each tensor in a planner's metadata."""
    return {
        name: (tuple(entry.size), dtype_name(entry.properties.dtype))
        for name, entry in whole.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
