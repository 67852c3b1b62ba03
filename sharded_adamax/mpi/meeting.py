"""Let torch.distributed's ranks find each other through MPI, and let the job die when one of them does.

[Note: where the ranks meet]  torch needs a TCPStore on rank 0. Rank 0 opens it on a port that the system picks and
tells the others through MPI, so no two jobs can race for one. On one host the address is the loopback. On several,
no rule finds the right address (a host name may resolve to 127.0.1.1, or not at all; the interface of the default
route may be a slow one that the others cannot reach), so it is tried: rank 0 names its host name and the address of
each of its interfaces, one process of every other host connects to all of them, and the first that everybody reached
is taken. The interface through which a host reached it is told to gloo (GLOO_SOCKET_IFNAME), which otherwise guesses
from the host name. MASTER_ADDR and MASTER_PORT, if set, are taken instead.

[Note: one dies, all die]  A rank that ends by an exception leaves the others waiting in MPI for ever. So it prints its
traceback and calls MPI_Abort, which ends them all. The others may see its connections close first and raise errors of
their own; those keep quiet for a moment, so that the error that the user sees last is the one that matters.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from types import TracebackType
from typing import NamedTuple

import torch.distributed as dist
from mpi4py import MPI
from torch._C._distributed_c10d import TCPStore

from sharded_adamax.launchers import Place
from sharded_adamax.mpi.work import RankLeft

PROBE_SECONDS = 5.0
ECHO_SECONDS = 3.0
PASS_ON_SECONDS = 0.5  # mpirun drops what a process has written and it has not passed on yet when the job is aborted
_SIOCGIFADDR = 0x8915  # linux/sockios.h: the IPv4 address of an interface


class Reached(NamedTuple):
    """The two ends of a connection, as IP addresses."""

    here: str
    there: str


def meet(*, expected_size: int | None, timeout_s: float) -> tuple[Place, TCPStore | None]:
    """Tell this process its place by MPI and open the store. Collective over MPI_COMM_WORLD.

    Args:
        expected_size: The number of processes that mpirun says it started; None where it says nothing.
        timeout_s: How long the store may take to connect.

    Returns:
        The place and the store; no store for a world of one.

    Raises:
        RuntimeError: The MPI library is not that of the mpirun; or no address of rank 0 is reached by all hosts.
    """
    world = MPI.COMM_WORLD
    if expected_size is not None and expected_size != world.size:
        raise RuntimeError(
            f"expected {expected_size} processes, as mpirun says, got {world.size} from the MPI library that mpi4py "
            f"loaded ({MPI.Get_library_version().splitlines()[0].strip()}): mpirun and the library belong to different "
            "MPIs. Use the mpirun that came with the library, or name the library of this mpirun in MPI4PY_LIBMPI"
        )
    if world.size == 1:
        return Place(rank=0, world_size=1, local_rank=0, master_address="127.0.0.1", master_port=0), None
    abort_on_uncaught_exceptions()
    local = world.Split_type(MPI.COMM_TYPE_SHARED)
    listener = _listen(int(os.environ.get("MASTER_PORT", "0"))) if world.rank == 0 else None
    port: int = world.bcast(None if listener is None else listener.getsockname()[1], root=0)
    on_one_host = world.allreduce(int(local.size == world.size), op=MPI.MIN) == 1
    address = "127.0.0.1" if on_one_host else _address_that_all_reach(local, port)
    place = Place(world.rank, world.size, local.rank, address, port)
    local.Free()
    return place, _open_store(place, listener, timeout_s)


def _open_store(place: Place, listener: socket.socket | None, timeout_s: float) -> TCPStore:
    limit = timedelta(seconds=timeout_s)
    try:
        store = TCPStore(
            place.master_address,
            place.master_port,
            place.world_size,
            is_master=listener is not None,
            timeout=limit,
            wait_for_workers=False,
            # The very socket whose port the others were told: nobody can take it in between.
            master_listen_fd=None if listener is None else listener.detach(),
        )
    except dist.DistError as error:
        raise RuntimeError(
            f"rank {place.rank}: expected rank 0 at {place.master_address}:{place.master_port} to answer within "
            f"{timeout_s:g} s, got: {str(error).splitlines()[0]}. Look whether a firewall is in between; MASTER_ADDR "
            "and MASTER_PORT choose another address"
        ) from error
    return store


def _listen(port: int) -> socket.socket:
    try:
        if socket.has_dualstack_ipv6():
            return socket.create_server(("", port), family=socket.AF_INET6, backlog=4096, dualstack_ipv6=True)
        return socket.create_server(("", port), backlog=4096)
    except OSError as error:
        raise RuntimeError(
            f"rank 0: expected to listen on port {port}, got: {error}. Unset MASTER_PORT to take a free one"
        ) from error


def _address_that_all_reach(local: MPI.Comm, port: int) -> str:
    """Return the first address of rank 0 that a process of every host connects to. See [Note: where the ranks meet]."""
    world = MPI.COMM_WORLD
    mine = [os.environ["MASTER_ADDR"]] if os.environ.get("MASTER_ADDR") else [socket.gethostname(), *interfaces()]
    addresses: list[str] = world.bcast(mine, root=0)
    with_rank_0 = local.bcast(world.rank == 0, root=0)
    reached: list[Reached | None] | None = None
    if local.rank == 0 and not with_rank_0:
        with ThreadPoolExecutor(len(addresses)) as pool:
            reached = list(pool.map(lambda address: _probe(address, port), addresses))
    everyone = world.allgather((socket.gethostname(), reached))
    for index, address in enumerate(addresses):
        found = [result[index] for _, result in everyone if result is not None]
        if all(found):
            there = next(one.there for one in found if one is not None)
            here = there if with_rank_0 else local.bcast(reached[index] if reached else None, root=0).here
            _tell_gloo(here)
            return address
    tried = "; ".join(
        f"{host} reached {', '.join(a for a, one in zip(addresses, result, strict=True) if one) or 'none'}"
        for host, result in everyone
        if result is not None
    )
    raise RuntimeError(
        f"rank {world.rank}: expected an address of rank 0 ({everyone[0][0]}) that every host can connect to, tried "
        f"{', '.join(addresses)} at port {port}: {tried}. Set MASTER_ADDR to an address that all hosts can reach, and "
        "MASTER_PORT to a port that the firewall lets through"
    )


def _probe(address: str, port: int) -> Reached | None:
    try:
        with socket.create_connection((address, port), timeout=PROBE_SECONDS) as connection:
            return Reached(_plain(connection.getsockname()[0]), _plain(connection.getpeername()[0]))
    except OSError:
        return None


def _plain(address: str) -> str:
    return address.removeprefix("::ffff:")


def interfaces() -> dict[str, str]:
    """Return the IPv4 addresses of this host, but for the loopback's, and the interface of each. Linux."""
    found: dict[str, str] = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(any_socket, _SIOCGIFADDR, struct.pack("256s", name.encode()))
            except OSError:  # an interface without an address
                continue
            found[socket.inet_ntoa(answer[20:24])] = name
    return {address: name for address, name in found.items() if not address.startswith("127.")}


