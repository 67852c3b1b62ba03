"""What a checkpoint holds, and whether it is whole: every byte and every element, not only what one load would read.

Loading verifies what it reads and stops at the first fault. Here everything is checked and every fault is told.
"""

from __future__ import annotations

import hashlib
import math
import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from sharded_adamax.checkpoint import foreign, manifest
from sharded_adamax.checkpoint.errors import CheckpointDamagedError, CheckpointError
from sharded_adamax.checkpoint.manifest import Chunk, Manifest, StoredFile, StoredTensor
from sharded_adamax.ranges import Box

_BLOCK_BYTES = 4 << 20
_MAX_THREADS = 8
# The manager sets a checkpoint aside under this name when it could not be restored.
_SET_ASIDE_SUFFIX = ".damaged"


class Meter:
    """Adds up the bytes that are done and tells them to a callback, one call at a time, from whichever thread."""

    def __init__(self, progress: Callable[[int, int], None] | None, total_bytes: int = 0) -> None:
        self._progress = progress
        self._lock = threading.Lock()
        self._total_bytes = total_bytes
        self._done_bytes = 0

    def expect(self, num_bytes: int) -> None:
        """Learn of more work."""
        with self._lock:
            self._total_bytes += num_bytes

    def advance(self, num_bytes: int) -> None:
        """Note that work is done."""
        with self._lock:
            self._done_bytes += num_bytes
            if self._progress is not None:
                self._progress(self._done_bytes, self._total_bytes)


