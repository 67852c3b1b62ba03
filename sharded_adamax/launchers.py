"""How this process was started, told from its environment alone. Nothing here communicates or imports torch.

[Note: launchers]  Every launcher tells its processes their numbers in variables of its own: torchrun in RANK,
WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT; srun in SLURM_PROCID, SLURM_STEP_NUM_TASKS, SLURM_LOCALID,
SLURM_STEP_NODELIST; an mpirun in PMI_SIZE (MPICH, Intel MPI) or OMPI_COMM_WORLD_SIZE (Open MPI), and the rest by MPI
itself. Launchers nest: mpirun starts its helpers by srun, srun starts one torchrun per host. The innermost one started
this process, and it is the one that counts: torchrun before mpirun before srun.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

TORCHRUN_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
MPIRUN_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
SRUN_VARIABLES = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_NODELIST")
# Ports for srun: above those of system services, below those that Linux hands out by itself (32768 and up).
FIRST_PORT, NUM_PORTS = 12_000, 20_000

Launcher = Literal["python", "torchrun", "mpirun", "srun"]


@dataclass(frozen=True)
class Place:
    """Where this process stands in the job, and where the ranks meet."""

    rank: int
    world_size: int
    local_rank: int  # among the processes of this host
    master_address: str
    master_port: int


def find_launcher(environ: Mapping[str, str]) -> Launcher:
    """Say what started this process. See [Note: launchers].

    Returns:
        "python" for a world of one, also where a launcher started one process only.

    Raises:
        ValueError: Only some of a launcher's variables are set, or two launchers each made a job of their own.
    """
    if _started_by_torchrun(environ):
        return "torchrun"
    for variable in MPIRUN_SIZES:
        if _integer(environ, variable, 1) > 1 and not _is_srun_itself(environ, variable):
            return "mpirun"
    return "srun" if _started_by_srun(environ) else "python"


def mpirun_size(environ: Mapping[str, str]) -> int | None:
    """Return the number of processes that an mpirun says it started; None without one."""
    sizes = [_integer(environ, variable, 1) for variable in MPIRUN_SIZES if variable in environ]
    return sizes[0] if sizes else None


def torchrun_place(environ: Mapping[str, str]) -> Place:
    """Read torchrun's variables."""
    return Place(
        rank=_integer(environ, "RANK"),
        world_size=_integer(environ, "WORLD_SIZE"),
        local_rank=_integer(environ, "LOCAL_RANK"),
        master_address=environ["MASTER_ADDR"],
        master_port=_integer(environ, "MASTER_PORT"),
    )


def srun_place(environ: Mapping[str, str]) -> Place:
    """Read srun's variables.

    The ranks meet on the first host of the step, where task 0 runs, at a port made of the job's and the step's number:
    every task comes to the same one without asking. MASTER_ADDR and MASTER_PORT take precedence.
    """
    hosts = expand_node_list(environ["SLURM_STEP_NODELIST"])
    job, step = _integer(environ, "SLURM_JOB_ID", 0), _integer(environ, "SLURM_STEP_ID", 0)
    return Place(
        rank=_integer(environ, "SLURM_PROCID"),
        world_size=_integer(environ, "SLURM_STEP_NUM_TASKS"),
        local_rank=_integer(environ, "SLURM_LOCALID"),
        master_address=environ.get("MASTER_ADDR") or ("127.0.0.1" if len(hosts) == 1 else hosts[0]),
        # Job 7, step 2: 12000 + 7 * 17 + 2 = 12121. Steps of a job differ, and so do jobs beside each other.
        master_port=_integer(environ, "MASTER_PORT", FIRST_PORT + (job * 17 + step) % NUM_PORTS),
    )


