"""What `plan` predicts is what torch's allocator counts: five models, three world sizes, with the peers beside."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

from sharded_adamax import ShardedAdamax, plan
from sharded_adamax.engine import HeldBytes
from sharded_adamax.planning import Footprint, Scheme
from sharded_adamax.planning.model import with_biases
from tests.benchmarks.memory import allocated
from tests.distributed.pool import Pool
from tests.planned_models import MODELS, LargeLayer, Mixed, PostNormTransformer, Transformer

NUM_STEPS = 2  # the state of the peers is made in the first
# What is not in a plan: counters, 4 bytes for each parameter here and up to 16 in the peers, and activations. In
# TinyParameters they are 0.6 and 1.9 %, elsewhere 0.2 % at most.
TOLERANCE = 0.01
TOLERANCE_OF_PEERS = 0.03


class Counted(NamedTuple):
    peak: int
    held: HeldBytes | None
    sent: int  # per step


def _model(model_class: type[nn.Module], dtype: torch.dtype | None) -> nn.Module:
    model = model_class()
    return model if dtype is None else model.to(dtype)


def _train(
    model_class: type[nn.Module], scheme: Scheme, dtype: torch.dtype | None, settings: dict[str, Any]
) -> tuple[Any, Any]:
    model = _model(model_class, dtype)
    forward = model
    if scheme != "sharded_adamax" or not settings.get("reduce_gradients", True):
        # What a gloo thread frees is not seen by the profiler: the flat copies of the first broadcast, and the first
        # buckets, which are made anew in the second step unless unused parameters are looked for.
        forward = DistributedDataParallel(
            model, bucket_cap_mb=1, gradient_as_bucket_view=True, find_unused_parameters=True, init_sync=False
        )
    optimizer: Any
    if scheme == "sharded_adamax":
        optimizer = ShardedAdamax(model.parameters(), bucket_mib=1, **settings)
    elif scheme == "zero":
        optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.Adamax, **settings)
    else:
        optimizer = torch.optim.Adamax(model.parameters(), **settings)
    for _ in range(NUM_STEPS):
        forward().backward()
        optimizer.step()
        optimizer.zero_grad()
    return forward, optimizer


def _count(model_class: type[nn.Module], scheme: Scheme, dtype: torch.dtype | None = None, **settings: Any) -> Counted:
    kept = []

    def train() -> object:
        kept.append(_train(model_class, scheme, dtype, settings))
        return kept

    # Workspaces of kernels are not in a plan: on a processor with AVX-512 and without a bfloat16 product of its own,
    # oneDNN takes memory for one, on others it does not.
    with torch.backends.mkldnn.flags(enabled=False):
        peak, _ = allocated(train)
    _, optimizer = kept.pop()
    if scheme != "sharded_adamax":
        return Counted(peak, None, 0)
    sent = optimizer._get_engine().group.traffic.sent_bytes
    return Counted(peak, optimizer.held_bytes(), (sent["reduce_scatter"] + sent["all_gather"]) // NUM_STEPS)


def _count_all(model_class: type[nn.Module], schemes: list[Scheme]) -> list[Counted]:
    return [_count(model_class, scheme) for scheme in schemes]


def _count_precisions(model_class: type[nn.Module], cases: list[dict[str, Any]]) -> list[Counted]:
    return [_count(model_class, "sharded_adamax", **case) for case in cases]


def _on_meta(model_class: type[nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return model_class()


def _assert_near(counted: int, predicted: int, tolerance: float = TOLERANCE) -> None:
    assert abs(counted - predicted) <= tolerance * counted, f"counted {counted}, predicted {predicted}"


def _assert_held(counted: Counted, predicted: Footprint) -> None:
    """Live tensors are counted to the byte."""
    assert counted.held == HeldBytes(
        parameters=predicted.parameters,
        gradient_shards_peak=predicted.gradient_shards_peak,
        state=predicted.state,
        buckets_peak=predicted.buckets_peak,
        masters=predicted.masters,
    )


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("model_class", MODELS, ids=lambda model_class: model_class.__name__)
def test_predicted_bytes_are_those_counted(ranks: Pool, model_class: type[nn.Module], world_size: int) -> None:
    row = plan(_on_meta(model_class), world_sizes=[world_size], bucket_mib=1, device="cpu").rows[0]
    schemes: list[Scheme] = ["sharded_adamax"]
    if world_size > 1:
        schemes += ["ddp", "zero"] if row.zero else ["ddp"]
    by_rank = ranks.run(world_size, _count_all, model_class, schemes)
    for scheme, counted in zip(schemes, zip(*by_rank, strict=True), strict=True):
        predicted = row.of(scheme)
        assert predicted is not None
        fullest = max(each.peak for each in counted)
        print(f"{scheme}: counted {fullest}, {fullest / predicted.peak - 1:+.3%} of that predicted {predicted.peak_at}")
        _assert_near(fullest, predicted.peak, TOLERANCE_OF_PEERS)
        if scheme == "sharded_adamax":
            for each in counted:
                _assert_near(each.peak, predicted.peak)
                _assert_held(each, predicted)
                assert each.sent == predicted.sent_per_step
    assert (row.zero is None) == (model_class is Mixed), "ZeroRedundancyOptimizer takes one dtype only"


PRECISIONS: list[dict[str, Any]] = [
    {"dtype": torch.bfloat16},
    {"dtype": torch.bfloat16, "master_dtype": torch.float32},
    {"dtype": torch.bfloat16, "reduce_dtype": torch.float32},
    {"dtype": torch.bfloat16, "reduce_dtype": torch.float32, "master_dtype": torch.float32},
    {"reduce_dtype": torch.bfloat16},
    {"reduce_gradients": False},
    {"dtype": torch.bfloat16, "reduce_gradients": False, "master_dtype": torch.float32},
]


@pytest.mark.parametrize("world_size", [1, 2])
def test_so_they_are_in_every_precision_and_beside_ddp(ranks: Pool, world_size: int) -> None:
    by_rank = ranks.run(world_size, _count_precisions, LargeLayer, PRECISIONS)
    for case, counted in zip(PRECISIONS, zip(*by_rank, strict=True), strict=True):
        settings = {key: value for key, value in case.items() if key != "dtype"}
        planned = plan(
            _on_meta(LargeLayer),
            world_sizes=[world_size],
            param_dtype=case.get("dtype"),
            bucket_mib=1,
            device="cpu",
            **settings,
        )
        predicted = planned.rows[0].sharded_adamax
        for each in counted:
            print(f"{case}: counted {each.peak}, predicted {predicted.peak}, peak in {predicted.peak_at}")
            _assert_near(each.peak, predicted.peak)
            _assert_held(each, predicted)
            if settings.get("reduce_gradients", True):
                assert each.sent == predicted.sent_per_step


def _count_foreach(model_class: type[nn.Module], schemes: list[Scheme]) -> list[Counted]:
    return [_count(model_class, scheme, foreach=True) for scheme in schemes]


def test_peers_on_cuda_are_taken_with_foreach_which_copies_all_gradients_it_updates(ranks: Pool) -> None:
    row = plan(_on_meta(Transformer), world_sizes=[2], device="cuda").rows[0]
    schemes: list[Scheme] = ["ddp", "zero"]
    by_rank = ranks.run(2, _count_foreach, Transformer, schemes)
    for scheme, counted in zip(schemes, zip(*by_rank, strict=True), strict=True):
        predicted = row.of(scheme)
        assert predicted is not None and predicted.peak_at == "step"
        _assert_near(max(each.peak for each in counted), predicted.peak, TOLERANCE_OF_PEERS)


def _order_of_gradients(model: nn.Module) -> list[tuple[str, int]]:
    order: list[tuple[str, int]] = []
    for index, (name, param) in enumerate(model.named_parameters()):
        param.register_post_accumulate_grad_hook(lambda _, use=(name, index): order.append(use))
    model().backward()
    return order


def test_another_order_than_that_of_registration_is_what_the_prediction_lacks(ranks: Pool) -> None:
    planned = plan(_on_meta(PostNormTransformer), world_sizes=[4], bucket_mib=1, device="cpu")
    uses = with_biases(_order_of_gradients(PostNormTransformer())[::-1])
    in_true_order = replace(planned, model=replace(planned.model, uses=uses)).row(4).sharded_adamax
    for counted in ranks.run(4, _count, PostNormTransformer, "sharded_adamax"):
        _assert_near(counted.peak, in_true_order.peak)
        # Gradients wait longer than predicted, for those of norms: 3 % here, where the model is ten buckets large.
        assert 0.96 * counted.peak <= planned.rows[0].sharded_adamax.peak < 0.98 * counted.peak


def _count_over_mpi(model_class: type[nn.Module]) -> Counted:
    # Its thread holds the tensors of a collective a moment longer than the collective takes. What it frees the profiler
    # does not see, and counts on to the end: one count in ten is too large by a shard.
    return min((_count(model_class, "sharded_adamax") for _ in range(5)), key=lambda each: each.peak)


def test_what_is_planned_for_nccl_is_counted_over_the_same_collectives(mpi_ranks: Pool) -> None:
    # MPI is no GPU, but its group is the one that NCCL has too: one result tensor, no rows of the other ranks.
    predicted = plan(_on_meta(Transformer), world_sizes=[2], bucket_mib=1, device="cuda").rows[0].sharded_adamax
    for counted in mpi_ranks.run(2, _count_over_mpi, Transformer):
        _assert_near(counted.peak, predicted.peak)
        _assert_held(counted, predicted)
        assert counted.sent == predicted.sent_per_step
