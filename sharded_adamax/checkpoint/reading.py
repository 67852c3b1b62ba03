"""Reading records: each once, verified as it passes, without running anything that it says.

A rank plans its reads by itself: which records hold elements of the tensors it wants. It reads those records and no
others, so loading costs each rank its own shard (and the model) whatever the world size, and verifying costs no second
pass.
"""

from __future__ import annotations

import io
import math
import os
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint._nested_dict import (  # type: ignore[attr-defined]
    flatten_state_dict,
    set_element,
)
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadItemType, ReadItem

from sharded_adamax.checkpoint.errors import CheckpointDamagedError, CheckpointError
from sharded_adamax.checkpoint.manifest import Record, is_file_name
from sharded_adamax.ranges import Box


class SafeLoadPlanner(DefaultLoadPlanner):
    """torch's planner, except that values are unpickled with ``weights_only=True``."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Put a value into the state dict."""
        path = self.mappings[read_item.dest_index.fqn]
        set_element(self.original_state_dict, path, torch.load(value, weights_only=True))


def read_into(directory: Path, metadata: Metadata, state: dict[str, Any], *, verify: bool) -> int:
    """Fill the tensors of ``state`` in place and replace its values. Local.

    Args:
        metadata: What is stored, with a Record for each part (`foreign.dcp_metadata`).
        state: Nested as it was saved.
        verify: Whether to compare checksums, where the records have one.

    Returns:
        Bytes read from files.

    Raises:
        CheckpointError: A key, shape or dtype that does not fit. Nothing was changed.
        CheckpointDamagedError: A record is not what was written. Some tensors may have been filled.
    """
    planner = SafeLoadPlanner()
    planner.set_up_planner(state, metadata, is_coordinator=True)
    _check_fit(planner.state_dict, metadata, directory)
    items = planner.create_local_plan().items
    _check_coverage(planner.state_dict, items, directory)
    by_record: dict[Record, list[ReadItem]] = {}
    for item in items:
        by_record.setdefault(metadata.storage_data[item.storage_index], []).append(item)
    read_bytes = 0
    for name, records in _by_file(list(by_record)).items():
        with _open(directory, name) as file:
            for record in records:
                data = _read(file, directory / name, record, verify=verify)
                read_bytes += len(data)
                _deliver(data, by_record[record], planner, f"{directory / name}, {len(data)} bytes at {record.offset}")
    return read_bytes


def verify_unread(directory: Path, metadata: Metadata, state: dict[str, Any], *, rank: int, world_size: int) -> int:
    """Verify this rank's share of the records that no rank reads to fill ``state``. Local.

    These are names that the job does not want, the generators of other ranks, tensors without elements. With it all
    ranks together look at every byte of the checkpoint.

    Returns:
        Bytes read from files.

    Raises:
        CheckpointDamagedError: A record is not what was written.
    """
    wanted, _ = flatten_state_dict(state)
    every = sorted(metadata.storage_data.items(), key=lambda entry: (entry[1].file, entry[1].offset))
    mine = []
    for number, (index, record) in enumerate(every):
        entry = metadata.state_dict_metadata[index.fqn]
        is_read = index.fqn in wanted and (isinstance(entry, BytesStorageMetadata) or math.prod(entry.size) > 0)
        if number % world_size == rank and not is_read:
            mine.append(record)
    read_bytes = 0
    for name, records in _by_file(mine).items():
        with _open(directory, name) as file:
            for record in records:
                read_bytes += len(_read(file, directory / name, record, verify=True))
    return read_bytes


def _check_fit(state: dict[str, Any], metadata: Metadata, directory: Path) -> None:
    for name, wanted in state.items():
        stored = metadata.state_dict_metadata.get(name)
        if stored is None:
            near = [key for key in metadata.state_dict_metadata if key.rsplit(".", 1)[-1] == name.rsplit(".", 1)[-1]]
            raise CheckpointError(
                f"{directory} has no {name}; it has {len(metadata.state_dict_metadata)} entries, for example "
                f"{', '.join(sorted(near or metadata.state_dict_metadata)[:3])}. Was it saved from another model?"
            )
        if isinstance(stored, BytesStorageMetadata):
            if isinstance(wanted, Tensor):
                raise CheckpointError(f"{directory}: {name} is a value, expected a tensor like that of this job")
            continue
        if not isinstance(wanted, Tensor):
            raise CheckpointError(f"{directory}: {name} is a tensor, expected a value like {wanted!r} of this job")
        if tuple(stored.size) != tuple(wanted.shape):
            raise CheckpointError(
                f"{directory}: {name} has shape {tuple(stored.size)}, expected {tuple(wanted.shape)}: build the model "
                "with the sizes it was saved with"
            )
        if stored.properties.dtype != wanted.dtype:
            raise CheckpointError(
                f"{directory}: {name} has dtype {stored.properties.dtype}, expected {wanted.dtype}: cast the model to "
                "the stored dtype before the optimizer is built, load, and cast afterwards"
            )


