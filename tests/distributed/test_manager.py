"""CheckpointManager: what it keeps, what it finds, what it falls back to; and saves that go on in the background."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.optim.lr_scheduler import StepLR

from sharded_adamax import CheckpointDamagedError, CheckpointError, CheckpointManager, ShardedAdamax
from sharded_adamax.checkpoint import disk, manifest
from tests.distributed.pool import Failure, Pool
from tests.distributed.problems import backward, gradient

ROOT = Path(__file__).resolve().parents[2]


class Job:
    """A small model and its optimizer, on one rank or several."""

    def __init__(self, numel: int = 70, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.model = nn.Module()
        self.model.register_parameter("weight", nn.Parameter(torch.randn(numel, generator=generator)))
        self.optimizer = ShardedAdamax(self.model.named_parameters(), lr=1e-2)
        self.step = 0

    def train(self, num_steps: int = 1) -> Job:
        rank = dist.get_rank() if dist.is_initialized() else 0
        for _ in range(num_steps):
            params = list(self.model.parameters())
            backward(params, [gradient(self.step, rank, index, param) for index, param in enumerate(params)])
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.step += 1
        return self

    def save(self, manager: CheckpointManager, **arguments: Any) -> None:
        manager.save(self.step, self.model, self.optimizer, **arguments)

    def restore(self, manager: CheckpointManager, step: int | None = None) -> int | None:
        restored = manager.restore(self.model, self.optimizer, step)
        self.step = self.step if restored is None else restored[0]
        return None if restored is None else restored[0]

    def weights(self) -> torch.Tensor:
        return self.model.get_parameter("weight").detach().clone()


def _weights_at(step: int) -> torch.Tensor:
    return Job().train(step).weights()


@contextlib.contextmanager
def opened(root: Path, **arguments: Any) -> Iterator[CheckpointManager]:
    manager = CheckpointManager(root, **arguments)
    try:
        yield manager
    finally:
        manager.close()


def _save_steps(manager: CheckpointManager, steps: list[int], metrics: list[float] | None = None) -> Job:
    job = Job()
    for index, step in enumerate(steps):
        job.train(step - job.step)
        job.save(manager, metric=None if metrics is None else metrics[index])
    manager.wait()
    return job


def _flip_a_bit(root: Path, step: int) -> None:
    """Damage the weights: a record that every restore reads."""
    directory = root / f"{step:08d}"
    written = manifest.parse((directory / "manifest.json").read_bytes(), directory)
    record = written.tensors["model.weight"].chunks[0].record
    data = bytearray((directory / record.file).read_bytes())
    data[record.offset + record.length // 2] ^= 1
    (directory / record.file).write_bytes(data)


# What stays.


def test_the_newest_stay_and_nothing_of_the_others_is_left(tmp_path: Path) -> None:
    with opened(tmp_path, keep_last=2) as manager:
        _save_steps(manager, [1, 2, 3, 4, 5])
        assert manager.steps() == [4, 5]
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "00000004", "00000005", "latest"]


def test_multiples_of_keep_every_stay_beside_the_newest(tmp_path: Path) -> None:
    with opened(tmp_path, keep_last=1, keep_every=3) as manager:
        _save_steps(manager, [1, 2, 3, 4, 5, 6, 7])
        assert manager.steps() == [3, 6, 7]


@pytest.mark.parametrize(("best", "kept"), [("min", [3, 5, 6]), ("max", [2, 4, 6])])
def test_the_best_by_the_metric_stay_and_nan_is_never_best(tmp_path: Path, best: str, kept: list[int]) -> None:
    metrics = [math.nan, 9.0, 1.0, 8.0, -2.5, 4.0]  # first: a NaN that is compared stays where it is
    with opened(tmp_path, keep_last=1, keep_best=2, best=best) as manager:
        _save_steps(manager, [1, 2, 3, 4, 5, 6], metrics)
        assert manager.steps() == kept


def test_of_equally_good_ones_the_newer_stays(tmp_path: Path) -> None:
    with opened(tmp_path, keep_last=1, keep_best=1) as manager:
        _save_steps(manager, [1, 2, 3], [1.0, 1.0, 2.0])
        assert manager.steps() == [2, 3]


def test_the_best_is_known_after_a_restart(tmp_path: Path) -> None:
    with opened(tmp_path, keep_last=1, keep_best=1) as manager:
        _save_steps(manager, [1, 2], [1.0, 2.0])
    with opened(tmp_path, keep_last=1, keep_best=1) as manager:
        _save_steps(manager, [3, 4], [3.0, 4.0])
        assert manager.steps() == [1, 4]


def test_a_checkpoint_just_saved_stays_although_later_steps_are_there(tmp_path: Path) -> None:
    """Someone went back to step 2 and trains on another way: that is not a reason to throw the new way away."""
    with opened(tmp_path, keep_last=1, keep_every=2) as manager:
        _save_steps(manager, [2, 4, 6])
        job = Job()
        assert job.restore(manager, step=2) == 2
        job.train(1)
        job.save(manager)
        assert 3 in manager.steps()
        assert (tmp_path / "latest").read_text() == "00000003\n"


@pytest.mark.parametrize(
    "arguments", [{"keep_last": 0}, {"keep_every": 0}, {"keep_best": -1}, {"best": "largest"}], ids=str
)
def test_bad_arguments_are_refused_before_anything_is_touched(tmp_path: Path, arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"expected keep_last >= 1.*got .*" + next(iter(arguments))):
        CheckpointManager(tmp_path / "root", **arguments)
    assert not (tmp_path / "root").exists()


# What is found.


def test_an_empty_root_gives_none(tmp_path: Path) -> None:
    with opened(tmp_path / "new") as manager:
        assert Job().restore(manager) is None
        assert manager.latest_step() is None


def test_latest_names_the_newest_after_every_save(tmp_path: Path) -> None:
    with opened(tmp_path) as manager:
        for step in (1, 2):
            _save_steps(manager, [step])
            assert (tmp_path / "latest").read_text() == f"{step:08d}\n"
            assert manager.latest_step() == step


def test_restore_takes_the_newest_or_the_step_it_is_told(tmp_path: Path) -> None:
    with opened(tmp_path) as manager:
        _save_steps(manager, [1, 2, 10])
        job = Job(seed=1)
        assert job.restore(manager) == 10
        assert torch.equal(job.weights(), _weights_at(10))
        assert job.restore(manager, step=2) == 2
        assert torch.equal(job.weights(), _weights_at(2))
        with pytest.raises(FileNotFoundError, match="00000007"):
            job.restore(manager, step=7)


def test_restore_does_not_believe_latest(tmp_path: Path) -> None:
    with opened(tmp_path) as manager:
        _save_steps(manager, [1, 2])
        (tmp_path / "latest").write_text("../../elsewhere\n")
        assert Job().restore(manager) == 2


# Damage.


def test_a_damaged_checkpoint_is_set_aside_and_its_step_is_saved_anew(tmp_path: Path) -> None:
    with opened(tmp_path) as manager:
        _save_steps(manager, [1, 2, 3])
        _flip_a_bit(tmp_path, 2)
        _flip_a_bit(tmp_path, 3)
        job = Job(seed=1)
        with pytest.warns(UserWarning, match="is damaged, trying an older one") as record:
            assert job.restore(manager) == 1
        assert [str(w.message).split(" is damaged")[0][-8:] for w in record] == ["00000003", "00000002"]
        assert torch.equal(job.weights(), _weights_at(1))
        assert {path.name for path in tmp_path.glob("*.damaged")} == {"00000002.damaged", "00000003.damaged"}
        assert (tmp_path / "latest").read_text() == "00000001\n", "latest must not name what is not there"
        for step in (2, 3):
            job.train()
            job.save(manager)
            assert job.step == step
        again = Job(seed=2)
        assert again.restore(manager) == 3
        assert torch.equal(again.weights(), _weights_at(3))


def test_only_damaged_checkpoints_are_an_error_not_a_fresh_start(tmp_path: Path) -> None:
    with opened(tmp_path) as manager:
        _save_steps(manager, [1, 2])
        _flip_a_bit(tmp_path, 1)
        (tmp_path / "00000002" / "manifest.json").unlink()
        (tmp_path / "00000002" / ".metadata").unlink()
        whole_message = r"every checkpoint.*\[2, 1\]"
        with pytest.warns(UserWarning, match="is damaged"), pytest.raises(CheckpointDamagedError, match=whole_message):
            Job().restore(manager)
        assert manager.steps() == [1, 2], "what could not be replaced stays where it is"


def test_damage_of_the_step_that_was_asked_for_is_an_error(tmp_path: Path) -> None:
    with opened(tmp_path) as manager:
        _save_steps(manager, [1, 2])
        _flip_a_bit(tmp_path, 2)
        with pytest.raises(CheckpointDamagedError, match="00000002"):
            Job().restore(manager, step=2)
        assert manager.steps() == [1, 2]


def test_another_model_is_an_error_and_not_damage(tmp_path: Path) -> None:
    with opened(tmp_path) as manager:
        _save_steps(manager, [1, 2])
        with pytest.raises(CheckpointError, match=r"shape \(70,\), expected \(71,\)") as caught:
            Job(numel=71).restore(manager)
        assert not isinstance(caught.value, CheckpointDamagedError)
        assert manager.steps() == [1, 2]


def _fall_back(root: Path) -> list[str]:
    manager = CheckpointManager(root)
    job = Job(seed=1)
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        assert job.restore(manager) == 1
    job.train()
    job.save(manager)
    manager.close()
    return [str(warning.message) for warning in record if "is damaged" in str(warning.message)]


def _save_two(root: Path) -> None:
    with opened(root) as manager:
        _save_steps(manager, [1, 2])


@pytest.mark.parametrize("world_size", [2, 3])
def test_all_ranks_fall_back_together_when_one_sees_the_damage(ranks: Pool, tmp_path: Path, world_size: int) -> None:
    ranks.run(2, _save_two, tmp_path)
    _flip_a_bit(tmp_path, 2)
    for messages in ranks.run(world_size, _fall_back, tmp_path):
        assert len(messages) == 1 and "00000002" in messages[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".lock",
        "00000001",
        "00000002",
        "00000002.damaged",
        "latest",
    ]


def _restore_other_models(root: Path) -> None:
    manager = CheckpointManager(root)
    try:
        Job(numel=99).restore(manager)
    finally:
        manager.close()


def test_another_model_stops_all_ranks(ranks: Pool, tmp_path: Path) -> None:
    ranks.run(2, _save_two, tmp_path)
    for failure in ranks.run_expecting_failures(2, _restore_other_models, tmp_path):
        assert isinstance(failure, Failure)
        assert failure.type_name == "CheckpointError" and "expected (99,)" in failure.message
    assert not list(tmp_path.glob("*.damaged"))


# Leftovers and other jobs.


def test_leftovers_of_crashed_saves_are_removed_at_the_start(tmp_path: Path) -> None:
    (tmp_path / ".00000005.incomplete").mkdir()
    (tmp_path / f".00000006.{'0' * 32}.incomplete").mkdir()
    (tmp_path / f".00000006.{'0' * 32}.incomplete" / "__0_0.distcp").write_bytes(b"half")
    (tmp_path / ".latest").write_text("0000")
    (tmp_path / "notes.txt").write_text("mine")
    with opened(tmp_path) as manager:
        assert manager.steps() == []
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "notes.txt"]


def test_a_second_manager_in_one_process_is_refused_until_the_first_is_closed(tmp_path: Path) -> None:
    with opened(tmp_path), pytest.raises(CheckpointError, match=rf"another job.*{os.getpid()}"):
        CheckpointManager(tmp_path)
    CheckpointManager(tmp_path).close()


HOLD = """
    import sys, time
    from sharded_adamax import CheckpointManager
    manager = CheckpointManager(sys.argv[1])
    print("holding", flush=True)
    time.sleep(60)
