"""Reading records: each once, verified as it passes, without running anything that it says.

A rank plans its reads by itself: which records hold elements of the tensors it wants. It reads those records and no
others, so loading costs each rank its own shard (and the model) whatever the world size, and verifying costs no second
pass.
"""

from __future__ import annotations

import io
import math
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint._nested_dict import set_element  # type: ignore[attr-defined]
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import LoadItemType, ReadItem

from sharded_adamax.checkpoint.errors import CheckpointDamagedError, CheckpointError
from sharded_adamax.checkpoint.manifest import Record


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
                _deliver(data, by_record[record], planner)
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
        if isinstance(stored, BytesStorageMetadata) or not isinstance(wanted, Tensor):
            continue
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
    covered: Counter[str] = Counter()
    for item in items:
        covered[item.dest_index.fqn] += math.prod(item.lengths)
    for name, wanted in state.items():
        if not isinstance(wanted, Tensor):
            continue
        local = getattr(wanted, "local", None)  # of a FlatShard
        if local is None and hasattr(wanted, "to_local"):  # of a DTensor
            local = wanted.to_local()
        numel = (wanted if local is None else local).numel()
        if covered[name] != numel:
            raise CheckpointDamagedError(
                f"{directory} stores only {covered[name]} of the {numel} elements of {name} that this rank needs"
            )


def _by_file(records: list[Record]) -> dict[str, list[Record]]:
    files: dict[str, list[Record]] = {}
    for record in sorted(records, key=lambda record: (record.file, record.offset)):
        files.setdefault(record.file, []).append(record)
    return files


def _open(directory: Path, name: str) -> io.BufferedReader:
    # A name from a stranger's metadata must not lead out of the directory.
    if Path(name).name != name:
        raise CheckpointDamagedError(f"{directory} names a file outside of itself: {name!r}")
    try:
        return open(directory / name, "rb")
    except FileNotFoundError:
        raise CheckpointDamagedError(f"{directory / name} is missing: use another checkpoint") from None


def _read(file: io.BufferedReader, path: Path, record: Record, *, verify: bool) -> bytes:
    file.seek(record.offset)
    data = file.read(record.length)
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


def _deliver(data: bytes, items: list[ReadItem], planner: SafeLoadPlanner) -> None:
    if items[0].type == LoadItemType.BYTE_IO:
        for item in items:
            planner.load_bytes(item, io.BytesIO(data))
        return
    stored = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    for item in items:
        target = planner.resolve_tensor(item).detach()
        target.copy_(narrow_tensor_by_index(stored, item.storage_offsets, item.lengths))


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
