"""A plan as tables, sentences and JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from sharded_adamax.planning.footprint import Footprint
from sharded_adamax.planning.plans import SCHEMES, Plan

GIB = 2**30
NAMES = {"sharded_adamax": "ShardedAdamax", "ddp": "DDP", "zero": "DDP + ZeRO"}


class Gib(float):
    """Bytes that are shown in GiB."""

    def __str__(self) -> str:
        return f"{self / GIB:.3f}" if self < GIB else f"{self / GIB:.2f}"


Table = tuple[list[str], list[list[object]]]


def held(plan: Plan) -> Table:
    """Return the table of what a rank holds when it holds most: of ShardedAdamax in parts, of the others the sum."""
    headings = ["ranks", "params", "state", "master", "grads", "buckets", "peak", "DDP", "ZeRO"]
    rows: list[list[object]] = []
    for row in plan.rows:
        mine = row.sharded_adamax
        parts = (
            mine.parameters + mine.frozen,
            mine.state,
            mine.masters,
            mine.gradients + mine.gradient_shards,
            mine.buckets + mine.temporaries,
            mine.peak,
            row.ddp.peak,
        )
        rows.append([row.world_size, *map(Gib, parts), _or_dash(row.zero, "peak")])
    if not any(row.sharded_adamax.masters for row in plan.rows):
        headings.remove("master")
        for cells in rows:
            del cells[3]
    return headings, rows


def sent(plan: Plan) -> Table:
    """Return the table of what a rank sends in a step."""
    rows: list[list[object]] = [
        [
            row.world_size,
            Gib(row.sharded_adamax.sent_per_step),
            Gib(row.ddp.sent_per_step),
            _or_dash(row.zero, "sent_per_step"),
        ]
        for row in plan.rows
    ]
    return ["ranks", "sent", "DDP", "ZeRO"], rows


def _or_dash(footprint: Footprint | None, name: str) -> object:
    return "-" if footprint is None else Gib(getattr(footprint, name))


def peaks(plan: Plan) -> str:
    """Return where in a step ShardedAdamax holds most."""
    ranks: dict[str, list[str]] = {}
    for row in plan.rows:
        ranks.setdefault(row.sharded_adamax.peak_at, []).append(str(row.world_size))
    return "; ".join(f"{where} (ranks: {', '.join(numbers)})" for where, numbers in ranks.items())


def fits(plan: Plan, gpu_bytes: float) -> str:
    """Return from how many ranks on each scheme fits."""
    texts = []
    for scheme in SCHEMES:
        size = plan.smallest_world_size(gpu_bytes, scheme)
        texts.append(f"{NAMES[scheme]}: {'never' if size is None else f'{size} rank' + 's' * (size > 1)}")
    return ", ".join(texts)


def notes(plans: Sequence[Plan]) -> list[str]:
    """Return what is not in the plans, and what was taken for granted."""
    found = [
        "not included: activations, the CUDA context, workspaces of libraries, the gaps of the allocator, and what "
        "clip_grad_norm_ takes for a moment; the counters of steps are on the CPU",
        "gradients are taken to become ready in the reverse order in which the parameters were registered",
        "grads: whole gradients that wait for the rest of their bucket, and reduced shards that wait for the update; "
        "buckets: those in flight, and copies that last for a moment",
        "DDP: torch.optim.Adamax, gradient_as_bucket_view=True (the default holds gradients twice); ZeRO: "
        "ZeroRedundancyOptimizer over it, the rank that holds most",
    ]
    if any(plan.settings.precision.master_dtype is not None for plan in plans):
        found.append("torch's Adamax has no master: beside one, DDP and ZeRO are taken in float32 under autocast")
    if any(row.zero is None for plan in plans for row in plan.rows):
        found.append("ZeroRedundancyOptimizer refuses a model of several dtypes")
    if plans[0].device == "cuda":
        found.append("the rules are those of NCCL and foreach on CUDA; they were counted on the CPU, never on a GPU")
    found += sorted({plan.model.assumption for plan in plans if plan.model.assumption})
    return found


def as_json(plans: dict[str, Plan], gpu_bytes: float | None) -> dict[str, Any]:
    """Return everything, in bytes."""
    planned = list(plans.values())
    return {
        "num_params": planned[0].model.num_params,
        "device": planned[0].device,
        "gpu_bytes": gpu_bytes,
        "plans": [
            {
                "precision": precision,
                "smallest_world_size": {scheme: plan.smallest_world_size(gpu_bytes, scheme) for scheme in SCHEMES}
                if gpu_bytes
                else None,
                "rows": [
                    {"world_size": row.world_size, **{scheme: _footprint(row.of(scheme)) for scheme in SCHEMES}}
                    for row in plan.rows
                ],
            }
            for precision, plan in plans.items()
        ],
        "notes": notes(planned),
    }


def _footprint(footprint: Footprint | None) -> dict[str, Any] | None:
    if footprint is None:
        return None
    return {**asdict(footprint), "steady": footprint.steady, "peak": footprint.peak}
