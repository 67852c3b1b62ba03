"""The control plane: what the hosts tell each other."""

from __future__ import annotations

from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from sharded_adamax.collectives import objects
from sharded_adamax.collectives.loans import lend
from sharded_adamax.collectives.traffic import Traffic
from sharded_adamax.pending import GLANCE, Done, Native, Pending

T = TypeVar("T")

# Above the tags of gloo.py, and out of the way of small tags in the user's own send and recv.
PROBE_TAG = 1 << 25


class ControlPlane:
    """Small messages between the hosts of all ranks; a world of one where ``process_group`` is None."""

    def __init__(self, process_group: dist.ProcessGroup | None) -> None:
        self._process_group = process_group
        self.rank = 0 if process_group is None else process_group.rank()
        self.size = 1 if process_group is None else process_group.size()
        self.traffic = Traffic()

    def maximum(self, ballot: Tensor) -> Pending[Tensor]:
        """Start the element-wise maximum of a small uint8 CPU tensor over the ranks. Modifies ``ballot`` in place."""
        self.traffic.record("maximum", ballot.nbytes if self.size > 1 else 0)
        if self._process_group is None:
            return Done(ballot)
        work = dist.all_reduce(lend(ballot), op=dist.ReduceOp.MAX, group=self._process_group, async_op=True)
        assert work is not None  # None is for ranks outside the group; control_plane refuses those
        return Native(self.rank, work, ballot)

    def dead_ranks(self) -> list[int]:
        """Return the ranks that take no message any more. For use after a failure only; gloo only knows."""
        if self._process_group is None or backend_name(self._process_group, torch.device("cpu")) != "gloo":
            return []
        found = []
        for peer in range(self.size):
            if peer != self.rank:
                try:
                    self._process_group.send([torch.zeros(1, dtype=torch.uint8)], peer, PROBE_TAG).wait(GLANCE)
                except RuntimeError:
                    found.append(peer)
        return found

    def exchange(self, value: T) -> list[T]:
        """Return the values of all ranks, by rank. Small picklable objects only."""
        self.traffic.record("exchange", 0)
        if self._process_group is None:
            return [value]
        return objects.all_gather(value, self._process_group)

    def gather(self, value: T) -> list[T] | None:
        """Return the values of all ranks on the first one, by rank; None elsewhere. Picklable objects."""
        self.traffic.record("gather", 0)
        if self._process_group is None:
            return [value]
        return objects.gather(value, self._process_group)

    def scatter(self, values: list[T] | None) -> T:
        """Return the value that the first rank has for this one; ``values`` counts there only. Picklable objects."""
        self.traffic.record("scatter", 0)
        if self._process_group is None:
            assert values is not None
            return values[0]
        return objects.scatter(values, self._process_group)


def backend_name(group: dist.ProcessGroup, device: torch.device) -> str | None:
    """Return the backend that carries tensors of ``device`` in ``group``; None where there is none."""
    try:
        return str(group._get_backend(device).name())
    except RuntimeError:  # "No backend type associated with device type ..."
        return None
