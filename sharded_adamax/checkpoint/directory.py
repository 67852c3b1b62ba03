"""A checkpoint is one directory, written by all ranks together: there whole, or not there.

[Note: protocol]

::

    .NAME.ID.incomplete/   made by the first rank; ID is the save's own
        __R_0.distcp       each rank R writes its records, fsync
        __R.part           each rank says what it wrote, fsync, renamed into place: its part is done
        .metadata          the first rank, when all parts are there: for torch.distributed.checkpoint; fsync
        manifest.json      the first rank, fsync; parts removed; directory fsynced
    NAME/                  renamed; parent directory fsynced. From here on the checkpoint exists

Nothing is overwritten in place. A crash leaves a hidden directory, which is never read and which the next save to the
same name removes. Two saves never share one: a rank that outlived its job, or that sees another disk than the first
rank, finds no directory to write to, instead of putting its part among those of others. After planning, no step needs a
collective, so the same protocol runs in a background thread.
"""

from __future__ import annotations

import datetime
import os
import re
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata

from sharded_adamax.agreement import run_together
from sharded_adamax.checkpoint import disk, foreign, manifest, parts, writing
from sharded_adamax.checkpoint.errors import CheckpointDamagedError, CheckpointError
from sharded_adamax.checkpoint.manifest import Manifest
from sharded_adamax.collectives import ControlPlane

# How long the first rank waits for the others' parts once its own is written. They write at the same time and as much.
PARTS_TIMEOUT_SECONDS = 1800.0
EXIT_TIMEOUT_SECONDS = 30.0
_POLL_SECONDS = 0.02


def incomplete(final: Path, save_id: str | None = None) -> Path:
    """Return the name under which a save writes ``final``; without an ID that under which ``final`` is removed."""
    return final.with_name(f".{final.name}.incomplete" if save_id is None else f".{final.name}.{save_id}.incomplete")


def _leftovers(final: Path) -> list[Path]:
    """Return what crashed saves to ``final`` left."""
    pattern = re.compile(rf"\.{re.escape(final.name)}(\.[0-9a-f]{{32}})?\.incomplete")
    return [path for path in final.parent.glob(".*.incomplete") if pattern.fullmatch(path.name)]


@dataclass(frozen=True)
class Header:
    """What a manifest says beside the files."""

    run_id: str
    step: int | None
    metric: float | None
    layout_digest: str | None


class Save:
    """One save of one rank after planning: write my part, then (first rank) commit. No collectives."""

    def __init__(
        self, control: ControlPlane, final: Path, save_id: str, header: Header, planned: writing.RankPlan
    ) -> None:
        self.rank = control.rank
        self.world_size = control.size
        self.final = final
        self.save_id = save_id
        self.directory = incomplete(final, save_id)
        self.header = header
        self._items = planned.items
        self._metadata = planned.metadata
        self.cancelled = threading.Event()  # some rank will never write its part

    def write(self) -> None:
        """Write this rank's records and its part file.

        Raises:
            CheckpointError: The disk refused, with its reason.
        """
        try:
            stream = writing.RecordStream(self._items, f"__{self.rank}_0.distcp")
            disk.write_file(self.directory / stream.file, stream)
            self._items = []
            # The part appears under its name only when it is whole.
            unfinished = self.directory / f".{parts.name(self.rank)}"
            disk.write_file(unfinished, [parts.to_json(stream.written())])
            disk.rename(unfinished, self.directory / parts.name(self.rank))
        except FileNotFoundError as error:
            raise CheckpointError(
                f"rank {self.rank} does not find {self.directory}, which the first rank has made: every rank must see "
                "the same directory. Is the disk shared? Earlier checkpoints are untouched"
            ) from error
        except OSError as error:
            raise CheckpointError(
                f"rank {self.rank} cannot write {self.final}: {error}. Earlier checkpoints are untouched"
            ) from error

    def commit(self, after: Callable[[], None] | None = None) -> None:
        """Make the checkpoint exist, when all parts are there. First rank only.

        Args:
            after: Called when the checkpoint is durable.
        """
        try:
            self._wait_for_parts()
            written = [self._read_part(rank) for rank in range(self.world_size)]
            assert self._metadata is not None
            whole = self._manifest(written, self._metadata)
            dcp_bytes = foreign.metadata_bytes(self._metadata, whole)
            whole.files[foreign.METADATA_NAME] = manifest.file_of(dcp_bytes)
            disk.write_file(self.directory / foreign.METADATA_NAME, [dcp_bytes])
            disk.write_file(self.directory / manifest.MANIFEST_NAME, [whole.to_json()])
            for rank in range(self.world_size):
                disk.remove_file(self.directory / parts.name(rank))
            disk.sync_directory(self.directory)
            disk.rename(self.directory, self.final)
            disk.sync_directory(self.final.parent)
            if after is not None:
                after()
        except OSError as error:
            raise CheckpointError(
                f"cannot complete {self.final}: {error}. Earlier checkpoints are untouched"
            ) from error

    def abandon(self) -> None:
        """Remove what was written, if the checkpoint does not exist yet. First rank only."""
        disk.remove_directory(self.directory)

    def _wait_for_parts(self) -> None:
        deadline = time.monotonic() + PARTS_TIMEOUT_SECONDS
        exiting = False
        missing = list(range(self.world_size))
        while missing:
            missing = [rank for rank in missing if not (self.directory / parts.name(rank)).exists()]
            if not exiting and not threading.main_thread().is_alive():
                exiting = True
                # The job is ending. Ranks that end with it are about to be done; one that has died never will be.
                deadline = min(deadline, time.monotonic() + EXIT_TIMEOUT_SECONDS)
            if missing and (self.cancelled.is_set() or time.monotonic() > deadline):
                raise CheckpointError(f"{self.final} was not completed: no part of ranks {missing}")
            if missing:
                time.sleep(_POLL_SECONDS)

    def _read_part(self, rank: int) -> writing.Written:
        return parts.parse((self.directory / parts.name(rank)).read_bytes())

    def _manifest(self, written: list[writing.Written], metadata: Metadata) -> Manifest:
        chunks: dict[str, list[manifest.Chunk]] = {}
        for part in written:
            for name, chunk in part.chunks:
                chunks.setdefault(name, []).append(chunk)
        tensors = {
            name: manifest.StoredTensor(shape, dtype, tuple(chunks.get(name, ())))
            for name, (shape, dtype) in writing.shapes_and_dtypes(metadata).items()
        }
        return Manifest(
            run_id=self.header.run_id,
            save_id=self.save_id,
            step=self.header.step,
            metric=self.header.metric,
            world_size=self.world_size,
            layout_digest=self.header.layout_digest,
            created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            torch_version=str(torch.__version__),
            files={part.file: part.stored for part in written},
            tensors=tensors,
            values={name: record for part in written for name, record in part.values},
        )


