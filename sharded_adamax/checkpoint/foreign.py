"""torch.distributed.checkpoint's own metadata: written for other programs, read from them without running their code.

[Note: safe]  The file ``.metadata`` is a pickle. Unpickling a stranger's file runs whatever it says, so it is read by
an unpickler that knows the handful of record types of torch.distributed.checkpoint and nothing else. It gets stand-ins
for them, made for this one file: a pickle can set attributes of the classes that it names, and these are nobody else's.
Our own checkpoints are read from their manifest; their ``.metadata`` is hashed and never unpickled.
"""

from __future__ import annotations

import collections
import io
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import filesystem, metadata

from sharded_adamax.checkpoint.errors import CheckpointDamagedError, CheckpointError
from sharded_adamax.checkpoint.manifest import Chunk, Manifest, Record, StoredTensor, check_places

METADATA_NAME = ".metadata"


class _Plain:
    """Takes the attributes that a pickle gives it."""


class _Properties(_Plain):
    dtype: torch.dtype

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.dtype = state[0]  # the rest is deprecated


class _Index(_Plain):
    fqn: str
    offset: tuple[int, ...] | None = None

    @property
    def place(self) -> tuple[str, tuple[int, ...] | None]:
        return self.fqn, None if self.offset is None else tuple(self.offset)

    def __hash__(self) -> int:
        return hash(self.place)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Index) and other.place == self.place


def _memory_format(value: object) -> object:
    """Stand in for the enumeration of memory formats, which nothing here looks at."""
    return value


def _stand_ins() -> dict[tuple[str, str], Any]:
    """Return what a pickle gets for the names it may use: classes and functions made for this call, and constants."""
    plain = ("BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "StorageMeta", "TensorStorageMetadata")
    return {
        **{(metadata.__name__, name): type(name, (_Plain,), {}) for name in plain},
        (metadata.__name__, "TensorProperties"): type("TensorProperties", (_Properties,), {}),
        (metadata.__name__, "MetadataIndex"): type("MetadataIndex", (_Index,), {}),
        (metadata.__name__, "_MEM_FORMAT_ENCODING"): _memory_format,
        (filesystem.__name__, "_StorageInfo"): type("_StorageInfo", (_Plain,), {}),
        ("torch", "Size"): torch.Size,  # C types like these two cannot be changed
        ("collections", "OrderedDict"): collections.OrderedDict,
        ("torch.serialization", "_get_layout"): lambda name: name,
        ("pathlib", "PosixPath"): lambda *parts: "/".join(parts),
        ("pathlib._local", "PosixPath"): lambda *parts: "/".join(parts),  # its name from Python 3.13 on
    }


class _Unpickler(pickle.Unpickler):
    def __init__(self, path: Path) -> None:
        super().__init__(io.BytesIO(path.read_bytes()))
        self._path = path
        self._allowed = _stand_ins()

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self._allowed:
            return self._allowed[module, name]
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if (module, name) == ("builtins", "getattr"):
            return self._member
        raise self._refusal(f"{module}.{name}")

    def _member(self, owner: object, name: object) -> object:
        """Return a member of an enumeration; Python 3.11.2 pickles it as ``getattr(enumeration, name)``."""
        if owner is not _memory_format:
            raise self._refusal("builtins.getattr")
        return name

    def _refusal(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self._path} asks for {what}, which no checkpoint needs: it was not run")


def read_metadata(path: Path) -> tuple[dict[str, StoredTensor], dict[str, Record]]:
    """Return the tensors and the values of a checkpoint that another program wrote.

    Raises:
        CheckpointError: The pickle asks for anything but the records of torch.distributed.checkpoint.
        CheckpointDamagedError: It is no such pickle.
    """
    try:
        found = _Unpickler(path).load()
        records = {
            index.place: Record(info.relative_path, info.offset, info.length, None)
            for index, info in found.storage_data.items()
        }
        tensors, values = {}, {}
        for name, entry in found.state_dict_metadata.items():
            if hasattr(entry, "chunks"):
                if not isinstance(entry.properties.dtype, torch.dtype):
                    raise TypeError(f"{name} has dtype {entry.properties.dtype!r}")
                chunks = [
                    Chunk(tuple(c.offsets), tuple(c.sizes), records[name, tuple(c.offsets)]) for c in entry.chunks
                ]
                tensors[name] = StoredTensor(tuple(entry.size), dtype_name(entry.properties.dtype), tuple(chunks))
            else:
                values[name] = records[name, None]
        check_places(tensors, values)
    except CheckpointError:
        raise
    except Exception as error:  # a damaged pickle can fail in any way
        raise CheckpointDamagedError(f"{path} is damaged ({type(error).__name__}: {error})") from error
    return tensors, values


def metadata_bytes(written: metadata.Metadata, manifest: Manifest) -> bytes:
    """Return the file ``.metadata`` that makes a checkpoint readable to torch.distributed.checkpoint.

    Args:
        written: The planner's; completed with where the records are.
    """
    storage = {
        metadata.MetadataIndex(name, torch.Size(chunk.offsets)): _storage_info(chunk.record)
        for name, tensor in manifest.tensors.items()
        for chunk in tensor.chunks
    }
    storage |= {metadata.MetadataIndex(name): _storage_info(record) for name, record in manifest.values.items()}
    written.storage_data = storage
    written.storage_meta = metadata.StorageMeta(save_id=manifest.save_id)
    written.version = filesystem.CURRENT_DCP_VERSION
    return pickle.dumps(written)


def dcp_metadata(tensors: dict[str, StoredTensor], values: dict[str, Record]) -> metadata.Metadata:
    """Return what torch.distributed.checkpoint's planner needs to know to plan a load."""
    entries: dict[str, Any] = {name: metadata.BytesStorageMetadata() for name in values}
    storage: dict[metadata.MetadataIndex, Record] = {
        metadata.MetadataIndex(name): record for name, record in values.items()
    }
    for name, tensor in tensors.items():
        entries[name] = metadata.TensorStorageMetadata(
            metadata.TensorProperties(dtype=dtype_of(tensor.dtype)),
            torch.Size(tensor.shape),
            [
                metadata.ChunkStorageMetadata(torch.Size(chunk.offsets), torch.Size(chunk.sizes))
                for chunk in tensor.chunks
            ],
        )
        for chunk in tensor.chunks:
            storage[metadata.MetadataIndex(name, torch.Size(chunk.offsets))] = chunk.record
    return metadata.Metadata(entries, storage_data=storage)


def dtype_name(dtype: torch.dtype) -> str:
    """Return "float32" for torch.float32."""
    return str(dtype).removeprefix("torch.")


def dtype_of(name: str) -> torch.dtype:
    """Return torch.float32 for "float32"."""
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise CheckpointError(f"expected the name of a torch dtype, got {name!r}")
    return dtype


def _storage_info(record: Record) -> filesystem._StorageInfo:
    return filesystem._StorageInfo(record.file, record.offset, record.length)
