"""What the frameworks are asked for: train at 2 ranks, save, go on at another number, as with torch.optim.Adamax.

A framework's test gives a function ``train(kind, save_to, resume_from)`` that builds everything anew and trains with
the framework's own calls. It is run with torch.optim.Adamax (under DistributedDataParallel, as all of them do by
themselves) and with ShardedAdamax, and has to give the same bits: every loss, the parameters, the optimizer's state in
the file.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import Dataset

from sharded_adamax import ShardedAdamax
from tests.distributed.models import NUM_INPUTS, NUM_OUTPUTS, SMALL_BUCKET_MIB
from tests.distributed.problems import assert_same_bits

OPTIONS: dict[str, Any] = {"lr": 0.01, "weight_decay": 0.05}
MAX_NORM = 0.05  # gradients of the models here are longer: every step is clipped
NUM_STEPS = 3  # before the save, and as many after it
ACCUMULATE = 2  # batches in a step


class Run(NamedTuple):
    """What came of a training run, on one rank."""

    losses: list[float]
    norms: list[float]  # of the gradients, before they were clipped; empty where they are not
    params: dict[str, Tensor]

    @classmethod
    def of(cls, model: nn.Module, losses: list[float], norms: list[float]) -> Run:
        return cls(losses, norms, {name: param.detach().clone() for name, param in model.named_parameters()})


class Train(Protocol):
    def __call__(
        self,
        kind: str,
        *,
        save_to: Path | None = None,
        resume_from: Path | None = None,
        max_norm: float | None = MAX_NORM,
    ) -> Run: ...


def make_optimizer(kind: str, params: Iterable[Any]) -> Optimizer:
    if kind == "adamax":
        return torch.optim.Adamax(params, **OPTIONS)
    return ShardedAdamax(params, bucket_mib=SMALL_BUCKET_MIB, reduce_gradients=kind == "reducing", **OPTIONS)


class Points(Dataset[tuple[Tensor, Tensor]]):
    """Samples that are the same wherever they are asked for."""

    def __init__(self, num_samples: int) -> None:
        generator = torch.Generator().manual_seed(5)
        self.x = torch.randn(num_samples, NUM_INPUTS, generator=generator)
        self.y = torch.randn(num_samples, NUM_OUTPUTS, generator=generator)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.x[index], self.y[index]


@contextmanager
def as_launched() -> Iterator[None]:
    """Say in the environment what torchrun would say."""
    rank, world_size = str(dist.get_rank()), str(dist.get_world_size())
    names = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": "0"}
    names |= {"WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size, "TORCHELASTIC_RUN_ID": "test"}
    os.environ.update(names, MASTER_ADDR="127.0.0.1", MASTER_PORT="1")
    try:
        yield
    finally:
        for name in (*names, "MASTER_ADDR", "MASTER_PORT"):
            del os.environ[name]


def assert_same_run(got: Run, expected: Run, what: str) -> None:
    assert len(expected.losses) == NUM_STEPS * ACCUMULATE, f"{what}: {len(expected.losses)} losses"
    assert got.losses == expected.losses, f"{what}: losses {got.losses}, expected {expected.losses}"
    assert got.norms == expected.norms, f"{what}: norms {got.norms}, expected {expected.norms}"
    assert got.params.keys() == expected.params.keys()
    for name, param in got.params.items():
        assert_same_bits(param, expected.params[name], f"{what}: {name}")


def first_half(train: Train, read_state: Callable[[Path], dict[str, Any]], root: Path) -> None:
    """Train and save with each optimizer. Afterwards ``root`` has a checkpoint of each."""
    with as_launched():
        expected = train("adamax", save_to=root / "adamax")
        got = train("sharded", save_to=root / "sharded")
        assert_same_run(got, expected, "first half")
        assert expected.norms and min(expected.norms) > MAX_NORM, "nothing was clipped"
    if dist.get_rank() == 0:
        assert_same_file(read_state(root / "sharded"), read_state(root / "adamax"))


def assert_same_file(got: dict[str, Any], expected: dict[str, Any]) -> None:
    assert got["state"].keys() == expected["state"].keys() and len(expected["state"]) > 3
    for index, state in expected["state"].items():
        assert state["step"] == NUM_STEPS
        for key in ("step", "exp_avg", "exp_inf"):
            assert_same_bits(got["state"][index][key], state[key], f"{key} of parameter {index} in the file")
    assert [dict(group) for group in got["param_groups"]] == [dict(group) for group in expected["param_groups"]]


def second_half(train: Train, root: Path) -> None:
    """Go on from each checkpoint with each optimizer."""
    with as_launched():
        expected = train("adamax", resume_from=root / "adamax")
        for writer, reader in [("sharded", "sharded"), ("adamax", "sharded"), ("sharded", "adamax")]:
            got = train(reader, resume_from=root / writer)
            assert_same_run(got, expected, f"{reader} from the checkpoint of {writer}")


def same_without_ddp(train: Train) -> None:
    """Let the optimizer reduce the gradients. At 2 ranks dividing is exact, so that DDP's order of it does not show."""
    with as_launched():
        assert_same_run(train("reducing", max_norm=None), train("adamax", max_norm=None), "without DDP")
