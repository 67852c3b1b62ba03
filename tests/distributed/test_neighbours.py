"""Ranks of one host read each other's memory: who with whom, whose bits, when a row may change, and how it ends."""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from sharded_adamax.collectives import GlooGroup, control_plane, lines
from sharded_adamax.pending import LostRankError
from tests.distributed.pool import Pool
from tests.distributed.problems import assert_same_bits
from tests.distributed.programs import start_rank

PATIENCE_SECONDS = 20
ROW_NUMEL = 5 << 18  # 5 MiB: several pieces


@contextmanager
def _near(switch: str = "1") -> Iterator[GlooGroup]:
    """A group whose ranks have met; left by all together, as an optimizer is."""
    world = dist.group.WORLD
    assert world is not None
    group = GlooGroup(world)
    with patch.dict(os.environ, {lines.SWITCH: switch}):
        group.meet(control_plane(None))
    yield group
    dist.barrier()
    if group._neighbours is not None:
        group._neighbours.close()


def _ranks_in_reach(group: GlooGroup) -> list[int]:
    return [] if group._neighbours is None else sorted(group._neighbours.ranks)


def _rows(rank: int, size: int) -> Tensor:
    return torch.randn(size * ROW_NUMEL, generator=torch.Generator().manual_seed(rank))


def _check_bits(group: GlooGroup) -> None:
    rank, size = group.rank, group.size
    buckets = [_rows(other, size) for other in range(size)]
    total = group.reduce_scatter(buckets[rank].clone()).wait("a test")
    expected = buckets[0]
    for other in buckets[1:]:
        expected = expected + other
    mine = slice(rank * ROW_NUMEL, (rank + 1) * ROW_NUMEL)
    assert_same_bits(total, expected[mine], "the sum")
    whole = torch.zeros(size * ROW_NUMEL)
    whole[mine] = buckets[0][mine]
    group.all_gather(whole).wait("a test")
    assert_same_bits(whole, buckets[0], "the bucket")


def _meet_with_one_switched_off() -> list[int]:
    with _near(switch="0" if dist.get_rank() == 2 else "1") as group:
        _check_bits(group)
        return _ranks_in_reach(group)


def test_a_rank_that_is_switched_off_gets_messages_and_the_others_read(ranks: Pool) -> None:
    assert ranks.run(4, _meet_with_one_switched_off) == [[1, 3], [0, 3], [], [0, 1]]


def _meet_with(target: str, replacement: Any, on_rank: int) -> list[int]:
    chosen = replacement if dist.get_rank() == on_rank else getattr(lines, target)
    with patch.object(lines, target, chosen), _near() as group:
        _check_bits(group)
        return _ranks_in_reach(group)


def _elsewhere() -> str:
    return "another host"


def _refused(*_: object) -> None:
    raise PermissionError("Operation not permitted")


_card = lines._card


def _of_other_memory(*arguments: Any) -> lines.Card:
    return _card(*arguments)._replace(secret=bytes(lines._SECRET_BYTES))


def _of_a_twin(*arguments: Any) -> lines.Card:
    """That of a process with the same memory, which is not the one that answers."""
    twin = os.fork()
    if twin == 0:
        time.sleep(5)
        os._exit(0)
    return _card(*arguments)._replace(pid=twin)


@pytest.mark.parametrize(
    ("target", "replacement"),
    [("_host", _elsewhere), ("_read", _refused), ("_card", _of_other_memory), ("_card", _of_a_twin)],
    ids=["is on another host", "may not read", "has another secret", "is another process"],
)
def test_where_one_of_two_cannot_read_both_send_messages(ranks: Pool, target: str, replacement: Any) -> None:
    assert ranks.run(3, _meet_with, target, replacement, 1) == [[2], [], [0]]


def _travel_unattended() -> None:
    with _near() as group:
        assert group._neighbours is not None
        pending = group.reduce_scatter(torch.ones(group.size * ROW_NUMEL))
        gives_up = time.monotonic() + PATIENCE_SECONDS
        while group._neighbours._reading._transfers:
            assert time.monotonic() < gives_up, "rows stand still until somebody waits"
            time.sleep(0.005)
        dist.barrier()  # nobody waits before everything has come everywhere
        assert_same_bits(pending.wait("a test"), torch.full((ROW_NUMEL,), float(group.size)), "the sum")


