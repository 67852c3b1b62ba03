"""`plan`: what a rank will hold and send, for a model and world sizes, before any training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import nn

from sharded_adamax import layout
from sharded_adamax.arguments import checked_settings
from sharded_adamax.buckets import LOW_PRECISION
from sharded_adamax.engine import Settings
from sharded_adamax.planning.footprint import Footprint
from sharded_adamax.planning.model import ModelShape, shape_of
from sharded_adamax.planning.peers import of_ddp, of_zero
from sharded_adamax.planning.timeline import of_sharded_adamax

Scheme = Literal["sharded_adamax", "ddp", "zero"]
SCHEMES: tuple[Scheme, ...] = get_args(Scheme)
MAX_WORLD_SIZE = 2**14  # of the search for one that fits


@dataclass(frozen=True)
class Row:
    """One rank of a job of ``world_size`` ranks, by three schemes."""

    world_size: int
    sharded_adamax: Footprint
    ddp: Footprint  # DistributedDataParallel and torch.optim.Adamax
    zero: Footprint | None  # DistributedDataParallel and ZeroRedundancyOptimizer; None: it refuses the model

    def of(self, scheme: Scheme) -> Footprint | None:
        """Return the footprint of one scheme."""
        footprint: Footprint | None = getattr(self, scheme)
        return footprint


@dataclass(frozen=True)
class Plan:
    """What ranks will hold and send. Activations, and what libraries and the CUDA context take, are not in it."""

    model: ModelShape
    settings: Settings
    device: Literal["cuda", "cpu"]
    rows: tuple[Row, ...]

    def footprint(self, scheme: Scheme, world_size: int) -> Footprint | None:
        """Return one scheme at one world size; of schemes whose ranks differ, the rank that holds most."""
        if scheme == "sharded_adamax":
            return of_sharded_adamax(
                self.model,
                layout.build(self.model.trained, world_size=world_size, bucket_bytes=self.settings.bucket_bytes),
                self.settings.precision,
                reduce_gradients=self.settings.reduce_gradients,
                on_gloo=self.device == "cpu",
            )
        of_peer = of_ddp if scheme == "ddp" else of_zero
        return of_peer(self._model_of_peers(), world_size, foreach=self.device == "cuda")

    def row(self, world_size: int) -> Row:
        """Return all schemes at any world size."""
        sharded, ddp = self.footprint("sharded_adamax", world_size), self.footprint("ddp", world_size)
        assert sharded is not None and ddp is not None
        return Row(world_size, sharded, ddp, self.footprint("zero", world_size))

    def smallest_world_size(self, gpu_bytes: float, scheme: Scheme = "sharded_adamax") -> int | None:
        """Return how many ranks it takes for the peak to be at most ``gpu_bytes``; None: no number up to 16,384 does.

        Any number of ranks counts, not only those of the rows.
        """

        def fits(world_size: int) -> bool:
            footprint = self.footprint(scheme, world_size)
            return footprint is not None and footprint.peak <= gpu_bytes

        alone = self.footprint(scheme, 1)
        # DDP does not depend on the number of ranks, and no scheme here shards the parameters.
        if alone is None or alone.parameters + alone.frozen > gpu_bytes or (scheme == "ddp" and not fits(1)):
            return None
        high = 1
        while not fits(high):
            high *= 2
            if high > MAX_WORLD_SIZE:
                return None
        low = high // 2 + 1  # half of it does not fit
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if fits(middle) else (middle + 1, high)
        return high

    def _model_of_peers(self) -> ModelShape:
        """Return the model in the precision that torch's Adamax needs for the same digits: it has no masters."""
        master_dtype = self.settings.precision.master_dtype
        if master_dtype is None:
            return self.model
        return self.model.to(master_dtype, only=LOW_PRECISION)


def plan(
    model: float | nn.Module | Sequence[Sequence[int]],
    *,
    world_sizes: Sequence[int] = (1, 2, 4, 8),
    param_dtype: torch.dtype | None = None,
    master_dtype: torch.dtype | None = None,
    reduce_dtype: torch.dtype | None = None,
    reduce_gradients: bool = True,
    bucket_mib: float = 25,
    device: Literal["cuda", "cpu"] = "cuda",
) -> Plan:
    """Return what each rank will hold and send, beside DistributedDataParallel and ZeroRedundancyOptimizer.

    Nothing is allocated: the layout is that of `ShardedAdamax`, and backward and step are gone through bucket by
    bucket. Activations are not in it.

    Args:
        model: A module, best built under ``torch.device("meta")``; or the shapes of its parameters; or their number.
        world_sizes: The numbers of ranks to plan for.
        param_dtype: To which the model is cast before it is planned for. None: as it is; float32 for shapes and
            numbers.
        master_dtype, reduce_dtype, reduce_gradients, bucket_mib: As for `ShardedAdamax`.
        device: "cuda": NCCL, and torch.optim.Adamax with foreach. "cpu": gloo, and torch.optim.Adamax without.

    Raises:
        TypeError, ValueError: What it is given is no model, or `ShardedAdamax` would refuse it.

    Example::

        with torch.device("meta"):
            model = Net()
        planned = plan(model, world_sizes=[8, 16], param_dtype=torch.bfloat16, master_dtype=torch.float32)
        planned.rows[0].sharded_adamax.peak  # bytes, at 8 ranks
        planned.smallest_world_size(80 * 2**30)
    """
    settings = checked_settings(
        reduce_gradients=reduce_gradients,
        bucket_mib=bucket_mib,
        reduce_dtype=reduce_dtype,
        master_dtype=master_dtype,
        skip_nonfinite=False,
        capturable=False,
        fused=False,
    )
    if device not in ("cuda", "cpu"):
        raise ValueError(f"expected device to be 'cuda' or 'cpu', got {device!r}")
    if not world_sizes or not all(isinstance(size, int) and size >= 1 for size in world_sizes):
        raise ValueError(f"expected world_sizes as numbers of at least 1, got {list(world_sizes)}")
    if param_dtype is not None and not param_dtype.is_floating_point:
        raise ValueError(f"expected param_dtype to be a floating-point dtype, got {param_dtype}")
    shape = shape_of(model, param_dtype or torch.float32, settings.bucket_bytes).to(param_dtype)
    for spec in shape.trained:
        if spec.dtype.is_complex and reduce_dtype is not None:
            raise ValueError(f"{spec.name} is complex ({spec.dtype}): reduce_dtype={reduce_dtype} cannot carry it")
    planned = Plan(shape, settings, device, ())
    return replace(planned, rows=tuple(planned.row(size) for size in world_sizes))
