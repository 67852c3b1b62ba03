"""Two hosts, which are network namespaces with a link between them: the link is cut in the middle of training."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from tests.crash.nursery import Nursery
from tests.elastic.reference import References
from tests.elastic.torchrun import TINY, Agent, Job, read_lives

INTERFACE = "eth0"
# Longer than one rank may have to wait for another that saves, or that starts later: else a live peer is given up.
GROUP_TIMEOUT_SECONDS = 8
NOTICED_SECONDS = GROUP_TIMEOUT_SECONDS + 15  # the wait that times out may begin after the cut; then processes end
STEPS = 100


@dataclass
class Host:
    """A network namespace."""

    name: str
    address: str

    @property
    def prefix(self) -> list[str]:
        return ["ip", "netns", "exec", self.name]

    def set_link(self, state: str) -> None:
        _ip("-n", self.name, "link", "set", INTERFACE, state)


def _ip(*arguments: str) -> None:
    result = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if result.returncode:
        raise OSError(f"ip {' '.join(arguments)}: {result.stderr.strip()}")


@contextlib.contextmanager
def linked_hosts() -> Iterator[list[Host]]:
    """Make two hosts with a cable between them, and take them away again.

    Raises:
        OSError: Not allowed here, or not possible.
    """
    # Addresses need not be free outside: a namespace has a network of its own.
    hosts = [Host(f"sharded-adamax-{os.getpid()}-{letter}", f"10.77.0.{n}") for n, letter in ((1, "a"), (2, "b"))]
    first, second = hosts
    try:
        for host in hosts:
            _ip("netns", "add", host.name)
        _ip(
            *["-n", first.name, "link", "add", INTERFACE, "type", "veth"],
            *["peer", "name", INTERFACE, "netns", second.name],
        )
        for host in hosts:
            _ip("-n", host.name, "address", "add", f"{host.address}/24", "dev", INTERFACE)
            _ip("-n", host.name, "link", "set", "lo", "up")
            host.set_link("up")
        yield hosts
    finally:
        for host in hosts:
            with contextlib.suppress(OSError):  # it was not made
                _ip("netns", "delete", host.name)


@pytest.fixture
def hosts() -> Iterator[list[Host]]:
    if shutil.which("ip") is None:
        pytest.skip("no ip command (Debian: iproute2) to make network namespaces with")
    with contextlib.ExitStack() as stack:
        try:
            made = stack.enter_context(linked_hosts())
        except OSError as error:
            pytest.skip(f"network namespaces are not allowed here: {error}")
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
            GLOO_SOCKET_IFNAME=INTERFACE,
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
