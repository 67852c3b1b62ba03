"""The system calls by which a checkpoint comes to be, and nothing else.

[Note: durable]  A file is durable when its bytes and its name are: the bytes after fsync of the file, the name after
fsync of its directory. A rename is atomic: at any moment there is the old name or the new one, never both and never
neither. The crash tests stop the process between any two calls of this module.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path


def make_directory(path: Path) -> None:
    """Make a directory and its parents; it must not exist."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.mkdir()


def write_file(path: Path, parts: Iterable[bytes | memoryview]) -> None:
    """Write a new file and make its bytes durable; its name is durable only after `sync_directory`."""
    with open(path, "xb") as file:
        for part in parts:
            file.write(part)
        file.flush()
        os.fsync(file.fileno())


def rename(old: Path, new: Path) -> None:
    """Give ``old`` the name ``new``, replacing a file that has it."""
    os.replace(old, new)


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_file(path: Path) -> None:
    """Remove a file."""
    path.unlink()


def remove_directory(path: Path) -> None:
    """Remove a directory and what is in it, if it is there."""
    shutil.rmtree(path, ignore_errors=True)
