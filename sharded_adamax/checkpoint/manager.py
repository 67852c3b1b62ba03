"""`CheckpointManager`: the checkpoints of a job under one directory.

::

    ROOT/00000100/                    a checkpoint
    ROOT/00000200/
    ROOT/.00000300.ID.incomplete/     being written, or left by a crash; removed at the next start
    ROOT/00000150.damaged/            was refused by `restore`, kept for a look
    ROOT/latest                       the name of the newest, for people and scripts
    ROOT/.lock                        held by the job that writes here

`restore` does not trust ``latest``: it tries what is there, newest first.
"""

from __future__ import annotations

import logging
import math
import os
import threading
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import nn
from torch.optim import Optimizer

from sharded_adamax import agreement
from sharded_adamax.agreement import RemoteError
from sharded_adamax.checkpoint import api, disk, manifest
from sharded_adamax.checkpoint.directory import Save, incomplete
from sharded_adamax.checkpoint.errors import CheckpointDamagedError, CheckpointError
from sharded_adamax.checkpoint.lock import DirectoryLock
from sharded_adamax.collectives import control_plane

logger = logging.getLogger(__name__)
LATEST_NAME = "latest"
_POLL_SECONDS = 0.02


@dataclass(frozen=True)
class Keep:
    """Which checkpoints stay when a new one is there. The newest always does."""

    last: int
    every: int | None
    best: int
    mode: Literal["min", "max"]

    def choose(self, metrics: dict[int, float | None]) -> set[int]:
        """Return the steps to keep, given the metric (or None) of each step that is there."""
        steps = sorted(metrics)
        kept = set(steps[-max(1, self.last) :])
        if self.every is not None:
            kept |= {step for step in steps if step % self.every == 0}
        rated = {step: metric for step, metric in metrics.items() if metric is not None and not math.isnan(metric)}
        sign = 1 if self.mode == "min" else -1
        kept |= set(sorted(rated, key=lambda step: (sign * rated[step], -step))[: self.best])
        return kept


@dataclass
class _Background:
    """An asynchronous save under way on this rank."""

    saving: Save
    thread: threading.Thread | None = None
    part_done: threading.Event = field(default_factory=threading.Event)
    part_error: Exception | None = None
    commit_error: Exception | None = None


