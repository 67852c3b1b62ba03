"""`init_distributed`: one call that finds out how the script was started and joins the job."""

from __future__ import annotations

import atexit
import os
import socket
import time
from dataclasses import dataclass
from datetime import timedelta
from types import ModuleType

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import Store, TCPStore

from sharded_adamax.launchers import Place, find_launcher, mpirun_size, srun_place, torchrun_place


@dataclass(frozen=True)
class DistributedContext:
    """This process's place in the job."""

    rank: int
    world_size: int
    local_rank: int  # among the processes of this host
    device: torch.device


def init_distributed(
    backend: str | None = None, *, join_timeout_s: float = 300.0, timeout_s: float | None = None
) -> DistributedContext:
    """Join the job that torchrun, mpirun or srun started, or be a world of one under plain ``python``.

    On CUDA machines the device is GPU ``local_rank`` and tensors on it travel by NCCL, CPU tensors by gloo; without
    GPUs everything travels by gloo. A world of one under plain ``python`` needs no process group and gets none.

    Under mpirun, MPI tells the ranks and lets them meet, and an exception that nobody catches ends the whole job: its
    traceback is printed, then MPI is asked to abort. (``sys.exit`` is no exception in this sense: the other ranks go on
    until they need the one that left.) The tensors travel as elsewhere, unless ``backend`` is "mpi".

    Args:
        backend: A torch.distributed backend, or "mpi" for collectives over MPI on CPU tensors (needs the extra ``mpi``
            and mpirun); None picks as above.
        join_timeout_s: Seconds within which all ranks have to arrive under mpirun and srun; under torchrun, seconds
            within which the master has to answer.
        timeout_s: Seconds that a rank waits for another in a collective before it gives up; None is torch's default,
            half an hour (ten minutes for NCCL). A host that is cut off closes no connection: only this ends the wait.

    Returns:
        Rank, world size, local rank and device. A process group that is already initialised is used as it is.

    Raises:
        ValueError: Only some of a launcher's variables are set; two launchers were used at once.
        ModuleNotFoundError: mpi4py is needed and not installed.
        RuntimeError: More local ranks than GPUs; the other ranks cannot be reached in time; mpi4py finds no MPI
            library, or not the one of this mpirun; ``backend`` is "mpi" on a host with GPUs.
    """
    if dist.is_initialized():
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        return DistributedContext(dist.get_rank(), dist.get_world_size(), local_rank, _device(local_rank, backend))
    launcher = find_launcher(os.environ)
    if launcher == "torchrun" and backend == "mpi":
        raise ValueError('backend="mpi" needs processes that were started by mpirun, got torchrun: mpirun -n RANKS ...')
    if launcher == "mpirun" or backend == "mpi":
        return _join_through_mpi(backend, join_timeout_s, timeout_s)
    if launcher == "python":
        return DistributedContext(rank=0, world_size=1, local_rank=0, device=_device(0, backend))
    if launcher == "srun":
        return _join_srun(srun_place(os.environ), backend, join_timeout_s, timeout_s)
    return _join_torchrun(torchrun_place(os.environ), backend, join_timeout_s, timeout_s)


def _join_torchrun(
    place: Place, backend: str | None, join_timeout_s: float, timeout_s: float | None
) -> DistributedContext:
    device = _device(place.local_rank, backend)
    # Where torchrun's agent keeps the store it is there already; otherwise rank 0 is about to open it.
    if place.rank > 0 or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        await_master(place, join_timeout_s)
    _init_process_group(backend, device, timeout_s)
    return DistributedContext(dist.get_rank(), dist.get_world_size(), place.local_rank, device)


def _join_srun(place: Place, backend: str | None, join_timeout_s: float, timeout_s: float | None) -> DistributedContext:
    device = _device(place.local_rank, backend)
    limit = timedelta(seconds=join_timeout_s)
    if place.rank > 0:
        await_master(place, join_timeout_s)
    try:
        # The constructor of rank 0 waits until all others have come.
        store = TCPStore(
            place.master_address, place.master_port, place.world_size, is_master=place.rank == 0, timeout=limit
        )
    except dist.DistError as error:
        raise RuntimeError(
            f"rank {place.rank}: expected all {place.world_size} ranks to meet at {place.master_address}:"
            f"{place.master_port} within {join_timeout_s:g} s, got: {str(error).splitlines()[0]}. Look whether a rank "
            "ended early, whether the port is taken (MASTER_PORT chooses another), and whether every host reaches the "
            "address (MASTER_ADDR chooses another)"
        ) from error
    _init_process_group(backend, device, timeout_s, store, place)
    _publish_local_rank(place)
    return DistributedContext(place.rank, place.world_size, place.local_rank, device)


