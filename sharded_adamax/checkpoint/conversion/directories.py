"""Bundles from and to checkpoint directories."""

from __future__ import annotations

import io
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.optim import Adamax

from sharded_adamax.checkpoint import contents, disk, foreign, manifest, reading
from sharded_adamax.checkpoint.conversion.bundle import Bundle, StoredPieces, in_memory, refuse_existing, zeros
from sharded_adamax.checkpoint.directory import Header, Save, open_checkpoint
from sharded_adamax.checkpoint.errors import CheckpointDamagedError, CheckpointError
from sharded_adamax.checkpoint.inspection import Meter, checkpoints_in, is_checkpoint, structure_problems
from sharded_adamax.checkpoint.manifest import Record, StoredTensor
from sharded_adamax.checkpoint.writing import Item, RankPlan
from sharded_adamax.collectives import ControlPlane
from sharded_adamax.ranges import Box
from sharded_adamax.state import STATE_KEYS

_MODEL, _STATE, _GROUPS = "model.", "optim.state.", "optim.param_groups."


class _Source:
    """The records of one directory, read one at a time."""

    def __init__(self, directory: Path, *, without_manifest: bool) -> None:
        self.directory = directory
        if not is_checkpoint(directory):
            inside = [str(path) for path in checkpoints_in(directory)]
            hint = f"convert one of those in it, for example {inside[-1]}" if inside else "it has no manifest.json"
            raise CheckpointError(f"{directory} is not a checkpoint: {hint}")
        has_manifest = (directory / manifest.MANIFEST_NAME).exists()
        if not has_manifest and not without_manifest:
            raise CheckpointDamagedError(
                f"{directory / manifest.MANIFEST_NAME} is missing: either it was lost, or another program wrote "
                f"{directory}, and nothing says whether its files are whole. Pass --without-manifest "
                "(without_manifest=True) to read it as it is"
            )
        opened = open_checkpoint(directory, verify=has_manifest)
        self.step = None if opened.manifest is None else opened.manifest.step
        self.is_ours = opened.manifest is not None
        self.tensors: dict[str, StoredTensor]
        self.values: dict[str, Record]
        if opened.manifest is None:
            self.tensors, self.values = foreign.read_metadata(directory / foreign.METADATA_NAME)
        else:
            self.tensors, self.values = opened.manifest.tensors, opened.manifest.values
        sizes = {path.name: path.stat().st_size for path in directory.iterdir() if path.is_file()}
        problems = structure_problems(self.tensors, sizes)
        if problems:
            raise CheckpointDamagedError(f"{directory} is damaged: {problems[0]}: use another checkpoint")
        self._unpickled: dict[bytes, Any] = {}

    def pieces(self, name: str) -> StoredPieces:
        stored = self.tensors[name]
        dtype = foreign.dtype_of(stored.dtype)
        records = {Box(chunk.offsets, chunk.sizes): chunk.record for chunk in stored.chunks}

        def read(box: Box) -> Tensor:
            data = self._read(records[box])
            piece = self._unpickle(data, records[box])
            if not isinstance(piece, Tensor) or (tuple(piece.shape), piece.dtype) != (box.sizes, dtype):
                raise self._strange(records[box], f"expected a piece of {name} of shape {box.sizes} and {dtype}")
            return piece

        return StoredPieces(stored.shape, dtype, tuple(records), read)

    def value(self, name: str) -> Any:
        """Return a value, or a small tensor where a value is expected."""
        if name in self.tensors:
            return torch.cat([piece.flatten() for piece in self.pieces(name).in_order()]).view(self.tensors[name].shape)
        data = self._read(self.values[name])
        # The same few hyper-parameters are stored under every parameter.
        if data not in self._unpickled:
            self._unpickled[data] = self._unpickle(data, self.values[name])
        return self._unpickled[data]

    def check(self, name: str) -> None:
        """Read what is not converted only to compare checksums: no byte of a checkpoint goes unseen."""
        chunks = self.tensors[name].chunks if name in self.tensors else ()
        for record in [self.values[name]] if name in self.values else [chunk.record for chunk in chunks]:
            self._read(record)

    def in_stored_order(self) -> list[str]:
        """Return all names in the order in which they were saved: a manifest has them sorted.

        A rank writes in the order of its state dict, and values, the hyper-parameters among them, are all written by
        the first rank. So the order of parameters in the optimizer is found in the values' places.
        """
        places = {name: (1, record.file, record.offset) for name, record in self.values.items()}
        for name, tensor in self.tensors.items():
            first = tensor.chunks[0].record
            places[name] = (2, first.file, first.offset)
        return sorted(places, key=lambda name: places[name])

    def _read(self, record: Record) -> bytes:
        try:
            with reading._open(self.directory, record.file) as file:
                return reading._read(file, self.directory / record.file, record, verify=True)
        except OSError as error:
            raise CheckpointDamagedError(f"{self.directory / record.file} cannot be read: {error}") from error

    def _unpickle(self, data: bytes, record: Record) -> Any:
        try:
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged pickle can fail in any way
            raise self._strange(record, f"{type(error).__name__}: {error}") from error

    def _strange(self, record: Record, why: str) -> CheckpointDamagedError:
        return CheckpointDamagedError(
            f"{self.directory / record.file} is damaged: the {record.length} bytes at {record.offset} are not what the "
            f"checkpoint says of them ({why}): use another checkpoint"
        )


