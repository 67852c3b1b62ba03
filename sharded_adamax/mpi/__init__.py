"""A torch.distributed process group over MPI, for CPU tensors: torch's wheels have none.

Using one of its names starts MPI. Importing it does not: torch imports all packages below one that TORCH_LOGS names.

[Note: MPI moves bytes, torch adds]  Every collective here moves bytes and nothing else; what has to be summed is summed
by torch, in the order of the ranks. So every dtype of torch travels, bfloat16 too, and a sum has the same bits however
parameters are packed into buckets, and the same bits as over gloo's messages (`collectives.GlooGroup`).

[Note: one thread per group]  Collectives are queued and run by one thread per group, in the order in which they were
called; MPI and torch drop the GIL, so backward goes on meanwhile. Messages (send, recv) start at once, beside the
queue: two ranks that both send first must not wait for each other. This needs MPI_THREAD_MULTIPLE.

[Note: the name]  torch keeps the name "mpi" for a backend that was compiled into it and never asks a registry about it.
This one is registered as "mpi4py"; `init_distributed(backend="mpi")` means this one.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sharded_adamax.mpi.group import BACKEND, MpiProcessGroup, register
    from sharded_adamax.mpi.meeting import abort_on_uncaught_exceptions, meet

__all__ = ["BACKEND", "MpiProcessGroup", "abort_on_uncaught_exceptions", "meet", "register"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    home = "meeting" if name in ("abort_on_uncaught_exceptions", "meet") else "group"
    return getattr(import_module(f"{__name__}.{home}"), name)