"""


def _python(program: str, *arguments: str | Path, launcher: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    path = Path(str(arguments[0])).parent / "program.py"
    path.write_text(textwrap.dedent(program))
    return subprocess.Popen(
        [sys.executable, *launcher, str(path), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


def test_another_job_on_the_directory_is_noticed_and_its_death_frees_it(tmp_path: Path) -> None:
    root = tmp_path / "root"
    holder = _python(HOLD, root)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "holding\n", holder.communicate()[1]
        with pytest.raises(CheckpointError, match=rf'another job writes checkpoints to.*"pid": {holder.pid}'):
            CheckpointManager(root)
    finally:
        holder.kill()
        holder.communicate()
    CheckpointManager(root).close()


def test_a_forked_child_does_not_keep_the_directory_locked(tmp_path: Path) -> None:
    """The workers of a DataLoader are forked after the manager was made and may outlive it."""
    manager = CheckpointManager(tmp_path)
    child = os.fork()
    if child == 0:
        time.sleep(60)
        os._exit(0)
    try:
        time.sleep(0.05)
        with pytest.raises(CheckpointError, match="another job"):
            CheckpointManager(tmp_path)  # the child has not freed it either
        manager.close()
        CheckpointManager(tmp_path).close()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


HOLD_WITH_CHILD = """
    import os, sys, time
    from sharded_adamax import CheckpointManager
    manager = CheckpointManager(sys.argv[1])
    child = os.fork()
    if child:
        print(child, flush=True)
    time.sleep(60)
