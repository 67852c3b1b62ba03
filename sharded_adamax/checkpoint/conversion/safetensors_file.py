"""Bundles from and to safetensors files, which run nothing when they are read.

[Note: safetensors file]  8 bytes length of the header, the header, the tensors' bytes. The header is JSON: for each
tensor its dtype, shape and place, and under ``__metadata__`` strings: ``format`` is "pt"; ``sharded_adamax`` is JSON
with the groups, the step, ``extra`` where JSON can hold it exactly (else there is a uint8 tensor ``extra``, which
``torch.load(weights_only=True)`` reads), and a CRC-32 for each tensor; ``sha256`` is that of the header with zeros in
its place.

The safetensors library writes from memory only, so the file is written here, tensor by tensor.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import zlib
from base64 import b64decode, b64encode
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from sharded_adamax.checkpoint import contents
from sharded_adamax.checkpoint.conversion.bundle import (
    Bundle,
    StoredPieces,
    cut,
    flat_range,
    in_memory,
    new_file,
    write_pieces,
)
from sharded_adamax.checkpoint.errors import CheckpointDamagedError, CheckpointError
from sharded_adamax.checkpoint.inspection import Meter
from sharded_adamax.ranges import Box, Range

_VERSION = 1
_MAX_HEADER_BYTES = 100_000_000  # the library's own limit
_OURS = "sharded_adamax"
_NO_SHA256 = "0" * 64
_NO_CRC32 = "0" * 8
_BLOCK_BYTES = 1 << 20

_DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def write(bundle: Bundle, final: Path, meter: Meter) -> None:
    """Write a safetensors file.

    Raises:
        CheckpointError: The disk refused, or a dtype that the format lacks; nothing is at ``final``.
    """
    tensors = bundle.tensors()
    ours: dict[str, Any] = {
        "version": _VERSION,
        "step": bundle.step,
        "param_groups": [to_json(group, pickles=True) for group in bundle.groups],
        "model_values": {
            name: to_json(entry, pickles=True)
            for name, entry in bundle.model.items()
            if not isinstance(entry, StoredPieces)
        },
    }
    try:
        ours["extra"] = to_json(bundle.extra, pickles=False)
    except TypeError:
        tensors[contents.EXTRA] = in_memory(contents.to_bytes(bundle.extra))
    crc32s = dict.fromkeys(tensors, _NO_CRC32)
    with new_file(final) as file:
        # Checksums are known when the tensors have passed; their length is fixed, so the header is written twice.
        header = _header(final, tensors, {**ours, "crc32": crc32s})
        file.write(header)
        for name in _in_file_order(tensors):
            crc32s[name] = _write_tensor(file, tensors[name], meter)
        checked = _header(final, tensors, {**ours, "crc32": crc32s})
        assert len(checked) == len(header)
        file.seek(0)
        file.write(checked)


def _in_file_order(tensors: dict[str, StoredPieces]) -> list[str]:
    """Large elements first: then all are aligned."""
    return sorted(tensors, key=lambda name: -tensors[name].dtype.itemsize)


def _write_tensor(file: BinaryIO, tensor: StoredPieces, meter: Meter) -> str:
    crc32 = 0

    def write(data: memoryview) -> None:
        nonlocal crc32
        crc32 = zlib.crc32(data, crc32)
        file.write(data)

    write_pieces(tensor, write, meter)
    return f"{crc32:08x}"


def _header(final: Path, tensors: dict[str, StoredPieces], ours: dict[str, Any]) -> bytes:
    """Return the file's first bytes, up to the first tensor."""
    places = {}
    start = 0
    for name in _in_file_order(tensors):
        places[name] = [start, start + tensors[name].nbytes]
        start += tensors[name].nbytes
    entries: dict[str, Any] = {"__metadata__": {"format": "pt", _OURS: json.dumps(ours), "sha256": _NO_SHA256}}
    for name, tensor in tensors.items():
        if tensor.dtype not in _NAMES:
            raise CheckpointError(f"{final}: {name} has {tensor.dtype}, which safetensors files cannot hold")
        entries[name] = {"dtype": _NAMES[tensor.dtype], "shape": tensor.shape, "data_offsets": places[name]}
    entries["__metadata__"]["sha256"] = hashlib.sha256(_padded(entries)).hexdigest()
    data = _padded(entries)
    return len(data).to_bytes(8, "little") + data


def _padded(entries: dict[str, Any]) -> bytes:
    data = json.dumps(entries, separators=(",", ":")).encode()
    return data + b" " * (-len(data) % 8)


def read(path: Path) -> Bundle:
    """Return what a file that `write` wrote holds; its tensors stay in the file.

    Raises:
        CheckpointDamagedError: The header is not what was written, or a tensor is not, when it is read.
        CheckpointError: Another program wrote it.
    """
    try:
        entries, ours, data_start = _read_header(path)
        tensors = {
            name: _pieces(path, name, entry, data_start, ours["crc32"][name])
            for name, entry in entries.items()
            if name != "__metadata__"
        }
        model: dict[str, StoredPieces | Any] = {
            name.removeprefix("model."): tensor for name, tensor in tensors.items() if name.startswith("model.")
        }
        model |= {name: from_json(value) for name, value in ours["model_values"].items()}
        state: dict[str, dict[str, StoredPieces]] = {}
        for key in tensors:
            if key.startswith("optim.state."):
                name, _, kind = key.removeprefix("optim.state.").rpartition(".")
                state.setdefault(name, {})[kind] = tensors[key]
        groups = [from_json(group) for group in ours["param_groups"]]
        if contents.EXTRA in tensors:
            extra = contents.from_bytes(torch.cat(list(tensors[contents.EXTRA].in_order())))
        else:
            extra = from_json(ours["extra"])
        bundle = Bundle(model, state, groups, extra, ours["step"])
        bundle.param_names()
        return bundle
    except CheckpointError:
        raise
    except Exception as error:  # its checksum does not tell who wrote the header
        raise CheckpointDamagedError(
            f"{path} is damaged: its header is not as expected ({type(error).__name__}: {error})"
        ) from error


