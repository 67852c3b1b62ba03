"""launch/mpirun.sh and launch/slurm.sbatch: a rank is killed, all are started again, the losses are the same bits."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from sharded_adamax import bootstrap
from tests.crash.nursery import Nursery
from tests.elastic.reference import References
from tests.elastic.torchrun import ROOT, TINY, Agent, Job, read_lives
from tests.integration import slurm

ARGUMENTS = [*TINY, "--batch=12", "--steps=60", "--checkpoint-every=10"]
KILL_AFTER_STEPS = 15
pytestmark = [
    pytest.mark.skipif(
        hasattr(bootstrap, "OTHER_LAUNCHERS"), reason="init_distributed does not speak to mpirun and srun yet"
    ),
    pytest.mark.timeout(240),
]


def ranks_of(job: Job) -> list[psutil.Process]:
    found = []
    for process in job.processes():
        with contextlib.suppress(psutil.Error):
            if process.cmdline()[1:2] == [str(ROOT / "launch" / "train.py")]:
                found.append(process)
    return found


def kill_a_rank_and_compare(job: Job, launcher: Agent, directory: Path, nursery: Nursery) -> None:
    """Kill a rank in the middle; expect the job to come to its end, with the losses of an uninterrupted run."""
    out = directory / "run"
    job.wait_until(lambda: any(len(life.losses) >= KILL_AFTER_STEPS for life in read_lives(out)), "its first steps")
    ranks = ranks_of(job)
    assert len(ranks) == 2
    ranks[1].kill()
    assert launcher.wait(90) == 0, launcher.output()
    assert ranks_of(job) == []
    assert "restart 1 of 3" in launcher.output()
    first, second = read_lives(out)
    assert first.last_step >= KILL_AFTER_STEPS
    assert first.last_step - second.start_step <= 10
    assert second.last_step == 60
    uninterrupted = References(nursery, directory, ARGUMENTS).life(2)
    for life in (first, second):
        assert life.world_size == 2
        for step, loss in life.losses.items():
            assert loss == uninterrupted.losses[step], f"step {step}"


def test_under_mpirun_a_job_whose_rank_is_killed_resumes_with_the_same_losses(nursery: Nursery, tmp_path: Path) -> None:
    beside_python = Path(sys.executable).parent
    if not (beside_python / "mpirun").exists():
        pytest.skip("no mpirun beside python: the extra mpi brings one")
    with Job(tmp_path / "job") as job:
        launcher = job.start_command(
            ["bash", str(ROOT / "launch" / "mpirun.sh"), *ARGUMENTS, f"--out={tmp_path / 'run'}"],
            PATH=f"{beside_python}:{os.environ['PATH']}",
        )
        kill_a_rank_and_compare(job, launcher, tmp_path, nursery)


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[slurm.Slurm]:
    missing = slurm.missing_commands()
    if missing or os.geteuid() != 0:
        pytest.skip(f"wants root and Slurm (Debian: slurmctld slurmd slurm-client); missing: {missing or 'root'}")
    with slurm.single_node(tmp_path / "slurm") as started:
        yield started


def test_under_slurm_a_job_whose_rank_is_killed_resumes_with_the_same_losses(
    cluster: slurm.Slurm, nursery: Nursery, tmp_path: Path
) -> None:
    log = tmp_path / "job" / "agent0.log"  # where the Job writes what sbatch itself says
    with Job(tmp_path / "job") as job:
        launcher = job.start_command(
            [
                *["sbatch", "--wait", "--ntasks-per-node=2", f"--output={log}"],
                *["launch/slurm.sbatch", *ARGUMENTS, f"--out={tmp_path / 'run'}"],
            ],
            SLURM_CONF=cluster.environment["SLURM_CONF"],
        )
        kill_a_rank_and_compare(job, launcher, tmp_path, nursery)
