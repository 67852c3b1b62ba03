"""`init_distributed` finds out how the script was started, and never takes a job of many for a world of one."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from sharded_adamax import DistributedContext, ShardedAdamax, init_distributed
from sharded_adamax.bootstrap import OTHER_LAUNCHERS, TORCHRUN_VARIABLES

REPOSITORY = Path(__file__).parents[2]
OF_ONE_RANK = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
ALONE = DistributedContext(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))


@pytest.fixture(autouse=True)
def _plain_python(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if started by ``python`` on a machine without GPUs, whatever runs the tests."""
    for name in (*TORCHRUN_VARIABLES, *OTHER_LAUNCHERS):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


class _Gpus:
    """A machine with GPUs, as far as init_distributed looks; what it asks for is noted."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
        self.current: list[int] = []
        self.groups: list[dict[str, Any]] = []
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "set_device", self.current.append)
        monkeypatch.setattr(dist, "init_process_group", self._note_group)
        monkeypatch.setattr(dist, "get_rank", lambda: int(os.environ["RANK"]))
        monkeypatch.setattr(dist, "get_world_size", lambda: int(os.environ["WORLD_SIZE"]))

    def _note_group(self, backend: str | None, **options: Any) -> None:
        self.groups.append({"backend": backend, **options})


def _set(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


# --- Plain python


def test_a_plain_start_is_a_world_of_one_without_a_process_group() -> None:
    assert init_distributed() == ALONE
    assert not dist.is_initialized()
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = ShardedAdamax([param], lr=0.5)
    param.grad = torch.ones(3)
    optimizer.step()
    assert param.tolist() == [0.5] * 3


def test_a_plain_start_with_gpus_takes_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = _Gpus(monkeypatch, 2)
    assert init_distributed() == DistributedContext(0, 1, 0, torch.device("cuda", 0))
    assert gpus.current == [0] and gpus.groups == []


SUBSETS = [
    subset for size in range(len(TORCHRUN_VARIABLES)) for subset in itertools.combinations(TORCHRUN_VARIABLES, size)
]
HALF_SET = [subset for subset in SUBSETS if "RANK" in subset or "WORLD_SIZE" in subset]


@pytest.mark.parametrize("subset", HALF_SET, ids=" ".join)
def test_half_of_torchruns_variables_is_refused_naming_the_other_half(
    subset: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    _set(monkeypatch, {name: OF_ONE_RANK[name] for name in subset})
    missing = ", ".join(name for name in TORCHRUN_VARIABLES if name not in subset)
    with pytest.raises(ValueError, match=f"got all but {missing}: start with torchrun, or unset RANK and WORLD_SIZE"):
        init_distributed()
    assert not dist.is_initialized()


@pytest.mark.parametrize("subset", [subset for subset in SUBSETS if subset not in HALF_SET], ids=" ".join)
def test_an_address_left_over_in_the_shell_is_no_job(subset: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    _set(monkeypatch, {name: OF_ONE_RANK[name] for name in subset})
    assert init_distributed() == ALONE
    assert not dist.is_initialized()


# --- Other launchers


@pytest.mark.parametrize(
    ("variable", "launcher"),
    [("OMPI_COMM_WORLD_SIZE", "mpirun"), ("PMI_SIZE", "mpirun"), ("SLURM_STEP_NUM_TASKS", "srun")],
)
def test_another_launcher_is_named_and_not_taken_for_a_world_of_one(
    variable: str, launcher: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, "2")
    with pytest.raises(NotImplementedError, match=rf"started by {launcher} \({variable}=2\).*torchrun"):
        init_distributed()
    monkeypatch.setenv(variable, "1")
    assert init_distributed() == ALONE


# --- torchrun


@pytest.mark.parametrize(("count", "local_rank"), [(0, 0), (1, 1), (2, 2), (2, 7)])
def test_more_local_ranks_than_gpus_is_refused_before_anything_is_joined(
    count: int, local_rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus = _Gpus(monkeypatch, count)
    _set(monkeypatch, {**OF_ONE_RANK, "LOCAL_RANK": str(local_rank)})
    with pytest.raises(RuntimeError, match=f"local rank {local_rank} has no GPU: this host has {count}"):
        init_distributed()
    assert gpus.current == [] and gpus.groups == []


@pytest.mark.parametrize("backend", [None, "nccl"])
def test_each_local_rank_takes_its_gpu_and_the_group_carries_both_kinds_of_tensors(
    backend: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus = _Gpus(monkeypatch, 4)
    _set(monkeypatch, {**OF_ONE_RANK, "RANK": "7", "WORLD_SIZE": "8", "LOCAL_RANK": "3"})
    device = torch.device("cuda", 3)
    assert init_distributed(backend) == DistributedContext(rank=7, world_size=8, local_rank=3, device=device)
    assert gpus.current == [3]
    assert gpus.groups == [{"backend": backend or "cpu:gloo,cuda:nccl", "device_id": device}]


def test_without_gpus_everything_travels_by_gloo(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = _Gpus(monkeypatch, 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    _set(monkeypatch, {**OF_ONE_RANK, "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"})
    assert init_distributed() == DistributedContext(rank=5, world_size=8, local_rank=1, device=torch.device("cpu"))
    assert gpus.groups == [{"backend": "gloo", "device_id": None}]


def test_torchruns_variables_win_over_those_of_the_launcher_that_started_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Srun starts one torchrun per host, whose children see both sets."""
    gpus = _Gpus(monkeypatch, 1)
    _set(monkeypatch, {**OF_ONE_RANK, "SLURM_STEP_NUM_TASKS": "2"})
    assert init_distributed().device == torch.device("cuda", 0)
    assert len(gpus.groups) == 1


