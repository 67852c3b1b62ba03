"""`init_distributed` finds out how the script was started, and never takes a job of many for a world of one."""

from __future__ import annotations

import datetime
import itertools
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from sharded_adamax import DistributedContext, ShardedAdamax, init_distributed
from sharded_adamax.bootstrap import await_master
from sharded_adamax.launchers import (
    FIRST_PORT,
    MPIRUN_SIZES,
    NUM_PORTS,
    SRUN_VARIABLES,
    TORCHRUN_VARIABLES,
    Place,
    expand_node_list,
    find_launcher,
    srun_place,
)

REPOSITORY = Path(__file__).parents[2]
OF_ONE_RANK = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
ALONE = DistributedContext(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))


@pytest.fixture(autouse=True)
def _plain_python(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if started by ``python`` on a machine without GPUs, whatever runs the tests."""
    for name in (*TORCHRUN_VARIABLES, *MPIRUN_SIZES, *SRUN_VARIABLES, "TORCHELASTIC_USE_AGENT_STORE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def master() -> Iterator[dict[str, str]]:
    """Somebody who listens where the ranks meet."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield {**OF_ONE_RANK, "MASTER_PORT": str(listener.getsockname()[1])}


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


# --- Which launcher

OF_TWO_RANKS = {**OF_ONE_RANK, "WORLD_SIZE": "2"}
SRUN = {
    "SLURM_PROCID": "5",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_JOB_ID": "1234",
    "SLURM_STEP_ID": "3",
}
BATCH_SCRIPT = {"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_LOCALID": "0", "SLURM_JOB_NODELIST": "gpu[07-08]"}


@pytest.mark.parametrize(
    ("environ", "launcher"),
    [
        ({}, "python"),
        (OF_ONE_RANK, "torchrun"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "mpirun"),
        ({"PMI_SIZE": "2", "PMI_RANK": "0"}, "mpirun"),
        (SRUN, "srun"),
        # One process is a world of one, whoever started it.
        ({"OMPI_COMM_WORLD_SIZE": "1"}, "python"),
        ({"PMI_SIZE": "1"}, "python"),
        ({**SRUN, "SLURM_STEP_NUM_TASKS": "1"}, "python"),
        # A batch script is one process, for all the tasks that its job may start.
        (BATCH_SCRIPT, "python"),
        # Nested: the innermost counts.
        ({**SRUN, "PMI_SIZE": "8", "PMI_RANK": "5"}, "srun"),  # srun --mpi=pmi2
        ({**SRUN, "SLURM_STEP_NUM_TASKS": "2", "PMI_SIZE": "8", "PMI_RANK": "5"}, "mpirun"),  # its helpers by srun
        ({**SRUN, "PMI_SIZE": "8", "PMI_RANK": "6"}, "mpirun"),
        ({**SRUN, "OMPI_COMM_WORLD_SIZE": "8"}, "mpirun"),
        ({**SRUN, **OF_ONE_RANK}, "torchrun"),
        ({**OF_TWO_RANKS, "GROUP_WORLD_SIZE": "2", "OMPI_COMM_WORLD_SIZE": "2"}, "torchrun"),  # one torchrun per host
        ({**OF_TWO_RANKS, "PMI_SIZE": "2"}, "torchrun"),  # numbers that a script took from mpirun's
        ({**OF_TWO_RANKS, "PMI_SIZE": "1"}, "torchrun"),
    ],
)
def test_the_innermost_launcher_is_the_one_that_counts(environ: dict[str, str], launcher: str) -> None:
    assert find_launcher(environ) == launcher


@pytest.mark.parametrize("size", MPIRUN_SIZES)
@pytest.mark.parametrize("num_agents", [None, "1"])
def test_a_torchrun_in_each_process_of_mpirun_is_refused(size: str, num_agents: str | None) -> None:
    environ = {**OF_ONE_RANK, "WORLD_SIZE": "4", size: "3"}
    if num_agents is not None:
        environ["GROUP_WORLD_SIZE"] = num_agents
    with pytest.raises(ValueError, match=r"two launchers: mpirun started 3 .* 4 ranks .*Start with one launcher"):
        find_launcher(environ)


@pytest.mark.parametrize("name", ["PMI_SIZE", "SLURM_STEP_NUM_TASKS"])
@pytest.mark.parametrize("value", ["", "two"])
def test_a_number_that_is_none_is_named(name: str, value: str) -> None:
    with pytest.raises(ValueError, match=f"expected an integer in the environment variable {name}, got '{value}'"):
        find_launcher({name: value})


# --- mpirun (with a real one: tests/integration/test_mpi_launch.py)

WITHOUT_MPI4PY = """
import sys
sys.modules["mpi4py"] = None
from sharded_adamax import init_distributed
init_distributed({backend})
"""
JOIN = "from sharded_adamax import init_distributed; init_distributed()"


def _error_of(program: str, variables: dict[str, str]) -> str:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), **variables}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1, (done.returncode, done.stderr)
    return " ".join(done.stderr.split())


