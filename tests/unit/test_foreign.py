"""The metadata that another program pickled: what its names may stand for."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.checkpoint import metadata

from sharded_adamax.checkpoint.errors import CheckpointError
from sharded_adamax.checkpoint.foreign import _Unpickler


class _Attribute:
    """Pickled as Python 3.11.2 pickles members of enumerations: as a call of getattr."""

    def __init__(self, owner: Any, name: str) -> None:
        self._arguments = owner, name

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, self._arguments


def _unpickled(tmp_path: Path, value: object) -> object:
    path = tmp_path / ".metadata"
    path.write_bytes(pickle.dumps(value))
    return _Unpickler(path).load()


def test_getattr_names_a_memory_format(tmp_path: Path) -> None:
    member = _Attribute(metadata._MEM_FORMAT_ENCODING, "TORCH_CONTIGUOUS_FORMAT")
    assert _unpickled(tmp_path, member) == "TORCH_CONTIGUOUS_FORMAT"


@pytest.mark.parametrize("owner", [metadata.TensorProperties, "text"])
def test_getattr_of_anything_else_is_refused(tmp_path: Path, owner: object) -> None:
    with pytest.raises(CheckpointError, match=r"asks for builtins\.getattr, which no checkpoint needs: it was not run"):
        _unpickled(tmp_path, _Attribute(owner, "__class__"))


def test_a_module_cannot_be_reached_through_getattr(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="was not run"):
        _unpickled(tmp_path, _Attribute(os.system, "__call__"))
