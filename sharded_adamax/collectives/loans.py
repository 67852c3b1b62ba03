"""Tensors on loan to torch.distributed, and a program that ends before they are given back.

[Note: the end of a program]  What a collective is given is on *loan*: a thread of gloo's holds it for a moment after
the collective is complete, and needs Python's lock to let go of it. If the program ends in that moment, Python ends
the thread instead, from inside a C++ destructor, and the process aborts: "terminate called without an active exception"
(pytorch/pytorch#179291 and #190489; of 30 jobs whose last statement was an all-reduce, 4). So a program that ends waits
until its last loans are back. It cannot destroy the process group instead: that waits for collectives which a rank that
failed has left.
"""

from __future__ import annotations

import atexit
import time
import weakref

from torch import Tensor

# A thread that waits for Python's lock has it within microseconds of its being free; but the machine may be busy. A
# rank that failed may have lent a tensor to a collective that nobody completes.
_PATIENCE_SECONDS = 0.5
_GLANCE_SECONDS = 0.001

_lent: set[weakref.ref[Tensor]] = set()


def lend(tensor: Tensor) -> Tensor:
    """Return an alias of ``tensor``, to be given to one collective and not kept: it lives as long as that holds it."""
    alias = tensor.detach()
    _lent.add(weakref.ref(alias, _lent.discard))
    return alias


def _await_return() -> None:
    gives_up = time.monotonic() + _PATIENCE_SECONDS
    time.sleep(_GLANCE_SECONDS)  # frees the lock: once even so, for what the program itself or DDP has lent
    while _lent and time.monotonic() < gives_up:
        time.sleep(_GLANCE_SECONDS)


atexit.register(_await_return)
