"""What the kernel says was sent: bytes acknowledged on this process's TCP connections. Linux only, no privileges."""

from __future__ import annotations

import os
import socket
import struct

# struct tcp_info of linux/tcp.h: tcpi_bytes_acked and tcpi_bytes_received are the 64-bit fields at these offsets.
_TCP_INFO_BYTES = 192
_COUNTER = struct.Struct("=Q")
_BYTES_ACKED_OFFSET = 120
_BYTES_RECEIVED_OFFSET = 128


def tcp_bytes_sent() -> dict[str, int]:
    """Return the payload bytes sent and acknowledged so far on each open TCP connection of this process."""
    return _counters(_BYTES_ACKED_OFFSET)


def tcp_bytes_received() -> dict[str, int]:
    """Return the payload bytes received so far on each open TCP connection of this process."""
    return _counters(_BYTES_RECEIVED_OFFSET)


def _counters(offset: int) -> dict[str, int]:
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            inode = os.readlink(f"/proc/self/fd/{name}")
            if not inode.startswith("socket:"):
                continue
            connection = socket.socket(fileno=os.dup(int(name)))
        except OSError:  # closed in the meantime
            continue
        with connection:
            if connection.type != socket.SOCK_STREAM or connection.family not in (socket.AF_INET, socket.AF_INET6):
                continue
            info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_BYTES)
            found[inode] = _COUNTER.unpack_from(info, offset)[0]
    return found


def bytes_between(before: dict[str, int], after: dict[str, int]) -> int:
    """Return what was sent between two looks. Connections of an earlier process group may close in between."""
    return sum(total - before.get(inode, 0) for inode, total in after.items())
