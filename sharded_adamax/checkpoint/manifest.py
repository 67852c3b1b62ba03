"""The manifest: one JSON file that says what a checkpoint consists of, down to the checksum of each record.

[Note: record]  A file of a checkpoint is a sequence of records; each is one box of one tensor (or one value) as
written by torch.save. The manifest has for each record its file, offset, length and CRC-32, so a rank verifies exactly
the bytes it reads, and for each file its size and SHA-256, so ``sha256sum`` can verify the whole.
"""

from __future__ import annotations

import hashlib
import json
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
        digest = body.pop("digest")
        if digest != _digest(body) or body["format"] != FORMAT:
            raise ValueError("its digest does not match")
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointDamagedError(f"{path} is damaged ({error}): use another checkpoint") from error
    if body["version"] > FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format version {body['version']}, this release reads up to {FORMAT_VERSION}: upgrade "
            "sharded_adamax"
        )
    return _from_body(body)


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
