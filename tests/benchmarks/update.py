"""The update kernels on the CPU beside torch.optim.Adamax and the memory bound, and a step over many tiny parameters.

    python -m tests.benchmarks.update --mi-elements 64 --threads 1 2 --rounds 5 --json update.json

Each round runs everything once, so that a machine that is slow for a while is slow for all; ratios are taken within a
round, and their median and range are reported. What else the machine was doing is reported as its load.

The bound is a pass that reads and writes the same 28 bytes per element with next to no arithmetic: three tensors are
changed in place and a fourth is added to one of them. No single way to write it is the fastest everywhere, so three are
timed (whole tensors, in chunks, compiled) and the fastest of each round counts.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sharded_adamax import ShardedAdamax
from sharded_adamax.kernels import Hyper, Kernel, choose, eager

MI = 1 << 20
CPU = torch.device("cpu")
KERNELS: dict[str, Kernel] = {
    "plain loop": eager.update_,
    "default (in chunks)": choose(None, CPU),
    "foreach=True (in chunks)": choose(True, CPU),
    "fused=True": choose(None, CPU, fused=True),
}
TORCH = "torch.optim.Adamax foreach=True"
BOUND = "bound: "


def _touch_(param: Tensor, grad: Tensor, exp_avg: Tensor, exp_inf: Tensor) -> None:
    param.mul_(0.999)
    exp_avg.mul_(0.999)
    exp_inf.add_(grad)


def _touch_in_chunks_(*tensors: Tensor) -> None:
    numel = 128 * 1024 * torch.get_num_threads()
    for chunk in zip(*(torch.split(tensor, numel) for tensor in tensors), strict=True):
        _touch_(*chunk)


def _bounds(operands: Sequence[Tensor]) -> dict[str, Callable[[], object]]:
    options: dict[str, Any] = {"cpp.dynamic_threads": True}
    compiled = torch.compile(_touch_, fullgraph=True, dynamic=True, options=options)
    ways: dict[str, Callable[..., None]] = {
        "whole tensors": _touch_,
        "in chunks": _touch_in_chunks_,
        "compiled": compiled,
    }
    return {f"{BOUND}{name}": functools.partial(touch, *operands) for name, touch in ways.items()}


def _interleaved(actions: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Return the seconds of each action in each round; a round before the first warms everything up."""
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for index in range(rounds + 1):
        for name, action in actions.items():
            start = time.perf_counter()
            action()
            if index:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def kernels(numel: int, rounds: int) -> dict[str, list[float]]:
    """Time one update of ``numel`` float32 elements with every kernel."""
    param = nn.Parameter(torch.randn(numel))
    param.grad = torch.randn(numel)
    reference = torch.optim.Adamax([param], foreach=True)
    reference.step()
    state, hyper = reference.state[param], Hyper.of(reference.param_groups[0])
    operands = (param.detach(), torch.randn(numel), state["exp_avg"], state["exp_inf"])

    def run(kernel: Kernel) -> Callable[[], None]:
        p, g, m, u = operands
        return lambda: kernel([p], [g], [m], [u], [2.0], hyper)

    actions: dict[str, Callable[[], object]] = {TORCH: reference.step, **_bounds(operands)}
    return _interleaved({**actions, **{name: run(kernel) for name, kernel in KERNELS.items()}}, rounds)


def tiny_steps(num_params: int, numel: int, rounds: int) -> dict[str, list[float]]:
    """Time ``step`` over many tiny parameters, gradients there; everything of `step` but the network counts."""
    makers: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
        TORCH: lambda params: torch.optim.Adamax(params, foreach=True),
        "ShardedAdamax": ShardedAdamax,
        "ShardedAdamax fused=True": lambda params: ShardedAdamax(params, fused=True),
    }
    seconds: dict[str, list[float]] = {name: [] for name in makers}
    jobs = {}
    for name, make in makers.items():
        params = [nn.Parameter(torch.zeros(numel)) for _ in range(num_params)]
        jobs[name] = (params, make(params))
    for index in range(rounds + 1):
        for name, (params, optimizer) in jobs.items():
            torch.stack([param.sum() for param in params]).sum().backward()  # type: ignore[no-untyped-call]
            start = time.perf_counter()
            optimizer.step()
            if index:
                seconds[name].append(time.perf_counter() - start)
            optimizer.zero_grad()
    return seconds


def _report(title: str, seconds: dict[str, list[float]]) -> dict[str, Any]:
    print(f"\n{title}\n{'':36} {'ms':>8} {'range':>17} {'speed of torch':>15} {'range':>13} {'time/bound':>11}")
    rows: dict[str, Any] = {}
    limits = [min(times) for times in zip(*(times for name, times in seconds.items() if BOUND in name), strict=True)]
    for name, times in seconds.items():
        faster = [other / mine for other, mine in zip(seconds[TORCH], times, strict=True)]
        row: dict[str, Any] = {"seconds": times, "speed_of_torch_foreach": statistics.median(faster)}
        bound = ""
        if limits:
            row["time_over_bound"] = statistics.median(mine / limit for mine, limit in zip(times, limits, strict=True))
            bound = f"{row['time_over_bound']:11.2f}"
        print(
            f"{name:36} {1e3 * statistics.median(times):8.2f} {1e3 * min(times):8.2f}-{1e3 * max(times):<8.2f} "
            f"{statistics.median(faster):15.2f} {min(faster):6.2f}-{max(faster):<6.2f} {bound}"
        )
        rows[name] = row
    return rows


def _machine() -> dict[str, Any]:
    cpu = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return {
        "cpu": f"{len(cpu)} x {cpu[0] if cpu else platform.machine()}",
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "load_before": os.getloadavg(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mi-elements", type=int, default=64, help="2**20 elements of the large update")
    parser.add_argument("--tiny", type=int, nargs="+", default=[100, 1000, 4000], help="numbers of tiny parameters")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="where to write all seconds")
    arguments = parser.parse_args()
    result: dict[str, Any] = {"machine": _machine()}
    print(*(f"{key}: {value}" for key, value in result["machine"].items()), sep="\n")
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        with torch.no_grad():
            title = f"{arguments.mi_elements} Mi elements, float32, {threads} threads"
            result[title] = _report(title, kernels(arguments.mi_elements * MI, arguments.rounds))
        for num_params in arguments.tiny:
            title = f"step() over {num_params} parameters of 512 elements, {threads} threads"
            result[title] = _report(title, tiny_steps(num_params, 512, 3 * arguments.rounds))
    result["machine"]["load_after"] = os.getloadavg()
    print(f"\nload_after: {result['machine']['load_after']}")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
