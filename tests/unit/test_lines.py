"""A line by itself: what is read from a process that is not the neighbour any more."""

from __future__ import annotations

import os
import socket
import subprocess

import pytest
import torch

from sharded_adamax.collectives.lines import Line


def test_what_is_read_from_a_process_that_has_taken_the_number_of_the_neighbour_is_refused() -> None:
    with subprocess.Popen(["true"]) as neighbour:
        handle = os.pidfd_open(neighbour.pid)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    line = Line(ours, os.getpid(), handle)
    source, target = torch.arange(100.0), torch.zeros(100)
    with pytest.raises(ConnectionError, match="its process has ended"):
        line.read(source.data_ptr(), target.data_ptr(), 0, source.nbytes)
    line.close()
    assert theirs.recv(1) == b"", "hanging up is heard"
    theirs.close()


def test_memory_that_is_not_there_is_an_error() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    line = Line(ours, os.getpid(), os.pidfd_open(os.getpid()))
    target = torch.zeros(4)
    with pytest.raises(OSError, match="process_vm_readv: Bad address"):
        line.read(0, target.data_ptr(), 0, target.nbytes)
    line.close()
    theirs.close()
