"""Disks that are full, read-only or not shared, and ranks that die or hang: a clear error everywhere, nothing lost."""

from __future__ import annotations

import ctypes
import functools
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn

from sharded_adamax import CheckpointManager, ShardedAdamax, load, save
from sharded_adamax.checkpoint import api, directory
from sharded_adamax.collectives import control_plane
from tests.crash.faults import Points
from tests.crash.nursery import Nursery
from tests.crash.program import Job, Uninterrupted, rank_and_world_size, strangers

MS_RDONLY, MS_REMOUNT, MS_BIND, MNT_DETACH = 1, 32, 4096, 2
DISK_BYTES = 4 << 20
BIG_NUMEL = 100_000  # a checkpoint of about 1.2 MB: three do not fit beside the filler


def _mount(path: Path, *, source: bytes = b"tmpfs", flags: int = 0, options: bytes = b"") -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(source, bytes(path), b"tmpfs", flags, options) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "disk"
    path.mkdir()
    try:
        _mount(path, options=f"size={DISK_BYTES}".encode())
    except OSError as error:
        pytest.skip(f"a file system of its own cannot be mounted here: {error}")
    yield path
    _unmount(path)


def _unmount(path: Path) -> None:
    ctypes.CDLL(None).umount2(bytes(path), MNT_DETACH)


@dataclass(frozen=True)
class Told:
    """An error as a rank saw it."""

    type_name: str
    message: str


def _told(action: Callable[[], object]) -> Told:
    try:
        action()
    except Exception as error:
        return Told(type(error).__name__, str(error))
    raise AssertionError("nothing was raised")


class Big:
    """A model large enough to fill a disk of a few MiB, trained a step at a time."""

    def __init__(self) -> None:
        self.model = nn.Linear(BIG_NUMEL, 1, bias=False)
        self.optimizer = ShardedAdamax(self.model.named_parameters())

    def train(self) -> None:
        torch.autograd.backward([(self.model.weight * torch.arange(BIG_NUMEL)).sum()])
        self.optimizer.step()
        self.optimizer.zero_grad()

    def weights(self) -> torch.Tensor:
        return self.model.weight.detach().clone()


@contextmanager
def _free_bytes_left(root: Path, free_bytes: int) -> Iterator[None]:
    """Fill the disk but for so much, on behalf of all ranks."""
    rank, _ = rank_and_world_size()
    filler = root / "filler"
    if rank == 0:
        status = os.statvfs(root)
        with open(filler, "wb") as file:
            os.posix_fallocate(file.fileno(), 0, status.f_bavail * status.f_frsize - free_bytes)
    _barrier()
    yield
    _barrier()
    if rank == 0:
        filler.unlink()
    _barrier()


def _barrier() -> None:
    if rank_and_world_size()[1] > 1:
        torch.distributed.barrier()


PAGE_BYTES = 4096
# What is left for a checkpoint, given how much one takes.
ROOM: dict[str, Callable[[int], int]] = {
    "no room": lambda _: 0,
    "a few pages": lambda _: 4 * PAGE_BYTES,
    "room for half": lambda needed_bytes: needed_bytes // 2 // PAGE_BYTES * PAGE_BYTES,
    # While the manifest is written the parts of the two ranks are still there, a page each.
    "room for all but the manifest": lambda needed_bytes: needed_bytes + 2 * PAGE_BYTES - PAGE_BYTES,
}


