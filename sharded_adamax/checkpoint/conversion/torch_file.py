"""Bundles from and to the files of torch.save.

[Note: torch file]  A zip archive, nothing compressed: ``data.pkl`` is the pickled object, in which a tensor is a
reference to one of the records ``data/0``, ``data/1``, ..., each the bytes of one storage. torch.save wants all tensors
in memory, so the archive is written here, record by record; it is read by torch.load.
"""

from __future__ import annotations

import collections
import ctypes
import io
import mmap
import pickle
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from sharded_adamax.checkpoint.conversion.bundle import Bundle, StoredPieces, cut, in_memory, new_file, write_pieces
from sharded_adamax.checkpoint.errors import CheckpointDamagedError, CheckpointError
from sharded_adamax.checkpoint.inspection import Meter
from sharded_adamax.ranges import Box

_BLOCK_BYTES = 1 << 20
_ALIGNMENT_BYTES = 64  # of a record in its file, so that tensors can be memory-mapped
_LOCAL_HEADER_BYTES = 30
_ZIP64_EXTRA_BYTES = 20
_PADDING_ID = b"FB"  # torch's own name for the padding
_ARCHIVE = "archive"

# The names that files have for the dtypes of before torch 2.1; later dtypes are named directly.
_STORAGE_TYPES: dict[torch.dtype, Any] = {
    torch.float32: torch.FloatStorage,
    torch.float64: torch.DoubleStorage,
    torch.float16: torch.HalfStorage,
    torch.bfloat16: torch.BFloat16Storage,
    torch.int64: torch.LongStorage,
    torch.int32: torch.IntStorage,
    torch.int16: torch.ShortStorage,
    torch.int8: torch.CharStorage,
    torch.uint8: torch.ByteStorage,
    torch.bool: torch.BoolStorage,
    torch.complex64: torch.ComplexFloatStorage,
    torch.complex128: torch.ComplexDoubleStorage,
}


@dataclass(frozen=True)
class _Storage:
    """Stands for a record in the pickle."""

    type: Any
    key: str
    numel: int


