"""Partition: the pieces of all ranks cover each parameter exactly once. No process group, plain integers."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sharded_adamax.layout import ALIGNMENT_NUMEL, Layout, ParamSpec, build

dimensions = st.one_of(st.integers(0, 4), st.integers(5, 40))
shapes = st.one_of(
    st.just(()),
    st.just((0,)),
    st.lists(dimensions, min_size=1, max_size=4).map(tuple),
    st.integers(1, 200_000).map(lambda numel: (numel,)),  # huge next to tiny
)
dtypes = st.sampled_from([torch.float32, torch.float64, torch.bfloat16])
models = st.lists(st.tuples(shapes, dtypes), min_size=1, max_size=12)


def _build(model: list[tuple[tuple[int, ...], torch.dtype]], world_size: int, bucket_bytes: int) -> Layout:
    specs = [ParamSpec(f"p{i}", shape, dtype) for i, (shape, dtype) in enumerate(model)]
    return build(specs, world_size=world_size, bucket_bytes=bucket_bytes)


@settings(max_examples=300, deadline=None)
@given(model=models, world_size=st.integers(1, 9), bucket_bytes=st.sampled_from([1, 256, 5_000, 1 << 20]))
def test_the_pieces_of_all_ranks_cover_each_parameter_exactly_once(
    model: list[tuple[tuple[int, ...], torch.dtype]], world_size: int, bucket_bytes: int
) -> None:
    layout = _build(model, world_size, bucket_bytes)
    covered: dict[int, list[tuple[int, int]]] = {index: [] for index in range(len(model))}
    for bucket in layout.buckets:
        for rank in range(world_size):
            for piece in bucket.pieces(rank):
                slot = bucket.slots[piece.slot]
                assert piece.param == slot.param
                assert piece.in_param.numel == piece.in_shard.numel
                if piece.in_param.numel == 0:
                    continue
                assert piece.in_shard.start >= 0 and piece.in_shard.stop <= bucket.shard_numel
                # The same element of the bucket, seen from the parameter and from the shard.
                assert slot.start + piece.in_param.start == bucket.shard(rank).start + piece.in_shard.start
                covered[piece.param].append((piece.in_param.start, piece.in_param.stop))
    for index, (shape, _) in enumerate(model):
        position = 0
        for start, stop in sorted(covered[index]):
            assert start == position, f"parameter {index}: gap or overlap at element {position}"
            position = stop
        assert position == math.prod(shape)


@settings(max_examples=300, deadline=None)
@given(model=models, world_size=st.integers(1, 9), bucket_bytes=st.sampled_from([1, 256, 5_000, 1 << 20]))
def test_shards_are_equal_and_slots_and_shards_are_aligned(
    model: list[tuple[tuple[int, ...], torch.dtype]], world_size: int, bucket_bytes: int
) -> None:
    layout = _build(model, world_size, bucket_bytes)
    for bucket in layout.buckets:
        assert bucket.shard_numel % ALIGNMENT_NUMEL == 0
        assert {bucket.shard(rank).numel for rank in range(world_size)} == {bucket.shard_numel}
        end = 0
        for slot in bucket.slots:
            assert slot.start % ALIGNMENT_NUMEL == 0
            assert slot.start >= end, "slots overlap"
            assert layout.specs[slot.param].dtype == bucket.dtype
            end = slot.start + slot.numel
        assert end <= bucket.numel < end + ALIGNMENT_NUMEL * (world_size + 1), "more padding than needed"
    assert sorted(slot.param for bucket in layout.buckets for slot in bucket.slots) == list(range(len(model)))


@settings(max_examples=100, deadline=None)
@given(model=models, bucket_bytes=st.sampled_from([256, 5_000, 1 << 20]))
def test_only_a_bucket_of_one_parameter_is_larger_than_asked(
    model: list[tuple[tuple[int, ...], torch.dtype]], bucket_bytes: int
) -> None:
    for bucket in _build(model, 1, bucket_bytes).buckets:
        used = bucket.slots[-1].in_bucket.stop * bucket.dtype.itemsize
        assert used <= bucket_bytes or sum(slot.numel > 0 for slot in bucket.slots) == 1


def test_the_last_parameter_is_in_the_first_bucket() -> None:
    layout = _build([((1000,), torch.float32)] * 4, 2, bucket_bytes=8000)
    assert [[slot.param for slot in bucket.slots] for bucket in layout.buckets] == [[3], [2], [1], [0]]
    layout = _build([((900,), torch.float32)] * 4, 2, bucket_bytes=8000)
    assert [[slot.param for slot in bucket.slots] for bucket in layout.buckets] == [[3, 2], [1, 0]]


def test_a_bucket_of_empty_parameters_has_a_shard_like_any_other() -> None:
    (bucket,) = _build([((0,), torch.float32), ((3, 0), torch.float32)], 3, bucket_bytes=100).buckets
    assert bucket.shard_numel == ALIGNMENT_NUMEL
    assert [piece.in_param.numel for piece in bucket.pieces(2)] == [0, 0]


def test_more_ranks_than_elements_leaves_ranks_with_nothing() -> None:
    layout = _build([((3,), torch.float32)], 9, bucket_bytes=1 << 20)
    (bucket,) = layout.buckets
    assert [bucket.pieces(rank)[0].in_param.numel for rank in range(9)] == [3, 0, 0, 0, 0, 0, 0, 0, 0]


def test_a_layout_for_4096_ranks_and_70_billion_parameters_needs_no_memory() -> None:
    model = [((8192, 28672), torch.bfloat16)] * 300
    layout = _build(model, 4096, bucket_bytes=25 << 20)
    assert layout.padded_numel / sum(math.prod(shape) for shape, _ in model) < 1.02


def test_digest_differs_where_layouts_differ() -> None:
    one = _build([((3,), torch.float32)], 2, 100)
    assert one.digest() == _build([((3,), torch.float32)], 2, 100).digest()
    assert one.digest() != _build([((3,), torch.float32)], 3, 100).digest()
    assert one.digest() != _build([((3,), torch.float64)], 2, 100).digest()


def test_extended_shifts_parameters_and_refuses_another_world() -> None:
    one, two = _build([((3,), torch.float32)], 2, 100), _build([((5,), torch.float32)], 2, 100)
    both = one.extended(two)
    assert [slot.param for bucket in both.buckets for slot in bucket.slots] == [0, 1]
    with pytest.raises(ValueError, match="2 ranks, got one for 3"):
        one.extended(_build([((5,), torch.float32)], 3, 100))


@pytest.mark.parametrize(("world_size", "bucket_bytes"), [(0, 100), (1, 0)])
def test_an_empty_world_or_bucket_is_refused(world_size: int, bucket_bytes: int) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        build([], world_size=world_size, bucket_bytes=bucket_bytes)
