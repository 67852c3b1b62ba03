"""torch.distributed.checkpoint's own metadata: written for other programs, read from them without running their code.

[Note: safe]  The file ``.metadata`` is a pickle. Unpickling a stranger's file runs whatever it says, so it is read by
an unpickler that knows the handful of record types of torch.distributed.checkpoint and nothing else. Our own
checkpoints are read from their manifest; their ``.metadata`` is never opened.
"""

from __future__ import annotations

import collections
import io
import pathlib
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import filesystem, metadata

from sharded_adamax.checkpoint.errors import CheckpointDamagedError, CheckpointError
from sharded_adamax.checkpoint.manifest import Chunk, Manifest, Record, StoredTensor

METADATA_NAME = ".metadata"

_ALLOWED: dict[tuple[str, str], Any] = {
    **{
        (metadata.__name__, name): getattr(metadata, name)
        for name in (
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        )
    },
    (filesystem.__name__, "_StorageInfo"): filesystem._StorageInfo,
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("pathlib", "PosixPath"): pathlib.PurePosixPath,  # a path that cannot touch the disk
    ("pathlib._local", "PosixPath"): pathlib.PurePosixPath,  # its name from Python 3.13 on
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ALLOWED:
            return _ALLOWED[module, name]
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise CheckpointError(f"the metadata asks for {module}.{name}, which no checkpoint needs: it was not run")


def read_metadata(path: Path) -> tuple[dict[str, StoredTensor], dict[str, Record]]:
    """Return the tensors and the values of a checkpoint that another program wrote.

    Raises:
        CheckpointError: The pickle asks for anything but the records of torch.distributed.checkpoint.
        CheckpointDamagedError: It is no such pickle.
    """
    try:
        found: metadata.Metadata = _Unpickler(io.BytesIO(path.read_bytes())).load()
        records = {
            index: Record(info.relative_path, info.offset, info.length, None)
            for index, info in found.storage_data.items()
        }
        tensors, values = {}, {}
        for name, entry in found.state_dict_metadata.items():
            if isinstance(entry, metadata.TensorStorageMetadata):
                chunks = [
                    Chunk(tuple(c.offsets), tuple(c.sizes), records[metadata.MetadataIndex(name, c.offsets)])
                    for c in entry.chunks
                ]
                tensors[name] = StoredTensor(tuple(entry.size), dtype_name(entry.properties.dtype), tuple(chunks))
            else:
                values[name] = records[metadata.MetadataIndex(name)]
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
