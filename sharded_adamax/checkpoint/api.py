"""`save` and `load`: one call each for everything a resume needs."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.optim import Optimizer

from sharded_adamax import agreement
from sharded_adamax.agreement import RemoteError
from sharded_adamax.checkpoint import contents, reading
from sharded_adamax.checkpoint.directory import Header, Opened, Save, open_checkpoint, start
from sharded_adamax.checkpoint.errors import CheckpointDamagedError, CheckpointError
from sharded_adamax.collectives import ControlPlane, control_plane
from sharded_adamax.wrappers import unwrapped

# All saves of this process belong to one run; that of the first rank counts.
_RUN_ID = uuid.uuid4().hex


def save(
    path: str | os.PathLike[str],
    model: nn.Module,
    optimizer: Optimizer,
    *,
    extra: Any = None,
    step: int | None = None,
) -> None:
    """Write model, optimizer state and ``extra`` to a new directory. Collective: every rank of the job calls it.

    Each rank writes its shard of the state and its part of the model; the checkpoint exists whole or not at all. The
    files are those of torch.distributed.checkpoint, with a manifest of checksums beside them.

    Args:
        path: Must not exist; its parents are made.
        optimizer: Also one that Accelerate, Fabric or Lightning has wrapped.
        extra: Anything that ``torch.load(weights_only=True)`` reads: numbers, strings, lists, dicts, tensors. That of
            the first rank is kept.
        step: For the manifest.

    Raises:
        FileExistsError: There is something at ``path`` already.
        ValueError: ``extra`` holds other objects.
        CheckpointError: The disk refused. Like the others, on every rank, and nothing is at ``path``.
    """
    control = control_plane(None)
    finish(control, begin(control, Path(path), model, optimizer, extra=extra, step=step, snapshot=False))


def begin(
    control: ControlPlane,
    final: Path,
    model: nn.Module,
    optimizer: Optimizer,
    *,
    extra: Any,
    step: int | None,
    snapshot: bool,
    metric: float | None = None,
) -> Save:
    """Decide who writes what. Collective. With ``snapshot`` the tensors may change afterwards."""
    optimizer = unwrapped(optimizer)
    state = contents.collect(model, optimizer)

    def serialise() -> None:
        state[contents.RNG] = {str(control.rank): contents.to_bytes(contents.rng_state())}
        if control.rank == 0:
            state[contents.EXTRA] = contents.to_bytes(extra)

    agreement.run_together(control, serialise, f"saving {final}")
    layout = getattr(optimizer, "layout", None)
    header = Header(_RUN_ID, step, metric, None if layout is None else layout.digest())
    return start(control, final, state, header, snapshot=snapshot)


def finish(control: ControlPlane, saving: Save) -> None:
    """Write and commit in the foreground. Collective."""
    doing = f"saving {saving.final}"
    try:
        raise_together(control, _error_of(saving.write), doing)
        raise_together(control, _error_of(saving.commit) if control.rank == 0 else None, doing)
    except BaseException:
        if control.rank == 0:
            saving.abandon()
        raise


def raise_together(control: ControlPlane, error: Exception | None, doing: str) -> None:
    """`agreement.raise_together`, where a rank may have died: its peers are told what that means. Collective."""
    try:
        agreement.raise_together(control, error, doing)
    except Exception as raised:
        if raised is error or isinstance(raised, RemoteError):
            raise
        raise CheckpointError(
            f"lost contact with another rank while {doing}: it died or hangs. Earlier checkpoints are untouched; start "
            f"the job again ({raised})"
        ) from raised


def _error_of(action: Callable[[], None]) -> Exception | None:
    try:
        action()
    except Exception as error:
        return error
    return None


def load(
    path: str | os.PathLike[str],
    model: nn.Module,
    optimizer: Optimizer,
    *,
    verify: bool = True,
    restore_rng: bool = False,
) -> Any:
    """Read a checkpoint of any world size into model and optimizer, in place. Collective.

    Every rank reads the model and its own shard of the state, and verifies what it reads. What no rank needs is shared
    out between them and verified, too: every byte of the checkpoint is looked at.

    Args:
        verify: False skips the checksums, and accepts checkpoints that another program wrote with
            torch.distributed.checkpoint, which have none.
        restore_rng: Set the random number generators (torch, CUDA, random, numpy) to where this rank left them; where
            the world size is another one, they stay as they are.

    Returns:
        What was given to `save` as ``extra``; None where the checkpoint has none.

    Raises:
        FileNotFoundError: There is nothing at ``path``.
        CheckpointError: The model is another one: names the key, shape or dtype. Nothing was changed.
        CheckpointDamagedError: Names the damaged file. If a checksum was wrong, tensors may have been overwritten:
            load another
            checkpoint before training on. All of these on every rank.
    """
    control = control_plane(None)
    return load_with(control, Path(path), model, optimizer, verify=verify, restore_rng=restore_rng)


def load_with(
    control: ControlPlane,
    path: Path,
    model: nn.Module,
    optimizer: Optimizer,
    *,
    verify: bool,
    restore_rng: bool,
) -> Any:
    """`load` with a given control plane."""
    optimizer = unwrapped(optimizer)
    opened: list[Opened] = []
    agreement.run_together(control, lambda: opened.append(open_checkpoint(path, verify=verify)), f"opening {path}")
    _same_checkpoint(control, opened[0])
    metadata = opened[0].metadata
    state = contents.collect(model, optimizer)
    contents.forgo_masters(state, metadata.state_dict_metadata)
    rng_name = f"{contents.RNG}.{control.rank}"
    wanted = [contents.EXTRA]
    if restore_rng and opened[0].manifest is not None and opened[0].manifest.world_size == control.size:
        wanted.append(rng_name)
    objects: dict[str, Any] = {}

    def read() -> None:
        for name in wanted:
            # Other programs may have neither, or use the name for something else.
            if isinstance(metadata.state_dict_metadata.get(name), TensorStorageMetadata):
                objects[name] = _object(path, reading.read_tensor(path, metadata, name, verify=verify), name)
        reading.read_into(path, metadata, state, verify=verify)
        if verify:
            rest = {**state, contents.EXTRA: None}
            reading.verify_unread(path, metadata, rest, rank=control.rank, world_size=control.size)

    agreement.run_together(control, read, f"reading {path}")
    contents.put_back(model, optimizer, state)
    if rng_name in objects:
        contents.set_rng_state(objects[rng_name])
    return objects.get(contents.EXTRA)


def _object(path: Path, data: Tensor, name: str) -> Any:
    try:
        return contents.from_bytes(data)
    except Exception as error:  # what is no pickle can fail in any way
        raise CheckpointDamagedError(
            f"{path}: {name} is damaged, or cannot be read without running code ({type(error).__name__}): use another "
            "checkpoint"
        ) from error


def _same_checkpoint(control: ControlPlane, opened: Opened) -> None:
    """Different directories behind one path (a disk that is not shared) would give each rank another state."""
    save_id = "none" if opened.manifest is None else opened.manifest.save_id
    agreement.compare(control, [f"{opened.directory} of save {save_id}"], "the checkpoints")
