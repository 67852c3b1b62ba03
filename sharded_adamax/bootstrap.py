"""`init_distributed`: one call that finds out how the script was started and joins the job."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist

TORCHRUN_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
# Number of processes of launchers that init_distributed does not speak yet. A silent world of one under these would
# train the same model many times, each process overwriting the other's checkpoints.
OTHER_LAUNCHERS = {"OMPI_COMM_WORLD_SIZE": "mpirun", "PMI_SIZE": "mpirun", "SLURM_STEP_NUM_TASKS": "srun"}


@dataclass(frozen=True)
class DistributedContext:
    """This process's place in the job."""

    rank: int
    world_size: int
    local_rank: int  # among the processes of this host
    device: torch.device


def init_distributed(backend: str | None = None) -> DistributedContext:
    """Join the job that torchrun started, or be a world of one under plain ``python``.

    On CUDA machines the device is GPU ``local_rank`` and tensors on it travel by NCCL, CPU tensors by gloo; without
    GPUs everything travels by gloo. A world of one under plain ``python`` needs no process group and gets none.

    Args:
        backend: A torch.distributed backend; None picks as above.

    Returns:
        Rank, world size, local rank and device. A process group that is already initialised is used as it is.

    Raises:
        ValueError: Only some of torchrun's variables are set.
        RuntimeError: More local ranks than GPUs.
        NotImplementedError: Started by mpirun or srun.
    """
    if dist.is_initialized():
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        return DistributedContext(dist.get_rank(), dist.get_world_size(), local_rank, _device(local_rank))
    if not _started_by_torchrun(os.environ):
        return DistributedContext(rank=0, world_size=1, local_rank=0, device=_device(0))
    local_rank = int(os.environ["LOCAL_RANK"])
    device = _device(local_rank)
    if backend is None:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, device_id=device if device.type == "cuda" else None)
    return DistributedContext(dist.get_rank(), dist.get_world_size(), local_rank, device)


def _started_by_torchrun(environ: Mapping[str, str]) -> bool:
    missing = [name for name in TORCHRUN_VARIABLES if name not in environ]
    if not missing:
        return True
    # MASTER_ADDR and MASTER_PORT alone may well be left over in a shell; a rank or world size means a launcher.
    if "RANK" in environ or "WORLD_SIZE" in environ:
        raise ValueError(
            f"expected all of {', '.join(TORCHRUN_VARIABLES)} in the environment, got all but {', '.join(missing)}: "
            "start with torchrun, or unset RANK and WORLD_SIZE for a world of one"
        )
    for variable, launcher in OTHER_LAUNCHERS.items():
        if int(environ.get(variable, "1")) > 1:
            raise NotImplementedError(
                f"started by {launcher} ({variable}={environ[variable]}), which is not implemented yet: start with "
                "torchrun"
            )
    return False


def _device(local_rank: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise RuntimeError(
            f"local rank {local_rank} has no GPU: this host has {torch.cuda.device_count()}. Start at most that many "
            "processes per host"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)
