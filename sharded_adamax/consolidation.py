"""The whole state on one rank, as the state dict of a torch.optim.Adamax."""

from __future__ import annotations

from itertools import chain

from torch import Tensor
from torch.optim.optimizer import Optimizer

from sharded_adamax.engine import Engine, sharded_state
from sharded_adamax.state import gather_full


def gather_state(engine: Engine, optimizer: Optimizer, to: int) -> dict[int, dict[str, Tensor]] | None:
    """Gather what ``optimizer.state`` holds, bucket by bucket. Collective.

    Returns:
        On rank ``to``: by number of the parameter in the groups, CPU tensors; None on the others.

    Raises:
        ValueError: There is no rank ``to``.
    """
    if not 0 <= to < engine.group.size:
        raise ValueError(f"expected a rank from 0 to {engine.group.size - 1} for to, got {to}")
    params = chain.from_iterable(group["params"] for group in optimizer.param_groups)
    numbers = {id(param): number for number, param in enumerate(params)}
    state: dict[int, dict[str, Tensor]] = {}
    engine.refresh_masters()
    for bucket in engine.buckets:
        steps = bucket.steps.to("cpu", copy=True)
        for key, shard in sharded_state(bucket).items():
            whole = gather_full(engine.group, bucket.layout, shard, bucket.params, to)
            for param, step, tensor in zip(bucket.params, steps, whole, strict=False):  # whole: rank ``to`` only
                entry = state.setdefault(numbers[id(param)], {"step": step.clone()})
                entry[key] = tensor
    return dict(sorted(state.items())) if engine.group.rank == to else None