def _tell_gloo(address: str) -> None:
    name = interfaces().get(address)
    if name is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


class _AbortingHook:
    """Prints an exception as the hook before it would, then ends the job."""

    def __init__(self, print_exception: Callable[..., object]) -> None:
        self._print_exception = print_exception
        self.aborts = True

    def __call__(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if self.aborts:
            _wait_if_echo(error)
        self._print_exception(kind, error, trace)
        if self.aborts:
            _abort()


def abort_on_uncaught_exceptions() -> None:
    """Make an exception that nobody catches, in any thread, end the job. See [Note: one dies, all die].

    To be called again after ``init_process_group``, which wraps the hook in one of its own: it collects what the hook
    prints and prints that itself afterwards, so a hook inside it must not be the one that ends the process.
    """
    before = next((hook for hook in _hooks if hook.aborts), None)
    if before is None:
        print_thread_exception = threading.excepthook

        def on_thread_exception(args: threading.ExceptHookArgs) -> None:
            if args.exc_type is SystemExit:  # how a thread ends itself
                return
            if args.exc_value is not None:
                _wait_if_echo(args.exc_value)
            print_thread_exception(args)
            _abort()

        threading.excepthook = on_thread_exception
    else:
        before.aborts = False
    _hooks.append(_AbortingHook(sys.excepthook))
    sys.excepthook = _hooks[-1]


_hooks: list[_AbortingHook] = []


def _wait_if_echo(error: BaseException) -> None:
    """Give the rank that failed first the time to say so and to abort: this process does not come back then."""
    text = str(error).lower()
    lost = isinstance(error, dist.DistError) or "connection closed" in text or "connection reset" in text
    # By name, because this room imports none above it: the optimizer repeats another rank's error, or waits in vain.
    of_optimizer = type(error).__name__ in ("RemoteError", "LostRankError")
    if lost or isinstance(error, RankLeft) or of_optimizer:
        time.sleep(ECHO_SECONDS)


def _abort() -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    time.sleep(PASS_ON_SECONDS)
    # MPI's own line about the abort would come last, and says less than the error before it.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    MPI.COMM_WORLD.Abort(1)
    os._exit(1)