"""


def test_a_child_that_outlives_a_killed_job_does_not_lock_out_the_next(tmp_path: Path) -> None:
    root = tmp_path / "root"
    holder = _python(HOLD_WITH_CHILD, root)
    assert holder.stdout is not None
    child = int(holder.stdout.readline())
    try:
        time.sleep(0.05)  # the child's first instructions
        holder.kill()
        holder.wait()
        CheckpointManager(root).close()
    finally:
        os.kill(child, signal.SIGKILL)
        holder.communicate()


def _open_twice(root: Path) -> None:
    first = CheckpointManager(root)
    try:
        CheckpointManager(root)
    finally:
        first.close()


def test_all_ranks_hear_of_the_other_job(ranks: Pool, tmp_path: Path) -> None:
    first, second = ranks.run_expecting_failures(2, _open_twice, tmp_path)
    assert first.type_name == "CheckpointError" and "another job" in first.message
    assert second.type_name == "RemoteError" and "another job" in second.message


# Saves in the background.


@contextlib.contextmanager
def _disk_function(name: str, replace: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    original = getattr(disk, name)
    setattr(disk, name, replace(original))
    try:
        yield
    finally:
        setattr(disk, name, original)


@contextlib.contextmanager
def _held_disk() -> Iterator[threading.Event]:
    """Writes wait until the event is set, or the block is left."""
    go = threading.Event()

    def held(write_file: Callable[..., None]) -> Callable[..., None]:
        def wait_and_write(*args: Any) -> None:
            assert go.wait(30)
            write_file(*args)

        return wait_and_write

    with _disk_function("write_file", held):
        try:
            yield go
        finally:
            go.set()


def _train_while_the_disk_is_slow(root: Path) -> None:
    manager = CheckpointManager(root, async_save=True)
    job = Job().train(3)
    with _held_disk() as go:
        extra = {"list": [1]}
        job.save(manager, extra=extra)
        extra["list"].append(2)
        job.train(4)
        for group in job.optimizer.param_groups:
            group["lr"] = 77.0
        torch.rand(5)
        assert manager.steps() == []
        go.set()
        manager.wait()
    resumed = Job(seed=4)
    restored = manager.restore(resumed.model, resumed.optimizer)
    assert restored == (3, {"list": [1]})
    expected = Job().train(3)
    assert torch.equal(resumed.weights(), expected.weights())
    assert resumed.optimizer.param_groups[0]["lr"] == 1e-2
    resumed.step = 3
    assert torch.equal(resumed.train(4).weights(), expected.train(4).weights())
    manager.close()


@pytest.mark.parametrize("world_size", [1, 2])
def test_later_steps_do_not_leak_into_a_slow_save(ranks: Pool, tmp_path: Path, world_size: int) -> None:
    ranks.run(world_size, _train_while_the_disk_is_slow, tmp_path)


def _fail_in_the_background(root: Path, bad_rank: int, fails: str, next_call: str) -> str:
    manager = CheckpointManager(root, async_save=True)
    job = Job().train(1)
    job.save(manager)
    manager.wait()
    job.train(1)

    def broken(call: Callable[..., None]) -> Callable[..., None]:
        def fail(path: Path, *args: Any) -> None:
            if path.name == fails and dist.get_rank() == bad_rank:
                raise OSError(5, "Input/output error", str(path))
            call(path, *args)

        return fail

    with _disk_function("write_file", broken):
        job.save(manager)
        job.train(1)  # the error is not here
        calls: dict[str, Callable[[], Any]] = {
            "save": lambda: job.save(manager),
            "wait": manager.wait,
            "restore": lambda: job.restore(manager),
            "close": manager.close,
        }
        try:
            calls[next_call]()
            raise AssertionError("the error was swallowed")
        except RuntimeError as error:
            message = f"{type(error).__name__}: {error}"
    manager.wait()  # said once
    dist.barrier()
    assert manager.steps() == [1]
    assert not list(root.glob(".*.incomplete"))
    job.save(manager)
    assert Job().restore(manager) == 3
    manager.close()
    return message


@pytest.mark.parametrize("next_call", ["save", "wait", "restore", "close"])
@pytest.mark.parametrize(
    ("bad_rank", "fails"), [(0, "__0_0.distcp"), (1, "__1_0.distcp"), (0, "manifest.json")], ids=lambda v: str(v)
)
def test_an_error_in_the_background_is_raised_by_the_next_call_on_all_ranks(
    ranks: Pool, tmp_path: Path, bad_rank: int, fails: str, next_call: str
) -> None:
    messages = ranks.run(2, _fail_in_the_background, tmp_path, bad_rank, fails, next_call)
    for rank, message in enumerate(messages):
        assert message.startswith("CheckpointError: " if rank == bad_rank else f"RemoteError: rank {bad_rank} failed")
        assert "Input/output error" in message and "00000002" in message


def _save_twice_quickly(root: Path) -> list[int]:
    manager = CheckpointManager(root, async_save=True)
    job = Job().train(1)
    with _held_disk() as go:
        job.save(manager)
        job.train(1)
        threading.Timer(0.2, go.set).start()
        started = time.monotonic()
        job.save(manager)
        assert time.monotonic() - started > 0.1, "it did not wait for the first"
        assert 1 in manager.steps()
    manager.close()
    return manager.steps()


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_second_save_waits_for_the_first(ranks: Pool, tmp_path: Path, world_size: int) -> None:
    assert ranks.run(world_size, _save_twice_quickly, tmp_path) == [[1, 2]] * world_size


LAST_SAVE = """
    import sys, time
    import torch
    from sharded_adamax import CheckpointManager, ShardedAdamax, init_distributed
    from sharded_adamax.checkpoint import disk

    init_distributed()
    model = torch.nn.Linear(30, 30)
    optimizer = ShardedAdamax(model.named_parameters())
    manager = CheckpointManager(sys.argv[1], async_save=True)
    write_file = disk.write_file

    def slow(*args):
        time.sleep(0.3)
        write_file(*args)

    disk.write_file = slow
    manager.save(1, model, optimizer, extra="the end")
    if sys.argv[2] == "raise":
        raise SystemExit(3)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
