"""Two hosts, which are network namespaces with a link between them: the link is cut in the middle of training."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.crash.nursery import Nursery
from tests.elastic.reference import References
from tests.elastic.torchrun import TINY, Agent, Job, read_lives
from tests.hosts import Host, linked_hosts

# Longer than one rank may have to wait for another that saves, or that starts later: else a live peer is given up.
GROUP_TIMEOUT_SECONDS = 8
NOTICED_SECONDS = GROUP_TIMEOUT_SECONDS + 15  # the wait that times out may begin after the cut; then processes end
STEPS = 100


@pytest.fixture
def hosts() -> Iterator[list[Host]]:
    with contextlib.ExitStack() as stack:
        try:
            made = stack.enter_context(linked_hosts(2))
        except OSError as error:
            pytest.skip(f"no hosts to be had here: {error}")
        yield made


def start(job: Job, hosts: list[Host], arguments: list[str]) -> list[Agent]:
    """Start launch/torchrun.sh on each host."""
    return [
        job.start(
            *arguments,
            f"--timeout={GROUP_TIMEOUT_SECONDS}",
            prefix=host.prefix,
            PET_NNODES="2",
            PET_NPROC_PER_NODE="1",
            PET_MAX_RESTARTS="5",
            PET_RDZV_ENDPOINT=f"{hosts[0].address}:29400",
            # Both hosts have the name of this machine, so nothing that is found by name is right: not the host of the
            # rendezvous, not the address of rank 0, not the interface that gloo listens on.
            PET_RDZV_CONF=f"is_host={int(host is hosts[0])}",
            PET_LOCAL_ADDR=host.address,
            GLOO_SOCKET_IFNAME=host.interface,
        )
        for host in hosts
    ]


def has_ended(process: psutil.Process) -> bool:
    # The agent on the host that lost the rendezvous waits for that, too, and does not see yet that its rank has ended.
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


@pytest.mark.timeout(240)
def test_a_job_over_two_hosts_survives_a_cut_link_with_the_same_losses(
    hosts: list[Host], nursery: Nursery, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    arguments = [*TINY, "--batch=12", f"--steps={STEPS}", "--checkpoint-every=10"]
    with Job(tmp_path / "job") as job:
        agents = start(job, hosts, [*arguments, f"--out={out}"])
        job.wait_until(lambda: any(len(life.losses) >= 25 for life in read_lives(out)), "25 steps")
        workers = [worker for agent in agents for worker in agent.workers().values()]
        hosts[1].set_link("down")
        cut_at = time.monotonic()
        assert len(workers) == 2
        job.wait_until(lambda: all(map(has_ended, workers)), "the end of both ranks", timeout_s=NOTICED_SECONDS)
        noticed_s = time.monotonic() - cut_at
        for agent in agents:
            assert f"Timed out waiting {GROUP_TIMEOUT_SECONDS}000ms" in agent.output()
        before = read_lives(out)
        hosts[1].set_link("up")
        for agent in agents:
            assert agent.wait(90) == 0, agent.output()
        recovered_s = time.monotonic() - cut_at
        assert job.processes() == []

    lives = read_lives(out)
    print(
        f"noticed after {noticed_s:.1f} s, done after {recovered_s:.1f} s;",
        [(i.start_step, i.last_step) for i in lives],
    )
    assert len(lives) > len(before)
    assert lives[len(before)].start_step >= 20
    assert lives[-1].last_step == STEPS
    uninterrupted = References(nursery, tmp_path, arguments).life(2)
    for life in lives:
        assert life.world_size == 2
        for step, loss in life.losses.items():
            assert loss == uninterrupted.losses[step], f"step {step}"
