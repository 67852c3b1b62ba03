"""Numbers every point of a save at which a process can be stopped, and stops it at one.

A point lies before and after each call of `sharded_adamax.checkpoint.disk`, and within those: around the half of each
write to a file, before and after fsync, before each name that a directory loses when it is removed. The functions of
`disk` do what they do; only the moment between two system calls is made visible.
"""

from __future__ import annotations

import builtins
import functools
import os
import re
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from sharded_adamax.checkpoint import disk

CALLS = ("make_directory", "write_file", "rename", "sync_directory", "remove_file", "remove_directory")
DIRECT_CALLS = ("make_directory", "rename", "remove_file")  # the others are made of points of their own
# A data file has dozens of records; a process that dies after the 9th leaves the same kind of file as after the 8th.
_RECORDS_TO_STOP_AT = (0, 1, 8)


def distinct(names: list[str]) -> list[int]:
    """Return the numbers of the points before which something happened on the disk: the others are the same moments."""
    changing = ("half of", "before the system call", "before open", *(f"before {call} " for call in DIRECT_CALLS))
    return [number for number, name in enumerate(names) if name.startswith(changing) or number == len(names) - 1]


class Points:
    """Counts the points that pass while it is armed; one may be deadly, all may be slow.

    Args:
        dies_at: The number of the point at which this process gets a signal; None for never.
        signal_number: Which signal.
        slow_down_s: How long every point takes, for a disk that is slow.
    """

    def __init__(
        self, dies_at: int | None = None, *, signal_number: int = signal.SIGKILL, slow_down_s: float = 0.0
    ) -> None:
        self.names: list[str] = []
        self.armed = False
        self._dies_at = dies_at
        self._signal_number = signal_number
        self._slow_down_s = slow_down_s
        self._in_disk = threading.local()
        self._kept: list[tuple[Any, str, Any]] = []

    def __enter__(self) -> Points:
        for name in CALLS:
            self._replace(disk, name, self._around(getattr(disk, name), name))
        for name in ("fsync", "unlink", "rmdir"):
            self._replace(os, name, self._within(getattr(os, name), name))
        disk.open = self._open  # type: ignore[attr-defined]  # hides the builtin in this one module
        return self

    def __exit__(self, *_: object) -> None:
        del disk.open  # type: ignore[attr-defined]
        for module, name, original in self._kept:
            setattr(module, name, original)

    def pass_by(self, name: str) -> None:
        """Be at a point."""
        if not self.armed:
            return
        number = len(self.names)
        self.names.append(re.sub(r"\.[0-9a-f]{32}\.", ".ID.", name))  # the same in every save
        if number == self._dies_at:
            os.kill(os.getpid(), self._signal_number)
        if self._slow_down_s:
            time.sleep(self._slow_down_s)

    def _replace(self, module: Any, name: str, by: Callable[..., Any]) -> None:
        self._kept.append((module, name, getattr(module, name)))
        setattr(module, name, by)

    def _around(self, call: Callable[..., Any], name: str) -> Callable[..., Any]:
        @functools.wraps(call)
        def stoppable(path: Path, *args: Any) -> Any:
            self.pass_by(f"before {name} {path.name}")
            self._in_disk.depth = getattr(self._in_disk, "depth", 0) + 1
            try:
                result = call(path, *args)
            finally:
                self._in_disk.depth -= 1
            self.pass_by(f"after {name} {path.name}")
            return result

        return stoppable

    def _within(self, call: Callable[..., Any], name: str) -> Callable[..., Any]:
        """Only where `disk` makes the call: gloo and the tests unlink files of their own."""

        @functools.wraps(call)
        def stoppable(*args: Any, **kwargs: Any) -> Any:
            if not getattr(self._in_disk, "depth", 0):
                return call(*args, **kwargs)
            self.pass_by(f"before the system call {name}")
            result = call(*args, **kwargs)
            self.pass_by(f"after the system call {name}")
            return result

        return stoppable

    def _open(self, path: Path, mode: str) -> _StoppableFile:
        self.pass_by(f"before open {path.name}")
        return _StoppableFile(builtins.open(path, mode), path.name, self)


class _StoppableFile:
    """A file that can end in the middle of a record."""

    def __init__(self, file: Any, name: str, points: Points) -> None:
        self._file = file
        self._name = name
        self._points = points
        self._num_written = 0

    def __enter__(self) -> _StoppableFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._file.close()

    def write(self, data: bytes | memoryview) -> None:
        if self._num_written in _RECORDS_TO_STOP_AT:
            half = len(data) // 2
            self._file.write(data[:half])
            self._file.flush()
            self._points.pass_by(f"half of write {self._num_written} to {self._name}")
            self._file.write(data[half:])
        else:
            self._file.write(data)
        self._num_written += 1

    def flush(self) -> None:
        self._points.pass_by(f"before flush of {self._name}")
        self._file.flush()

    def fileno(self) -> int:
        number: int = self._file.fileno()
        return number
