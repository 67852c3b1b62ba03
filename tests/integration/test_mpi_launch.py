"""A real mpirun: training, the MPI collectives, and how a job ends when one rank does."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.integration.test_train_program import TINY

ROOT = Path(__file__).resolve().parents[2]
MPIRUN = Path(sys.executable).parent / "mpirun"  # of the mpich wheel, which the test extra brings
TRAIN = [ROOT / "launch" / "train.py", *TINY]
SECONDS_TO_DIE = 15

LAUNCHERS: dict[str, list[str | Path]] = {
    "torchrun": [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"],
    "mpirun": [MPIRUN, "-n", "2", sys.executable],
}


def _environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


def _run(*command: str | Path, timeout_s: float = 60) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        list(map(str, command)), capture_output=True, text=True, timeout=timeout_s, env=_environment(), check=False
    )


def _losses(launcher: str, out: Path, *arguments: str) -> list[tuple[int, float]]:
    done = _run(*LAUNCHERS[launcher], *TRAIN, "--out", out, *arguments)
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert all(record["world_size"] == 2 for record in records)
    return [(record["step"], record["loss"]) for record in records if record["event"] == "step"]


@pytest.fixture(scope="module")
def under_torchrun(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[tuple[int, float]]]:
    out = tmp_path_factory.mktemp("torchrun")
    return out, _losses("torchrun", out)


@pytest.mark.parametrize("backend", ["gloo", "mpi"])
def test_under_mpirun_the_losses_are_those_of_torchrun_to_the_last_bit(
    under_torchrun: tuple[Path, list[tuple[int, float]]], backend: str, tmp_path: Path
) -> None:
    losses = _losses("mpirun", tmp_path, f"--backend={backend}")
    assert len(losses) == 6
    assert losses == under_torchrun[1]


def test_a_run_of_torchrun_goes_on_under_mpirun_by_itself(
    under_torchrun: tuple[Path, list[tuple[int, float]]], tmp_path: Path
) -> None:
    """The default backend, and a checkpoint that travels from one launcher to another."""
    shutil.copytree(under_torchrun[0] / "checkpoints" / "00000003", tmp_path / "checkpoints" / "00000003")
    assert _losses("mpirun", tmp_path, "--resume") == under_torchrun[1][3:]


# --- One rank ends

FAILING = """
import os, sys, threading, time
import torch, torch.distributed as dist
from sharded_adamax import init_distributed

backend, how, pids = None if sys.argv[1] == "default" else sys.argv[1], sys.argv[2], sys.argv[3]
context = init_distributed(backend)
open(os.path.join(pids, str(os.getpid())), "w").close()
dist.all_reduce(torch.ones(3))
try:
    if context.rank == 1:
        print("now", file=sys.stderr, flush=True)
        if how == "raise":
            raise ValueError("the real reason")
        if how == "thread":
            def fail():
                raise ValueError("the real reason")
            threading.Thread(target=fail).start()
            time.sleep(600)
        if how == "exit":
            sys.exit("the real reason")
    dist.all_reduce(torch.ones(3))
    dist.all_reduce(torch.ones(3))
finally:
    if "destroy" in sys.argv:
        dist.destroy_process_group()
"""


def _fail(tmp_path: Path, *arguments: str) -> tuple[list[str], int, float]:
    """Run until nobody is left; returns the lines of stderr, the exit code, and the seconds since the failure."""
    program, pids = tmp_path / "failing.py", tmp_path / "pids"
    program.write_text(FAILING)
    pids.mkdir()
    process = subprocess.Popen(
        [str(MPIRUN), "-n", "3", sys.executable, str(program), arguments[0], arguments[1], str(pids), *arguments[2:]],
        stderr=subprocess.PIPE,
        text=True,
        env=_environment(),
        start_new_session=True,
    )
    try:
        assert process.stderr is not None
        lines: list[str] = []
        failed_at = time.monotonic()
        for line in process.stderr:
            lines.append(line.rstrip("\n"))
            if line == "now\n":
                failed_at = time.monotonic()
        code = process.wait(timeout=SECONDS_TO_DIE)
        numbers = [int(path.name) for path in pids.iterdir()]
        assert len(numbers) == 3
        while any(psutil.pid_exists(number) for number in numbers):
            assert time.monotonic() - failed_at < SECONDS_TO_DIE, "a rank outlived the job"
            time.sleep(0.05)
        return lines, code, time.monotonic() - failed_at
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.timeout(60)
@pytest.mark.parametrize(("backend", "how"), [("default", "raise"), ("mpi", "raise"), ("default", "thread")])
def test_an_exception_on_one_rank_ends_the_job_and_is_the_last_thing_to_be_seen(
    tmp_path: Path, backend: str, how: str
) -> None:
    lines, code, seconds = _fail(tmp_path, backend, how, "destroy")
    assert code != 0
    assert seconds < SECONDS_TO_DIE
    assert lines[-1].endswith("ValueError: the real reason"), "\n".join(lines)
    assert sum("Traceback" in line for line in lines) == 1, "\n".join(lines)


@pytest.mark.timeout(60)
@pytest.mark.parametrize(("backend", "ending"), [("default", "destroy"), ("mpi", "leave it to exit")])
def test_a_rank_that_exits_alone_does_not_leave_the_others_waiting(tmp_path: Path, backend: str, ending: str) -> None:
    lines, code, seconds = _fail(tmp_path, backend, "exit", ending)
    assert code != 0
    assert seconds < SECONDS_TO_DIE
    assert "the real reason" in lines


JOIN = "from sharded_adamax import init_distributed; init_distributed()"


def test_torchrun_inside_mpirun_is_refused(tmp_path: Path) -> None:
    program = tmp_path / "join.py"
    program.write_text(JOIN)
    done = _run(*LAUNCHERS["mpirun"], "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1", program)
    assert done.returncode != 0
    assert "started by two launchers: mpirun started 2 processes, and torchrun" in done.stderr


def test_a_port_that_is_taken_is_an_error_that_names_it() -> None:
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        done = _run("env", f"MASTER_PORT={port}", *LAUNCHERS["mpirun"], "-c", JOIN)
    assert done.returncode != 0
    assert f"RuntimeError: rank 0: expected to listen on port {port}" in done.stderr.splitlines()[-1]