def start(control: ControlPlane, final: Path, state: dict[str, Any], header: Header, *, snapshot: bool) -> Save:
    """Make the directory and decide who writes what. Collective.

    Args:
        state: What to save, nested as torch.distributed.checkpoint nests it.
        snapshot: Copy everything to host memory first, for a save in the background.

    Raises:
        FileExistsError: ``final`` exists. On every rank.
        CheckpointError: The directory cannot be made. On every rank.
    """
    save_id = control.scatter([uuid.uuid4().hex] * control.size if control.rank == 0 else None)
    unfinished = incomplete(final, save_id)

    def prepare() -> None:
        if control.rank == 0:
            if final.exists():
                raise FileExistsError(f"{final} exists: a checkpoint is never overwritten, save to a new path")
            try:
                for leftover in _leftovers(final):
                    disk.remove_directory(leftover)
                disk.make_directory(unfinished)
            except OSError as error:
                raise CheckpointError(f"cannot make {unfinished}: {error}") from error

    run_together(control, prepare, f"preparing {final}")
    planned = writing.plan(control, state)
    if snapshot:
        planned = writing.RankPlan(writing.snapshot(planned.items), planned.metadata)
    return Save(control, final, save_id, header, planned)


@dataclass(frozen=True)
class Opened:
    """A checkpoint directory whose manifest or metadata was read and found in order."""

    directory: Path
    manifest: Manifest | None  # None: written by another program
    metadata: Metadata


def open_checkpoint(directory: Path, *, verify: bool) -> Opened:
    """Read what a checkpoint consists of and check that its files are there and of the right size. Local.

    Args:
        verify: Refuse a checkpoint without a manifest, files of another size, and another ``.metadata``: it has no
            records, so nothing else would look at it.

    Raises:
        FileNotFoundError: There is no such directory.
        CheckpointDamagedError: Names the file and what is wrong with it. No manifest, with ``verify``.
    """
    if not directory.is_dir():
        raise FileNotFoundError(f"there is no checkpoint at {directory}")
    path = directory / manifest.MANIFEST_NAME
    if path.is_file():
        found = manifest.parse(path.read_bytes(), path)
        if verify:
            _check_sizes(directory, found)
            _check_metadata(directory / foreign.METADATA_NAME, found)
        return Opened(directory, found, _dcp_metadata(path, found.tensors, found.values))
    foreign_path = directory / foreign.METADATA_NAME
    if not foreign_path.is_file():
        raise CheckpointDamagedError(f"{path} is missing: {directory} is not a complete checkpoint, use another")
    if verify:
        raise CheckpointDamagedError(
            f"{path} is missing: either it was lost, or another program wrote {directory}, and nothing says whether "
            "its files are whole. Pass verify=False to read it as it is"
        )
    return Opened(directory, None, _dcp_metadata(foreign_path, *foreign.read_metadata(foreign_path)))


def _dcp_metadata(
    path: Path, tensors: dict[str, manifest.StoredTensor], values: dict[str, manifest.Record]
) -> Metadata:
    try:
        return foreign.dcp_metadata(tensors, values)
    except CheckpointError as error:
        raise CheckpointDamagedError(f"{path} is damaged ({error}): use another checkpoint") from error


def _check_metadata(path: Path, found: Manifest) -> None:
    if not path.is_file():
        raise CheckpointDamagedError(f"{path} is missing: use another checkpoint")
    if manifest.file_of(path.read_bytes()) != found.files.get(path.name):
        raise CheckpointDamagedError(f"{path} is damaged: it is not what was written, use another checkpoint")


def _check_sizes(directory: Path, found: Manifest) -> None:
    for name, stored in found.files.items():
        path = directory / name
        if not path.is_file():
            raise CheckpointDamagedError(f"{path} is missing: use another checkpoint")
        size = os.path.getsize(path)
        if size != stored.bytes:
            raise CheckpointDamagedError(
                f"{path} has {size} bytes, expected {stored.bytes}: it was cut or replaced, use another checkpoint"
            )