def expand_node_list(text: str) -> list[str]:
    """Write out Slurm's short form of host names, as `scontrol show hostnames` does.

    Example:
        >>> expand_node_list("login,rack[0-1]n[08-10,12]")[:4]
        ['login', 'rack0n08', 'rack0n09', 'rack0n10']

    Raises:
        ValueError: It is not in that form.
    """
    name = r"(?:[^,\[\]]|\[[^\[\]]+\])+"  # a comma ends a name, but not within brackets
    if not re.fullmatch(f"{name}(?:,{name})*", text):
        raise _not_a_node_list(text)
    hosts: list[str] = []
    for found in re.findall(name, text):
        parts = re.split(r"\[([^\]]*)\]", found)  # text, range, text, range, ..., text
        choices = [_expand_range(part, text) if index % 2 else [part] for index, part in enumerate(parts)]
        hosts += ["".join(choice) for choice in itertools.product(*choices)]
    if not hosts:  # a range that ends before it starts
        raise _not_a_node_list(text)
    return hosts


def _expand_range(part: str, text: str) -> list[str]:
    numbers: list[str] = []
    for item in part.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", item)
        if match is None:
            raise _not_a_node_list(text)
        first, last = match[1], match[2] or match[1]
        numbers += [f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)]
    return numbers


def _not_a_node_list(text: str) -> ValueError:
    return ValueError(f"expected host names as Slurm writes them, like n[01-03,7],login, got {text!r}: set MASTER_ADDR")


def _started_by_torchrun(environ: Mapping[str, str]) -> bool:
    missing = [name for name in TORCHRUN_VARIABLES if name not in environ]
    if missing:
        # MASTER_ADDR and MASTER_PORT alone may well be left over in a shell; a rank or world size means a launcher.
        if "RANK" in environ or "WORLD_SIZE" in environ:
            raise ValueError(
                f"expected all of {', '.join(TORCHRUN_VARIABLES)} in the environment, got all but "
                f"{', '.join(missing)}: start with torchrun, or unset RANK and WORLD_SIZE for another launcher or a "
                "world of one"
            )
        return False
    # mpirun may start one torchrun per host, which then knows of the others. If it does not, there are as many jobs as
    # torchruns, all training the same model into the same files. (Not asked of srun, where an elastic job may go on
    # with fewer hosts.)
    outer = mpirun_size(environ) or 1
    num_agents = _integer(environ, "GROUP_WORLD_SIZE", _integer(environ, "WORLD_SIZE"))
    if outer > 1 and num_agents != outer:
        raise ValueError(
            f"started by two launchers: mpirun started {outer} processes, and torchrun, in one of them, a job of "
            f"{environ['WORLD_SIZE']} ranks on {num_agents} host(s) that knows nothing of the others. Start with one "
            "launcher: mpirun -n RANKS python train.py, or torchrun --nproc-per-node=RANKS train.py"
        )
    return True


def _started_by_srun(environ: Mapping[str, str]) -> bool:
    # A batch script has SLURM_PROCID and SLURM_NTASKS too, and is one process: only a step has a number of tasks.
    if _integer(environ, "SLURM_STEP_NUM_TASKS", 1) == 1:
        return False
    missing = [name for name in SRUN_VARIABLES if name not in environ]
    if missing:
        raise ValueError(
            f"expected all of {', '.join(SRUN_VARIABLES)} in the environment, got all but {', '.join(missing)}: start "
            "with srun, or unset SLURM_STEP_NUM_TASKS for a world of one"
        )
    return True


def _is_srun_itself(environ: Mapping[str, str], variable: str) -> bool:
    """Say whether srun set PMI_SIZE, as `srun --mpi=pmi2` does; its own variables then tell the same."""
    return (
        variable == "PMI_SIZE"
        and environ["PMI_SIZE"] == environ.get("SLURM_STEP_NUM_TASKS")
        and environ.get("PMI_RANK", "") == environ.get("SLURM_PROCID")
    )


def _integer(environ: Mapping[str, str], name: str, default: int | None = None) -> int:
    value = environ.get(name)
    if value is None and default is not None:
        return default
    try:
        return int(value or "")
    except ValueError:
        raise ValueError(f"expected an integer in the environment variable {name}, got {value!r}") from None
