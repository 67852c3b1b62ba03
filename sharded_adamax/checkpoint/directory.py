"""A checkpoint is one directory, written by all ranks together: there whole, or not there.

[Note: how a directory comes to be]  All ranks write into a hidden directory beside the final one; when the last file
is there the first rank renames it. A crash leaves at most a hidden directory, which the next save to the same path
removes.
"""

from __future__ import annotations

import io
import os
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from torch.optim import Optimizer

from sharded_adamax import agreement
from sharded_adamax.collectives import control_plane

# One key per parameter and state, not one per parameter number: numbers change when a model is edited, names do not.
_OPTIONS = StateDictOptions(flatten_optimizer_state_dict=True)
_EXTRA = "extra"


def save(path: str | os.PathLike[str], model: nn.Module, optimizer: Optimizer, *, extra: Any = None) -> None:
    """Write model, optimizer state and ``extra`` to a new directory. Collective: every rank of the job calls it.

    Each rank writes its shard of the state and its part of the model. The files are those of
    torch.distributed.checkpoint, with keys ``model.<name>``, ``optim.state.<name>.exp_avg`` and so on.

    Args:
        path: Must not exist; its parents are made.
        extra: Anything that ``torch.load(weights_only=True)`` reads: numbers, strings, lists, dicts, tensors. That of
            the
            first rank is kept.

    Raises:
        FileExistsError: On every rank: there is something at ``path`` already.
        ValueError: On every rank: ``extra`` holds other objects.
    """
    control = control_plane(None)
    final = Path(path)
    temporary = final.with_name(f".{final.name}.incomplete")
    tensors: dict[str, Any] = {}

    def prepare() -> None:
        if control.rank == 0:
            if final.exists():
                raise FileExistsError(f"{final} exists: a checkpoint is never overwritten, save to a new path")
            tensors[_EXTRA] = _to_bytes(extra)
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)

    agreement.run_together(control, prepare, f"preparing {final}")
    tensors["model"] = get_model_state_dict(model)
    tensors["optim"] = _without_param_names(get_optimizer_state_dict(model, optimizer, options=_OPTIONS))
    dcp_save(tensors, checkpoint_id=temporary, no_dist=not dist.is_initialized())

    def publish() -> None:
        if control.rank == 0:
            temporary.rename(final)

    agreement.run_together(control, publish, f"publishing {final}")


def load(path: str | os.PathLike[str], model: nn.Module, optimizer: Optimizer) -> Any:
    """Read a checkpoint of any world size into model and optimizer, in place. Collective.

    Returns:
        What was given to `save` as ``extra``.

    Raises:
        FileNotFoundError: On every rank: there is no complete checkpoint at ``path``.
    """
    control = control_plane(None)
    directory = Path(path)

    def check() -> None:
        if not (directory / ".metadata").is_file():
            raise FileNotFoundError(f"rank {control.rank} finds no complete checkpoint at {directory}")

    agreement.run_together(control, check, f"opening {directory}")
    reader = FileSystemReader(directory)
    extra_metadata = reader.read_metadata().state_dict_metadata[_EXTRA]
    extra = torch.empty(extra_metadata.size, dtype=torch.uint8)  # type: ignore[union-attr]
    model_state = get_model_state_dict(model)
    # These are the live tensors: torch.distributed.checkpoint reads straight into the shards.
    optimizer_state: dict[str, Any] = get_optimizer_state_dict(model, optimizer, options=_OPTIONS)
    param_names = {key: value for key, value in optimizer_state.items() if _is_param_names(key)}
    tensors: dict[str, Any] = {"model": model_state, "optim": _without_param_names(optimizer_state), _EXTRA: extra}
    dcp_load(tensors, storage_reader=reader, no_dist=not dist.is_initialized())
    set_model_state_dict(model, model_state)
    set_optimizer_state_dict(model, optimizer, {**tensors["optim"], **param_names}, options=_OPTIONS)
    return _from_bytes(extra)


def _is_param_names(key: str) -> bool:
    return key.startswith("param_groups.") and key.endswith(".param_names")


def _without_param_names(state: dict[str, Any]) -> dict[str, Any]:
    # torch would repeat the names of a whole group under every parameter, and other programs' files do not have them.
    return {key: value for key, value in state.items() if not _is_param_names(key)}


def _to_bytes(extra: Any) -> Tensor:
    """Serialise to a uint8 tensor. As a tensor it is read back without torch.distributed.checkpoint unpickling it."""
    file = io.BytesIO()
    torch.save(extra, file)
    data = torch.frombuffer(bytearray(file.getbuffer()), dtype=torch.uint8)
    try:
        _from_bytes(data)
    except Exception as error:
        raise ValueError(
            "extra holds objects that torch.load(weights_only=True) refuses: keep numbers, strings, lists, dicts and "
            f"tensors in it, for example the state_dict() of a scheduler ({error})"
        ) from error
    return data


def _from_bytes(data: Tensor) -> Any:
    return torch.load(io.BytesIO(data.numpy().tobytes()), map_location="cpu", weights_only=True)
