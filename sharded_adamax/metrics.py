"""Figures of the last step, for whoever draws curves.

[Note: metrics]  Names to plain floats: ``wandb.log(optimizer.metrics())``, or TensorBoard's
``writer.add_scalars("optimizer", optimizer.metrics(), step)``. A step computes nothing for them but the time that it
waits. Reading them makes the host wait for the device, once; and reading twice gives the same.

=============================  ========================================================================================
``skipped_steps``              so far, by ``skip_nonfinite`` and ``skip_grad_norm_above``
``grad_norm``                  L2 norm of the mean gradient before it was clipped. Only where the step computed it
``shard_exp_inf_max``          the largest element of exp_inf (u) that this rank owns; NaN where one is NaN
``host_wait_seconds``          time this host waited for other ranks, from the end of the step before to that of the
                               last one: communication that was not hidden behind computing. It is the sum of:
``host_wait_*_seconds``        ``reduce_scatter`` (over gloo and MPI with adding up what arrived), ``vote``,
                               ``all_gather``, and ``all_reduce``, which norms and GradScaler need
=============================  ========================================================================================

Over NCCL it is the device that waits, and the host's time is close to nothing. There the profiler shows the ranges
``sharded_adamax::...`` beside the kernels of NCCL.

What one rank cannot know needs all of them: ``metrics_of_all_ranks`` is collective. It has ``exp_inf_max`` over all
shards, and the least and the most time that any host waited: all others wait for a rank that hardly waits itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from sharded_adamax.engine import Engine

_KINDS = ("reduce_scatter", "vote", "all_gather", "all_reduce")


def of_rank(engine: Engine) -> dict[str, float]:
    """Return what this rank knows. Local; waits for the device."""
    grad_norm, exp_inf_max = _read(engine)
    known = {} if grad_norm is None else {"grad_norm": grad_norm}
    waited = {f"host_wait_{kind}_seconds": engine.waited_seconds.get(kind, 0.0) for kind in _KINDS}
    return {
        "skipped_steps": float(engine.num_skipped_steps),
        **known,
        "shard_exp_inf_max": exp_inf_max,
        "host_wait_seconds": sum(waited.values()),
        **waited,
    }


def of_all_ranks(engine: Engine) -> dict[str, float]:
    """Return what all ranks know together, the same on each. Collective; waits for the device."""
    mine = of_rank(engine)
    # The hosts' values, and not a reduction on the device: of those some would lose NaN, which is what to look for.
    ranks = engine.control.exchange(mine)
    waited = [metrics["host_wait_seconds"] for metrics in ranks]
    return {
        **{name: mine[name] for name in ("skipped_steps", "grad_norm") if name in mine},
        "exp_inf_max": _max(metrics["shard_exp_inf_max"] for metrics in ranks),
        "host_wait_seconds_min": min(waited),
        "host_wait_seconds_max": max(waited),
    }


def _read(engine: Engine) -> tuple[float | None, float]:
    """Return the norm of the last gradient, if there is one, and the largest exp_inf, in one go."""
    values = []
    for bucket in engine.buckets:
        exp_inf = torch.view_as_real(bucket.exp_inf) if bucket.exp_inf.is_complex() else bucket.exp_inf
        values.append(exp_inf.amax().double())
    norm = engine.grad_norm
    if norm is not None:
        # The norm of no gradients at all is on the CPU; a sum is on the device.
        values.append(values[0].new_zeros(()) + norm if values else norm.double())
    numbers: list[float] = torch.stack(values).cpu().tolist() if values else []
    return None if norm is None else numbers.pop(), _max(numbers)


def _max(values: Iterable[float]) -> float:
    """Return the largest, 0 if there is none; NaN if one is NaN, which ``max`` may overlook."""
    found = 0.0
    for value in values:
        if math.isnan(value):
            return value
        found = max(found, value)
    return found
