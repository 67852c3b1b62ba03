"""The training text: the source of Python's own standard library, which every machine has."""

from __future__ import annotations

import hashlib
import sysconfig
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

# Folders that are not the library itself: what was installed beside it, its tests, and compiled leftovers.
SKIPPED_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"},
)


class Text(NamedTuple):
    """All files one after the other, in the order of their names."""

    data: Tensor  # (num_bytes,), uint8
    num_files: int
    sha256: str


def read_stdlib_text() -> Text:
    """Read every `*.py` of the running interpreter's standard library."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(
        (path.relative_to(root).as_posix(), path)
        for path in root.rglob("*.py")
        if SKIPPED_FOLDERS.isdisjoint(path.relative_to(root).parts)
    )
    content = bytearray()
    for _, path in files:
        content += path.read_bytes()
    if not content:
        raise SystemExit(
            f"expected the standard library's source in {root}, got no *.py file there; "
            "use a Python that ships its library as source"
        )
    data = torch.frombuffer(content, dtype=torch.uint8)
    return Text(data, len(files), hashlib.sha256(content).hexdigest())


def sample_windows(data: Tensor, *, step: int, seed: int, batch: int, context: int) -> Tensor:
    """Draw the global batch of one step; the same on every rank, at every world size and after every resume.

    The generator is seeded by (seed, step), so the position in the data is the step number and nothing else.

    Returns:
        (batch, context + 1), int64: each row holds the inputs `[:-1]` and the targets `[1:]`.
    """
    generator = torch.Generator().manual_seed((seed << 32) + step)
    starts = torch.randint(data.numel() - context, (batch, 1), generator=generator)
    return data[starts + torch.arange(context + 1)].long()
