"""What a job holds with DistributedDataParallel and torch.optim.Adamax, plain or in ZeroRedundancyOptimizer.

DistributedDataParallel is taken with ``gradient_as_bucket_view=True``; its default holds every gradient twice. Of
torch.optim.Adamax its default: the loop on the CPU, with a copy of one gradient at a time; foreach on CUDA, with one of
all gradients.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable

from sharded_adamax.layout import ParamSpec
from sharded_adamax.planning.footprint import Footprint
from sharded_adamax.planning.model import ModelShape, Parameter, nbytes
from sharded_adamax.planning.timeline import all_reduce_bytes


def of_ddp(model: ModelShape, world_size: int, *, foreach: bool) -> Footprint:
    """Return what DistributedDataParallel with torch.optim.Adamax holds, the same on every rank."""
    trained = model.trained
    sent = all_reduce_bytes(sum(model.gradient_bytes), world_size)
    return _footprint(model, trained, _scratch(trained, foreach=foreach), sent)


def of_zero(model: ModelShape, world_size: int, *, foreach: bool) -> Footprint | None:
    """Return what DistributedDataParallel with ZeroRedundancyOptimizer holds, on the rank that holds most.

    ZeroRedundancyOptimizer gives whole parameters to ranks, so that ranks differ: by as much as the largest parameter.
    What each rank sends is the mean over the ranks. None: it refuses a model of several dtypes.
    """
    if len({spec.dtype for spec, _ in model.parameters}) > 1:
        return None
    parts = partition(model.parameters, world_size)
    mine = max(parts, key=lambda part: sum(map(nbytes, part)))
    of_all = sum(model.gradient_bytes)
    sent_updates = (world_size - 1) * sum(nbytes(spec) for spec, _ in model.parameters) // world_size
    return _footprint(model, mine, _scratch(mine, foreach=foreach), all_reduce_bytes(of_all, world_size) + sent_updates)


def partition(parameters: Iterable[Parameter], world_size: int) -> list[list[ParamSpec]]:
    """Return the trained parameters of each rank: the largest first, each to the rank with the fewest elements so far.

    Source: ``_partition_parameters`` in torch/distributed/optim/zero_redundancy_optimizer.py, which is given all
    parameters of the model, frozen ones among them.
    """
    parts: list[list[ParamSpec]] = [[] for _ in range(world_size)]
    loads = [(0, rank) for rank in range(world_size)]
    for spec, is_trained in sorted(parameters, key=lambda parameter: parameter.spec.numel, reverse=True):
        load, rank = heapq.heappop(loads)
        heapq.heappush(loads, (load + spec.numel, rank))
        if is_trained:
            parts[rank].append(spec)
    return parts


def _scratch(updated: list[ParamSpec], *, foreach: bool) -> int:
    """Return the bytes of |gradient| that torch.optim.Adamax makes: of all tensors of a dtype, or of one at a time."""
    if not foreach:
        return max(map(nbytes, updated), default=0)
    by_dtype: Counter[object] = Counter()
    for spec in updated:
        by_dtype[spec.dtype] += nbytes(spec)
    return max(by_dtype.values(), default=0)


def _footprint(model: ModelShape, updated: list[ParamSpec], scratch: int, sent: int) -> Footprint:
    of_trained = sum(model.gradient_bytes)
    largest = model.largest_in_autograd  # before it is copied into DDP's bucket
    return Footprint(
        parameters=of_trained,
        frozen=model.frozen_bytes,
        state=2 * sum(map(nbytes, updated)),
        masters=0,
        gradients=of_trained,
        gradient_shards=0,
        buckets=0,
        temporaries=max(largest, scratch),
        peak_at="step" if scratch > largest else "backward",
        sent_per_step=sent,
    )