def read(directory: Path, *, without_manifest: bool) -> Bundle:
    """Return what a checkpoint holds.

    Args:
        without_manifest: Also read a checkpoint of another program, which nothing says is whole.

    Raises:
        CheckpointDamagedError: Names the file.
        CheckpointError: It is no checkpoint.
    """
    source = _Source(directory, without_manifest=without_manifest)
    model: dict[str, StoredPieces | Any] = {}
    state: dict[str, dict[str, StoredPieces]] = {}
    hypers: dict[str, dict[str, Any]] = {}
    left_out = []
    for key in source.in_stored_order():
        if key.startswith(_MODEL):
            name = key.removeprefix(_MODEL)
            model[name] = source.pieces(key) if key in source.tensors else source.value(key)
        elif key.startswith(_STATE) and key in source.tensors:
            name, _, kind = key.removeprefix(_STATE).rpartition(".")
            state.setdefault(name, {})[kind] = source.pieces(key)
        elif key.startswith(_GROUPS):
            name, _, kind = key.removeprefix(_GROUPS).rpartition(".")
            hypers.setdefault(name, {})[kind] = source.value(key)
        elif key != contents.EXTRA or not source.is_ours:  # another program's "extra" may be anything
            left_out.append(key)
            if source.is_ours:
                source.check(key)
    extra = _unpickled_extra(source) if source.is_ours and contents.EXTRA in source.tensors else None
    return Bundle(model, state, _groups(hypers), extra, source.step, tuple(left_out))


def _unpickled_extra(source: _Source) -> Any:
    data = source.value(contents.EXTRA)
    try:
        return contents.from_bytes(data)
    except Exception as error:
        raise CheckpointDamagedError(f"{source.directory}: {contents.EXTRA} cannot be read: {error}") from error


def _groups(hypers: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Put parameters that follow each other and have equal hyper-parameters into one group."""
    groups: list[dict[str, Any]] = []
    for name, hyper in hypers.items():
        if not groups or not _same({**groups[-1], "param_names": None}, {**hyper, "param_names": None}):
            groups.append({**hyper, "param_names": []})
        groups[-1]["param_names"].append(name)
    return groups


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(value, other[key]) for key, value in one.items())
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    return type(one) is type(other) and not isinstance(one, Tensor) and bool(one == other)


def write(bundle: Bundle, final: Path, meter: Meter) -> None:
    """Write a checkpoint as a job of one rank would.

    Raises:
        CheckpointError: The disk refused; nothing is at ``final``.
    """
    refuse_existing(final)
    writer = _Writer(bundle, meter)
    header = Header(run_id=uuid.uuid4().hex, step=bundle.step, metric=None, layout_digest=None)
    # A stream of records goes through its items once, so they need not be there all at once.
    items = cast(list[Item], writer)
    saving = Save(ControlPlane(None), final, uuid.uuid4().hex, header, RankPlan(items, writer.metadata()))
    try:
        disk.make_directory(saving.directory)
        saving.write()
        saving.commit()
    except OSError as error:
        raise CheckpointError(f"cannot write {final}: {error}") from error
    finally:
        saving.abandon()


class _Writer:
    """The items of a checkpoint, each made when its turn comes."""

    def __init__(self, bundle: Bundle, meter: Meter) -> None:
        self._meter = meter
        self._tensors = bundle.tensors() | _missing_states(bundle)
        self._tensors[contents.EXTRA] = in_memory(contents.to_bytes(bundle.extra))
        self._values: dict[str, Any] = {}
        for name, entry in bundle.model.items():
            if not isinstance(entry, StoredPieces):
                self._values[f"{_MODEL}{name}"] = entry
        for group in bundle.groups:
            self._add_group(group)

    def _add_group(self, group: dict[str, Any]) -> None:
        for name in group["param_names"]:
            for key, value in (_DEFAULTS | group).items():
                if key == "param_names":
                    continue
                if isinstance(value, Tensor):
                    self._tensors[f"{_GROUPS}{name}.{key}"] = in_memory(value)
                else:
                    self._values[f"{_GROUPS}{name}.{key}"] = value

    def __iter__(self) -> Iterator[Item]:
        for name, tensor in self._tensors.items():
            for box in tensor.boxes:
                piece = tensor.read(box)
                yield Item(name, (box.offsets, box.sizes), piece)
                self._meter.advance(piece.nbytes)
        for name, value in self._values.items():
            data = io.BytesIO()
            torch.save(value, data)
            yield Item(name, None, data)

    def metadata(self) -> Metadata:
        """Return what torch.distributed.checkpoint's planner would say of the items."""
        entries: dict[str, Any] = {name: BytesStorageMetadata() for name in self._values}
        for name, tensor in self._tensors.items():
            chunks = [ChunkStorageMetadata(torch.Size(box.offsets), torch.Size(box.sizes)) for box in tensor.boxes]
            properties = TensorProperties(dtype=tensor.dtype)
            entries[name] = TensorStorageMetadata(properties, torch.Size(tensor.shape), chunks)
        # Where each entry was in the nested dict: "model.a.b" is ["model"]["a.b"].
        paths = {name: tuple(name.split(".", 1)) for name in entries}
        return Metadata(entries, planner_data=paths)


# Files of older torch releases lack the newer flags; a load asks for all of them.
_DEFAULTS = dict(Adamax([torch.empty(0)]).defaults)


def _missing_states(bundle: Bundle) -> dict[str, StoredPieces]:
    """Return the state of parameters that had no gradient yet, as the first gradient would find it.

    torch.optim.Adamax has no state for them, ShardedAdamax has, and asks for it when it loads.
    """
    found = {}
    for name in bundle.param_names():
        if name not in bundle.state:
            param = bundle.model[name]
            found[f"{_STATE}{name}.step"] = in_memory(torch.zeros(()))
            found |= {f"{_STATE}{name}.{key}": zeros(param.shape, param.dtype) for key in STATE_KEYS}
    return found