def test_rows_travel_while_nobody_waits(ranks: Pool) -> None:
    ranks.run(3, _travel_unattended)


def _post_late() -> None:
    with _near() as group:
        rank = group.rank
        whole = torch.full((2 * ROW_NUMEL,), float(rank))
        if rank == 1:
            dist.barrier()  # until rank 0 has looked
            group.all_gather(whole).wait("a test")
        else:
            pending = group.all_gather(whole)
            assert pending.missing() == [1]
            waiting = threading.Thread(target=pending.wait, args=("a test",))
            waiting.start()
            waiting.join(0.2)
            assert waiting.is_alive(), "the row may be changed though nobody has taken it"
            dist.barrier()
            waiting.join(PATIENCE_SECONDS)
            assert not waiting.is_alive()
            assert pending.missing() == []
        assert_same_bits(whole, torch.arange(2.0).repeat_interleave(ROW_NUMEL), "the bucket")


def test_a_row_is_kept_until_the_neighbour_has_taken_it(ranks: Pool) -> None:
    ranks.run(2, _post_late)


def _let_go() -> None:
    with _near() as group:
        for _ in range(20):
            bucket = torch.ones(group.size * ROW_NUMEL)
            memory = weakref.ref(bucket.untyped_storage())
            pending = group.reduce_scatter(bucket)
            del bucket
            total = pending.wait("a test")
            assert memory() is None, "the bucket outlives the wait"
            memory = weakref.ref(total.untyped_storage())
            del total, pending
            assert memory() is None, "the result outlives its owner"


def test_no_memory_outlives_the_wait(ranks: Pool) -> None:
    ranks.run(3, _let_go)


def _is_reading() -> bool:
    return "sharded_adamax reading" in [thread.name for thread in threading.enumerate()]


def _hang_up(offers: bool) -> None:
    with _near() as group:
        assert group._neighbours is not None
        group._neighbours._reading._timeout = timedelta(seconds=1)
        if group.rank == 1:
            abandoned = group.all_gather(torch.zeros(2 * ROW_NUMEL)) if offers else None
            group._neighbours.close()
            dist.barrier()
            del abandoned
            return
        dist.barrier()
        pending = group.all_gather(torch.zeros(2 * ROW_NUMEL))
        before = time.process_time()
        with pytest.raises(LostRankError, match="nothing was heard of it within 0:00:01") as caught:
            pending.wait("a test")
        assert time.process_time() - before < 0.5, "the thread that reads does not rest"
        assert caught.value.lost == (1,)
        assert pending.missing() == [1]
        assert _is_reading()


@pytest.mark.parametrize("offers", [False, True])
def test_a_neighbour_that_hangs_up_is_named_when_the_timeout_is_over(ranks: Pool, offers: bool) -> None:
    ranks.run(2, _hang_up, offers)


def _abandon(with_child: bool) -> None:
    """Rank 1 takes the row of rank 0 and lets its own memory go, while rank 0 is reading it."""
    with _near() as group:
        assert group._neighbours is not None
        group._neighbours._reading._timeout = timedelta(seconds=1)
        reading = group._neighbours._reading
        store = dist.distributed_c10d._get_default_store()
        if group.rank == 1:
            pending = group.all_gather(torch.zeros(2 * ROW_NUMEL))
            (transfer,) = reading._transfers.values()
            store.wait(["reading"])
            while transfer.incoming is not None:
                time.sleep(0.005)
            if with_child and os.fork() == 0:  # it holds the sockets open
                time.sleep(5)
                os._exit(0)
            del pending
            group._neighbours.close()
            store.set("gone", "")
            return
        read = lines.Line.read

        def slowly(*arguments: Any) -> None:
            read(*arguments)
            store.set("reading", "")
            store.wait(["gone"])
            with suppress(OSError):
                reading._listen(1)  # that rank 1 has taken the row: it could have come before

        with patch.object(lines.Line, "read", slowly):
            pending = group.all_gather(torch.zeros(2 * ROW_NUMEL))
            with pytest.raises(LostRankError, match="rank 1"):
                pending.wait("a test")


