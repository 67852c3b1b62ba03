"""How the collectives are done: bytes by MPI, sums by torch. See [Note: MPI moves bytes, torch adds]."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from mpi4py import MPI
from torch import Tensor

# MPI counts in C ints: a message of 2^31 bytes is one too many. No message is larger than this.
MAX_MESSAGE_BYTES = 1 << 30
# A reduce-scatter receives piece by piece, so that it needs little memory and sums what is still in the cache.
MIN_PIECE_BYTES, MAX_PIECE_BYTES = 1 << 16, 1 << 19
PIECES_BYTES = 1 << 24  # what the pieces of all ranks may take together, where MIN_PIECE_BYTES allows
SMALL_BYTES = 1 << 15  # an all-reduce up to this size is one round trip instead of two

Combine = Callable[[Tensor, Tensor], Tensor]  # (total, other) -> total, in place

COMBINES: dict[str, Combine] = {
    "SUM": lambda total, other: total.add_(other),
    "AVG": lambda total, other: total.add_(other),
    "PRODUCT": lambda total, other: total.mul_(other),
    "MIN": lambda total, other: torch.minimum(total, other, out=total),
    "MAX": lambda total, other: torch.maximum(total, other, out=total),
    "BAND": lambda total, other: total.bitwise_and_(other),
    "BOR": lambda total, other: total.bitwise_or_(other),
    "BXOR": lambda total, other: total.bitwise_xor_(other),
}


class Reduction(NamedTuple):
    """How the values of several ranks become one."""

    combine: Combine
    divisor: int  # what the total is divided by; 1 but for an average


class _Arriving(NamedTuple):
    """A piece of a reduce-scatter under way: the values of all ranks, by rank, and where their sum goes."""

    requests: list[MPI.Request]
    values: list[Tensor]
    total: Tensor


class Transport:
    """Blocking collectives over a communicator, on contiguous CPU tensors. One thread at a time."""

    def __init__(self, communicator: MPI.Intracomm) -> None:
        self.communicator = communicator
        self.rank = communicator.rank
        self.size = communicator.size
        # The largest tag is for messages of collectives; those of the user have the others.
        self.largest_tag: int = communicator.Get_attr(MPI.TAG_UB) or 32767  # 32767: the least that MPI promises

    def broadcast(self, tensor: Tensor, root: int) -> None:
        """Overwrite ``tensor`` with that of ``root``."""
        for memory in messages(tensor):
            self.communicator.Bcast(memory, root)

    def all_gather(self, whole: Tensor, mine: Tensor) -> None:
        """Fill ``whole`` with every rank's ``mine``, one after another; ``mine`` may be its part of ``whole``."""
        rows = whole.view(self.size, -1)
        if rows[self.rank].data_ptr() != mine.data_ptr():
            rows[self.rank].copy_(mine.view(-1))
        row_bytes = rows[0].nbytes
        for start in range(0, row_bytes, MAX_MESSAGE_BYTES):
            piece_bytes = min(MAX_MESSAGE_BYTES, row_bytes - start)
            # One element of this type is the piece; the next rank's lies a whole row further.
            contiguous = MPI.BYTE.Create_contiguous(piece_bytes)
            piece = contiguous.Create_resized(0, row_bytes).Commit()
            memory = MPI.buffer.fromaddress(whole.data_ptr() + start, whole.nbytes - start)
            self.communicator.Allgather(MPI.IN_PLACE, [memory, 1, piece])
            piece.Free()
            contiguous.Free()

    def all_reduce(self, tensor: Tensor, reduction: Reduction) -> None:
        """Combine ``tensor`` over the ranks, in place; the same bits on all of them."""
        flat = tensor.view(-1)
        # What the ranks cannot share evenly, and what is small, goes to every rank whole.
        num_tail = flat.numel() % self.size if tensor.nbytes > SMALL_BYTES else flat.numel()
        body, tail = flat[: flat.numel() - num_tail], flat[flat.numel() - num_tail :]
        if body.numel():
            rows = body.view(self.size, -1)
            shard = torch.empty_like(rows[0])
            self.reduce_scatter(shard, rows, reduction)
            self.all_gather(body, shard)
        if tail.numel():
            rows = tail.new_empty(self.size, tail.numel())
            self.all_gather(rows, tail)
            _combine_in_rank_order(tail, list(rows), reduction)

    def reduce_scatter(self, shard: Tensor, rows: Tensor, reduction: Reduction) -> None:
        """Fill ``shard``, shape (m,), with what the ranks' ``rows[this rank]`` combine to; ``rows`` is (size, m)."""
        piece_bytes = min(max(PIECES_BYTES // self.size, MIN_PIECE_BYTES), MAX_PIECE_BYTES)
        numel = max(min(piece_bytes // shard.element_size(), shard.numel()), 1)
        # Two rooms: while one piece is summed in the first, the next arrives in the second.
        rooms = [rows.new_empty(self.size, numel) for _ in range(2)] if self.size > 1 else [rows, rows]
        before: _Arriving | None = None
        for index, start in enumerate(range(0, shard.numel(), numel)):
            part = slice(start, min(start + numel, shard.numel()))
            values = [row[: part.stop - part.start] for row in rooms[index % 2]]
            values[self.rank] = rows[self.rank, part]
            requests = self._start({peer: row[part] for peer, row in enumerate(rows)}, dict(enumerate(values)))
            if before is not None:
                _finish(before, reduction)
            before = _Arriving(requests, values, shard[part])
        if before is not None:
            _finish(before, reduction)

    def exchange(self, departures: dict[int, Tensor], arrivals: dict[int, Tensor]) -> None:
        """Send ``departures[q]`` to rank q and fill ``arrivals[q]`` with what it sends."""
        if self.rank in departures and self.rank in arrivals:
            arrivals[self.rank].copy_(departures[self.rank].view(arrivals[self.rank].shape))
        MPI.Request.Waitall(self._start(departures, arrivals))

    def _start(self, departures: dict[int, Tensor], arrivals: dict[int, Tensor]) -> list[MPI.Request]:
        requests = []
        for distance in range(1, self.size):  # each rank begins with another, so that not all send to rank 0 at once
            sender, receiver = (self.rank - distance) % self.size, (self.rank + distance) % self.size
            if sender in arrivals:
                for memory in messages(arrivals[sender]):
                    requests.append(self.communicator.Irecv(memory, sender, self.largest_tag))
            if receiver in departures:
                for memory in messages(departures[receiver]):
                    requests.append(self.communicator.Isend(memory, receiver, self.largest_tag))
        return requests


def messages(tensor: Tensor) -> list[MPI.buffer]:
    """Return the memory of a contiguous tensor in messages that MPI can count; one empty message where it is empty."""
    address, nbytes = tensor.data_ptr(), tensor.nbytes
    return [
        MPI.buffer.fromaddress(address + start, min(MAX_MESSAGE_BYTES, nbytes - start))
        for start in range(0, max(nbytes, 1), MAX_MESSAGE_BYTES)
    ]


def _finish(arriving: _Arriving, reduction: Reduction) -> None:
    MPI.Request.Waitall(arriving.requests)
    _combine_in_rank_order(arriving.total, arriving.values, reduction)


def _combine_in_rank_order(result: Tensor, values: Sequence[Tensor], reduction: Reduction) -> None:
    total = values[0].clone()  # not straight into the result, which may be this rank's own value
    for value in values[1:]:
        reduction.combine(total, value)
    if reduction.divisor > 1:
        total.div_(reduction.divisor)
    result.copy_(total)
