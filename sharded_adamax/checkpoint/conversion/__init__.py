"""From one file format to another, in bounded memory: checkpoint directories, torch.save files, safetensors files.

[Note: conversion]  A source is read as a `Bundle`: what a job holds, by parameter name, its tensors not yet read. A
target is written from a bundle piece by piece, so memory is bounded by a few copies of one stored piece (files are read
in pieces of `CHUNK_BYTES`), and by ``extra``, which is held whole. Whatever is read is verified as it passes; a target
appears under its name only when it is whole and durable.

=============  =====================================================================================================
directory      a checkpoint of `sharded_adamax.save`; if asked for also one of torch.distributed.checkpoint with the
               same keys, which has no manifest and no checksums
torch          ``torch.save`` of ``{"model": state_dict, "optimizer": state dict of torch.optim.Adamax, "extra": ...}``,
               with ``"step"`` if known. Read with ``weights_only=True``, its CRC-32s checked
safetensors    tensors ``model.<name>`` and ``optim.state.<name>.exp_avg``; the rest as JSON in the header
=============  =====================================================================================================

Order: the ids in a torch file number the parameters in the order of ``optim.param_groups`` at the time of the save;
each group lists its ``param_names``. Checkpoints store hyper-parameters per parameter, so adjacent groups with equal
hyper-parameters come back as one group; ids are the same. The states of random number generators belong to the ranks
of a job and are not converted.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

from sharded_adamax.checkpoint.conversion import directories, safetensors_file, torch_file
from sharded_adamax.checkpoint.conversion.bundle import Bundle, refuse_existing
from sharded_adamax.checkpoint.errors import CheckpointError
from sharded_adamax.checkpoint.inspection import Meter

Target = Literal["torch", "safetensors", "sharded"]

_WRITERS: dict[str, Callable[[Bundle, Path, Meter], None]] = {
    "torch": torch_file.write,
    "safetensors": safetensors_file.write,
    "sharded": directories.write,
}


def convert(
    source: Path,
    target: Path,
    to: Target,
    *,
    without_manifest: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[str, ...]:
    """Write what ``source`` holds to ``target``, which must not exist, in another format.

    Args:
        source: A checkpoint directory, a torch file or a safetensors file.
        target: The new file or, for "sharded", directory.
        to: See [Note: conversion].
        without_manifest: Also read a checkpoint directory of another program, which nothing says is whole.
        progress: Called with the bytes done so far and in all.

    Returns:
        The names of entries of ``source`` that have no place in ``target``.

    Raises:
        FileExistsError: ``target`` exists.
        FileNotFoundError: ``source`` does not.
        CheckpointDamagedError: Names the damaged file of ``source``. There is nothing at ``target``.
        CheckpointError: ``source`` is no checkpoint of a model and torch.optim.Adamax, or the disk refused.
    """
    refuse_existing(target)
    meter = Meter(progress)
    bundle = _read(source, meter, without_manifest)
    bundle.check(source)
    meter.expect(bundle.total_bytes)
    _WRITERS[to](bundle, target, meter)
    return bundle.left_out


def _read(source: Path, meter: Meter, without_manifest: bool) -> Bundle:
    if source.is_dir():
        return directories.read(source, without_manifest=without_manifest)
    with open(source, "rb") as file:
        head = file.read(9)
    if head.startswith(b"PK"):
        return torch_file.read(source, meter)
    if head.endswith(b"{") and len(head) == 9:  # the length of the header, 8 bytes, and the header
        return safetensors_file.read(source)
    raise CheckpointError(
        f"{source} is neither a checkpoint directory nor a torch.save or safetensors file. If an old torch release "
        "wrote it, load it and save it again"
    )