@pytest.mark.parametrize(("backend", "variables"), [("None", {"OMPI_COMM_WORLD_SIZE": "2"}), ("'mpi'", {})])
def test_without_mpi4py_the_error_names_the_extra(backend: str, variables: dict[str, str]) -> None:
    error = _error_of(WITHOUT_MPI4PY.format(backend=backend), variables)
    assert "ModuleNotFoundError: " in error
    assert "mpi4py is not installed: pip install 'sharded-adamax[mpi]'" in error


def test_without_an_mpi_library_the_error_says_where_one_is_looked_for() -> None:
    error = _error_of(JOIN, {"PMI_SIZE": "2", "MPI4PY_LIBMPI": "/nowhere/libmpi.so"})
    assert "RuntimeError: mpi4py is installed, but finds no MPI library" in error
    assert "pip install mpich" in error


def test_a_library_that_is_not_open_mpi_is_refused_under_its_mpirun() -> None:
    """Before MPI starts: MPICH would end the process itself, and speak of PMI versions."""
    error = _error_of(JOIN, {"OMPI_COMM_WORLD_SIZE": "2"})
    assert "RuntimeError: expected Open MPI, whose mpirun started this process, got MPICH" in error
    assert "belong to different MPIs" in error


def test_processes_that_mpi_does_not_know_of_are_refused() -> None:
    """Open MPI's library under MPICH's mpirun: each process would be a world of one."""
    error = _error_of("from sharded_adamax.mpi import meet; meet(expected_size=2, timeout_s=1)", {})
    assert "RuntimeError: expected 2 processes, as mpirun says, got 1 from the MPI library" in error
    assert "belong to different MPIs" in error


def test_mpi_collectives_are_refused_under_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    _set(monkeypatch, OF_TWO_RANKS)
    with pytest.raises(ValueError, match='backend="mpi" needs processes that were started by mpirun, got torchrun'):
        init_distributed("mpi")


# --- srun


def test_srun_gives_every_task_its_place() -> None:
    assert srun_place(SRUN) == Place(5, 8, 1, "gpu07", FIRST_PORT + 1234 * 17 + 3 - NUM_PORTS)


def test_on_one_host_srun_meets_at_the_loopback() -> None:
    assert srun_place({**SRUN, "SLURM_STEP_NODELIST": "gpu07"}).master_address == "127.0.0.1"


