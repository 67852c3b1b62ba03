"""One job per directory: a lock that the operating system drops when its holder dies."""

from __future__ import annotations

import fcntl
import json
import os
import socket
from pathlib import Path
from weakref import WeakSet

from sharded_adamax.checkpoint.errors import CheckpointError

LOCK_NAME = ".lock"


class DirectoryLock:
    """Held from construction until `release` or the end of the process, however it ends."""

    def __init__(self, root: Path) -> None:
        # Not deleted on release: a second job could then lock the old file while a third locks a new one.
        self._file = open(root / LOCK_NAME, "a+")  # noqa: SIM115
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.seek(0)
            holder = self._file.read()
            self._file.close()
            raise CheckpointError(
                f"another job writes checkpoints to {root}: {holder.strip() or 'it did not say who'}. Give each job a "
                "directory of its own, or stop the other one"
            ) from None
        self._file.truncate(0)
        self._file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))
        self._file.flush()
        _held.add(self)

    def release(self) -> None:
        """Let another job have the directory."""
        if not self._file.closed:
            fcntl.flock(self._file, fcntl.LOCK_UN)  # also where a child that is being forked still has the file
            self._file.close()

    def leave_to_parent(self) -> None:
        """Close the file without unlocking it."""
        self._file.close()


_held: WeakSet[DirectoryLock] = WeakSet()


def _leave_all_to_parent() -> None:
    # A forked child, such as a worker of a DataLoader, shares the lock and would hold it after the job was killed.
    for lock in _held:
        lock.leave_to_parent()


os.register_at_fork(after_in_child=_leave_all_to_parent)
