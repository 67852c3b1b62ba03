"""Ranks on hosts with links of a given rate, and what the links really carry.

    python -m tests.benchmarks.links --hosts 2 4 --mbit 200 1000 5000

The hosts are network namespaces of this machine (needs root), so both ends share its cores: at high rates the
processors are the limit and not the link. That is why what a link carries is measured and not taken for granted.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.hosts import LOCALHOST, Host, linked_hosts

ROOT = Path(__file__).resolve().parents[2]
PORT = 29400
PROBE_SECONDS = 0.7
PIECE_BYTES = 1 << 20


@contextlib.contextmanager
def joined(num_hosts: int, rate_mbit: float | None) -> Iterator[list[Host]]:
    """Give a host for each rank: with links of that rate between them, or this machine for all where it is None.

    Raises:
        OSError: There can be no such hosts here; the message says why.
    """
    if rate_mbit is None:
        yield [LOCALHOST] * num_hosts
    else:
        with linked_hosts(num_hosts, rate_mbit) as hosts:
            yield hosts


def name_of(rate_mbit: float | None) -> str:
    return "loopback" if rate_mbit is None else f"{rate_mbit:g} Mbit/s"


def run_ranks(hosts: Sequence[Host], arguments: Sequence[object], *, timeout_s: float) -> str:
    """Run ``python *arguments`` as rank r on host r, with one thread each, and return what rank 0 printed.

    The ranks find each other by the variables that torchrun sets. What the others print goes to stderr.

    Raises:
        RuntimeError: A rank failed, or did not end in time; all are killed.
    """
    port = PORT if hosts[0].namespace else _free_port()
    processes: list[subprocess.Popen[bytes]] = []
    with tempfile.TemporaryFile("w+") as output:
        try:
            for rank, host in enumerate(hosts):
                processes.append(
                    subprocess.Popen(
                        [*host.prefix, sys.executable, *map(str, arguments)],
                        env=os.environ | _environment(hosts, rank, port),
                        stdout=output if rank == 0 else sys.stderr,
                        cwd=ROOT,
                    )
                )
            _wait(processes, timeout_s)
        finally:
            for process in processes:
                process.kill()
                process.wait()
        output.seek(0)
        return output.read()


def _environment(hosts: Sequence[Host], rank: int, port: int) -> dict[str, str]:
    alone = hosts[rank].namespace is not None
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(len(hosts)),
        "LOCAL_RANK": "0" if alone else str(rank),
        "LOCAL_WORLD_SIZE": "1" if alone else str(len(hosts)),
        "MASTER_ADDR": hosts[0].address,
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": hosts[rank].interface,
        "OMP_NUM_THREADS": "1",
    }


def _wait(processes: Sequence[subprocess.Popen[bytes]], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while True:
        codes = [process.poll() for process in processes]
        if any(codes):
            raise RuntimeError(f"a rank failed (exit codes: {codes}); its output is above")
        if None not in codes:
            return
        if time.monotonic() > deadline:
            raise RuntimeError(f"the ranks did not end within {timeout_s:g} s (exit codes: {codes})")
        time.sleep(0.02)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((LOCALHOST.address, 0))
        return int(probe.getsockname()[1])


def carried_mbit(hosts: Sequence[Host]) -> float:
    """Return the payload that host 0 receives per second when every host sends to the next one, all at once.

    The payload of TCP is at most 0.957 of a link (1,448 bytes of each Ethernet packet of 1,514).
    """
    arguments = ["-m", __spec__.name, "--addresses", *(host.address for host in hosts)]
    return float(json.loads(run_ranks(hosts, arguments, timeout_s=60)))


def _probe(addresses: Sequence[str]) -> None:
    """Be one host of `carried_mbit`."""
    rank = int(os.environ["RANK"])
    with socket.create_server((addresses[rank], PORT + 1)) as server:
        connections: list[socket.socket] = []
        acceptor = threading.Thread(target=lambda: connections.append(server.accept()[0]))
        acceptor.start()
        sender = _connected(addresses[(rank + 1) % len(addresses)])
        acceptor.join()
    received = 0
    until = time.monotonic() + PROBE_SECONDS

    def send() -> None:
        piece = bytes(PIECE_BYTES)
        while time.monotonic() < until:
            sender.sendall(piece)
        sender.close()

    thread = threading.Thread(target=send)
    thread.start()
    began = time.monotonic()
    buffer = bytearray(PIECE_BYTES)
    while count := connections[0].recv_into(buffer):
        received += count
    if rank == 0:
        print(received * 8 / 1e6 / (time.monotonic() - began))
    thread.join()


def _connected(address: str) -> socket.socket:
    deadline = time.monotonic() + 20
    while True:
        try:
            return socket.create_connection((address, PORT + 1))
        except ConnectionRefusedError:  # that host is not up yet
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--mbit", type=float, nargs="+", default=[200, 1000, 5000])
    parser.add_argument("--addresses", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.addresses is not None:
        _probe(options.addresses)
        return
    for num_hosts in options.hosts:
        for rate_mbit in options.mbit:
            title = f"{num_hosts} hosts, {name_of(rate_mbit)}"
            try:
                with joined(num_hosts, rate_mbit) as hosts:
                    carried = carried_mbit(hosts)
            except OSError as error:
                print(f"{title}: not measured: {error}")
            else:
                print(f"{title}: carried {carried:.0f} Mbit/s ({carried / rate_mbit:.3f})")


if __name__ == "__main__":
    main()
