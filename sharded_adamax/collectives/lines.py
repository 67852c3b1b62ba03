"""Lines between the ranks of one host: short notices, and each other's memory.

[Note: line]  Over gloo two ranks of one host would talk TCP with themselves: four copies through the kernel for each
byte. A *line* to a *neighbour*, a rank in reach, is a Unix socket for notices ("my row is at this address") and
``process_vm_readv``, by which one process copies out of another's memory, once, straight to where the bytes belong.

Whether that is allowed depends on users, containers and ptrace rules, so nothing is inferred: each rank reads a secret
out of the other's memory and compares it, and only if that worked both ways is there a line. A process number may be
given to another process; what was read counts only if the neighbour is found alive afterwards, by a handle that
belongs to that one process (pidfd).
"""

from __future__ import annotations

import ctypes
import os
import secrets
import select
import socket
import struct
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import NamedTuple

from sharded_adamax.collectives.control import ControlPlane

# Set to 0 on any rank, this rank has no lines.
SWITCH = "SHARDED_ADAMAX_NEIGHBOURS"

# For a rank that has said where it listens, to connect. It is about to; if it does not, messages take the place.
_CONNECT_SECONDS = 20.0
_HELLO = struct.Struct("=Q")
_CREDENTIALS = struct.Struct("=iII")  # struct ucred: pid, uid, gid
_SECRET_BYTES = 16

# None where the C library has no such call.
_process_vm_readv = getattr(ctypes.CDLL(None, use_errno=True), "process_vm_readv", None)
if _process_vm_readv is not None:
    _pointer, _count = ctypes.c_void_p, ctypes.c_ulong
    _process_vm_readv.argtypes = (ctypes.c_int, _pointer, _count, _pointer, _count, _count)
    _process_vm_readv.restype = ctypes.c_ssize_t


class _IoVec(ctypes.Structure):
    """struct iovec."""

    _fields_ = (("base", ctypes.c_void_p), ("num_bytes", ctypes.c_size_t))


class Card(NamedTuple):
    """What a rank tells all others, so that those of its host find it."""

    host: str
    pid: int
    name: bytes  # of the socket on which it listens
    secret_address: int
    secret: bytes


class Line:
    """To one neighbour. Nothing here is safe against use from two threads at once, but `tell` is one system call."""

    def __init__(self, connection: socket.socket, pid: int, process: int) -> None:
        self._connection = connection
        self._pid = pid
        self._process = process  # a pidfd, owned
        self._end = select.poll()
        self._end.register(process, select.POLLIN)

    @property
    def connection(self) -> int:
        """A file number that becomes readable when there are notices."""
        return self._connection.fileno()

    @property
    def process(self) -> int:
        """A file number that becomes readable when the neighbour's process has ended."""
        return self._process

    def tell(self, notice: bytes) -> None:
        """Send a notice, which arrives whole and in order.

        Raises:
            OSError: The neighbour has hung up.
        """
        self._connection.send(notice, socket.MSG_NOSIGNAL)

    def notices(self, max_bytes: int) -> Iterator[bytes]:
        """Yield the notices that are there.

        Raises:
            OSError: The neighbour has hung up; after its last notice.
        """
        while True:
            try:
                notice = self._connection.recv(max_bytes, socket.MSG_DONTWAIT)
            except BlockingIOError:
                break
            if not notice:
                raise ConnectionError("it has hung up")
            yield notice

    def read(self, address: int, target: int, start: int, stop: int) -> None:
        """Copy bytes ``start`` to ``stop`` of what the neighbour has at ``address`` to the same place of ``target``.

        Raises:
            OSError: The neighbour has ended, or has no such memory. What is there then means nothing.
        """
        _read(self._pid, address + start, target + start, stop - start)
        if self._end.poll(0):
            raise ConnectionError("its process has ended")

    def close(self) -> None:
        """Hang up. The neighbour still gets what it was told."""
        # A child made by fork may hold the socket open, too; it is to end nevertheless.
        with suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        self._connection.close()
        os.close(self._process)


