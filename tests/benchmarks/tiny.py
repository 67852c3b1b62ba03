"""What many tiny parameters cost: hooks in backward and `step`, beside DistributedDataParallel and torch.optim.Adamax.

In a world of one nothing is sent: what is above plain autograd are the hooks. On two ranks there is the traffic as
well, and who waits for it where differs, so backward and `step` are read together.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sharded_adamax import ShardedAdamax
from tests.benchmarks.report import Report, ratios
from tests.distributed.pool import Pool

NUMEL = 512
PLAIN = "torch foreach, no hooks"
DDP = "DDP + torch foreach"
OURS = "ShardedAdamax"


class Tiny(nn.Module):
    """Many small parameters, each used once."""

    def __init__(self, num_params: int) -> None:
        super().__init__()
        self.params = nn.ParameterList(torch.zeros(NUMEL) for _ in range(num_params))

    def forward(self) -> Tensor:
        return torch.stack([param.sum() for param in self.params]).sum()


@dataclass(frozen=True)
class Seconds:
    """Of one contender on one rank, in each round."""

    backward: list[float]
    step: list[float]


def _contenders(num_params: int) -> dict[str, tuple[nn.Module, torch.optim.Optimizer]]:
    plain, wrapped, ours = (Tiny(num_params) for _ in range(3))
    return {
        PLAIN: (plain, torch.optim.Adamax(plain.parameters(), foreach=True)),
        DDP: (
            DistributedDataParallel(wrapped, gradient_as_bucket_view=True),
            torch.optim.Adamax(wrapped.parameters(), foreach=True),
        ),
        OURS: (ours, ShardedAdamax(ours.parameters())),
    }


def measure(num_params: int, rounds: int) -> dict[str, Seconds]:
    """Time backward and `step` on the ranks of the default process group; one round before is not counted."""
    contenders = _contenders(num_params)
    seconds = {name: Seconds([], []) for name in contenders}
    for number in range(rounds + 1):
        for name, (module, optimizer) in contenders.items():
            loss = module()
            dist.barrier()
            began = time.perf_counter()
            loss.backward()
            middle = time.perf_counter()
            optimizer.step()
            ended = time.perf_counter()
            optimizer.zero_grad()
            if number:
                seconds[name].backward.append(middle - began)
                seconds[name].step.append(ended - middle)
    return seconds


def measure_and_tell(report: Report, num_params: int, rounds: int) -> None:
    """Report backward and `step` in a world of one, and on two ranks."""
    pool = Pool()
    for world_size in (1, 2):
        found = pool.run(world_size, measure, num_params, rounds, timeout_s=600)[0]
        what = f"{num_params} parameters of {NUMEL} elements, {world_size} rank{'s' if world_size > 1 else ''}"
        plain = found[PLAIN]
        added = {
            name: [1e6 * (mine - its) / num_params for mine, its in zip(its_all.backward, plain.backward, strict=True)]
            for name, its_all in found.items()
        }
        backward = {name: seconds.backward for name, seconds in found.items()}
        report.table(f"backward: {what}", backward, {"added us/param": added})
        step = {name: seconds.step for name, seconds in found.items()}
        report.table(
            f"step(): {what}", step, {"this / foreach": {n: ratios(its, plain.step) for n, its in step.items()}}
        )
    pool.close()
