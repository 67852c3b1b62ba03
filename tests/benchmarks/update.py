"""The update kernels on the CPU beside torch.optim.Adamax and the memory bound, and a step over many tiny parameters.

    python -m tests.benchmarks.update --mi-elements 64 --threads 1 2 --rounds 5 --json update.json

The bound is a pass that reads and writes the same 28 bytes per element with next to no arithmetic: three tensors are
changed in place and a fourth is added to one of them. No single way to write it is the fastest everywhere, so three are
timed (whole tensors, in chunks, compiled) and the fastest of each round counts.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sharded_adamax import ShardedAdamax
from sharded_adamax.kernels import Hyper, Kernel, choose, eager
from tests.benchmarks.report import Report, interleaved, ratios

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
    return interleaved({**actions, **{name: run(kernel) for name, kernel in KERNELS.items()}}, rounds)


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


def _compare(report: Report, title: str, seconds: dict[str, list[float]]) -> None:
    columns = {"speed of torch": {name: ratios(seconds[TORCH], times) for name, times in seconds.items()}}
    bounds = [times for name, times in seconds.items() if name.startswith(BOUND)]
    if bounds:
        bound = [min(times) for times in zip(*bounds, strict=True)]
        columns["time/bound"] = {name: ratios(times, bound) for name, times in seconds.items()}
    report.table(title, seconds, columns)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mi-elements", type=int, default=64, help="2**20 elements of the large update")
    parser.add_argument("--tiny", type=int, nargs="+", default=[100, 1000, 4000], help="numbers of tiny parameters")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="where to write all seconds")
    arguments = parser.parse_args()
    report = Report(arguments.json)
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        with torch.no_grad():
            title = f"{arguments.mi_elements} Mi elements, float32, {threads} threads"
            _compare(report, title, kernels(arguments.mi_elements * MI, arguments.rounds))
        for num_params in arguments.tiny:
            title = f"step() over {num_params} parameters of 512 elements, {threads} threads"
            _compare(report, title, tiny_steps(num_params, 512, 3 * arguments.rounds))
    report.close()


if __name__ == "__main__":
    main()