def _join_through_mpi(backend: str | None, join_timeout_s: float, timeout_s: float | None) -> DistributedContext:
    mpi = import_mpi()
    place, store = mpi.meet(expected_size=mpirun_size(os.environ), timeout_s=join_timeout_s)
    device = _device(place.local_rank, backend)
    if store is not None:  # a world of one has nobody to meet
        if backend == "mpi":
            mpi.register()
            backend = mpi.BACKEND
        _init_process_group(backend, device, timeout_s, store, place)
        mpi.abort_on_uncaught_exceptions()  # again: torch has just put a hook of its own around it
        atexit.register(_leave)
        _publish_local_rank(place)
    return DistributedContext(place.rank, place.world_size, place.local_rank, device)


def _leave() -> None:
    # A process that ends waits in MPI for all others (MPI_Finalize). If it was sys.exit on this rank alone, they wait
    # for it in a collective: they have to see that it has left the group before it waits for them.
    if dist.is_initialized():
        dist.destroy_process_group()


def import_mpi() -> ModuleType:
    """Import `sharded_adamax.mpi` and start MPI; only here, because the package itself needs torch alone.

    Raises:
        ModuleNotFoundError: mpi4py is not installed.
        RuntimeError: There is no MPI library that mpi4py can load, or it is not that of the mpirun.
    """
    try:
        import mpi4py

        # Started below and not by the import: MPICH's library ends a process that Open MPI's mpirun started, with words
        # that help nobody. Before the start it can be asked which one it is.
        mpi4py.rc.initialize, mpi4py.rc.finalize = False, True
        from mpi4py import MPI
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "started by mpirun, or asked for the MPI backend, but mpi4py is not installed: pip install "
            "'sharded-adamax[mpi]' brings it with an MPI; on a cluster, pip install mpi4py with its MPI loaded. Or "
            "start with torchrun",
            name="mpi4py",
        ) from error
    except (ImportError, RuntimeError) as error:  # mpi4py says either, by how it was built
        raise RuntimeError(
            f"mpi4py is installed, but finds no MPI library ({error}): pip install mpich, or load the cluster's MPI so "
            "that its libmpi.so is on LD_LIBRARY_PATH (MPI4PY_LIBMPI names the file itself)"
        ) from error
    library = MPI.Get_library_version().splitlines()[0].strip()
    if "OMPI_COMM_WORLD_SIZE" in os.environ and "Open MPI" not in library:
        raise RuntimeError(
            f"expected Open MPI, whose mpirun started this process, got {library} from mpi4py: mpirun and the library "
            "belong to different MPIs. Use the mpirun that came with the library, or name this mpirun's library in "
            "MPI4PY_LIBMPI"
        )
    if not MPI.Is_initialized():
        MPI.Init_thread(MPI.THREAD_MULTIPLE)
    from sharded_adamax import mpi

    return mpi


def await_master(place: Place, timeout_s: float) -> None:
    """Wait until somebody listens where the ranks meet.

    torch's own attempt waits for half an hour and then speaks of a client socket.

    Raises:
        RuntimeError: Nobody did in time.
    """
    address = f"{place.master_address}:{place.master_port}"
    began = time.monotonic()
    while True:
        left = timeout_s - (time.monotonic() - began)
        try:
            with socket.create_connection((place.master_address, place.master_port), timeout=max(left, 0.1)):
                return
        except OSError as error:
            if time.monotonic() - began + 0.2 >= timeout_s:
                raise RuntimeError(
                    f"rank {place.rank}: expected rank 0 at {address} to answer within {timeout_s:g} s, got: {error}. "
                    "Look whether rank 0 is running, whether this host can reach that address (name, route, "
                    "firewall), and whether MASTER_ADDR and MASTER_PORT are those of this job"
                ) from error
            time.sleep(0.2)


def _init_process_group(
    backend: str | None,
    device: torch.device,
    timeout_s: float | None,
    store: Store | None = None,
    place: Place | None = None,
) -> None:
    if backend is None:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    device_id = device if device.type == "cuda" else None
    # Set here or never: a timeout that a group gets later does not reach its point-to-point messages.
    timeout = None if timeout_s is None else timedelta(seconds=timeout_s)
    if store is None or place is None:
        dist.init_process_group(backend, timeout=timeout, device_id=device_id)
    else:
        dist.init_process_group(
            backend,
            timeout=timeout,
            store=store,
            rank=place.rank,
            world_size=place.world_size,
            device_id=device_id,
        )


def _publish_local_rank(place: Place) -> None:
    # Not RANK and the others: a process that this one starts would take itself for a rank of torchrun.
    os.environ["LOCAL_RANK"] = str(place.local_rank)


def _device(local_rank: int, backend: str | None) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if backend == "mpi":
        raise RuntimeError(
            f'backend="mpi" carries CPU tensors only, and this host has {torch.cuda.device_count()} GPU(s): leave '
            "backend out for NCCL, or hide the GPUs with CUDA_VISIBLE_DEVICES="
        )
    if local_rank >= torch.cuda.device_count():
        raise RuntimeError(
            f"local rank {local_rank} has no GPU: this host has {torch.cuda.device_count()}. Start at most that many "
            "processes per host"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)
