"""The ways to train with Adamax on several ranks that the benchmark of the step compares.

Each is built from the same model on every rank of the default process group, as its own documentation shows, with
buckets of the same size where it has any. Settings other than the default ones are in `Contender.settings`: they make a
peer faster, or make it train as the others do.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sharded_adamax import ShardedAdamax

LAUNCH = Path(__file__).resolve().parents[2] / "launch"
if str(LAUNCH) not in sys.path:
    sys.path.insert(0, str(LAUNCH))

if TYPE_CHECKING:
    from byte_model import ByteModel, ModelSizes

MIB = 1 << 20
LR = 2e-3


class Unavailable(Exception):
    """A contender that cannot be built here, and why."""


@dataclass(frozen=True)
class Training:
    """A model at work on this rank. A step is ``backward(module(tokens, targets))``, then ``update()``."""

    module: nn.Module  # returns the loss
    update: Callable[[], object]  # the step of the optimizer, and zero_grad
    backward: Callable[[Tensor], object] = torch.Tensor.backward

    def step(self, tokens: Tensor, targets: Tensor) -> Tensor:
        loss: Tensor = self.module(tokens, targets)
        self.backward(loss)
        self.update()
        return loss.detach()


@dataclass(frozen=True)
class Contender:
    """A way of training; ``build(sizes, bucket_mib)`` is collective.

    Raises (build):
        Unavailable: On every rank.
    """

    name: str
    settings: str  # for the report
    build: Callable[[ModelSizes, float], Training]


def sizes_of(options: argparse.Namespace) -> ModelSizes:
    """Return the sizes of the model that the command line asks for."""
    from byte_model import ModelSizes

    names = [field.name for field in dataclasses.fields(ModelSizes)]
    return ModelSizes(**{name: getattr(options, name) for name in names})


def make_model(sizes: ModelSizes) -> ByteModel:
    """Return the same model on every rank."""
    from byte_model import ByteModel

    torch.manual_seed(0)
    return ByteModel(sizes)


def _updates(optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    def update() -> None:
        optimizer.step()
        optimizer.zero_grad()

    return update


def _compute_alone(sizes: ModelSizes, bucket_mib: float) -> Training:
    model = make_model(sizes)
    return Training(model, model.zero_grad)


def _ours(sizes: ModelSizes, bucket_mib: float) -> Training:
    model = make_model(sizes)
    return Training(model, _updates(ShardedAdamax(model.named_parameters(), lr=LR, bucket_mib=bucket_mib)))


def _ours_overlapping(sizes: ModelSizes, bucket_mib: float) -> Training:
    model = make_model(sizes)
    optimizer = ShardedAdamax(model.named_parameters(), lr=LR, bucket_mib=bucket_mib)
    optimizer.overlap_forward(model)
    return Training(model, _updates(optimizer))


def _ddp(sizes: ModelSizes, bucket_mib: float) -> Training:
    model = DistributedDataParallel(make_model(sizes), bucket_cap_mb=bucket_mib, gradient_as_bucket_view=True)
    return Training(model, _updates(torch.optim.Adamax(model.parameters(), lr=LR)))


def _zero_redundancy(sizes: ModelSizes, bucket_mib: float) -> Training:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model = DistributedDataParallel(make_model(sizes), bucket_cap_mb=bucket_mib, gradient_as_bucket_view=True)
    optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.Adamax, parameters_as_bucket_view=True, lr=LR)
    return Training(model, _updates(optimizer))


def _fsdp2(sizes: ModelSizes, *, reshard_after_forward: bool) -> Training:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = make_model(sizes)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=reshard_after_forward)
    fully_shard(model, mesh=mesh, reshard_after_forward=reshard_after_forward)
    return Training(model, _updates(torch.optim.Adamax(model.parameters(), lr=LR)))


def _deepspeed(sizes: ModelSizes, bucket_mib: float, *, stage: int) -> Training:
    if importlib.util.find_spec("deepspeed") is None:
        raise Unavailable("not installed: pip install .[bench]")
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    deepspeed.logger.setLevel("ERROR")
    model = make_model(sizes)
    bucket_numel = int(bucket_mib * MIB / 4)
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,  # for its own report only
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,  # the default clips the norm to 1
        "zero_optimization": {
            "stage": stage,
            "overlap_comm": True,
            "reduce_bucket_size": bucket_numel,
            "allgather_bucket_size": bucket_numel,
        },
    }
    optimizer = torch.optim.Adamax(model.parameters(), lr=LR)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
    return Training(engine, engine.step, engine.backward)


COMPUTE = "compute alone"
OURS = "ours"
OVERLAPPING = "ours, overlap_forward"
DDP = "DDP + Adamax"
ZERO = "ZeroRedundancyOptimizer"
FSDP2 = "FSDP2, ZeRO-2"
FSDP2_RESHARDING = "FSDP2, ZeRO-3"
DEEPSPEED_1 = "DeepSpeed ZeRO-1"
DEEPSPEED_2 = "DeepSpeed ZeRO-2"

_DDP_SETTINGS = "bucket_cap_mb as ours, gradient_as_bucket_view=True"
_FSDP_SETTINGS = "fully_shard of each block and of the whole, gloo's own collectives"
_DEEPSPEED_SETTINGS = "fp32, torch.optim.Adamax as client optimizer, buckets as ours, overlap_comm=True, no clipping"
CONTENDERS = (
    Contender(COMPUTE, "forward and backward on all ranks at once, no optimizer, nothing sent", _compute_alone),
    Contender(OURS, "ShardedAdamax, step() waits for the parameters", _ours),
    Contender(OVERLAPPING, "ShardedAdamax, overlap_forward(model)", _ours_overlapping),
    Contender(DDP, f"DistributedDataParallel, {_DDP_SETTINGS}; torch.optim.Adamax", _ddp),
    Contender(
        ZERO,
        f"the same around torch.optim.Adamax, parameters_as_bucket_view=True; DDP: {_DDP_SETTINGS}",
        _zero_redundancy,
    ),
    Contender(
        FSDP2,
        f"{_FSDP_SETTINGS}, reshard_after_forward=False: parameters stay from forward to backward",
        lambda sizes, bucket_mib: _fsdp2(sizes, reshard_after_forward=False),
    ),
    Contender(
        FSDP2_RESHARDING,
        f"{_FSDP_SETTINGS}, reshard_after_forward=True: parameters are sharded, too, and gathered twice",
        lambda sizes, bucket_mib: _fsdp2(sizes, reshard_after_forward=True),
    ),
    Contender(DEEPSPEED_1, _DEEPSPEED_SETTINGS, lambda sizes, bucket_mib: _deepspeed(sizes, bucket_mib, stage=1)),
    Contender(DEEPSPEED_2, _DEEPSPEED_SETTINGS, lambda sizes, bucket_mib: _deepspeed(sizes, bucket_mib, stage=2)),
)
BY_NAME = {contender.name: contender for contender in CONTENDERS}
PEERS = (DDP, ZERO, FSDP2, FSDP2_RESHARDING, DEEPSPEED_1, DEEPSPEED_2)