# A process group is a global thing, and belongs into a process of its own.
PROGRAM = """
import json, os, torch, torch.distributed as dist
from sharded_adamax import ShardedAdamax, init_distributed
torch.cuda.is_available = lambda: False
if INITIALISED_BEFORE:
    dist.init_process_group("gloo")
contexts = [init_distributed(), init_distributed()]
group = dist.group.WORLD
param = torch.nn.Parameter(torch.ones(3))
optimizer = ShardedAdamax([param], lr=0.5, process_group=group)
param.sum().backward()
optimizer.step()
print(json.dumps({
    "contexts": [[c.rank, c.world_size, c.local_rank, str(c.device)] for c in contexts],
    "backend": dist.get_backend(), "same_group": dist.group.WORLD is group, "param": param.tolist(),
}))
dist.destroy_process_group()
"""


def _run(program: str, variables: dict[str, str]) -> dict[str, Any]:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", **variables}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


@pytest.mark.parametrize("initialised_before", [False, True])
def test_under_torchruns_variables_it_joins_a_real_group_once(initialised_before: bool) -> None:
    result = _run(f"INITIALISED_BEFORE = {initialised_before}\n{PROGRAM}", OF_ONE_RANK)
    assert result["contexts"] == [[0, 1, 0, "cpu"]] * 2
    assert result["backend"] == "gloo" and result["same_group"]
    assert result["param"] == [0.5] * 3


@pytest.mark.parametrize("local_rank", ["1", None], ids=["LOCAL_RANK=1", "no LOCAL_RANK"])
def test_a_group_that_is_there_already_is_used_as_it_is(
    local_rank: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    gpus = _Gpus(monkeypatch, 2)
    _set(monkeypatch, {"RANK": "3", "WORLD_SIZE": "4"})  # half-set does not matter any more
    if local_rank is not None:
        monkeypatch.setenv("LOCAL_RANK", local_rank)
    number = int(local_rank or 0)
    assert init_distributed() == DistributedContext(3, 4, number, torch.device("cuda", number))
    assert gpus.groups == [] and gpus.current == [number]


def test_the_context_cannot_be_changed_by_accident() -> None:
    context: Any = init_distributed()
    with pytest.raises(AttributeError):
        context.rank = 1
