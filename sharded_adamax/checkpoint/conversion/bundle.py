"""What every format holds: model, optimizer state by parameter name, groups in their order, extra; tensors unread.

[Note: piece]  A `StoredPieces` is a tensor that is still in a file, in boxes. Each is read when asked for.
"""

from __future__ import annotations

import ctypes
import errno
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from sharded_adamax.checkpoint import disk
from sharded_adamax.checkpoint.errors import CheckpointError
from sharded_adamax.checkpoint.inspection import Meter
from sharded_adamax.ranges import Box, Range
from sharded_adamax.state import STATE_KEYS, FlatShard


@dataclass(frozen=True)
class StoredPieces:
    """A tensor in pieces: which there are, and how to read one."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    boxes: tuple[Box, ...]  # cover the tensor exactly
    read: Callable[[Box], Tensor]  # one of ``boxes`` -> a new tensor of its sizes

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def in_order(self) -> Iterator[Tensor]:
        """Read the tensor as pieces that follow each other in its flattened form."""
        ranges = {box: flat_range(self.shape, box) for box in self.boxes}
        if None not in ranges.values():
            for box in sorted(self.boxes, key=lambda box: ranges[box] or Range(0, 0)):
                yield self.read(box)
            return
        # Sharded along an inner dimension: rows of different pieces alternate, so the tensor is put together first.
        whole = torch.empty(self.shape, dtype=self.dtype)
        for box in self.boxes:
            place = tuple(slice(start, start + size) for start, size in zip(*box, strict=True))
            whole[place] = self.read(box)
        yield whole


def flat_range(shape: tuple[int, ...], box: Box) -> Range | None:
    """Return the elements of the flattened tensor that a box holds; None if they are not one range.

    Example: of shape (3, 4), the box at (1, 0) of sizes (2, 4) is Range(4, 12); the one at (0, 0) of sizes (2, 2) is
        none.
    """
    if box.numel == 0:
        return Range(0, 0)
    # Dimensions before the first that is longer than 1 select; those after it must be whole.
    first = next((dim for dim, size in enumerate(box.sizes) if size > 1), len(shape))
    if box.sizes[first + 1 :] != shape[first + 1 :]:
        return None
    start = 0
    for offset, extent in zip(box.offsets, shape, strict=True):
        start = start * extent + offset
    return Range(start, start + box.numel)


def cut(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Box, ...]:
    """Return the boxes in which a whole state of this shape is stored."""
    numel = math.prod(shape)
    whole = FlatShard(torch.empty(numel, dtype=dtype, device="meta"), shape, Range(0, numel))
    return tuple(box for box, _ in whole.chunks.values())


def zeros(shape: tuple[int, ...], dtype: torch.dtype) -> StoredPieces:
    """Return a tensor of zeros that is stored nowhere."""
    return StoredPieces(shape, dtype, cut(shape, dtype), lambda box: torch.zeros(box.sizes, dtype=dtype))


def in_memory(tensor: Tensor) -> StoredPieces:
    """Return a small tensor that is already here, as one piece."""
    shape = tuple(tensor.shape)
    return StoredPieces(shape, tensor.dtype, (Box((0,) * len(shape), shape),), lambda _: tensor.detach().cpu())


@dataclass(frozen=True)
class Bundle:
    """What a job holds. ``groups`` are those of torch.optim.Adamax with ``param_names`` in the place of ``params``."""

    model: dict[str, StoredPieces | Any]  # values are what modules return as extra state
    state: dict[str, dict[str, StoredPieces]]  # by parameter name; none for a parameter that had no gradient yet
    groups: list[dict[str, Any]]
    extra: Any
    step: int | None
    left_out: tuple[str, ...] = ()

    def tensors(self) -> dict[str, StoredPieces]:
        """Return all tensors under the keys of a checkpoint."""
        found = {f"model.{name}": entry for name, entry in self.model.items() if isinstance(entry, StoredPieces)}
        for name, states in self.state.items():
            found |= {f"optim.state.{name}.{key}": entry for key, entry in states.items()}
        return found

    @property
    def total_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def param_names(self) -> list[str]:
        """Return the parameters in the order of the optimizer."""
        return [name for group in self.groups for name in group["param_names"]]

    def check(self, source: Path) -> None:
        """Refuse states that do not belong to the parameters: names or shapes that do not fit.

        Raises:
            CheckpointError: Names the parameter.
        """
        names = self.param_names()
        if not names:
            raise CheckpointError(f"{source} has no optimizer: expected the groups and state of torch.optim.Adamax")
        if len(set(names)) != len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise CheckpointError(f"{source}: parameter {twice} is in two places of the optimizer's groups")
        strangers = [name for name in (*names, *self.state) if not isinstance(self.model.get(name), StoredPieces)]
        if strangers:
            raise CheckpointError(
                f"{source}: the optimizer has {strangers[0]}, the model has not; it has "
                f"{', '.join(list(self.model)[:3])}. Build the optimizer from the named_parameters() of the module "
                "whose state dict is saved (not of a wrapper)"
            )
        for name in self.state.keys() - set(names):
            raise CheckpointError(f"{source} has a state of {name}, which is in no group of the optimizer")
        for name, states in self.state.items():
            self._check_state(source, name, states)

    def _check_state(self, source: Path, name: str, states: dict[str, StoredPieces]) -> None:
        missing = [key for key in ("step", *STATE_KEYS) if key not in states]
        if missing:
            raise CheckpointError(
                f"{source}: the state of {name} lacks {', '.join(missing)}; it has {', '.join(states)}. Expected a "
                "state of torch.optim.Adamax or ShardedAdamax"
            )
        for key in STATE_KEYS:
            if states[key].shape != self.model[name].shape:
                raise CheckpointError(
                    f"{source}: {key} of {name} has shape {states[key].shape}, the parameter {self.model[name].shape}: "
                    "the state belongs to another parameter"
                )


def refuse_existing(target: Path) -> None:
    """Raise FileExistsError if there is anything at ``target``."""
    if os.path.lexists(target):
        raise FileExistsError(f"{target} exists: nothing is overwritten, convert to a new path")


@contextmanager
def new_file(final: Path) -> Iterator[BinaryIO]:
    """Open a file that gets its name when it is whole and durable; after an error there is none."""
    # With the process in its name: two conversions to one target do not write into one file.
    unfinished = final.with_name(f".{final.name}.{os.getpid()}.incomplete")
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        with open(unfinished, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        _give_name(unfinished, final)
        disk.sync_directory(final.parent)
    except FileExistsError:
        raise
    except OSError as error:
        raise CheckpointError(f"cannot write {final}: {error}") from error
    finally:
        unfinished.unlink(missing_ok=True)


def _give_name(unfinished: Path, final: Path) -> None:
    try:
        os.link(unfinished, final)  # unlike a rename, never replaces a file that came meanwhile
    except OSError as error:
        refuse_existing(final)
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        # A file system without links.
        disk.rename(unfinished, final)


def write_pieces(tensor: StoredPieces, write: Callable[[memoryview], object], meter: Meter) -> None:
    """Write the bytes of a tensor, piece by piece."""
    for piece in tensor.in_order():
        data = piece.contiguous()
        if data.nbytes:
            # Not numpy, which lacks bfloat16 and which torch does without. ``data`` outlives the view.
            write(memoryview((ctypes.c_ubyte * data.nbytes).from_address(data.data_ptr())).cast("B"))
            meter.advance(data.nbytes)
