"""Small picklable objects between ranks, as bytes in tensors; the collectives' own helper.

torch's collectives for objects need numpy, as does Tensor.numpy(). The package needs torch alone.
"""

from __future__ import annotations

import ctypes
import pickle
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from sharded_adamax.collectives.loans import lend

T = TypeVar("T")


def all_gather(value: T, group: dist.ProcessGroup) -> list[T]:
    """Return the values of all ranks, by rank."""
    data = _to_bytes(value)
    sizes = _sizes(data, group)
    rows = list(torch.empty(group.size(), max(sizes), dtype=torch.uint8).unbind())
    dist.all_gather([lend(row) for row in rows], lend(_padded(data, max(sizes))), group=group)
    return [_from_bytes(row, size) for row, size in zip(rows, sizes, strict=True)]


def gather(value: T, group: dist.ProcessGroup) -> list[T] | None:
    """Return the values of all ranks on the first one, by rank; None elsewhere."""
    data = _to_bytes(value)
    sizes = _sizes(data, group)
    rows = list(torch.empty(group.size(), max(sizes), dtype=torch.uint8).unbind()) if group.rank() == 0 else None
    lent = None if rows is None else [lend(row) for row in rows]
    dist.gather(lend(_padded(data, max(sizes))), lent, group=group, group_dst=0)
    return None if rows is None else [_from_bytes(row, size) for row, size in zip(rows, sizes, strict=True)]


def scatter(values: list[T] | None, group: dist.ProcessGroup) -> T:
    """Return the value that the first rank has for this one; ``values`` counts there only."""
    data = [] if values is None or group.rank() != 0 else [_to_bytes(value) for value in values]
    sizes = torch.tensor([each.numel() for each in data] or [0] * group.size())
    dist.broadcast(lend(sizes), group=group, group_src=0)
    longest = int(sizes.max())
    received = torch.empty(longest, dtype=torch.uint8)
    dist.scatter(lend(received), [lend(_padded(each, longest)) for each in data] or None, group=group, group_src=0)
    result: T = _from_bytes(received, int(sizes[group.rank()]))
    return result


def _sizes(data: Tensor, group: dist.ProcessGroup) -> list[int]:
    """Return how many bytes each rank has."""
    sizes = list(torch.empty(group.size(), 1, dtype=torch.int64).unbind())
    dist.all_gather([lend(size) for size in sizes], lend(torch.tensor([data.numel()])), group=group)
    return [int(size) for size in sizes]


def _to_bytes(value: object) -> Tensor:
    return torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)


def _from_bytes(data: Tensor, num_bytes: int) -> Any:
    return pickle.loads(ctypes.string_at(data.data_ptr(), num_bytes))


def _padded(data: Tensor, numel: int) -> Tensor:
    return torch.nn.functional.pad(data, (0, numel - data.numel()))
