"""Copies of the model beside the optimizer: EMA and SWA averages, and deepcopies that live a life of their own."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn, update_bn

from sharded_adamax import ShardedAdamax
from tests.distributed.models import Batch, Net, Twins, compare_models, straight_backward
from tests.distributed.pool import Pool


def _tenth_avg(averaged: Tensor, current: Tensor, num_averaged: Tensor | int) -> Tensor:
    return averaged + 0.1 * (current - averaged)


AVERAGES: dict[str, Callable[[nn.Module], AveragedModel]] = {
    "swa": lambda model: AveragedModel(model),
    "ema": lambda model: AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.8)),
    "ema, one by one": lambda model: AveragedModel(model, avg_fn=get_ema_avg_fn(0.8)),
    "own function": lambda model: AveragedModel(model, avg_fn=_tenth_avg),
    "ema of the buffers, too": lambda m: AveragedModel(m, multi_avg_fn=get_ema_multi_avg_fn(0.8), use_buffers=True),
}


class Normed(Net):
    """Net with statistics. They are of the rank's own batches, so the ranks' differ: nobody synchronises buffers."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(super().forward(x))
        return out


def _same_statistics(twins: Twins) -> None:
    """Give the twin, which has seen the batches of all ranks, the statistics of this rank's model."""
    for buffer, other in zip(twins.model.buffers(), twins.twin.buffers(), strict=True):
        other.copy_(buffer)


def _average(kind: str, before_the_optimizer: bool) -> None:
    """Average, swap the average in and out as for an evaluation, go on, and end with update_bn."""
    made: list[AveragedModel] = []

    def make(seed: int) -> nn.Module:
        net = Normed(0 if before_the_optimizer else seed)
        if before_the_optimizer:
            made.append(AVERAGES[kind](net))
        return net

    twins = Twins(make)
    averaged, expected = made or [AVERAGES[kind](model) for model in (twins.model, twins.twin)]
    for step in range(6):
        twins.feed_twin(step, straight_backward)
        straight_backward(twins.model, step, dist.get_rank())
        _same_statistics(twins)
        twins.step_both(step)
        averaged.update_parameters(twins.model)
        expected.update_parameters(twins.twin)
        compare_models(averaged, expected, f"of the average after step {step}")
        if step == 3:
            _swap_in_and_out(twins.model, averaged)
            twins.compare("after swapping back")
    twins.compare_state()

    loader = [Batch(100 + index, dist.get_rank()).x for index in range(3)]
    update_bn(loader, averaged)
    update_bn(loader, expected)
    compare_models(averaged, expected, "of the average after update_bn")


def _swap_in_and_out(model: nn.Module, averaged: AveragedModel) -> None:
    own = [param.detach().clone() for param in model.parameters()]
    average = [param.detach().clone() for param in averaged.module.parameters()]
    with torch.no_grad():
        for param, value in zip(model.parameters(), average, strict=True):
            param.copy_(value)
    _assert_values(model, average)
    with torch.no_grad():
        for param, value in zip(model.parameters(), own, strict=True):
            param.data.copy_(value)


def _assert_values(model: nn.Module, values: list[Tensor]) -> None:
    assert all(torch.equal(param, value) for param, value in zip(model.parameters(), values, strict=True))


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("kind", AVERAGES)
def test_an_average_beside_it_is_the_one_beside_adamax(ranks: Pool, kind: str, world_size: int) -> None:
    ranks.run(world_size, _average, kind, False)


@pytest.mark.parametrize("kind", ["swa", "ema"])
def test_an_average_may_be_made_before_the_optimizer(ranks: Pool, kind: str) -> None:
    ranks.run(2, _average, kind, True)


def _train_on_the_average() -> None:
    """The average goes into the model and is trained on: with load_state_dict, state kept."""
    twins = Twins()
    averages = [AveragedModel(twins.model), AveragedModel(twins.twin)]
    schedulers = [SWALR(optimizer, swa_lr=0.01, anneal_epochs=3) for optimizer in (twins.optimizer, twins.reference)]
    for step in range(8):
        twins.train(1, first_step=step)
        for scheduler, average, model in zip(schedulers, averages, (twins.model, twins.twin), strict=True):
            average.update_parameters(model)
            scheduler.step()
            if step == 4:
                model.load_state_dict(average.module.state_dict())
    twins.compare_state()


@pytest.mark.parametrize("world_size", [1, 2])
def test_training_goes_on_from_the_average_that_was_loaded_into_the_model(ranks: Pool, world_size: int) -> None:
    ranks.run(world_size, _train_on_the_average)


def _copy() -> None:
    """Train a copy in the middle of the model's own backward passes: neither takes notice of the other."""
    twins = Twins()
    rank = dist.get_rank()
    twins.train(2)
    copied, copied_twin = copy.deepcopy(twins.model), copy.deepcopy(twins.twin)
    own = torch.optim.SGD(copied.parameters(), lr=0.1)
    own_twin = torch.optim.SGD(copied_twin.parameters(), lr=0.1)
    storages = {param.untyped_storage().data_ptr() for param in twins.model.parameters()}
    assert all(param.untyped_storage().data_ptr() not in storages for param in copied.parameters())
    traffic: dict[str, Any] = twins.optimizer._get_engine().group.traffic.calls
    for step in range(2, 5):
        twins.feed_twin(step, straight_backward)
        before = dict(traffic)
        straight_backward(copied, step, rank)
        assert dict(traffic) == before, "the gradients of a copy are nobody's but the copy's"
        assert all(param.grad is not None for param in copied.parameters())
        straight_backward(twins.model, step, rank)
        straight_backward(copied_twin, step, rank)
        own.step()
        own_twin.step()
        own.zero_grad()
        own_twin.zero_grad()
        twins.step_both(step)
        compare_models(copied, copied_twin, f"of the copy after step {step}")
    twins.compare_state()


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_deepcopy_of_the_model_is_independent_of_the_optimizer(ranks: Pool, world_size: int) -> None:
    ranks.run(world_size, _copy)


def _copy_with_its_own_optimizer() -> None:
    """A copy gets a ShardedAdamax of its own, as a second model of a GAN or a teacher would."""
    first = Twins()
    first.train(1)
    second = Twins(lambda seed: copy.deepcopy(first.twin), lr=0.01)
    second.model = copy.deepcopy(first.model)
    second.optimizer = ShardedAdamax(second.model.named_parameters(), lr=0.01, bucket_mib=0.002)
    for step in range(1, 4):
        for twins in (first, second):
            twins.feed_twin(step, straight_backward)
            straight_backward(twins.model, step, dist.get_rank())
        # Stepped in another order than backward ran, with both rounds under way.
        second.step_both(step)
        first.step_both(step)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_two_models_train_side_by_side_with_an_optimizer_each(ranks: Pool, world_size: int) -> None:
    ranks.run(world_size, _copy_with_its_own_optimizer)
