"""Save and load beside torch.save, torch.load and dd on the same disk, the stall of asynchronous saves, and memory.

    python -m tests.benchmarks.checkpoint_costs --state-mib 1024 --ranks 2 --rounds 3 --directory /tmp

Each round does everything once, so a disk that is slow for a while is slow for all. Files are fsynced by every writer
and dropped from the page cache before every read. torch.save and torch.load handle the same bytes in one process.
"""

from __future__ import annotations

import argparse
import functools
import os
import platform
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from sharded_adamax import CheckpointManager, ShardedAdamax, load, save
from tests.benchmarks.memory import growth
from tests.distributed.pool import Pool

MIB = 2**20
LAYER_MIB = 16  # a piece: the largest tensor
WIDTH = 2048


class Job(NamedTuple):
    net: nn.Module
    optimizer: ShardedAdamax


def build(state_mib: int) -> Job:
    """A model whose exp_avg and exp_inf have ``state_mib`` MiB, that is half of it in parameters."""
    layers = [nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(state_mib // 2 // LAYER_MIB)]
    net = nn.Sequential(*layers)
    optimizer = ShardedAdamax(net.parameters(), reduce_gradients=False)
    for param in net.parameters():
        param.grad = param.detach()
    optimizer.step()
    optimizer.zero_grad()
    return Job(net, optimizer)


def _seconds(action: Callable[[], object], *, together: bool = True) -> float:
    """With ``together`` the time until the last rank is done; otherwise only the first rank does it."""
    dist.barrier()
    start = time.perf_counter()
    if together or dist.get_rank() == 0:
        action()
    if together:
        dist.barrier()
    elapsed = time.perf_counter() - start
    dist.barrier()
    return elapsed


def _forget(path: Path) -> None:
    """Drop a file or the files of a directory from the page cache."""
    if dist.get_rank() == 0:
        for file in path.iterdir() if path.is_dir() else [path]:
            descriptor = os.open(file, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)
    dist.barrier()


def _torch_save(path: Path, everything: Any) -> None:
    with open(path, "wb") as file:
        torch.save(everything, file)
        file.flush()
        os.fsync(file.fileno())


def _dd(*arguments: str) -> None:
    subprocess.run(["dd", "bs=1M", *arguments], check=True, capture_output=True)


def throughput(root: str, state_mib: int, rounds: int) -> dict[str, list[float]]:
    """Return the seconds of each thing in each round, on every rank."""
    job = build(state_mib)
    everything = {"model": job.net.state_dict(), "optimizer": job.optimizer.full_state_dict(to=0)}
    times: dict[str, list[float]] = {}
    for number in range(rounds):
        directory = Path(root) / str(number)
        directory.mkdir(exist_ok=True)
        for what, seconds in _round(directory, job, everything, state_mib * 3 // 2).items():
            times.setdefault(what, []).append(seconds)
        dist.barrier()
        if dist.get_rank() == 0:
            shutil.rmtree(directory)
        dist.barrier()
    return times


def _round(directory: Path, job: Job, everything: Any, total_mib: int) -> dict[str, float]:
    ours, plain, zeros = (directory / name for name in ("ours", "plain", "zeros"))
    write = ("if=/dev/zero", f"of={zeros}", f"count={total_mib}", "conv=fsync")
    times = {
        "save": _seconds(lambda: save(ours, job.net, job.optimizer)),
        "torch.save + fsync": _seconds(lambda: _torch_save(plain, everything), together=False),
        "dd write, conv=fsync": _seconds(lambda: _dd(*write), together=False),
    }
    _forget(ours)
    times["load"] = _seconds(lambda: load(ours, job.net, job.optimizer))
    _forget(ours)
    times["load, verify=False"] = _seconds(lambda: load(ours, job.net, job.optimizer, verify=False))
    _forget(plain)
    times["torch.load"] = _seconds(lambda: torch.load(plain, weights_only=True), together=False)
    _forget(zeros)
    times["dd read"] = _seconds(lambda: _dd(f"if={zeros}", "of=/dev/null"), together=False)
    for is_async in (False, True):
        manager = CheckpointManager(directory / f"manager{is_async}", async_save=is_async)
        save_ = functools.partial(manager.save, 1, job.net, job.optimizer)
        name = "asynchronous" if is_async else "synchronous"
        times[f"{name} save: stall"] = _seconds(save_)
        times[f"{name} save: until durable"] = times[f"{name} save: stall"] + _seconds(manager.wait)
        manager.close()
    return times


def memory(root: str, state_mib: int) -> dict[str, tuple[float, float]]:
    """Return the growth of memory in MiB, at most and in the end, of this rank."""
    path = Path(root) / "memory"
    small = build(2 * LAYER_MIB)
    save(Path(root) / "small", small.net, small.optimizer)  # what the first time imports and allocates does not count
    load(Path(root) / "small", small.net, small.optimizer)
    small.optimizer.full_state_dict(to=0)
    job = build(state_mib)
    found = {}
    _, found["save"] = growth(lambda: save(path, job.net, job.optimizer))
    _, found["load"] = growth(lambda: load(path, job.net, job.optimizer))
    full, found["full_state_dict"] = growth(lambda: job.optimizer.full_state_dict(to=0))
    del full
    return {name: (value.peak_bytes / MIB, value.end_bytes / MIB) for name, value in found.items()}


def _report(times: list[dict[str, list[float]]], total_mib: float) -> None:
    for what in times[0]:
        rounds = [max(by_rank) for by_rank in zip(*(t[what] for t in times), strict=True)]
        low, middle, high = min(rounds), statistics.median(rounds), max(rounds)
        rate = f"{total_mib / middle:7.0f} MiB/s" if ":" not in what else " " * 13
        print(f"  {what:32} {middle:7.2f} s  ({low:.2f} to {high:.2f})  {rate}")


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--state-mib", type=int, default=1024, help="of exp_avg and exp_inf together")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--directory", type=Path, default=Path(tempfile.gettempdir()))
    options = parser.parse_args()
    total_mib = options.state_mib * 1.5
    print(
        f"state {options.state_mib} MiB, model {options.state_mib // 2} MiB, fp32, largest tensor {LAYER_MIB} MiB, "
        f"{options.ranks} ranks, {options.rounds} rounds, {options.directory}\n"
        f"torch {torch.__version__}, Python {platform.python_version()}, Linux {platform.release()}, "
        f"{os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}"
    )
    # Large tensors are given back when they are freed, so that what is resident is what is in use.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(MIB)
    pool = Pool()
    with tempfile.TemporaryDirectory(dir=options.directory) as root:
        print("memory above what was there before, MiB, by rank: at most / in the end")
        for rank, found in enumerate(pool.run(options.ranks, memory, root, options.state_mib, timeout_s=900)):
            print(
                f"  rank {rank}: " + ", ".join(f"{name} {peak:.0f} / {end:.0f}" for name, (peak, end) in found.items())
            )
    with tempfile.TemporaryDirectory(dir=options.directory) as root:
        print("seconds, median (least to most) of the rounds, and rate of the median")
        _report(pool.run(options.ranks, throughput, root, options.state_mib, options.rounds, timeout_s=3600), total_mib)
    pool.close()


if __name__ == "__main__":
    main()