def test_the_port_differs_between_steps_and_jobs_and_stays_below_the_systems_own() -> None:
    ports = {
        (job, step): srun_place({**SRUN, "SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)}).master_port
        for job in range(4_000_000_000, 4_000_000_100)
        for step in range(5)
    }
    assert len(set(ports.values())) == len(ports)
    assert min(ports.values()) >= 12_000 and max(ports.values()) < 32_000


def test_master_addr_and_master_port_take_precedence_over_what_srun_says() -> None:
    place = srun_place({**SRUN, "MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "2345"})
    assert (place.master_address, place.master_port) == ("10.0.0.7", 2345)


@pytest.mark.parametrize("missing", [name for name in SRUN_VARIABLES if name != "SLURM_STEP_NUM_TASKS"])
def test_half_of_sruns_variables_is_refused_naming_the_other_half(missing: str) -> None:
    with pytest.raises(ValueError, match=f"got all but {missing}: start with srun"):
        find_launcher({name: value for name, value in SRUN.items() if name != missing})


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("login", ["login"]),
        ("a,b", ["a", "b"]),
        ("n[1-3]", ["n1", "n2", "n3"]),
        ("n[08-11]", ["n08", "n09", "n10", "n11"]),
        ("n[1,3-4],login", ["n1", "n3", "n4", "login"]),
        ("n[1-2]-ib,m[007]", ["n1-ib", "n2-ib", "m007"]),
        ("r[0-1]n[0-1]", ["r0n0", "r0n1", "r1n0", "r1n1"]),
        ("gpu-a-3.cluster.org", ["gpu-a-3.cluster.org"]),
    ],
)
def test_node_lists_are_written_out(text: str, hosts: list[str]) -> None:
    assert expand_node_list(text) == hosts


@pytest.mark.parametrize("text", ["", ",", "n[", "n[]", "n]1[", "n[1-]", "n[a-c]", "n[1-2", "n[1[2]]", "n[2-1]"])
def test_what_is_no_node_list_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expected host names as Slurm writes them"):
        expand_node_list(text)


JOIN_BY_SRUN = """
import json, torch, torch.distributed as dist
from sharded_adamax import init_distributed
torch.cuda.is_available = lambda: False
contexts = [init_distributed(), init_distributed()]
ranks = [None] * dist.get_world_size()
dist.all_gather_object(ranks, contexts[0].rank)
print(json.dumps({"contexts": [[c.rank, c.world_size, c.local_rank] for c in contexts], "ranks": ranks}))
dist.destroy_process_group()
"""


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _srun_task(rank: int, port: int, program: str) -> subprocess.Popen[str]:
    variables = {
        "SLURM_PROCID": str(rank),
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_LOCALID": str(rank),
        "SLURM_STEP_NODELIST": "localhost",
        "MASTER_PORT": str(port),
    }
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", **variables}
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", program],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_tasks_of_srun_meet() -> None:
    """The variables of a real srun, on processes that it did not start."""
    port = _free_port()
    tasks = [_srun_task(rank, port, JOIN_BY_SRUN) for rank in range(2)]
    for rank, task in enumerate(tasks):
        out, err = task.communicate(timeout=60)
        assert task.returncode == 0, err
        assert json.loads(out.splitlines()[-1]) == {"contexts": [[rank, 2, rank]] * 2, "ranks": [0, 1]}


def test_rank_0_does_not_wait_for_ever_for_a_task_that_is_not_coming() -> None:
    task = _srun_task(0, _free_port(), "from sharded_adamax import *; init_distributed(join_timeout_s=2)")
    _, err = task.communicate(timeout=60)
    assert task.returncode == 1
    assert "RuntimeError: rank 0: expected all 2 ranks to meet at 127.0.0.1:" in err and "within 2 s" in err
    assert "MASTER_PORT" in err and "MASTER_ADDR" in err


def test_an_address_where_nobody_answers_is_named_with_what_to_look_at() -> None:
    place = Place(rank=3, world_size=4, local_rank=0, master_address="127.0.0.1", master_port=_free_port())
    began = time.monotonic()
    with pytest.raises(RuntimeError, match=r"rank 3: expected rank 0 at 127.0.0.1:\d+ to answer within 1 s.*refused"):
        await_master(place, 1)
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("launcher", ["torchrun", "srun"])
def test_a_rank_whose_master_does_not_answer_says_so_in_time(launcher: str, monkeypatch: pytest.MonkeyPatch) -> None:
    port = str(_free_port())
    of_rank_1 = {**OF_TWO_RANKS, "RANK": "1", "LOCAL_RANK": "1"} if launcher == "torchrun" else SRUN
    _set(monkeypatch, {**of_rank_1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port})
    began = time.monotonic()
    with pytest.raises(RuntimeError, match=rf"expected rank 0 at 127.0.0.1:{port} to answer within 1 s"):
        init_distributed(join_timeout_s=1)
    assert time.monotonic() - began < 5
    assert not dist.is_initialized()


@pytest.mark.parametrize("found", ["agent", "no agent"])
def test_rank_0_of_torchrun_waits_for_the_agents_store_only(found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = _Gpus(monkeypatch, 1)
    _set(monkeypatch, {**OF_TWO_RANKS, "MASTER_PORT": str(_free_port())})
    if found == "agent":
        monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
        with pytest.raises(RuntimeError, match="rank 0: expected rank 0 at"):
            init_distributed(join_timeout_s=0.5)
    else:
        init_distributed(join_timeout_s=0.5)
    assert len(gpus.groups) == (0 if found == "agent" else 1)


def test_a_host_name_that_nobody_knows_is_an_error_in_time() -> None:
    place = Place(rank=3, world_size=4, local_rank=0, master_address="no-such-host.invalid", master_port=1)
    with pytest.raises(RuntimeError, match=r"no-such-host.invalid:1 to answer within 1 s"):
        await_master(place, 1)


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
    backend: str | None, monkeypatch: pytest.MonkeyPatch, master: dict[str, str]
) -> None:
    gpus = _Gpus(monkeypatch, 4)
    _set(monkeypatch, {**master, "RANK": "7", "WORLD_SIZE": "8", "LOCAL_RANK": "3"})
    device = torch.device("cuda", 3)
    assert init_distributed(backend) == DistributedContext(rank=7, world_size=8, local_rank=3, device=device)
    assert gpus.current == [3]
    assert gpus.groups == [{"backend": backend or "cpu:gloo,cuda:nccl", "timeout": None, "device_id": device}]


def test_without_gpus_everything_travels_by_gloo(monkeypatch: pytest.MonkeyPatch, master: dict[str, str]) -> None:
    gpus = _Gpus(monkeypatch, 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    _set(monkeypatch, {**master, "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"})
    context = init_distributed(timeout_s=90)
    assert context == DistributedContext(rank=5, world_size=8, local_rank=1, device=torch.device("cpu"))
    assert gpus.groups == [{"backend": "gloo", "timeout": datetime.timedelta(seconds=90), "device_id": None}]


def test_torchruns_variables_win_over_those_of_the_launcher_that_started_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Srun starts one torchrun per host, whose children see both sets."""
    gpus = _Gpus(monkeypatch, 1)
    _set(monkeypatch, {**OF_ONE_RANK, "SLURM_STEP_NUM_TASKS": "2"})
    assert init_distributed().device == torch.device("cuda", 0)
    assert len(gpus.groups) == 1


def test_mpi_collectives_on_a_host_with_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = _Gpus(monkeypatch, 2)
    with pytest.raises(RuntimeError, match=r'backend="mpi" carries CPU tensors only, and this host has 2 GPU\(s\)'):
        init_distributed("mpi")
    assert gpus.current == [] and gpus.groups == []


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