def lines_to_neighbours(control: ControlPlane) -> dict[int, Line]:
    """Return a line for each rank whose memory this one can read and that can read this one's. Collective."""
    secret = ctypes.create_string_buffer(secrets.token_bytes(_SECRET_BYTES), _SECRET_BYTES)
    listener = _listen() if _is_possible() else None
    card = None if listener is None else _card(listener, secret)
    cards = control.exchange(card)
    found: dict[int, Line] = {}
    if listener is not None and card is not None:
        near = {rank: other for rank, other in enumerate(cards) if other is not None and other.host == card.host}
        del near[control.rank]
        with listener:
            for rank, connection in _connect(control.rank, near, listener).items():
                line = _tried(connection, near[rank])
                if line is not None:
                    found[rank] = line
    # Also says that everybody has read the secret that it wanted to read.
    reachable = control.exchange(set(found))
    for rank in [rank for rank in found if control.rank not in reachable[rank]]:
        found.pop(rank).close()
    return found


def _is_possible() -> bool:
    has_calls = sys.platform == "linux" and hasattr(os, "pidfd_open") and _process_vm_readv is not None
    return has_calls and os.environ.get(SWITCH) != "0"


def _card(listener: socket.socket, secret: ctypes.Array[ctypes.c_char]) -> Card:
    return Card(_host(), os.getpid(), listener.getsockname(), ctypes.addressof(secret), secret.raw)


def _host() -> str:
    """Return a name of what two processes must share: kernel, names of sockets, process numbers, users."""
    with open("/proc/sys/kernel/random/boot_id") as file:
        boot = file.read().strip()
    return " ".join([boot, *(os.readlink(f"/proc/self/ns/{kind}") for kind in ("net", "pid", "user"))])


def _listen() -> socket.socket | None:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        listener.bind(b"")  # an abstract name, chosen by the kernel: no file to be left behind
        listener.listen(socket.SOMAXCONN)
    except OSError:
        listener.close()
        return None
    return listener


def _connect(rank: int, near: dict[int, Card], listener: socket.socket) -> dict[int, socket.socket]:
    """Return a connection to each rank of ``near`` that can be had: the lower rank of two calls the higher one."""
    found: dict[int, socket.socket] = {}
    for higher in (other for other in near if other > rank):
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            connection.connect(near[higher].name)
            connection.send(_HELLO.pack(rank), socket.MSG_NOSIGNAL)
            found[higher] = connection
        except OSError:
            connection.close()
    callers = {other for other in near if other < rank}
    gives_up = time.monotonic() + _CONNECT_SECONDS
    while callers and (left := gives_up - time.monotonic()) > 0:
        listener.settimeout(left)
        try:
            connection, _ = listener.accept()
            connection.settimeout(left)
            (caller,) = _HELLO.unpack(connection.recv(_HELLO.size))
        except (OSError, struct.error):
            continue
        if caller in callers:
            callers.remove(caller)
            connection.settimeout(None)
            found[caller] = connection
    return found


def _tried(connection: socket.socket, card: Card) -> Line | None:
    """Return the line if the one who answers is the one of the card and its memory can be read."""
    secret = ctypes.create_string_buffer(_SECRET_BYTES)
    try:
        process = os.pidfd_open(card.pid)
    except OSError:
        connection.close()
        return None
    line = Line(connection, card.pid, process)
    try:
        credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        _read(card.pid, card.secret_address, ctypes.addressof(secret), _SECRET_BYTES)
        if _CREDENTIALS.unpack(credentials)[0] == card.pid and secret.raw == card.secret:
            return line
    except OSError:
        pass
    line.close()
    return None


def _read(pid: int, source: int, target: int, num_bytes: int) -> None:
    """Copy from another process's memory. ctypes frees Python's lock meanwhile."""
    assert _process_vm_readv is not None
    done = 0
    while done < num_bytes:
        here = _IoVec(target + done, num_bytes - done)
        there = _IoVec(source + done, num_bytes - done)
        count = _process_vm_readv(pid, ctypes.byref(here), 1, ctypes.byref(there), 1, 0)
        if count <= 0:
            error = ctypes.get_errno()
            raise OSError(error, f"process_vm_readv: {os.strerror(error)}")
        done += count
