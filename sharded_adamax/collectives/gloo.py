"""gloo, whose own collectives leave half of a link idle: ours are made of its messages.

[Note: why gloo does not get its own reduce-scatter]  gloo's reduce-scatter is an all-reduce and a slice, twice the
traffic, and its broadcasts and all_to_all leave one direction of a full-duplex link idle. Point-to-point messages of
about 1 MiB keep both directions busy and land where they belong. Summing in the order of the ranks makes the result
independent of how parameters are packed into buckets.

[Note: posting thread]  gloo guards a connection with a lock, and its own thread holds it while it copies to or from
the socket. Whoever posts a message waits for that. So a thread of the group posts, in the order of the collectives, and
backward goes on meanwhile: in a step of 190 ms posting took 17.

Ranks of one host do not send each other messages if they can read each other's memory: `neighbours.py`.
"""

from __future__ import annotations

import functools
import logging
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch
import torch.distributed as dist
from torch import Tensor

from sharded_adamax.collectives.control import ControlPlane
from sharded_adamax.collectives.groups import ProcessGroup, as_real
from sharded_adamax.collectives.lines import lines_to_neighbours
from sharded_adamax.collectives.neighbours import Neighbours, Rows
from sharded_adamax.pending import Message, Messages, Part, Pending, Refused, Work

logger = logging.getLogger(__name__)

MESSAGE_BYTES = 1 << 20
# Tags of our messages stay in blocks of their own, out of the way of small tags in the user's own send and recv. Each
# kind has its block: a rank that is a step behind the others must not take a gradient for a parameter.
FIRST_TAG = {"reduce_scatter": 1 << 24, "all_gather": 3 << 23}
NUM_TAGS = 1 << 23

# What to send to a rank, where to receive from it, and what to do then; see `GlooGroup._start`.
_Job = tuple[Callable[[int], Tensor], Callable[[int], Tensor], Callable[[slice], None]]


class GlooGroup(ProcessGroup):
    """gloo on CPU tensors: reduce-scatter and all-gather made of point-to-point messages. See the notes above."""

    def __init__(self, process_group: dist.ProcessGroup) -> None:
        super().__init__(process_group)
        # By kind; the same on all ranks, because every rank cuts every collective into the same messages.
        self._num_messages: Counter[str] = Counter()
        self._neighbours: Neighbours | None = None
        # One thread, so that messages are posted in the order of the collectives. It ends with this object.
        self._posting = ThreadPoolExecutor(max_workers=1, thread_name_prefix="sharded_adamax posting")

    def meet(self, control: ControlPlane) -> None:
        lines = lines_to_neighbours(control)
        if lines:
            timeout = self._process_group._get_backend(torch.device("cpu")).options._timeout
            self._neighbours = Neighbours(lines, timeout)
        logger.debug("rank %d reads the memory of ranks %s", self.rank, sorted(lines))

    def reduce_scatter(self, bucket: Tensor) -> Pending[Tensor]:
        rows = as_real(bucket).view(self.size, -1)  # row q is meant for rank q
        # Each row that arrives has memory of its own, so that one of them can become the result and the others go.
        values = {peer: torch.empty_like(rows[peer]) for peer in self._peers()}
        held_bytes = bucket.nbytes + (self.size - 2) * rows[0].nbytes
        # The result takes the place of what the first other rank sends: a + b has the bits of b + a, and fresh memory
        # would cost more than the sum, because the kernel has to clear it page by page.
        values[self.rank] = rows[self.rank]
        total, second = (values[1], values[0]) if self.rank == 0 else (values[0], values[1])
        others = [second, *(values[peer] for peer in range(2, self.size))]

        def add(part: slice) -> None:
            for other in others:
                total[part].add_(other[part])

        self.traffic.record("reduce_scatter", rows[0].nbytes * (self.size - 1))
        posted = self._start("reduce_scatter", rows.__getitem__, values.__getitem__, add)
        result = torch.view_as_complex(total.view(-1, 2)) if bucket.is_complex() else total
        return Messages(self.rank, posted, result, held_bytes)

    def all_gather(self, bucket: Tensor) -> Pending[None]:
        rows = as_real(bucket).view(self.size, -1)  # row q comes from rank q
        self.traffic.record("all_gather", rows[0].nbytes * (self.size - 1))
        own = rows[self.rank]
        posted = self._start("all_gather", lambda peer: own, rows.__getitem__, lambda part: None)
        return Messages(self.rank, posted, None, held_bytes=0)

    def _peers(self) -> list[int]:
        """Return the other ranks, the next one first, so that not all ranks send to rank 0 at once."""
        return [(self.rank + distance) % self.size for distance in range(1, self.size)]

    def _start(
        self, kind: str, send: Callable[[int], Tensor], receive: Callable[[int], Tensor], then: Callable[[slice], None]
    ) -> Future[list[Part]]:
        """Start sending a row to, and receiving a row from, every other rank, in parts of ``MESSAGE_BYTES``.

        Args:
            send: The row for a rank.
            receive: Where the row of a rank is to go.
            then: Called while waiting, with each part of a row, in order, when it has come from all ranks.
        """
        near = self._neighbours.post(kind, send, receive) if self._neighbours is not None else {}
        # In a list, which `_parts` empties: the executor may hold its arguments for a moment after all is over, and the
        # memory of a bucket is not to outlive the wait.
        job = [(send, receive, then)]
        if len(near) < self.size - 1:
            return self._posting.submit(self._parts, kind, job, near)
        parts: Future[list[Part]] = Future()
        parts.set_result(self._parts(kind, job, near))
        return parts

    def _parts(self, kind: str, job: list[_Job], near: dict[int, Rows]) -> list[Part]:
        """Post the messages to ranks that are not near; return what there is to wait for."""
        send, receive, then = job.pop()
        row = send(self._peers()[0])
        part_numel = MESSAGE_BYTES // row.element_size()
        distant = [peer for peer in self._peers() if peer not in near]
        parts = []
        # All at once: gloo sends nothing that the other rank does not receive yet.
        for start in range(0, row.numel(), part_numel):
            part = slice(start, start + part_numel)
            messages = self._messages(kind, part, distant, send, receive)
            stop = min(start + part_numel, row.numel())
            for peer, rows in near.items():
                messages.append(Message(peer, is_arrival=True, work=rows.arrival(stop * row.element_size())))
                if stop == row.numel():
                    messages.append(Message(peer, is_arrival=False, work=rows.departure()))
            parts.append(Part(messages, functools.partial(then, part)))
        return parts

    def _messages(
        self,
        kind: str,
        part: slice,
        peers: list[int],
        send: Callable[[int], Tensor],
        receive: Callable[[int], Tensor],
    ) -> list[Message]:
        """Post the messages that carry this part of each row."""
        tag = FIRST_TAG[kind] + self._num_messages[kind] % NUM_TAGS
        self._num_messages[kind] += 1
        messages = []
        for peer in peers:
            arrival = _posted(self._process_group.recv, receive(peer)[part], peer, tag)
            messages.append(Message(peer, is_arrival=True, work=arrival))
            departure = _posted(self._process_group.send, send(peer)[part], peer, tag)
            messages.append(Message(peer, is_arrival=False, work=departure))
        return messages


def _posted(post: Callable[[list[Tensor], int, int], dist.Work], message: Tensor, peer: int, tag: int) -> Work:
    try:
        return post([message], peer, tag)
    except RuntimeError as error:  # the connection is gone: whoever waits is to know which one
        return Refused(error)