"""


# Not (2, "raise"): torchrun kills the other ranks when one ends with an error.
@pytest.mark.parametrize(("world_size", "ending"), [(1, "return"), (1, "raise"), (2, "return")])
def test_a_process_that_ends_waits_for_its_save(tmp_path: Path, world_size: int, ending: str) -> None:
    root = tmp_path / "root"
    if world_size == 1:
        program = _python(LAST_SAVE, root, ending)
    else:
        launcher = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world_size}")
        program = _python(LAST_SAVE, root, ending, launcher=launcher)
    _, errors = program.communicate(timeout=60)
    assert program.returncode == (3 if ending == "raise" else 0), errors
    assert sorted(path.name for path in root.iterdir()) == [".lock", "00000001", "latest"]
    with opened(root) as manager:
        model = nn.Linear(30, 30)
        assert manager.restore(model, ShardedAdamax(model.named_parameters())) == (1, "the end")


# Everything a resume needs.


def _train_with_scheduler(job: Job, scheduler: StepLR, num_steps: int) -> None:
    for _ in range(num_steps):
        job.train()
        scheduler.step()


def test_a_scheduler_in_extra_goes_on_where_it_was(tmp_path: Path) -> None:
    job = Job()
    scheduler = StepLR(job.optimizer, step_size=2, gamma=0.5)
    with opened(tmp_path) as manager:
        _train_with_scheduler(job, scheduler, 3)
        job.save(manager, extra={"scheduler": scheduler.state_dict(), "epoch": 7, "position": torch.arange(3)})
        _train_with_scheduler(job, scheduler, 4)
        resumed = Job(seed=8)
        resumed_scheduler = StepLR(resumed.optimizer, step_size=2, gamma=0.5)
        restored = manager.restore(resumed.model, resumed.optimizer)
    assert restored is not None
    resumed.step, extra = restored
    assert extra["epoch"] == 7 and torch.equal(extra["position"], torch.arange(3))
    resumed_scheduler.load_state_dict(extra["scheduler"])
    _train_with_scheduler(resumed, resumed_scheduler, 4)
    assert torch.equal(resumed.weights(), job.weights())
    assert resumed_scheduler.get_last_lr() == scheduler.get_last_lr()


def _draw() -> tuple[float, float, float]:
    import random

    import numpy as np

    return torch.rand(()).item(), random.random(), float(np.random.rand())


def _save_with_generators(root: Path, async_save: bool) -> tuple[float, float, float]:
    import random

    import numpy as np

    for seed in (torch.manual_seed, random.seed, np.random.seed):
        seed(100 + dist.get_rank())
    _draw()
    with opened(root, async_save=async_save) as manager:
        _save_steps(manager, [1])
        return _draw()


def _restore_generators(root: Path) -> tuple[float, float, float]:
    import random

    import numpy as np

    for seed in (torch.manual_seed, random.seed, np.random.seed):
        seed(5)
    with opened(root) as manager:
        job = Job()
        assert job.restore(manager) == 1
        return _draw()


@pytest.mark.parametrize("async_save", [False, True], ids=["sync", "async"])
def test_generators_go_on_at_the_same_world_size_and_are_left_alone_at_another(
    ranks: Pool, tmp_path: Path, async_save: bool
) -> None:
    drawn = ranks.run(2, _save_with_generators, tmp_path, async_save)
    assert drawn[0] != drawn[1]
    assert ranks.run(2, _restore_generators, tmp_path) == drawn
    at_three = ranks.run(3, _restore_generators, tmp_path)
    assert at_three[0] == at_three[1] == at_three[2], "seeded alike, they must still be alike"
    assert at_three[0] not in drawn
