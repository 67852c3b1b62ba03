from __future__ import annotations

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sharded_adamax.ranges import Box, Range, boxes, round_up


@settings(max_examples=500, deadline=None)
@given(shape=st.lists(st.integers(0, 6), max_size=4).map(tuple), data=st.data())
def test_boxes_hold_exactly_the_elements_of_the_range_in_order(shape: tuple[int, ...], data: st.DataObject) -> None:
    numel = math.prod(shape)
    start = data.draw(st.integers(0, numel))
    stop = data.draw(st.integers(start, numel))
    whole = torch.arange(numel).view(shape)
    found = boxes(shape, Range(start, stop))
    elements: list[int] = []
    for box in found:
        corner = tuple(slice(o, o + s) for o, s in zip(box.offsets, box.sizes, strict=True))
        elements += whole[corner].reshape(-1).tolist()
        assert box.numel == whole[corner].numel() > 0
    assert elements == list(range(start, stop))
    assert len(found) <= max(1, 2 * len(shape) - 1)


def test_the_example_of_the_docstring() -> None:
    assert boxes((3, 4), Range(2, 10)) == [Box((0, 2), (1, 2)), Box((1, 0), (1, 4)), Box((2, 0), (1, 2))]


def test_intersection_is_empty_or_the_common_elements() -> None:
    assert Range(0, 5).intersect(Range(3, 9)) == Range(3, 5)
    assert Range(0, 3).intersect(Range(3, 9)).numel == 0
    assert Range(7, 9).intersect(Range(0, 3)).numel == 0


def test_round_up() -> None:
    assert [round_up(value, 64) for value in (0, 1, 64, 65)] == [0, 64, 64, 128]
