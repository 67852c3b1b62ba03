"""All-gather and reduce-scatter of 64 MiB: gloo's own, ours made of gloo's messages, and over MPI.

    python -m tests.benchmarks.collectives

Starts itself under mpirun at 2 and at 4 ranks. The three take turns within each round, so that what else the machine
does meets all of them; a time is that of the slowest rank.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parents[2]
MPIRUN = Path(sys.executable).parent / "mpirun"


def measure(mib: int, rounds: int) -> None:
    """Print a table on rank 0. One rank of the job."""
    from mpi4py import MPI

    from sharded_adamax import init_distributed, mpi
    from sharded_adamax.collectives import GlooGroup, ProcessGroup

    context = init_distributed("mpi")
    over_mpi = dist.group.WORLD
    over_gloo = dist.new_group(backend="gloo")
    assert isinstance(over_mpi, mpi.MpiProcessGroup) and isinstance(over_gloo, dist.ProcessGroup)
    groups = {
        "gloo's own": ProcessGroup(over_gloo),
        "gloo's messages": GlooGroup(over_gloo),
        "MPI": ProcessGroup(over_mpi),
    }
    bucket = torch.rand(mib << 18)
    actions: dict[tuple[str, str], Callable[[], object]] = {}
    for name, group in groups.items():
        actions["all-gather", name] = lambda group=group: group.all_gather(bucket).wait()  # type: ignore[misc]
        actions["reduce-scatter", name] = lambda group=group: group.reduce_scatter(bucket).wait()  # type: ignore[misc]
    times: dict[tuple[str, str], list[float]] = {key: [] for key in actions}
    for number in range(rounds + 1):
        for key, action in actions.items():
            dist.barrier()
            began = time.perf_counter()
            action()
            slowest = torch.tensor([time.perf_counter() - began], dtype=torch.float64)
            dist.all_reduce(slowest, dist.ReduceOp.MAX)
            if number > 0:  # the first round connects and touches memory
                times[key].append(slowest.item() * 1e3)
    if context.rank == 0:
        version = MPI.Get_library_version().split("\n")[0].strip()
        print(f"\n{context.world_size} ranks, {mib} MiB fp32, {rounds} rounds, {os.cpu_count()} CPUs; {version}")
        print(f"{'ms':32}{'median':>8}{'least':>8}{'most':>8}")
        for (kind, name), values in sorted(times.items()):
            row = f"{statistics.median(values):8.0f}{min(values):8.0f}{max(values):8.0f}"
            print(f"{kind + ', ' + name:32}{row}", flush=True)
    dist.destroy_process_group()


def main() -> None:
    """Start the ranks, or be one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=64, help="size of the whole bucket")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        torch.set_num_threads(1)
        measure(options.mib, options.rounds)
        return
    print(f"Python {platform.python_version()}, torch {torch.__version__}, {platform.platform()}", flush=True)
    for ranks in options.ranks:
        command = [MPIRUN, "-n", ranks, sys.executable, "-W", "ignore", "-m", __spec__.name, "--worker"]
        command += ["--mib", options.mib, "--rounds", options.rounds]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        subprocess.run(list(map(str, command)), env=environment, check=True)


if __name__ == "__main__":
    main()
