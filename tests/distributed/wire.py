"""What the kernel says was sent: bytes acknowledged on this process's TCP connections. Linux only, no privileges."""

from __future__ import annotations

import os
import socket
import struct

# struct tcp_info of linux/tcp.h: tcpi_bytes_acked is the 64-bit field at offset 120.
_TCP_INFO_BYTES = 192
_BYTES_ACKED = struct.Struct("=Q")
_BYTES_ACKED_OFFSET = 120


def tcp_bytes_sent() -> dict[str, int]:
    """Return the payload bytes sent and acknowledged so far on each open TCP connection of this process."""
    sent = {}
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
            sent[inode] = _BYTES_ACKED.unpack_from(info, _BYTES_ACKED_OFFSET)[0]
    return sent


def bytes_between(before: dict[str, int], after: dict[str, int]) -> int:
    """Return what was sent between two looks. Connections of an earlier process group may close in between."""
    return sum(total - before.get(inode, 0) for inode, total in after.items())