class CheckpointManager:
    """Saves, keeps, finds and restores the checkpoints of one job. Every method is called on all ranks.

    With ``async_save=True`` `save` returns when the state is copied to host memory; a thread of each rank writes. A
    second `save`, `restore` and `wait` first wait for the one under way and raise its error, on every rank. A process
    that ends waits for it; a process that is killed leaves an incomplete directory, which nobody reads.

    Args:
        root: A directory that all ranks see. Made if missing. One job at a time.
        keep_last: How many of the newest checkpoints stay; at least 1.
        async_save: Write in the background.
        keep_every: Also keep steps that are multiples of this.
        keep_best: Also keep this many with the best ``metric``.
        best: Whether a small or a large metric is good.

    Raises:
        CheckpointError: Another job writes to ``root``, or it cannot be made. On every rank.
        ValueError: Bad arguments.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        keep_last: int = 3,
        async_save: bool = False,
        keep_every: int | None = None,
        keep_best: int = 0,
        best: Literal["min", "max"] = "min",
    ) -> None:
        if keep_last < 1 or keep_best < 0 or (keep_every is not None and keep_every < 1) or best not in ("min", "max"):
            raise ValueError(
                "expected keep_last >= 1, keep_best >= 0, keep_every >= 1 or None and best 'min' or 'max', got "
                f"keep_last={keep_last}, keep_best={keep_best}, keep_every={keep_every}, best={best!r}"
            )
        self.root = Path(root)
        self.async_save = async_save
        self._keep = Keep(keep_last, keep_every, keep_best, best)
        self._control = control_plane(None)
        self._lock: DirectoryLock | None = None
        self._background: _Background | None = None
        agreement.run_together(self._control, self._take_over, f"opening {self.root}")

    def _take_over(self) -> None:
        if self._control.rank != 0:
            return
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            disk.sync_directory(self.root.resolve().parent)  # a root that was just made must not vanish
            self._lock = DirectoryLock(self.root)
            for leftover in self.root.glob(".*.incomplete"):
                logger.warning("removing %s, which a crashed save left", leftover)
                disk.remove_directory(leftover)
            (self.root / f".{LATEST_NAME}").unlink(missing_ok=True)
        except OSError as error:
            raise CheckpointError(f"cannot use {self.root}: {error}") from error

    def save(
        self, step: int, model: nn.Module, optimizer: Optimizer, extra: Any = None, *, metric: float | None = None
    ) -> None:
        """Save a checkpoint of ``step``, with the random number generators of every rank. Collective.

        Args:
            extra: See `sharded_adamax.save`.
            metric: For ``keep_best``; that of the first rank counts.

        Raises:
            FileExistsError: There is a checkpoint of this step.
            CheckpointError, ValueError: As `sharded_adamax.save`; or the error of the previous asynchronous save.
        """
        if step < 0:
            raise ValueError(f"expected a step of at least 0, got {step}")
        self.wait()
        saving = api.begin(
            self._control,
            self._path(step),
            model,
            optimizer,
            extra=extra,
            step=step,
            metric=None if metric is None else float(metric),  # also of a tensor or a numpy number
            snapshot=self.async_save,
        )
        background = _Background(saving)
        if self.async_save:
            # Not a daemon: the interpreter waits for it before it exits.
            background.thread = threading.Thread(target=self._run, args=(background,), name="sharded_adamax save")
            background.thread.start()
            self._background = background
        else:
            self._run_part(background)
            self._finish(background)

    def _run(self, background: _Background) -> None:
        self._run_part(background)
        if self._control.rank == 0:
            self._run_commit(background)

    def _run_part(self, background: _Background) -> None:
        try:
            background.saving.write()
        except Exception as error:
            background.part_error = error
        background.part_done.set()

    def _run_commit(self, background: _Background) -> None:
        try:
            if background.part_error is not None:
                raise background.part_error
            background.saving.commit(after=lambda: self._published(background.saving.final))
        except Exception as error:
            background.commit_error = error
            if background.thread is not None and background.part_error is not None:
                # The others still write; without the directory they would report that instead of the disk's reason.
                while threading.main_thread().is_alive() and not background.saving.cancelled.wait(_POLL_SECONDS):
                    pass
            background.saving.abandon()
            if not threading.main_thread().is_alive():
                logger.error("the last checkpoint was not completed: %s", error)  # nobody will call wait any more

    def wait(self) -> None:
        """Wait for the asynchronous save under way, if there is one. Collective.

        Raises:
            CheckpointError: It failed, on whichever rank.
        """
        background, self._background = self._background, None
        if background is not None:
            background.part_done.wait()
            self._finish(background)

    def _finish(self, background: _Background) -> None:
        """Learn together whether all parts are written, then whether the commit was made. Collective."""
        doing = f"saving {background.saving.final}"
        try:
            api.raise_together(self._control, background.part_error, doing)
        except Exception:
            background.saving.cancelled.set()  # else the first rank would wait for a part that never comes
            if background.thread is not None:
                background.thread.join()
            elif self._control.rank == 0:
                background.saving.abandon()
            raise
        if background.thread is not None:
            background.thread.join()
        elif self._control.rank == 0:
            self._run_commit(background)
        api.raise_together(self._control, background.commit_error, doing)

    def _published(self, final: Path) -> None:
        """Move ``latest`` and remove what need not be kept; the new checkpoint is durable. First rank only."""
        self._point_latest_to(final)
        kept = self._keep.choose({step: self._metric(step) for step in self.steps()})
        # Not only the highest: who went back to an older step and trains on from there has higher ones lying about.
        kept.add(int(final.name))
        for step in set(self.steps()) - kept:
            # Under its hidden name first: half a checkpoint must never be seen under a real one.
            hidden = incomplete(self._path(step))
            disk.rename(self._path(step), hidden)
            disk.remove_directory(hidden)

    def _point_latest_to(self, checkpoint: Path) -> None:
        unfinished = self.root / f".{LATEST_NAME}"
        unfinished.unlink(missing_ok=True)
        disk.write_file(unfinished, [checkpoint.name.encode() + b"\n"])
        disk.rename(unfinished, self.root / LATEST_NAME)
        disk.sync_directory(self.root)

    def restore(self, model: nn.Module, optimizer: Optimizer, step: int | None = None) -> tuple[int, Any] | None:
        """Load a checkpoint: the newest that is whole, with a warning for each that is not. Collective.

        Restores the random number generators, too, where the world size is that of the save.

        Returns:
            The step and what was saved as ``extra``; None where there is no checkpoint at all.

        Raises:
            FileNotFoundError: No checkpoint of ``step``.
            CheckpointDamagedError: That of ``step``, or every one there is, is damaged.
            CheckpointError: A checkpoint is whole but of another model.
        """
        self.wait()
        candidates = self._control.scatter(
            [[step] if step is not None else self.steps()[::-1]] * self._control.size
            if self._control.rank == 0
            else None
        )
        damaged: list[int] = []
        for candidate in candidates:
            error = self._try(candidate, model, optimizer)
            if not isinstance(error, Exception):
                if damaged:
                    self._set_aside(damaged, candidate)
                return candidate, error[0]
            if step is not None:
                raise error
            warnings.warn(f"checkpoint {self._path(candidate)} is damaged, trying an older one: {error}", stacklevel=2)
            logger.error("checkpoint %s is damaged: %s", self._path(candidate), error)
            damaged.append(candidate)
        if damaged:
            raise CheckpointDamagedError(
                f"every checkpoint in {self.root} is damaged (steps {damaged}): nothing to resume from. To start anew, "
                "use another directory"
            )
        return None

    def _try(self, step: int, model: nn.Module, optimizer: Optimizer) -> tuple[Any] | Exception:
        """Return what was loaded, or the damage that all ranks agree on; raise, on all ranks, anything else."""
        outcome: tuple[Any] | Exception
        path = self._path(step)
        try:
            outcome = (api.load_with(self._control, path, model, optimizer, verify=True, restore_rng=True),)
        except Exception as error:
            outcome = error
        is_damage = isinstance(outcome, CheckpointDamagedError) or (
            isinstance(outcome, RemoteError) and outcome.error_type == CheckpointDamagedError.__name__
        )
        # A rank may see damage where another sees a different model: then it is not for us to choose another
        # checkpoint.
        decisions = self._control.exchange(is_damage or not isinstance(outcome, Exception))
        if not all(decisions) and isinstance(outcome, Exception):
            raise outcome
        return outcome

    def _set_aside(self, damaged: list[int], whole: int) -> None:
        """Rename damaged checkpoints: training on comes to their steps again and needs the names. Collective."""

        def rename() -> None:
            if self._control.rank != 0:
                return
            try:
                self._point_latest_to(self._path(whole))
                for step in damaged:
                    path = self._path(step)
                    target = path.with_name(f"{path.name}.damaged")
                    disk.remove_directory(target)
                    disk.rename(path, target)
            except OSError as error:
                raise CheckpointError(
                    f"step {whole} of {self.root} is whole, but the damaged ones after it cannot be renamed: {error}"
                ) from error

        agreement.run_together(self._control, rename, "setting damaged checkpoints aside")

    def steps(self) -> list[int]:
        """Return the steps of the checkpoints that are there, ascending. Local; says nothing of damage."""
        found = (path for path in self.root.iterdir() if path.name.isdigit() and path.is_dir())
        return sorted(int(path.name) for path in found)

    def latest_step(self) -> int | None:
        """Return the step of the newest checkpoint that is there, None where there is none. Local."""
        steps = self.steps()
        return steps[-1] if steps else None

    def close(self) -> None:
        """Wait for the save under way and let another job have the directory. Collective."""
        self.wait()
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def _path(self, step: int) -> Path:
        return self.root / f"{step:08d}"

    def _metric(self, step: int) -> float | None:
        path = self._path(step) / manifest.MANIFEST_NAME
        try:
            return manifest.parse(path.read_bytes(), path).metric
        except (OSError, CheckpointError):
            return None  # damaged: `restore` will say so
