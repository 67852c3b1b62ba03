"""The manifest: one JSON file that says what a checkpoint consists of, down to the checksum of each record.

[Note: record]  A file of a checkpoint is a sequence of records; each is one box of one tensor (or one value) as
written by torch.save. The manifest has for each record its file, offset, length and CRC-32, so a rank verifies exactly
the bytes it reads, and for each file its size and SHA-256, so ``sha256sum`` can verify the whole.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sharded_adamax.checkpoint.errors import CheckpointDamagedError, CheckpointError

MANIFEST_NAME = "manifest.json"
FORMAT = "sharded_adamax checkpoint"
FORMAT_VERSION = 1


@dataclass(frozen=True, slots=True)
class Record:
    """Where one item is stored. ``crc32`` is None in checkpoints of other programs."""

    file: str
    offset: int
    length: int
    crc32: int | None


@dataclass(frozen=True, slots=True)
class Chunk:
    """One stored box of a tensor."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    record: Record


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor of the checkpoint: its global shape, and the boxes that make it up."""

    shape: tuple[int, ...]
    dtype: str  # "float32"
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file of the checkpoint."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """Everything that is known of a checkpoint without opening its files."""

    run_id: str  # the same for all saves of one job
    save_id: str  # of this save alone
    step: int | None
    metric: float | None  # by which the manager keeps the best
    world_size: int
    layout_digest: str | None
    created: str  # ISO 8601, UTC
    torch_version: str
    files: dict[str, StoredFile]
    tensors: dict[str, StoredTensor]
    values: dict[str, Record]

    def to_json(self) -> bytes:
        """Return the file's bytes; they end in a digest of the rest."""
        body = {"format": FORMAT, "version": FORMAT_VERSION, **asdict(self)}
        return _canonical({**body, "digest": _digest(body)})


def file_of(data: bytes) -> StoredFile:
    """Return what a manifest says of a file with these bytes."""
    return StoredFile(len(data), hashlib.sha256(data).hexdigest())


def parse(data: bytes, path: Path) -> Manifest:
    """Return the manifest that ``data`` holds.

    Args:
        path: Of the file, for messages.

    Raises:
        CheckpointDamagedError: Not JSON, or not the bytes that were written.
        CheckpointError: A newer format.
    """
    try:
        body: dict[str, Any] = json.loads(data)
        # The bytes, too: 1e-05 and 1E-05 are the same number and one bit apart.
        if _canonical(body) != data or body.pop("digest") != _digest(body) or body["format"] != FORMAT:
            raise ValueError("its digest does not match")
        if not isinstance(body["version"], int):
            raise TypeError(f"its version is {body['version']!r}")
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise CheckpointDamagedError(f"{path} is damaged ({error}): use another checkpoint") from error
    if body["version"] > FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format version {body['version']}, this release reads up to {FORMAT_VERSION}: upgrade "
            "sharded_adamax"
        )
    try:
        found = _from_body(body)
        _check_types(found)
        check_places(found.tensors, found.values)
    except (ValueError, KeyError, AttributeError, TypeError) as error:  # its digest is right: made, not damaged
        raise CheckpointDamagedError(f"{path} is no manifest ({error}): use another checkpoint") from error
    return found


def check_places(tensors: dict[str, StoredTensor], values: dict[str, Record]) -> None:
    """Check that records and boxes are possible, whoever says so: inside the directory, inside the tensor.

    Raises:
        ValueError: Names the tensor and what is wrong.
    """
    for name, tensor in tensors.items():
        if not _are_sizes(tensor.shape) or not isinstance(tensor.dtype, str):
            raise ValueError(f"{name} has shape {tensor.shape!r} and dtype {tensor.dtype!r}")
        for chunk in tensor.chunks:
            inside = (
                _are_sizes(chunk.offsets)
                and _are_sizes(chunk.sizes)
                and len(chunk.offsets) == len(chunk.sizes) == len(tensor.shape)
                and all(o + s <= n for o, s, n in zip(chunk.offsets, chunk.sizes, tensor.shape, strict=True))
            )
            if not inside:
                raise ValueError(f"{name} has shape {tensor.shape}, and a part at {chunk.offsets} of {chunk.sizes}")
            _check_record(name, chunk.record)
    for name, record in values.items():
        _check_record(name, record)


def _check_record(name: str, record: Record) -> None:
    if not is_file_name(record.file):
        raise ValueError(f"{name} is said to be in a file outside of the directory: {record.file!r}")
    if not _are_sizes((record.offset, record.length)) or not isinstance(record.crc32, int | None):
        raise ValueError(f"{name} is said to be at {record.offset!r}, {record.length!r} bytes")


def is_file_name(name: object) -> bool:
    """Return whether ``name`` can only be a file in the directory it is joined to."""
    return (
        isinstance(name, str)
        and name not in ("", ".", "..")
        and not any(character in name for character in "/\\\0")
        and len(name.encode(errors="replace")) <= 255
    )


def _are_sizes(values: Iterable[object]) -> bool:
    return all(type(value) is int and 0 <= value < 1 << 63 for value in values)


def _check_types(found: Manifest) -> None:
    expected: dict[str, Any] = {
        "run_id": str,
        "save_id": str,
        "step": int | None,
        "metric": float | int | None,
        "world_size": int,
        "layout_digest": str | None,
        "created": str,
        "torch_version": str,
    }
    for key, types in expected.items():
        if not isinstance(getattr(found, key), types):
            raise TypeError(f"{key} is {getattr(found, key)!r}")
    for name, file in found.files.items():
        if not is_file_name(name):
            raise ValueError(f"it lists a file outside of the directory: {name!r}")
        if not _are_sizes([file.bytes]) or not isinstance(file.sha256, str):
            raise TypeError(f"it says {file} of {name}")


def _from_body(body: dict[str, Any]) -> Manifest:
    tensors = {
        name: StoredTensor(
            tuple(tensor["shape"]),
            tensor["dtype"],
            tuple(
                Chunk(tuple(chunk["offsets"]), tuple(chunk["sizes"]), Record(**chunk["record"]))
                for chunk in tensor["chunks"]
            ),
        )
        for name, tensor in body["tensors"].items()
    }
    plain = ("run_id", "save_id", "step", "metric", "world_size", "layout_digest", "created", "torch_version")
    return Manifest(
        **{key: body[key] for key in plain},
        files={name: StoredFile(**file) for name, file in body["files"].items()},
        tensors=tensors,
        values={name: Record(**record) for name, record in body["values"].items()},
    )


def _canonical(body: dict[str, Any]) -> bytes:
    return json.dumps(body, sort_keys=True, separators=(",", ":")).encode()


def _digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(_canonical(body)).hexdigest()
