"""Parameters out: every rank's updated shard into the flat tensors that the model uses."""

from __future__ import annotations

from torch.profiler import record_function

from sharded_adamax.buckets import Bucket
from sharded_adamax.collectives import Group
from sharded_adamax.pending import Pending


class ParameterGathering:
    """The all-gathers under way. Between ``launch`` and ``wait_all`` the parameters of a bucket are partly old."""

    def __init__(self, group: Group) -> None:
        self.group = group
        self._pending: list[tuple[int, Pending[None]]] = []

    def launch(self, index: int, bucket: Bucket) -> None:
        """Start the all-gather of ``bucket``, the ``index``-th. Collective."""
        with record_function(f"sharded_adamax::all_gather bucket {index}"):
            self._pending.append((index, self.group.all_gather(bucket.flat_param)))

    def wait_all(self, step: int) -> None:
        """Wait until all parameters are new; ``step`` is for the message if a rank is lost."""
        for index, pending in self._pending:
            with record_function(f"sharded_adamax::wait gather bucket {index}"):
                pending.wait(f"the all-gather of bucket {index}, step {step}")
        self._pending.clear()