@dataclass(frozen=True)
class TensorSummary:
    """One stored tensor."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int
    num_pieces: int


@dataclass(frozen=True)
class FileSummary:
    """One file; its size on disk, None if it is missing."""

    name: str
    bytes: int | None


@dataclass(frozen=True)
class Summary:
    """What a checkpoint says of itself. Everything but tensors and files is None where there is no manifest."""

    directory: str
    written_by: str
    step: int | None
    created: str | None
    world_size: int | None
    metric: float | None
    layout_digest: str | None
    run_id: str | None
    save_id: str | None
    torch_version: str | None
    num_values: int
    tensors: tuple[TensorSummary, ...]
    files: tuple[FileSummary, ...]


@dataclass(frozen=True)
class Report:
    """What `verify` found. ``problems`` mean damage, ``warnings`` do not."""

    directory: Path
    step: int | None
    num_files: int
    stored_bytes: int
    problems: tuple[str, ...]
    warnings: tuple[str, ...]

    @property
    def is_whole(self) -> bool:
        return not self.problems


def is_checkpoint(directory: Path) -> bool:
    """Say whether a directory is, or once was, a checkpoint: also one that has lost its manifest."""
    names = (manifest.MANIFEST_NAME, foreign.METADATA_NAME)
    return any((directory / name).exists() for name in names) or any(directory.glob("__*.distcp"))


def checkpoints_in(root: Path) -> list[Path]:
    """Return the checkpoints under a directory such as a `CheckpointManager` writes, the newest last."""
    found = [
        path
        for path in root.iterdir()
        if path.is_dir()
        and not path.name.startswith(".")
        and not path.name.endswith(_SET_ASIDE_SUFFIX)
        # The manager's directories are numbers; one that has lost all its files is still one that was there.
        and (path.name.isdigit() or is_checkpoint(path))
    ]
    return sorted(found, key=lambda path: (int(path.name) if path.name.isdigit() else -1, path.name))


def summarise(directory: Path) -> Summary:
    """Return what a checkpoint says of itself, without opening its tensor files.

    Raises:
        CheckpointDamagedError: Its manifest, or another program's metadata, is damaged.
    """
    path = directory / manifest.MANIFEST_NAME
    found = manifest.parse(path.read_bytes(), path) if path.is_file() else None
    if found is not None:
        tensors, num_values = found.tensors, len(found.values)
        names: Iterable[str] = found.files
    else:
        tensors, values = foreign.read_metadata(directory / foreign.METADATA_NAME)
        num_values = len(values)
        names = (entry.name for entry in directory.iterdir() if entry.is_file())
    return Summary(
        directory=str(directory),
        written_by="torch.distributed.checkpoint (no manifest)" if found is None else "sharded_adamax",
        step=None if found is None else found.step,
        created=None if found is None else found.created,
        world_size=None if found is None else found.world_size,
        metric=None if found is None else found.metric,
        layout_digest=None if found is None else found.layout_digest,
        run_id=None if found is None else found.run_id,
        save_id=None if found is None else found.save_id,
        torch_version=None if found is None else found.torch_version,
        num_values=num_values,
        tensors=tuple(_tensor_summary(name, tensor) for name, tensor in tensors.items()),
        files=tuple(FileSummary(name, _size(directory / name)) for name in sorted(names)),
    )


def _tensor_summary(name: str, tensor: StoredTensor) -> TensorSummary:
    num_bytes = math.prod(tensor.shape) * foreign.dtype_of(tensor.dtype).itemsize
    return TensorSummary(name, tensor.shape, tensor.dtype, num_bytes, len(tensor.chunks))


def _size(path: Path) -> int | None:
    return os.path.getsize(path) if path.is_file() else None


def verify(directory: Path, progress: Callable[[int, int], None] | None = None) -> Report:
    """Check a checkpoint: its manifest, size and SHA-256 of every file, and that its tensors are covered exactly.

    Args:
        progress: Called with the bytes read so far and in all; from several threads, one at a time.

    Returns:
        All that is wrong, by file name; nothing is raised for damage.

    Raises:
        CheckpointError: A newer format.
    """
    path = directory / manifest.MANIFEST_NAME
    if not path.is_file():
        return _without_manifest(directory)
    try:
        found = manifest.parse(path.read_bytes(), path)
    except CheckpointDamagedError as error:
        return Report(directory, None, 0, 0, (str(error),), ())
    outside = [name for name in found.files if Path(name).name != name]
    if outside:
        return Report(directory, found.step, 0, 0, (f"{path} names a file outside of {directory}: {outside[0]!r}",), ())
    meter = Meter(progress, sum(stored.bytes for stored in found.files.values()))
    # hashlib releases the interpreter while it works, so threads use all cores and keep the disk busy.
    with ThreadPoolExecutor(min(_MAX_THREADS, (os.cpu_count() or 1) + 1)) as pool:
        checked = pool.map(lambda name: _check_file(directory / name, found.files[name], meter), found.files)
        problems = [problem for problem in checked if problem is not None]
    if foreign.METADATA_NAME not in found.files:
        problems.append(f"{path} does not list {foreign.METADATA_NAME}")
    problems += structure_problems(found.tensors, {name: stored.bytes for name, stored in found.files.items()})
    return Report(
        directory,
        found.step,
        len(found.files),
        sum(stored.bytes for stored in found.files.values()),
        tuple(problems),
        tuple(_unknown_files(directory, found)),
    )


def _without_manifest(directory: Path) -> Report:
    path = directory / manifest.MANIFEST_NAME
    problems = [
        f"{path} is missing: it was lost, or another program wrote {directory}, and nothing says whether its files are "
        "whole"
    ]
    metadata = directory / foreign.METADATA_NAME
    sizes = {entry.name: entry.stat().st_size for entry in directory.iterdir() if entry.is_file()}
    if metadata.is_file():
        try:
            tensors, _ = foreign.read_metadata(metadata)
            problems += structure_problems(tensors, sizes)
        except CheckpointError as error:
            problems.append(str(error))
    return Report(directory, None, len(sizes), sum(sizes.values()), tuple(problems), ())


def _check_file(path: Path, stored: StoredFile, meter: Meter) -> str | None:
    """Return what is wrong with a file, None if nothing is."""
    if not path.is_file():
        return f"{path} is missing"
    size = os.path.getsize(path)
    if size != stored.bytes:
        return f"{path} has {size} bytes, expected {stored.bytes}: it was cut or replaced"
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while block := file.read(_BLOCK_BYTES):
                digest.update(block)
                meter.advance(len(block))
    except OSError as error:
        return f"{path} cannot be read: {error}"
    if digest.hexdigest() != stored.sha256:
        return f"{path} is damaged: its SHA-256 is {digest.hexdigest()}, expected {stored.sha256}"
    return None


def _unknown_files(directory: Path, found: Manifest) -> list[str]:
    known = {*found.files, manifest.MANIFEST_NAME}
    return [f"{entry} is not a file of this checkpoint" for entry in directory.iterdir() if entry.name not in known]


def structure_problems(tensors: dict[str, StoredTensor], file_bytes: dict[str, int]) -> list[str]:
    """Return what is wrong with the pieces of tensors: outside of the tensor or its file, overlapping, or lacking.

    Args:
        file_bytes: The size of each file that there is.
    """
    problems = []
    for name, tensor in tensors.items():
        files = ", ".join(sorted({chunk.record.file for chunk in tensor.chunks})) or "no file"
        problems += [f"{files}: {name} {problem}" for problem in _tensor_problems(tensor, file_bytes)]
    return problems


def _tensor_problems(tensor: StoredTensor, file_bytes: dict[str, int]) -> list[str]:
    for chunk in tensor.chunks:
        record = chunk.record
        if record.file not in file_bytes:
            return [f"has a piece in {record.file}, which is not a file of this checkpoint"]
        if record.offset < 0 or record.length < 0 or record.offset + record.length > file_bytes[record.file]:
            return [
                f"has a piece at bytes {record.offset}:{record.offset + record.length} of {record.file}, which has "
                f"{file_bytes[record.file]}"
            ]
        if not _is_inside(chunk, tensor.shape):
            return [f"of shape {tensor.shape} has a piece at {chunk.offsets} of shape {chunk.sizes}"]
    parts = [Box(chunk.offsets, chunk.sizes) for chunk in tensor.chunks if math.prod(chunk.sizes)]
    overlap = _overlap(parts, len(tensor.shape))
    if overlap is not None:
        return [f"has overlapping pieces at {overlap[0].offsets} and {overlap[1].offsets}"]
    # Inside the tensor and without overlap, the pieces cover it exactly if they have as many elements as it.
    covered = sum(part.numel for part in parts)
    if covered != math.prod(tensor.shape) or not tensor.chunks:
        return [f"is stored only in part: {covered} of {math.prod(tensor.shape)} elements"]
    return []


def _is_inside(chunk: Chunk, shape: tuple[int, ...]) -> bool:
    if not len(chunk.offsets) == len(chunk.sizes) == len(shape):
        return False
    return all(
        offset >= 0 and size >= 0 and offset + size <= extent
        for offset, size, extent in zip(chunk.offsets, chunk.sizes, shape, strict=True)
    )


def _overlap(parts: list[Box], num_dims: int) -> tuple[Box, Box] | None:
    """Return two boxes that share an element, if there are any.

    Sweeps along the dimension in which the boxes start at the most places: few are then open at a time.
    """
    if len(parts) < 2:
        return None
    if num_dims == 0:
        return parts[0], parts[1]
    along = max(range(num_dims), key=lambda dim: len({part.offsets[dim] for part in parts}))
    opened: list[Box] = []
    for part in sorted(parts, key=lambda part: part.offsets[along]):
        opened = [other for other in opened if other.offsets[along] + other.sizes[along] > part.offsets[along]]
        for other in opened:
            if all(
                max(start, other_start) < min(start + size, other_start + other_size)
                for start, size, other_start, other_size in zip(*part, *other, strict=True)
            ):
                return other, part
        opened.append(part)
    return None
