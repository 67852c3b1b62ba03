"""Hosts on one machine: network namespaces around a switch, with links of a given rate. Linux, root, iproute2.

Programs on a host see a network of their own. Each link is full duplex: what a host sends and what it receives are held
to the rate each by itself, by a token bucket (`tc tbf`) at either end of the link:

    host a: wirea <- bucket, bucket -> switch <- bucket, bucket -> host b: wireb
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import shutil
import string
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# What a bucket lets through at once. Not below a large packet of TCP (64 KiB), which it would have to cut up; a
# millisecond of the fastest rate in use is enough for the clock that fills it.
BURST_SECONDS = 1e-3
MIN_BURST_BYTES = 128 << 10
QUEUE_MS = 50
NAME = "sharded-adamax"

_networks = itertools.count()


@dataclass(frozen=True)
class Host:
    """Where a program can be started: on this machine, or in a network namespace of it."""

    address: str
    interface: str
    namespace: str | None = None

    @property
    def prefix(self) -> list[str]:
        """The beginning of a command that runs on this host."""
        return [] if self.namespace is None else ["ip", "netns", "exec", self.namespace]

    def set_link(self, state: str) -> None:
        _run(*self.prefix, "ip", "link", "set", self.interface, state)


LOCALHOST = Host("127.0.0.1", "lo")


@contextlib.contextmanager
def linked_hosts(num_hosts: int, rate_mbit: float | None = None) -> Iterator[list[Host]]:
    """Make hosts that reach each other through a switch, and take them away again.

    Args:
        rate_mbit: Of each host's link, in 10^6 bits per second and in each direction, headers included; None: as fast
            as the machine can.

    Raises:
        OSError: Not allowed here, or not possible; the message says what is missing.
    """
    for command in ("ip", "tc"):
        if shutil.which(command) is None:
            raise OSError(f"no {command} command (Debian: iproute2) to make network namespaces with")
    if os.geteuid() != 0:
        raise OSError("network namespaces need root")
    _sweep()
    # Names are shared with all of the machine, addresses are not: a namespace has a network of its own.
    network = f"{NAME}-{os.getpid()}-{next(_networks)}"
    switch = f"{network}-switch"
    hosts = [
        Host(f"10.77.0.{number}", f"wire{letter}", f"{network}-{letter}")
        for number, letter in zip(range(1, num_hosts + 1), string.ascii_lowercase, strict=False)
    ]
    with contextlib.ExitStack() as stack:
        for namespace in (switch, *(str(host.namespace) for host in hosts)):
            _run("ip", "netns", "add", namespace)
            stack.callback(_run, "ip", "netns", "delete", namespace)  # takes the links along
        _run("ip", "-n", switch, "link", "add", "bridge", "type", "bridge")
        _run("ip", "-n", switch, "link", "set", "bridge", "up")
        for host in hosts:
            _connect(host, switch, rate_mbit)
        yield hosts


def _sweep() -> None:
    """Take away what is left of processes that were killed."""
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=False).stdout
    for namespace, pid in re.findall(rf"^({NAME}-(\d+)-\S+)", listed, re.MULTILINE):
        if not Path("/proc", pid).exists():
            with contextlib.suppress(OSError):  # another process sweeps at the same time
                _run("ip", "netns", "delete", namespace)


def _connect(host: Host, switch: str, rate_mbit: float | None) -> None:
    """Lay a cable from ``host`` to the switch; its two ends have the same name."""
    namespace, wire = str(host.namespace), host.interface
    _run("ip", "-n", namespace, "link", "add", wire, "type", "veth", "peer", "name", wire, "netns", switch)
    if rate_mbit is not None:
        burst_bytes = max(MIN_BURST_BYTES, int(rate_mbit * 1e6 / 8 * BURST_SECONDS))
        bucket = f"tbf rate {round(rate_mbit * 1e6)}bit burst {burst_bytes} latency {QUEUE_MS}ms".split()
        for end in (namespace, switch):
            _run("tc", "-n", end, "qdisc", "add", "dev", wire, "root", *bucket)
    _run("ip", "-n", switch, "link", "set", wire, "master", "bridge", "up")
    _run("ip", "-n", namespace, "address", "add", f"{host.address}/24", "dev", wire)
    _run("ip", "-n", namespace, "link", "set", "lo", "up")
    host.set_link("up")


def _run(*command: str) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise OSError(f"{' '.join(command)}: {result.stderr.strip()}")
