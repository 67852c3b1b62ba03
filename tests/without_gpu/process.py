"""Pretending in a process of its own: what is done to torch there cannot be undone."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")


def answer_of(function: Callable[[], T], directory: Path, seconds: float) -> T:
    """Return what a function of a module returns on pretended CUDA; it has ``seconds`` for it.

    Args:
        directory: Where to put what has to be compiled.
    """
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_answer, args=(function, directory, theirs))
    process.start()
    theirs.close()
    try:
        assert ours.poll(seconds), "no answer"
        result: T = ours.recv()
    finally:
        process.kill()
    return result


def _answer(function: Callable[[], T], directory: Path, connection: Connection) -> None:
    from tests.without_gpu.pretended_cuda import pretend

    pretend(directory)
    connection.send(function())
