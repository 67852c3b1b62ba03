"""All-gather and reduce-scatter of one bucket: gloo's own, ours, over MPI, and the wire's time.

    python -m tests.benchmarks.collectives --ranks 2 4 --mib 64 --mbit 200 1000 5000 --json collectives.json

On this machine the ranks are started by mpirun and MPI takes part; ours reads the memory of the other ranks, and once
more without that, by messages. Over links of a given rate each rank is on a host of its own (tests/benchmarks/links.py,
needs root). A time is that of the slowest rank. The wire's time is what one rank sends, which is also what it receives,
divided by the rate: no headers, nothing else to do.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from sharded_adamax import init_distributed
from sharded_adamax.collectives import GlooGroup, Group, ProcessGroup, control_plane
from sharded_adamax.pending import Pending
from tests.benchmarks import links
from tests.benchmarks.report import Action, Report, interleaved, ratios, seconds_of_the_slowest_rank

MPIRUN = Path(sys.executable).parent / "mpirun"
NATIVE, OURS, MESSAGES, MPI = "gloo's own", "ours", "ours, by messages", "MPI"
KINDS = ALL_GATHER, REDUCE_SCATTER = "all-gather", "reduce-scatter"


def row(kind: str, group: str) -> str:
    return f"{kind}, {group}"


def measure(backend: str, mib: int, rounds: int) -> None:
    """Print the seconds of each collective in each round, on rank 0, as JSON. One rank of the job."""
    context = init_distributed(backend)
    world = dist.group.WORLD
    over_gloo = world if backend == "gloo" else dist.new_group(backend="gloo")
    assert isinstance(world, dist.ProcessGroup) and isinstance(over_gloo, dist.ProcessGroup)
    groups: dict[str, Group] = {NATIVE: ProcessGroup(over_gloo), OURS: GlooGroup(over_gloo)}
    groups[OURS].meet(control_plane(over_gloo))
    if backend == "mpi":
        groups[MESSAGES] = GlooGroup(over_gloo)  # which has not met
        groups[MPI] = ProcessGroup(world)
    bucket = torch.rand(mib << 18)
    actions: dict[str, Action] = {}
    for name, group in groups.items():
        actions[row(ALL_GATHER, name)] = functools.partial(_complete, group.all_gather, bucket)
        actions[row(REDUCE_SCATTER, name)] = functools.partial(_complete, group.reduce_scatter, bucket)
    seconds = interleaved(actions, rounds, seconds_of_the_slowest_rank)
    if context.rank == 0:
        print(json.dumps(seconds))
    dist.destroy_process_group()


def _complete(start: Callable[[Tensor], Pending[object]], bucket: Tensor) -> None:
    start(bucket).wait("a benchmark")


def run(num_ranks: int, rate_mbit: float | None, mib: int, rounds: int, report: Report) -> None:
    """Measure over links of one rate, or on this machine where it is None, and report."""
    worker = ["-m", __spec__.name, "--worker", "--mib", str(mib), "--rounds", str(rounds)]
    facts: dict[str, object] = {"load": os.getloadavg()[0]}
    with links.joined(num_ranks, rate_mbit) as hosts:
        if rate_mbit is None:
            environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(links.ROOT)}
            command = [str(MPIRUN), "-n", str(num_ranks), sys.executable, *worker, "--backend", "mpi"]
            done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
            output = done.stdout
        else:
            facts["carried_mbit"] = round(links.carried_mbit(hosts))
            output = links.run_ranks(hosts, worker, timeout_s=600)
    seconds: dict[str, list[float]] = json.loads(output)
    natives = {name: seconds[row(name.split(", ")[0], NATIVE)] for name in seconds}
    columns = {"time/gloo's own": {name: ratios(times, natives[name]) for name, times in seconds.items()}}
    if rate_mbit is not None:
        facts["wire_ms"] = wire_ms = mib * 2**20 * 8 * (num_ranks - 1) / num_ranks / rate_mbit / 1e3
        columns["time/wire"] = {name: [1e3 * each / wire_ms for each in times] for name, times in seconds.items()}
    report.table(f"{num_ranks} ranks, {links.name_of(rate_mbit)}, {mib} MiB fp32", seconds, columns, **facts)


def main() -> None:
    """Start the ranks, or be one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=64, help="size of the whole bucket")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--mbit", type=float, nargs="*", default=[1000.0], help="rates of links; none: only loopback")
    parser.add_argument("--json", type=Path, help="where to write all seconds")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--backend", default="gloo", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        torch.set_num_threads(1)
        measure(options.backend, options.mib, options.rounds)
        return
    report = Report(options.json)
    for num_ranks in options.ranks:
        for rate_mbit in (None, *options.mbit):
            try:
                run(num_ranks, rate_mbit, options.mib, options.rounds, report)
            except OSError as error:
                print(f"\n{num_ranks} ranks, {links.name_of(rate_mbit)}: not measured: {error}")
    report.close()


if __name__ == "__main__":
    main()
