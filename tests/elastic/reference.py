"""What a run that nobody interrupts arrives at: train.py on ranks that are forked in a second, without a launcher."""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from pathlib import Path

from tests.crash.nursery import Nursery, failed
from tests.elastic.torchrun import PROGRAM, Life, read_lives


def _train(arguments: list[str]) -> None:
    sys.path.insert(0, str(PROGRAM.parent))
    import train  # type: ignore[import-not-found]

    sys.argv = [str(PROGRAM), *arguments]
    train.main()


class References:
    """Uninterrupted runs of one program."""

    def __init__(self, nursery: Nursery, directory: Path, arguments: list[str]) -> None:
        self._nursery = nursery
        self._directory = directory
        self._arguments = arguments

    def life(self, world_size: int, *, checkpoint: Path | None = None, until: int | None = None) -> Life:
        """Return a run at ``world_size`` from the beginning or a checkpoint to the end, or at least to step ``until``.

        It is the last step in the arguments that the learning rate depends on, so ``until`` cannot take its place.
        """
        out = Path(tempfile.mkdtemp(dir=self._directory))
        if checkpoint is not None:
            shutil.copytree(checkpoint, out / "checkpoints" / checkpoint.name)
        ranks = self._nursery.start(world_size, _train, [*self._arguments, "--resume", f"--out={out}"])
        if until is not None:
            _wait_for_step(out, until)
            for rank in range(world_size):
                ranks.kill(rank)
        outcomes = ranks.join()
        assert until is not None or not any(failed(outcome) for outcome in outcomes), outcomes
        (life,) = read_lives(out)
        return life


def _wait_for_step(out: Path, step: int) -> None:
    deadline = time.monotonic() + 60
    while not (lives := read_lives(out)) or lives[0].last_step < step:
        assert time.monotonic() < deadline, f"a reference did not get to step {step}: {lives}"
        time.sleep(0.02)
