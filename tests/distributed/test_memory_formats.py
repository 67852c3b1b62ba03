"""Models in channels_last and other dense formats: they stay so, and files do not know of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from sharded_adamax import ShardedAdamax, load, save
from sharded_adamax.state import FlatShard
from tests.distributed.pool import Pool
from tests.distributed.problems import assert_same_bits, assert_same_state


class Convolutions(nn.Module):
    def __init__(self, memory_format: torch.memory_format) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.first = nn.Conv2d(3, 10, 3).to(memory_format=memory_format)
        self.second = nn.Conv2d(10, 7, (2, 5)).to(memory_format=memory_format)
        self.volume = nn.Parameter(torch.randn(2, 3, 4, 5, 6).to(memory_format=torch.channels_last_3d))
        self.turned = nn.Parameter(torch.randn(9, 31).t())
        self.gaps = nn.Parameter(torch.randn(6, 8)[:, ::2])  # not dense: becomes so, as in a copy

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.second(torch.relu(self.first(images)))
        return (
            hidden.square().mean() + self.volume.square().sum() + self.turned.sum().square() + self.gaps.square().sum()
        )


def _memory_formats(path: str, reduce_gradients: bool) -> None:
    model, twin = (Convolutions(torch.channels_last) for _ in range(2))
    first = [name for name, _ in model.named_parameters()].index("first.weight")
    strides = [param.stride() for name, param in model.named_parameters() if name != "gaps"]
    optimizer = ShardedAdamax(model.named_parameters(), bucket_mib=0.001, reduce_gradients=reduce_gradients)
    reference = torch.optim.Adamax(twin.parameters())
    assert [p.stride() for name, p in model.named_parameters() if name != "gaps"] == strides
    assert not model.first.weight.is_contiguous() and model.gaps.stride() == (4, 1)
    generator = torch.Generator().manual_seed(3)
    for step in range(4):
        images = torch.randn(2, 3, 9, 9, generator=generator).to(memory_format=torch.channels_last)
        for either, module in ((optimizer, model), (reference, twin)):  # the same images on all ranks
            module(images).backward()
            either.step()
            either.zero_grad()
        for (name, param), other in zip(model.named_parameters(), twin.parameters(), strict=True):
            if dist.get_world_size() in (1, 2):  # the mean of 2 equal numbers is that number; of 3 it may not be
                assert_same_bits(param, other, f"{name} after step {step}")
    full = optimizer.full_state_dict()
    if full is not None and dist.get_world_size() in (1, 2):
        assert_same_state(full, reference)
        assert full["state"][first]["exp_avg"].stride() == reference.state[twin.first.weight]["exp_avg"].stride()

    save(path, model, optimizer)
    for memory_format in (torch.channels_last, torch.contiguous_format):  # files do not know of it
        fresh = Convolutions(memory_format)
        target = ShardedAdamax(fresh.named_parameters(), bucket_mib=0.002, reduce_gradients=reduce_gradients)
        load(path, fresh, target)
        for (name, param), other in zip(fresh.named_parameters(), model.parameters(), strict=True):
            assert_same_bits(param, other, f"{name} loaded")
        loaded = target.full_state_dict()
        if loaded is not None and full is not None:
            for index, state in full["state"].items():
                for key, value in state.items():
                    assert_same_bits(loaded["state"][index][key], value, f"{key} of {index} loaded")
        everything: list[Any] = [full]
        dist.broadcast_object_list(everything)
        target.load_state_dict(everything[0])
        part = target.state[fresh.first.weight]["exp_avg"]
        assert isinstance(part, FlatShard)
        order = (0, 2, 3, 1) if memory_format == torch.channels_last else (0, 1, 2, 3)
        whole = everything[0]["state"][first]["exp_avg"].permute(order).reshape(-1)
        assert_same_bits(part.local, whole[part.owned.as_slice()], "a part of a plain state dict")


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("reduce_gradients", [True, False])
def test_channels_last_and_other_dense_formats_stay_and_are_saved_as_any_other(
    ranks: Pool, tmp_path: Path, world_size: int, reduce_gradients: bool
) -> None:
    ranks.run(world_size, _memory_formats, str(tmp_path / "checkpoint"), reduce_gradients)


def _other_order() -> str:
    weight = torch.ones(4, 3, 2, 2)
    if dist.get_rank() == 1:
        weight = weight.to(memory_format=torch.channels_last)
    try:
        ShardedAdamax([("weight", nn.Parameter(weight))])
    except ValueError as error:
        return str(error)
    return "nothing raised"


def test_a_memory_format_that_differs_between_ranks_is_named(ranks: Pool) -> None:
    for message in ranks.run(2, _other_order):
        assert "rank 1 has weight of shape (4, 3, 2, 2) and dtype torch.float32, dimensions in memory order" in message
