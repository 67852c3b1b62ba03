"""Ranks of one mpirun on two hosts: two network namespaces with a wire between them, each with a host name of its own.

The names resolve to the loopback, if at all, and host a has a second interface that host b cannot reach: nothing but
trying finds the address where the ranks can meet.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hosts import linked_hosts

ROOT = Path(__file__).resolve().parents[2]
MPIRUN = Path(sys.executable).parent / "mpirun"
ELSEWHERE = "192.168.77.1"

# mpirun starts its helper on another host by this instead of ssh: HOST COMMAND...
REMOTE_SHELL = """#!/bin/bash
while [[ "$1" == -* ]]; do shift; done
host="$1"; shift
exec ip netns exec "{b}" unshare --uts bash -c "hostname other-host; $*"
"""
PROGRAM = """
import json, os, sys, torch, torch.distributed as dist
from sharded_adamax import init_distributed
context = init_distributed(sys.argv[1] if len(sys.argv) > 1 else None)
total = torch.full((1 << 18,), context.rank + 1.0)
dist.all_reduce(total)
place = [context.rank, context.local_rank, os.uname().nodename == "other-host", os.environ["GLOO_SOCKET_IFNAME"]]
places = [None] * context.world_size
dist.all_gather_object(places, place)
if context.rank == 0:
    print(json.dumps({"places": places, "total": total[-1].item()}))
dist.destroy_process_group()
"""


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[list[str]]:
    """Give the beginning of a command that starts ranks 0 and 1 on host a, and 2 and 3 on host b."""
    with contextlib.ExitStack() as stack:
        try:
            a, b = stack.enter_context(linked_hosts(2))
        except OSError as error:
            pytest.skip(f"no hosts to be had here: {error}")
        for command in (
            "link add elsewhere type veth peer name nowhere",
            f"address add {ELSEWHERE}/24 dev elsewhere",
            "link set elsewhere up",
            "link set nowhere up",
        ):
            subprocess.run([*a.prefix, "ip", *command.split()], check=True)
        shell = tmp_path / "remote-shell"
        shell.write_text(REMOTE_SHELL.format(b=b.namespace))
        shell.chmod(0o755)
        launcher = ["-launcher", "rsh", "-launcher-exec", str(shell), "-hosts", f"{a.address}:2,{b.address}:2"]
        yield [*a.prefix, str(MPIRUN), *launcher, "-n", "4", sys.executable, "-c", PROGRAM]


def _run(command: list[str], **variables: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    return subprocess.run(
        command, env=environment | variables, capture_output=True, text=True, timeout=100, check=False
    )


@pytest.mark.parametrize("backend", [[], ["mpi"]], ids=["default", "mpi"])
def test_ranks_on_two_hosts_find_the_address_that_all_reach(hosts: list[str], backend: list[str]) -> None:
    done = _run([*hosts, *backend])
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["total"] == 10
    assert result["places"] == [
        [0, 0, False, "wirea"], [1, 1, False, "wirea"], [2, 0, True, "wireb"], [3, 1, True, "wireb"],
    ]  # fmt: skip


def test_an_address_that_a_host_does_not_reach_is_named_with_the_host(hosts: list[str]) -> None:
    done = _run(hosts, MASTER_ADDR=ELSEWHERE)
    assert done.returncode != 0
    assert "that every host can connect to, tried 192.168.77.1 at port" in done.stderr
    assert "other-host reached none. Set MASTER_ADDR" in done.stderr
