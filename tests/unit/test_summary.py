"""The summary of a layout: its figures by hand, its table, its picture."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from sharded_adamax import ShardedAdamax
from sharded_adamax.buckets import Precision
from sharded_adamax.layout import ParamSpec, build
from sharded_adamax.ranges import Range
from sharded_adamax.summary import ParamRow, Summary, summarize

SPECS = [
    ParamSpec("embed", (2, 150), torch.bfloat16),
    ParamSpec("none", (0, 4), torch.bfloat16),
    ParamSpec("bias", (20,), torch.bfloat16),
    ParamSpec("scale", (100,), torch.float32),
]


def _summary(world_size: int = 3, *, reduce_gradients: bool = True) -> Summary:
    layout = build(SPECS, world_size=world_size, bucket_bytes=1 << 20)
    return summarize(layout, Precision(torch.float32, torch.float32), reduce_gradients=reduce_gradients)


def test_the_figures_are_those_that_one_gets_by_hand() -> None:
    f32, bf16 = _summary().buckets
    # 100 elements take 2 units of 64; 3 shards of one unit each.
    assert (f32.numel, f32.padding_numel, f32.owners) == (192, 92, (Range(0, 64), Range(64, 128), Range(128, 192)))
    assert f32.params == (ParamRow("scale", (100,), Range(0, 100), {0: Range(0, 64), 1: Range(64, 100)}),)
    assert (f32.param_bytes, f32.state_bytes, f32.master_bytes) == (192 * 4, 2 * 64 * 4, 0)
    assert (f32.wire_bits, f32.reduce_scatter_bytes, f32.all_gather_bytes) == ((32, 32), 2 * 64 * 4, 2 * 64 * 4)
    # bias at 0, none at 64, embed at 64 to 364: 6 units of 64, so 2 in each shard.
    assert (bf16.numel, bf16.padding_numel) == (384, 384 - 320)
    assert bf16.params == (
        ParamRow("bias", (20,), Range(0, 20), {0: Range(0, 20)}),
        ParamRow("none", (0, 4), Range(64, 64), {}),
        ParamRow("embed", (2, 150), Range(64, 364), {0: Range(0, 64), 1: Range(64, 192), 2: Range(192, 300)}),
    )
    assert (bf16.param_bytes, bf16.state_bytes, bf16.master_bytes) == (384 * 2, 2 * 128 * 4, 128 * 4)
    assert (bf16.wire_bits, bf16.reduce_scatter_bytes, bf16.all_gather_bytes) == ((32, 16), 2 * 128 * 4, 2 * 128 * 2)
    assert _summary().num_params == 420
    assert _summary().bytes_per_rank == 768 + 512 + 768 + 1024 + 512
    assert _summary().sent_bytes_per_step == 512 + 512 + 1024 + 512


def test_gradients_that_arrive_reduced_are_not_on_the_wire() -> None:
    for bucket in _summary(reduce_gradients=False).buckets:
        assert bucket.wire_dtype is None
        assert bucket.wire_bits == (0, 8 * bucket.dtype.itemsize)
        assert bucket.reduce_scatter_bytes == 0 < bucket.all_gather_bytes


@pytest.mark.parametrize("world_size", [1, 2, 3, 7, 64])
def test_every_element_has_one_owner_and_it_is_the_rank_whose_piece_it_is(world_size: int) -> None:
    layout = build(SPECS, world_size=world_size, bucket_bytes=300)
    summary = summarize(layout, Precision(), reduce_gradients=True)
    for row, bucket in zip(summary.buckets, layout.buckets, strict=True):
        for rank in range(world_size):
            for param, piece in zip(row.params, bucket.pieces(rank), strict=True):
                assert param.name == SPECS[piece.param].name
                assert param.owners.get(rank, Range(0, 0)) == piece.in_param


def test_the_text_is_a_table_in_columns() -> None:
    lines = str(_summary()).splitlines()
    assert lines[0] == (
        "420 parameters in 4 tensors, 2 buckets, 3 ranks; "
        "each rank holds 3.5 KiB between steps and sends 2.5 KiB per step"
    )
    buckets = lines.index(next(line for line in lines if line.startswith("bucket")))
    header, rule, f32, bf16, _, total = lines[buckets : buckets + 6]
    assert set(rule) == {"-"}
    assert len(header) == len(rule) == len(f32) == len(bf16) == len(total) < 120
    assert bf16.split("  ")[-1].strip() == "512 B"
    assert re.split(r"\s{2,}", bf16.strip()) == [
        *("1", "bfloat16", "3", "384", "64", "768 B", "1.0 KiB", "512 B", "32 / 16", "1.0 KiB", "512 B")
    ]
    assert re.split(r"\s{2,}", total.strip()) == [
        *("all", "4", "576", "156", "1.5 KiB", "1.5 KiB", "512 B", "1.5 KiB", "1.0 KiB")
    ]
    assert re.split(r"\s{2,}", lines[-1].strip()) == ["1", "0:128", "128:256", "256:384", "bias ... embed"]


def test_a_table_for_many_ranks_shows_the_first_and_the_last() -> None:
    lines = str(_summary(4096)).splitlines()
    assert re.split(r"\s{2,}", lines[-4].strip()) == ["bucket", "rank 0", "rank 1", "...", "rank 4095", "parameters"]
    assert max(map(len, lines)) < 140


def test_an_optimizer_shows_what_it_is_and_one_without_buckets_too() -> None:
    optimizer = ShardedAdamax([("weight", nn.Parameter(torch.ones(5, 13)))])
    assert "65 parameters in 1 tensor, 1 bucket, 1 rank; each rank holds" in str(optimizer.summary())
    assert optimizer.summary().sent_bytes_per_step == 0
    frozen = ShardedAdamax([nn.Parameter(torch.ones(3), requires_grad=False)])
    assert str(frozen.summary()).startswith("0 parameters in 0 tensors, 0 buckets, 1 rank; each rank holds 0 B")


def test_the_picture_has_every_shard_in_the_colour_of_its_rank_and_the_names_that_fit(tmp_path: Path) -> None:
    path = tmp_path / "summary.svg"
    _summary().draw(path)
    drawn = path.read_text()
    for colour in ("#8da0cb", "#fc8d62", "#66c2a5"):
        assert drawn.count(f"fill: {colour}") == 2 + 1, "two buckets and the legend"
    assert "#e78ac3" not in drawn, "there is no fourth rank"
    assert "<!-- scale -->" in drawn
    assert "<!-- embed -->" in drawn
    assert "<!-- none -->" not in drawn, "it has no elements"
    assert drawn.count("<!-- rank 1 -->") == 1


def test_the_table_of_the_page_is_what_its_model_gives_on_two_ranks() -> None:
    (page,) = (Path(__file__).parents[2] / "docs").rglob("observing.md")
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))
    specs = [ParamSpec.of(name, param) for name, param in model.named_parameters()]
    layout = build(specs, world_size=2, bucket_bytes=int(1.1 * 2**20))
    assert f"```text\n{summarize(layout, Precision(), reduce_gradients=True)}\n```" in page.read_text()
