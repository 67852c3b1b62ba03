"""A clip factor waits with the gradients for the update, and is applied to what was there when it came, once."""

from __future__ import annotations

import pytest
import torch

from sharded_adamax.buckets import Bucket, Precision
from sharded_adamax.collectives import LocalGroup
from sharded_adamax.layout import ParamSpec, build
from sharded_adamax.reduction import BackwardReduction

HALF = torch.tensor(0.5)


@pytest.fixture
def source() -> BackwardReduction:
    """A source that holds one gradient of eights."""
    param = torch.nn.Parameter(torch.ones(64))
    layout = build([ParamSpec.of("p", param)], world_size=1, bucket_bytes=1 << 20)
    source = BackwardReduction(LocalGroup())
    source.add(Bucket(layout.buckets[0], [param], 0, Precision()), ["p"])
    param.grad = torch.full((64,), 8.0)
    source.flush()
    return source


def test_the_factor_is_left_to_the_update(source: BackwardReduction) -> None:
    source.scale_(HALF)
    values, scale = source.take_shard(0)
    assert values.eq(8).all() and scale is HALF


def test_a_second_factor_does_not_replace_the_first(source: BackwardReduction) -> None:
    source.scale_(HALF)
    source.scale_(torch.tensor(0.25))
    values, scale = source.take_shard(0)
    assert scale is not None and (values * scale).eq(1).all()


def test_who_reads_a_shard_reads_it_scaled_and_leaves_nothing_to_scale(source: BackwardReduction) -> None:
    source.scale_(HALF)
    assert source.shard(0).eq(4).all()
    values, scale = source.take_shard(0)
    assert values.eq(4).all() and scale is None


def test_gradients_that_come_later_are_not_scaled(source: BackwardReduction) -> None:
    source.scale_(HALF)
    source.buckets[0].params[0].grad = torch.ones(64)
    source.launch_again(0)
    values, scale = source.take_shard(0)
    assert values.eq(5).all() and scale is None