def _save_on_a_full_disk(disk: Path, room: str, async_save: bool) -> list[Told]:
    manager = CheckpointManager(disk / "checkpoints", async_save=async_save)
    job = Big()
    job.train()
    manager.save(1, job.model, job.optimizer)
    manager.wait()
    saved = job.weights()
    job.train()

    def save_and_wait() -> None:
        manager.save(2, job.model, job.optimizer)
        manager.wait()

    sizes = [path.stat().st_size for path in (manager.root / "00000001").iterdir()]
    needed_bytes = sum(-(-size // PAGE_BYTES) * PAGE_BYTES for size in sizes)
    with _free_bytes_left(disk, ROOM[room](needed_bytes)):
        told = [_told(save_and_wait)]
        _barrier()  # the first rank tidies up after all have been told
        assert strangers(manager.root) == [], "what did not fit must not stay and fill the disk"
        told.append(_told(lambda: save(disk / "other", job.model, job.optimizer)))
        _barrier()
        assert sorted(path.name for path in disk.iterdir()) == ["checkpoints", "filler"]
        second = job.weights()
        assert manager.restore(job.model, job.optimizer) == (1, None)
        assert torch.equal(job.weights(), saved)
    job.train()
    assert torch.equal(job.weights(), second), "the state of step 1 was not restored"
    save_and_wait()
    assert manager.restore(job.model, job.optimizer) == (2, None)
    assert torch.equal(job.weights(), second)
    manager.close()
    return told


@pytest.mark.parametrize("async_save", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("room", ROOM)
def test_a_full_disk_is_an_error_on_all_ranks_and_the_next_save_works_when_there_is_room(
    nursery: Nursery, small_disk: Path, room: str, async_save: bool
) -> None:
    first, second = nursery.run(2, _save_on_a_full_disk, small_disk, room, async_save)
    for by_manager, by_save in zip(first, second, strict=True):
        for told in (by_manager, by_save):
            assert told.type_name in ("CheckpointError", "RemoteError")
            assert "No space left on device" in told.message
    # Did the disk fill up where the name of the case says?
    assert ("cannot complete" in first[0].message) == (room == "room for all but the manifest")
    assert "00000002" in first[0].message and "00000002" in second[0].message


def _save_on_a_read_only_disk(disk: Path, async_save: bool) -> list[Told]:
    root = disk / "checkpoints"
    manager = CheckpointManager(root, async_save=async_save)
    job = Job()
    job.train(1)
    job.save(manager)
    manager.wait()
    rank, _ = rank_and_world_size()
    if rank == 0:  # over itself: the manager's lock is open for writing, which a mount underneath would refuse
        _mount(disk, source=bytes(disk), flags=MS_BIND)
        _mount(disk, flags=MS_REMOUNT | MS_BIND | MS_RDONLY)
    _barrier()

    def save_and_wait() -> None:
        job.save(manager)
        manager.wait()

    job.train(1)
    told = [
        _told(save_and_wait),
        _told(lambda: save(root / "other", job.model, job.optimizer)),
        _told(lambda: CheckpointManager(disk / "another")),
    ]
    assert job.restore(manager) == 1
    _barrier()
    if rank == 0:
        _unmount(disk)
    _barrier()
    job.train(1)
    save_and_wait()
    assert Job().restore(manager) == 2
    assert strangers(root) == []
    manager.close()
    return told


@pytest.mark.parametrize("async_save", [False, True], ids=["sync", "async"])
def test_a_read_only_directory_is_an_error_on_all_ranks_and_can_still_be_read(
    nursery: Nursery, small_disk: Path, async_save: bool
) -> None:
    for told in nursery.run(2, _save_on_a_read_only_disk, small_disk, async_save):
        assert {one.type_name for one in told} <= {"CheckpointError", "RemoteError"}
        assert all("Read-only file system" in one.message for one in told)
        assert "00000002" in told[0].message and "other" in told[1].message and "another" in told[2].message


def _two_saves(root: Path) -> None:
    manager = CheckpointManager(root)
    job = Job()
    for _ in range(2):
        job.train(1)
        job.save(manager)


def _load_without(root: Path, missing: str) -> Told:
    job = Job()
    told = _told(lambda: load(root / "00000002", job.model, job.optimizer))
    manager = CheckpointManager(root)
    assert job.restore(manager) == 1
    assert job.digest_of_model() == Uninterrupted(2).digest_of_model(1)
    job.train(1)
    job.save(manager)  # of the very step whose file is missing
    assert Job().restore(manager) == 2
    manager.close()
    return told


@pytest.mark.parametrize("loaded_at", [1, 2, 3])
@pytest.mark.parametrize("missing_rank", [0, 1])
def test_a_missing_file_of_a_rank_is_named_by_all_ranks(
    nursery: Nursery, tmp_path: Path, missing_rank: int, loaded_at: int
) -> None:
    nursery.run(2, _two_saves, tmp_path)
    missing = tmp_path / "00000002" / f"__{missing_rank}_0.distcp"
    missing.unlink()
    for told in nursery.run(loaded_at, _load_without, tmp_path, missing.name):
        assert f"{missing} is missing" in told.message


def _lose_a_rank_while_saving(
    root: Path, lost_rank: int, signal_number: int, point: int, async_save: bool
) -> tuple[Told, float]:
    manager = CheckpointManager(root, async_save=async_save)
    job = Job()
    job.train(1)
    job.save(manager)
    manager.wait()
    job.train(1)
    started = time.monotonic()
    with Points(point if job.rank == lost_rank else None, signal_number=signal_number) as points:
        points.armed = True

        def save_and_wait() -> None:
            job.save(manager)
            manager.wait()

        return _told(save_and_wait), time.monotonic() - started


GROUP_TIMEOUT_SECONDS = 3.0
LOST = [
    pytest.param(rank, signal_number, id=f"rank {rank} {name}")
    for signal_number, name in ((signal.SIGKILL, "killed"), (signal.SIGSTOP, "stopped"))
    for rank in range(3)
    if name == "killed" or rank < 2  # a stopped rank costs the whole timeout
]


@pytest.mark.parametrize("async_save", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize(("lost_rank", "signal_number"), LOST)
def test_ranks_whose_peer_is_lost_during_a_save_say_so_within_the_timeout(
    nursery: Nursery, tmp_path: Path, lost_rank: int, signal_number: int, async_save: bool
) -> None:
    point = 8  # in the middle of its file
    life = nursery.start(
        3,
        _lose_a_rank_while_saving,
        tmp_path,
        lost_rank,
        signal_number,
        point,
        async_save,
        group_timeout_s=GROUP_TIMEOUT_SECONDS,
    )
    survivors = [rank for rank in range(3) if rank != lost_rank]
    outcomes = {rank: life.join_one(rank, timeout_s=20) for rank in survivors}
    if signal_number == signal.SIGSTOP:
        life.kill(lost_rank)
    assert life.join_one(lost_rank).was_killed
    for outcome in outcomes.values():
        assert outcome.error_type is None, outcome
        told, seconds = outcome.value
        assert told.type_name in ("CheckpointError", "RemoteError")
        assert "00000002" in told.message
        assert "lost contact with another rank" in told.message
        assert "Earlier checkpoints are untouched" in told.message
        assert seconds < 4 * GROUP_TIMEOUT_SECONDS
    nursery.run(3, _goes_on_from_1, tmp_path)


def _goes_on_from_1(root: Path) -> None:
    manager = CheckpointManager(root)
    job = Job(seed=3)
    assert job.restore(manager) == 1
    assert job.digest_of_model() == Uninterrupted(3).digest_of_model(1)
    assert strangers(root) == []
    job.train(1)
    job.save(manager)
    assert manager.latest_step() == 2
    manager.close()


def _save_to_a_root_of_ones_own(parent: Path, stale: bool, async_save: bool) -> list[Told]:
    directory.PARTS_TIMEOUT_SECONDS = 5.0  # if it waits for a part, it does so in vain
    rank, _ = rank_and_world_size()
    root = parent / f"host{rank}" / "checkpoints"
    root.mkdir(parents=True)
    if stale:  # left on each host by a job that ran there alone
        (root / ".00000001.incomplete").mkdir()
        (root.parent / ".plain.incomplete").mkdir()
    manager = CheckpointManager(root, async_save=async_save)
    job = Job()
    job.train(1)

    def save_and_wait() -> None:
        job.save(manager)
        manager.wait()

    told = [_told(save_and_wait), _told(lambda: save(root.parent / "plain", job.model, job.optimizer))]
    assert manager.restore(job.model, job.optimizer) is None
    manager.close()
    return told


@pytest.mark.parametrize("async_save", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("stale", [False, True], ids=["empty", "with leftovers of the same name"])
def test_a_disk_that_the_ranks_do_not_share_is_refused_at_the_save(
    nursery: Nursery, tmp_path: Path, stale: bool, async_save: bool
) -> None:
    started = time.monotonic()
    for told in nursery.run(2, _save_to_a_root_of_ones_own, tmp_path, stale, async_save):
        for one in told:
            assert one.type_name in ("CheckpointError", "RemoteError")
            assert "rank 1" in one.message
            assert "every rank must see" in one.message
    assert time.monotonic() - started < 5.0


def _write_late(path: Path) -> Told:
    job = Job()
    begin = functools.partial(api.begin, control_plane(None), path, job.model, job.optimizer, step=1, snapshot=True)
    of_the_killed_job = begin(extra="old")
    job.train(1)
    of_the_next_job = begin(extra="new")
    told = _told(of_the_killed_job.write)
    of_the_next_job.write()
    of_the_next_job.commit()
    fresh = Job(seed=2)
    assert load(path, fresh.model, fresh.optimizer) == "new"
    for got, expected in zip(fresh.model.parameters(), job.model.parameters(), strict=True):
        assert torch.equal(got, expected)
    return told


def test_a_rank_that_outlives_its_job_does_not_write_into_the_save_of_the_next(
    nursery: Nursery, tmp_path: Path
) -> None:
    """Rank 0 was killed, the job was started again, and a thread of the old rank 1 still has its part to write."""
    told = nursery.run(1, _write_late, tmp_path / "checkpoint")[0]
    assert told.type_name == "CheckpointError"
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def _load_from_a_root_of_ones_own(parent: Path) -> Told:
    rank, _ = rank_and_world_size()
    job = Job()
    return _told(lambda: load(parent / f"{rank}", job.model, job.optimizer))


def _save_alone(path: Path) -> None:
    job = Job()
    save(path, job.model, job.optimizer)


def test_ranks_that_read_different_checkpoints_behind_one_call_are_refused(nursery: Nursery, tmp_path: Path) -> None:
    for name in ("0", "1"):
        nursery.run(1, _save_alone, tmp_path / name)
    for told in nursery.run(2, _load_from_a_root_of_ones_own, tmp_path):
        assert "the checkpoints differ between ranks" in told.message