def _read_header(path: Path) -> tuple[dict[str, Any], dict[str, Any], int]:
    """Return the entries, our metadata, and where the tensors start."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > min(_MAX_HEADER_BYTES, size - 8):
            raise CheckpointDamagedError(f"{path} is damaged: a header of {length} bytes in a file of {size}")
        data = file.read(length)
    try:
        entries = json.loads(data)
        metadata = entries.get("__metadata__", {})
    except (ValueError, AttributeError) as error:
        raise CheckpointDamagedError(f"{path} is damaged: its header is not JSON ({error})") from error
    if _OURS not in metadata:
        raise CheckpointError(
            f"{path} has no optimizer state that sharded_adamax knows: expected a file that `convert --to safetensors` "
            f"wrote, got one with the tensors {', '.join([name for name in entries if name != '__metadata__'][:3])}"
        )
    expected = str(metadata.get("sha256"))
    if hashlib.sha256(data.replace(expected.encode(), _NO_SHA256.encode(), 1)).hexdigest() != expected:
        raise CheckpointDamagedError(f"{path} is damaged: its header is not the one that was written: use another file")
    ends = [entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__"]
    if size != 8 + length + max(ends, default=0):
        raise CheckpointDamagedError(
            f"{path} has {size} bytes, expected {8 + length + max(ends, default=0)}: it was cut, use another file"
        )
    ours = json.loads(metadata[_OURS])
    if ours["version"] > _VERSION:
        raise CheckpointError(f"{path} has version {ours['version']}, this release reads up to {_VERSION}: upgrade")
    return entries, ours, 8 + length


def _pieces(path: Path, name: str, entry: dict[str, Any], data_start: int, crc32: str) -> StoredPieces:
    shape, dtype = tuple(entry["shape"]), _DTYPES[entry["dtype"]]
    first, last = entry["data_offsets"]
    if first < 0 or any(extent < 0 for extent in shape):
        raise ValueError(f"{name} has a place or a shape below zero")
    if last - first != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{name} has {last - first} bytes")
    is_checked = False

    def read(box: Box) -> Tensor:
        nonlocal is_checked
        if not is_checked:
            _check_crc32(path, name, data_start + first, last - first, crc32)
            is_checked = True
        place = flat_range(shape, box)
        assert place is not None  # `cut` makes no others
        if place.numel == 0:
            return torch.empty(box.sizes, dtype=dtype)
        data = _read_bytes(path, data_start + first, place, dtype.itemsize)
        return torch.frombuffer(data, dtype=dtype).view(box.sizes)

    return StoredPieces(shape, dtype, cut(shape, dtype), read)


def _read_bytes(path: Path, start: int, place: Range, itemsize: int) -> bytearray:
    data = bytearray(place.numel * itemsize)
    try:
        with open(path, "rb") as file:
            file.seek(start + place.start * itemsize)
            got = file.readinto(data)
    except OSError as error:
        raise CheckpointDamagedError(f"{path} cannot be read: {error}") from error
    if got != len(data):
        raise CheckpointDamagedError(f"{path} is cut short: use another file")
    return data


def _check_crc32(path: Path, name: str, start: int, num_bytes: int, expected: str) -> None:
    """Read a tensor once before any piece of it is used: its checksum is one for all pieces."""
    crc32 = 0
    for block in range(0, num_bytes, _BLOCK_BYTES):
        crc32 = zlib.crc32(_read_bytes(path, start, Range(block, min(block + _BLOCK_BYTES, num_bytes)), 1), crc32)
    if f"{crc32:08x}" != expected:
        raise CheckpointDamagedError(f"{path} is damaged: the bytes of {name} are not those that were written")


# JSON that gives back exactly what it was given: tuples as {"tuple": [...]}, anything else that JSON lacks as a pickle
# that torch.load(weights_only=True) reads.
_TUPLE, _PICKLED = "tuple", "torch.save"


def to_json(value: Any, *, pickles: bool) -> Any:
    """Return what JSON can hold and `from_json` gives back.

    Raises:
        TypeError: That would need a pickle, and ``pickles`` is False.
    """
    if value is None or type(value) in (bool, int, float, str):
        return value
    if type(value) is list:
        return [to_json(item, pickles=pickles) for item in value]
    if type(value) is tuple:
        return {_TUPLE: [to_json(item, pickles=pickles) for item in value]}
    if type(value) is dict and all(type(key) is str for key in value) and not value.keys() & {_TUPLE, _PICKLED}:
        return {key: to_json(item, pickles=pickles) for key, item in value.items()}
    if not pickles:
        raise TypeError(f"JSON cannot hold a {type(value).__name__}")
    data = io.BytesIO()
    torch.save(value, data)
    return {_PICKLED: b64encode(data.getvalue()).decode()}


def from_json(value: Any) -> Any:
    """Return what `to_json` was given."""
    if isinstance(value, list):
        return [from_json(item) for item in value]
    if not isinstance(value, dict):
        return value
    if value.keys() == {_TUPLE}:
        return tuple(from_json(item) for item in value[_TUPLE])
    if value.keys() == {_PICKLED}:
        return torch.load(io.BytesIO(b64decode(value[_PICKLED])), map_location="cpu", weights_only=True)
    return {key: from_json(item) for key, item in value.items()}
