"""Neighbours at the same step are updated as one tensor, and what lies between them stays zeros."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sharded_adamax import ShardedAdamax
from sharded_adamax.buckets import Bucket, Precision, Run
from sharded_adamax.kernels import longest_merged_gap
from sharded_adamax.layout import ParamSpec, build
from sharded_adamax.ranges import Range

SHAPES = [(64,), (20,), (), (0,), (100,), (3, 64), (7, 11)]


def _bucket(*numels: int, world_size: int = 1, rank: int = 0) -> Bucket:
    params = [torch.nn.Parameter(torch.ones(numel)) for numel in reversed(numels)]  # the last comes first
    layout = build([ParamSpec.of("p", param) for param in params], world_size=world_size, bucket_bytes=1 << 20)
    return Bucket(layout.buckets[0], params[::-1], rank, Precision())


def test_neighbours_at_the_same_step_are_one_run() -> None:
    bucket = _bucket(100, 20, 0, 70)
    assert bucket.runs([0, 1, 2, 3], 63) == [Run(Range(0, 320), 0.0)]


def test_another_step_or_an_unused_parameter_ends_a_run() -> None:
    bucket = _bucket(100, 20, 64, 10, 64)  # start at 0, 128, 192, 256, 320
    bucket.steps[2] = 5
    assert bucket.runs([0, 1, 2, 3, 4], 63) == [
        Run(Range(0, 192), 0.0),
        Run(Range(192, 256), 5.0),
        Run(Range(256, 384), 0.0),
    ]
    assert bucket.runs([0, 1, 2, 4], 63)[2:] == [Run(Range(320, 384), 0.0)]
    # An unused one that fills its place: the gap is as small as it can be.
    assert bucket.runs([1, 3], 63) == [Run(Range(128, 192), 0.0), Run(Range(256, 320), 0.0)]


def test_without_padding_to_cross_only_what_touches_is_merged_and_low_precision_never() -> None:
    bucket = _bucket(64, 64, 20, 64)
    assert bucket.runs([0, 1, 2, 3], 0) == [Run(Range(0, 148), 0.0), Run(Range(192, 256), 0.0)]
    assert len(bucket.runs([0, 1, 2, 3], -1)) == 4


def test_what_other_ranks_own_is_in_no_run() -> None:
    bucket = _bucket(100, 20, 300, world_size=2, rank=1)  # the shard is [256, 512) of slots at 0, 128 and 192
    assert bucket.runs([0, 1, 2], 63) == [Run(Range(0, 256), 0.0)]
    assert bucket.runs([0, 1], 63) == []


@pytest.mark.parametrize(
    ("dtype", "eps", "gap"),
    [
        (torch.float32, 1e-8, 63),
        (torch.float64, 1e-300, 63),
        (torch.float32, 1e-39, 0),
        (torch.float32, 0.0, 0),
        (torch.bfloat16, 1e-8, -1),
        (torch.float16, 1e-8, -1),
        (torch.complex64, 1e-8, -1),
    ],
)
def test_padding_is_crossed_only_where_it_stays_zeros(dtype: torch.dtype, eps: float, gap: int) -> None:
    assert longest_merged_gap(dtype, eps) == gap


@pytest.mark.parametrize("flags", [{}, {"weight_decay": 0.1, "maximize": True}, {"eps": 0.0}, {"eps": 1e-46}], ids=str)
@pytest.mark.parametrize("master", [False, True], ids=["fp32", "bf16 with a master"])
def test_padding_stays_zeros_and_parameters_have_the_bits_of_torch(flags: dict[str, Any], master: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=generator).bfloat16() for shape in SHAPES]
    ours = [torch.nn.Parameter(value.clone() if master else value.float()) for value in values]
    expected = [torch.nn.Parameter(value.float()) for value in values]
    optimizer = ShardedAdamax(ours, master_dtype=torch.float32 if master else None, **flags)
    reference = torch.optim.Adamax(expected, **flags)
    for step in range(6):
        for index, (param, other) in enumerate(zip(ours, expected, strict=True)):
            if (step + index) % 5 == 0 and step % 2:
                other.grad = None
                continue
            gradient = torch.randn(param.shape, generator=generator).bfloat16()
            other.grad = gradient.float()
            param.grad = gradient if master else gradient.float()
        optimizer.step()
        reference.step()
        for param, other in zip(ours, expected, strict=True):
            assert torch.equal(param, other.to(param.dtype))
            assert optimizer.state[param]["step"] == reference.state.get(other, {}).get("step", 0)
    for bucket in optimizer._get_engine().buckets:
        padding = torch.ones(bucket.layout.numel, dtype=torch.bool)
        for slot in bucket.layout.slots:
            padding[slot.in_bucket.as_slice()] = False
        assert padding.any()
        for name in ("flat_param", "exp_avg", "master"):
            flat = getattr(bucket, name)
            assert flat is None or flat[padding].eq(0).all(), name
        assert bucket.exp_inf[padding].isfinite().all()


class _Calls(TorchDispatchMode):
    """Counts the operations of an update that run, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("use_foreach", [None, True, False])
def test_the_update_of_many_parameters_is_as_many_calls_as_that_of_one(use_foreach: bool | None) -> None:
    counts = []
    for num_params in (1, 300):
        params = [torch.nn.Parameter(torch.ones(30_000 // num_params)) for _ in range(num_params)]
        optimizer = ShardedAdamax(params, foreach=use_foreach)
        for param in params:
            param.grad = torch.ones_like(param)
        with _Calls() as calls:
            optimizer.step()
        counts.append({name: calls.counts[name] for name in ("lerp_", "addcdiv_", "_foreach_lerp_", "mul_")})
    assert counts[0] == counts[1]
    assert counts[0]["lerp_"] + counts[0]["_foreach_lerp_"] == 1