class _Pickler(pickle.Pickler):
    """Pickles as torch.save does, and collects the tensors instead of writing them."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=2)
        self.records: list[StoredPieces] = []

    def persistent_id(self, obj: Any) -> Any:
        return ("storage", obj.type, obj.key, "cpu", obj.numel) if isinstance(obj, _Storage) else None

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, Tensor):
            obj = in_memory(obj)
        if not isinstance(obj, StoredPieces):
            return NotImplemented
        key = str(len(self.records))
        self.records.append(obj)
        strides = torch.empty(obj.shape, dtype=obj.dtype, device="meta").stride()
        storage_type = _STORAGE_TYPES.get(obj.dtype)
        no_hooks: collections.OrderedDict[str, Any] = collections.OrderedDict()
        if storage_type is None:
            storage = _Storage(torch.UntypedStorage, key, obj.nbytes)
            return torch._utils._rebuild_tensor_v3, (storage, 0, obj.shape, strides, False, no_hooks, obj.dtype)
        storage = _Storage(storage_type, key, obj.nbytes // obj.dtype.itemsize)
        return torch._utils._rebuild_tensor_v2, (storage, 0, obj.shape, strides, False, no_hooks)


def write(bundle: Bundle, final: Path, meter: Meter) -> None:
    """Write what ``torch.load(final, weights_only=True)`` reads.

    Raises:
        CheckpointError: The disk refused; nothing is at ``final``.
    """
    pickled = io.BytesIO()
    pickler = _Pickler(pickled)
    pickler.dump(_to_object(bundle))
    with new_file(final) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        _write_record(archive, file, "data.pkl", in_memory(_as_tensor(pickled.getvalue())), Meter(None))
        _write_record(archive, file, "byteorder", in_memory(_as_tensor(sys.byteorder.encode())), Meter(None))
        for key, tensor in enumerate(pickler.records):
            _write_record(archive, file, f"data/{key}", tensor, meter)
        _write_record(archive, file, "version", in_memory(_as_tensor(b"3\n")), Meter(None))


def _as_tensor(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _write_record(archive: zipfile.ZipFile, file: BinaryIO, name: str, tensor: StoredPieces, meter: Meter) -> None:
    info = zipfile.ZipInfo(f"{_ARCHIVE}/{name}")  # dated 1980: the same source gives the same bytes
    info.file_size = tensor.nbytes
    # Always with 64-bit sizes, so that the length of the header is known.
    start = file.tell() + _LOCAL_HEADER_BYTES + len(info.filename) + _ZIP64_EXTRA_BYTES + len(_PADDING_ID) + 2
    padding_bytes = -start % _ALIGNMENT_BYTES
    info.extra = _PADDING_ID + padding_bytes.to_bytes(2, "little") + b"Z" * padding_bytes
    with archive.open(info, "w", force_zip64=True) as record:
        write_pieces(tensor, record.write, meter)
    info.extra = b""  # the directory at the end of the archive needs no padding


def _to_object(bundle: Bundle) -> dict[str, Any]:
    ids = {name: index for index, name in enumerate(bundle.param_names())}
    found = {
        "model": dict(bundle.model),
        "optimizer": {
            "state": {index: dict(bundle.state[name]) for name, index in ids.items() if name in bundle.state},
            "param_groups": [
                {**group, "params": [ids[name] for name in group["param_names"]]} for group in bundle.groups
            ],
        },
        "extra": bundle.extra,
    }
    return found if bundle.step is None else {**found, "step": bundle.step}


def read(path: Path, meter: Meter) -> Bundle:
    """Return what a torch file holds; its tensors stay in the file.

    Raises:
        CheckpointDamagedError: A record is not what was written.
        CheckpointError: It holds something else, or asks for code to be run.
    """
    _check_records(path, meter)
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise CheckpointError(
            f"{path} cannot be read with weights_only=True; nothing else is tried, because it could run code: {error}"
        ) from error
    if not isinstance(loaded, dict) or not isinstance(loaded.get("model"), dict) or "optimizer" not in loaded:
        got = ", ".join(map(str, loaded)) if isinstance(loaded, dict) else type(loaded).__name__
        raise CheckpointError(f'{path}: expected a dict with "model" and "optimizer", got {got or "nothing"}')
    step = loaded.get("step")
    rest = {key: value for key, value in loaded.items() if key not in ("model", "optimizer", "step")}
    model = {name: _entry(value) for name, value in loaded["model"].items()}
    try:
        state, groups = _named(path, model, loaded["optimizer"])
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise CheckpointError(
            f'{path}: expected "optimizer" to be the state dict of torch.optim.Adamax ({type(error).__name__}: {error})'
        ) from error
    return Bundle(
        model,
        state,
        groups,
        # What programs store beside model and optimizer (a scheduler, an epoch) is not lost.
        extra=rest.get("extra") if set(rest) <= {"extra"} else rest,
        step=step if type(step) is int else None,
    )


def _check_records(path: Path, meter: Meter) -> None:
    """Read the whole archive once: zipfile compares each record with its CRC-32."""
    try:
        with zipfile.ZipFile(path) as archive:
            meter.expect(sum(info.file_size for info in archive.infolist()))
            for info in archive.infolist():
                with archive.open(info) as record:
                    while block := record.read(_BLOCK_BYTES):
                        meter.advance(len(block))
                if info.filename.endswith("/byteorder") and archive.read(info) != sys.byteorder.encode():
                    raise CheckpointError(f"{path} was written on a machine of another byte order: save it again here")
    except CheckpointError:
        raise
    except Exception as error:  # a damaged archive can fail in any way
        raise CheckpointDamagedError(f"{path} is damaged: {error}: use another file") from error


def _entry(value: Any) -> StoredPieces | Any:
    return _mapped(value) if isinstance(value, Tensor) else value


def _mapped(tensor: Tensor) -> StoredPieces:
    """Return a memory-mapped tensor as pieces whose memory is given back after each."""
    is_plain = type(tensor) in (Tensor, torch.nn.Parameter) and tensor.device.type == "cpu"
    if not is_plain or tensor.layout != torch.strided or tensor.is_quantized:
        raise CheckpointError(
            f"expected plain tensors, got a {type(tensor).__name__} with {tensor.layout}, {tensor.dtype} and device "
            f"{tensor.device}"
        )
    shape = tuple(tensor.shape)

    def read(box: Box) -> Tensor:
        piece = tensor.detach()
        for dim, (start, numel) in enumerate(zip(*box, strict=True)):
            piece = piece.narrow(dim, start, numel)
        copy = piece.clone(memory_format=torch.contiguous_format)
        if piece.is_contiguous():
            _forget(piece.data_ptr(), piece.nbytes)
        return copy

    return StoredPieces(shape, tensor.dtype, cut(shape, tensor.dtype), read)


def _forget(address: int, num_bytes: int) -> None:
    """Let go of the whole pages of a mapped range: they can be read again from the file, and are not needed again."""
    start = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
    stop = (address + num_bytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if start < stop:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), mmap.MADV_DONTNEED)


def _named(
    path: Path, model: dict[str, StoredPieces | Any], optimizer: dict[str, Any]
) -> tuple[dict[str, dict[str, StoredPieces]], list[dict[str, Any]]]:
    """Return state and groups of a plain optimizer state dict by parameter name."""
    groups = [dict(group) for group in optimizer["param_groups"]]
    ids = [list(group.pop("params")) for group in groups]
    state = {
        index: {key: _state_entry(value) for key, value in entry.items()} for index, entry in optimizer["state"].items()
    }
    for group, group_ids in zip(groups, ids, strict=True):
        if "param_names" not in group:
            if len(groups) > 1:
                raise CheckpointError(
                    f"{path}: the optimizer has {len(groups)} groups and no param_names, so nothing says which "
                    "parameter is which: build it from named_parameters() and save again"
                )
            group["param_names"] = _guess_names(path, model, [state.get(index) for index in group_ids])
        if len(group["param_names"]) != len(group_ids):
            raise CheckpointError(
                f"{path}: a group has {len(group_ids)} parameters and {len(group['param_names'])} param_names"
            )
    names = {
        index: name
        for group, group_ids in zip(groups, ids, strict=True)
        for index, name in zip(group_ids, group["param_names"], strict=True)
    }
    unknown = [index for index in state if index not in names]
    if unknown:
        raise CheckpointError(f"{path}: the optimizer has a state of parameter {unknown[0]}, which is in no group")
    return {names[index]: entry for index, entry in state.items()}, groups


def _state_entry(value: Any) -> StoredPieces:
    # Before torch 1.12 steps were numbers.
    return _mapped(value) if isinstance(value, Tensor) else in_memory(torch.tensor(float(value), dtype=torch.float32))


def _guess_names(
    path: Path, model: dict[str, StoredPieces | Any], states: list[dict[str, StoredPieces] | None]
) -> list[str]:
    """Name the parameters of an optimizer that was given ``model.parameters()``: they are in the model's order.

    Buffers are among the model's entries and are not told apart by anything but their shape. So the names are accepted
    only if there is one way to find the parameters, by shape, in the order of the model's entries: the earliest places
    are then the latest places, too.
    """
    entries = [(name, entry.shape) for name, entry in model.items() if isinstance(entry, StoredPieces)]
    shapes = [None if state is None or "exp_avg" not in state else state["exp_avg"].shape for state in states]
    earliest = _match(entries, shapes)
    latest = _match(entries[::-1], shapes[::-1])
    if earliest is None or latest is None or earliest != latest[::-1]:
        ways = "no way" if earliest is None else "more than one way"
        raise CheckpointError(
            f"{path}: the optimizer has no param_names, and its {len(shapes)} states fit the model's {len(entries)} "
            f"tensors in {ways}: build it from named_parameters() and save again"
        )
    return earliest


def _match(entries: list[tuple[str, tuple[int, ...]]], shapes: list[tuple[int, ...] | None]) -> list[str] | None:
    """Find each shape in turn at the earliest entry that has it; None (no gradient yet) fits any entry."""
    found = []
    remaining = iter(entries)
    for shape in shapes:
        name = next((name for name, candidate in remaining if shape is None or candidate == shape), None)
        if name is None:
            return None
        found.append(name)
    return found