def _check_coverage(state: dict[str, Any], items: list[ReadItem], directory: Path) -> None:
    """Every element that this rank wants must come from somewhere: torch would leave a gap as it was."""
    parts: dict[MetadataIndex, list[Box]] = {}
    for item in items:
        if item.type == LoadItemType.TENSOR:
            parts.setdefault(item.dest_index, []).append(Box(tuple(item.dest_offsets), tuple(item.lengths)))
    covered: dict[str, int] = {}
    for index, boxes in parts.items():
        if _overlap(boxes):
            raise CheckpointDamagedError(f"{directory} stores elements of {index.fqn} more than once")
        covered[index.fqn] = covered.get(index.fqn, 0) + sum(box.numel for box in boxes)
    for name, wanted in state.items():
        if not isinstance(wanted, Tensor):
            continue
        local = getattr(wanted, "local", None)  # of a FlatShard
        if local is None and hasattr(wanted, "to_local"):  # of a DTensor
            local = wanted.to_local()
        numel = (wanted if local is None else local).numel()
        if covered.get(name, 0) != numel:
            raise CheckpointDamagedError(
                f"{directory} stores only {covered.get(name, 0)} of the {numel} elements of {name} that this rank needs"
            )


def _overlap(boxes: list[Box]) -> bool:
    """Return whether two boxes share an element. Fast where few share a row, which is how tensors are cut."""
    before: list[Box] = []
    for box in sorted(boxes):
        if box.numel == 0:
            continue
        # Sorted by first row: a box that ends above this one ends above all that follow.
        before = [other for other in before if not box.offsets or other.offsets[0] + other.sizes[0] > box.offsets[0]]
        if any(_share(box, other) for other in before):
            return True
        before.append(box)
    return False


def _share(one: Box, other: Box) -> bool:
    starts_and_sizes = zip(one.offsets, one.sizes, other.offsets, other.sizes, strict=True)
    return all(a < b + num_b and b < a + num_a for a, num_a, b, num_b in starts_and_sizes)


def _by_file(records: list[Record]) -> dict[str, list[Record]]:
    files: dict[str, list[Record]] = {}
    for record in sorted(records, key=lambda record: (record.file, record.offset)):
        files.setdefault(record.file, []).append(record)
    return files


def _open(directory: Path, name: str) -> io.BufferedReader:
    # A name from a stranger's metadata must not lead out of the directory.
    if not is_file_name(name):
        raise CheckpointDamagedError(f"{directory} names a file outside of itself: {name!r}")
    if not (directory / name).is_file():  # a pipe would wait for ever
        raise CheckpointDamagedError(f"{directory / name} is missing: use another checkpoint")
    return open(directory / name, "rb")


def _read(file: io.BufferedReader, path: Path, record: Record, *, verify: bool) -> bytes:
    file.seek(record.offset)
    # Not more than there is: a stranger's length must not make us allocate it.
    data = file.read(min(record.length, max(0, os.fstat(file.fileno()).st_size - record.offset)))
    if len(data) != record.length:
        raise CheckpointDamagedError(
            f"{path} is cut short: expected {record.length} bytes at {record.offset}, got {len(data)}: use another "
            "checkpoint"
        )
    if verify and record.crc32 is not None and zlib.crc32(data) != record.crc32:
        raise CheckpointDamagedError(
            f"{path} is damaged: the {record.length} bytes at {record.offset} are not those that were written: use "
            "another checkpoint"
        )
    return data


def _deliver(data: bytes, items: list[ReadItem], planner: SafeLoadPlanner, place: str) -> None:
    """Put a record where it belongs.

    Args:
        place: Where the record is, for messages.
    """
    try:
        if items[0].type == LoadItemType.BYTE_IO:
            for item in items:
                planner.load_bytes(item, io.BytesIO(data))
            return
        stored = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # what is no pickle of a tensor can fail in any way
        raise CheckpointDamagedError(
            f"{place}: what is stored there is damaged, or cannot be read without running code "
            f"({type(error).__name__}): use another checkpoint"
        ) from error
    assert planner.metadata is not None
    for item in items:
        assert item.storage_index.index is not None
        entry = planner.metadata.state_dict_metadata[item.storage_index.fqn]
        assert isinstance(entry, TensorStorageMetadata)
        expected = _kind(entry.chunks[item.storage_index.index].sizes, entry.properties.dtype)
        is_plain = isinstance(stored, Tensor) and stored.layout == torch.strided and stored.device.type == "cpu"
        found = _kind(stored.shape, stored.dtype) if is_plain else f"a {type(stored).__name__}"
        if found != expected:  # copy_ would cast, broadcast or take a part of it
            raise CheckpointDamagedError(f"{place}: expected {expected}, found {found}: use another checkpoint")
        target = planner.resolve_tensor(item).detach()
        target.copy_(narrow_tensor_by_index(stored, item.storage_offsets, item.lengths))


def _kind(shape: torch.Size, dtype: torch.dtype) -> str:
    return f"a tensor of shape {tuple(shape)} and {dtype}"


def read_tensor(directory: Path, metadata: Metadata, name: str, *, verify: bool) -> Tensor:
    """Read one whole tensor, which need not be known beforehand."""
    stored = metadata.state_dict_metadata.get(name)
    if stored is None or isinstance(stored, BytesStorageMetadata):
        raise CheckpointError(f"{directory} has no tensor {name}")
    tensor = torch.empty(stored.size, dtype=stored.properties.dtype)
    read_into(directory, metadata, {name: tensor}, verify=verify)
    return tensor


def record_of(metadata: Metadata, name: str) -> Record:
    """Return where a value is stored."""
    record: Record = metadata.storage_data[MetadataIndex(name)]
    return record