@pytest.mark.parametrize("with_child", [False, True])
def test_what_was_read_from_a_neighbour_that_has_let_go_meanwhile_does_not_count(ranks: Pool, with_child: bool) -> None:
    ranks.run(2, _abandon, with_child)


def _disagree() -> None:
    with _near() as group:
        assert group._neighbours is not None
        numel = 2 * (1000 + group.rank)
        with group._neighbours._reading._changed:  # the thread finds both at once
            pending = [group.all_gather(torch.zeros(numel)) for _ in range(2)]
            dist.barrier()
        for each in pending:
            with pytest.raises(LostRankError, match=r"expected a row of \d+ bytes, got one of \d+"):
                each.wait("a test")
        assert _is_reading()


def test_rows_of_different_sizes_are_refused_not_read(ranks: Pool) -> None:
    ranks.run(2, _disagree)


# Rank 1 is killed; a child that it forked, as a DataLoader does, has its sockets still open. Arguments: rank, store.
KILLED = """
import datetime, os, signal, sys, time
import torch, torch.distributed as dist
from sharded_adamax.collectives import GlooGroup, control_plane
from sharded_adamax.pending import LostRankError

rank = int(sys.argv[1])
timeout = datetime.timedelta(seconds=60)
dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2, timeout=timeout)
group = GlooGroup(dist.group.WORLD)
group.meet(control_plane(None))
if rank == 1:
    child = os.fork()
    if child == 0:
        time.sleep(40)
        os._exit(0)
    print(child, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
for doing in ("a test", "the next one"):
    try:
        group.all_gather(torch.zeros(2000)).wait(doing)
    except LostRankError as error:
        print(error)
before = time.process_time()
time.sleep(1)
print("rests" if time.process_time() - before < 0.5 else "does not rest")
"""


def test_a_killed_neighbour_is_noticed_though_a_child_of_it_lives(tmp_path: Path) -> None:
    survivor, victim = (start_rank(KILLED, rank, tmp_path) for rank in range(2))
    assert victim.stdout is not None
    child = int(victim.stdout.readline())
    try:
        output, errors = survivor.communicate(timeout=PATIENCE_SECONDS)
        os.kill(child, 0)  # lives
    finally:
        os.kill(child, signal.SIGKILL)
    victim.communicate()
    assert survivor.returncode == 0, errors
    for doing in ("a test", "the next one"):
        assert f"rank 0 waited in vain for rank 1 in {doing}" in output
    assert output.count("its process has ended") == 2
    assert output.splitlines()[-1] == "rests"


def _fork_and_go_on() -> None:
    with _near() as group:
        child = os.fork()
        if child == 0:
            try:
                assert group._neighbours is not None
                group._neighbours.close()  # as the end of the program would
            finally:
                os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        dist.barrier()
        _check_bits(group)


def test_a_child_made_by_fork_hangs_up_for_nobody(ranks: Pool) -> None:
    ranks.run(2, _fork_and_go_on)


def _resources() -> Counter[str]:
    """Return the names of threads and open files."""
    found = Counter(thread.name for thread in threading.enumerate())
    for name in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):
            found[os.readlink(f"/proc/self/fd/{name}")] += 1
    return found


def _come_and_go() -> None:
    world = dist.group.WORLD
    assert world is not None
    dist.barrier()
    before = _resources()
    group = GlooGroup(world)
    group.meet(control_plane(None))
    _check_bits(group)
    dist.barrier()
    assert sum((_resources() - before).values()) >= 1 + 1 + 2 * 2  # thread, eventfd; socket and pidfd of two neighbours
    del group
    gc.collect()
    assert not _resources() - before  # gloo may have closed some of an earlier test in the meantime


def test_thread_and_files_go_with_the_group(ranks: Pool) -> None:
    ranks.run(3, _come_and_go)
