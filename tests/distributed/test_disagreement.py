"""What can differ between ranks is found when the optimizer is built or steps: the same error everywhere, at once."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from sharded_adamax import ShardedAdamax
from tests.distributed.pool import Failure, Pool
from tests.distributed.problems import assert_same_bits, backward, gradient, make_params


def _model() -> list[tuple[str, nn.Parameter]]:
    return [
        ("weight", nn.Parameter(torch.ones(5, 3))),
        ("bias", nn.Parameter(torch.ones(3))),
        ("scale", nn.Parameter(torch.ones(()))),
    ]


def _another_shape(named: list[tuple[str, nn.Parameter]], options: dict[str, Any]) -> None:
    named[1] = ("bias", nn.Parameter(torch.ones(4)))


def _another_dtype(named: list[tuple[str, nn.Parameter]], options: dict[str, Any]) -> None:
    named[1] = ("bias", nn.Parameter(torch.ones(3, dtype=torch.float64)))


def _another_order(named: list[tuple[str, nn.Parameter]], options: dict[str, Any]) -> None:
    named[0], named[1] = named[1], named[0]


def _one_less(named: list[tuple[str, nn.Parameter]], options: dict[str, Any]) -> None:
    named.pop()


def _frozen(named: list[tuple[str, nn.Parameter]], options: dict[str, Any]) -> None:
    named[1][1].requires_grad_(False)


def _another_lr(named: list[tuple[str, nn.Parameter]], options: dict[str, Any]) -> None:
    options["lr"] = 5e-4


def _another_bucket(named: list[tuple[str, nn.Parameter]], options: dict[str, Any]) -> None:
    options["bucket_mib"] = 1


def _another_formula(named: list[tuple[str, nn.Parameter]], options: dict[str, Any]) -> None:
    options["capturable"] = True


DIFFERENCES: dict[str, tuple[Callable[..., None], str]] = {
    "shape": (_another_shape, r"ranks 0, 2 have bias of shape \(3,\).*rank 1 has bias of shape \(4,\)"),
    "dtype": (_another_dtype, r"ranks 0, 2 have bias .*float32.*rank 1 has bias .*float64"),
    "order": (_another_order, r"ranks 0, 2 have weight .*rank 1 has bias"),
    "number": (_one_less, r"ranks 0, 2 have scale .*rank 1 has nothing"),
    "frozen": (_frozen, r"ranks 0, 2 have bias .*rank 1 has bias .*frozen"),
    "lr": (_another_lr, r"ranks 0, 2 have group 0: lr=0.002.*rank 1 has group 0: lr=0.0005"),
    "capturable": (_another_formula, r"ranks 0, 2 have capturable=False; rank 1 has capturable=True"),
    "bucket": (_another_bucket, r"ranks 0, 2 have .*bucket_mib=25.*rank 1 has .*bucket_mib=1"),
}


def _build_differently(difference: str) -> None:
    named, options = _model(), {"lr": 2e-3}
    if dist.get_rank() == 1:
        DIFFERENCES[difference][0](named, options)
    ShardedAdamax(named, **options)


@pytest.mark.parametrize("difference", DIFFERENCES)
def test_building_with_a_difference_raises_the_same_error_on_every_rank(ranks: Pool, difference: str) -> None:
    failures = ranks.run_expecting_failures(3, _build_differently, difference, timeout_s=20)
    assert len({failure.message for failure in failures}) == 1
    assert {failure.type_name for failure in failures} == {"ValueError"}
    assert re.search(DIFFERENCES[difference][1], failures[0].message), failures[0].message


def _bad_on_one_rank() -> None:
    ShardedAdamax(_model(), lr=-1.0 if dist.get_rank() == 1 else 1e-3)


def test_a_bad_argument_on_one_rank_stops_all(ranks: Pool) -> None:
    failures = ranks.run_expecting_failures(3, _bad_on_one_rank, timeout_s=20)
    assert failures[1].type_name == "ValueError" and failures[1].message == "Invalid learning rate: -1.0"
    for rank in (0, 2):
        assert failures[rank].type_name == "RemoteError"
        assert "rank 1" in failures[rank].message and "Invalid learning rate: -1.0" in failures[rank].message


def _add_different_groups() -> tuple[str, bool]:
    optimizer = ShardedAdamax(make_params(torch.float32))
    rank = dist.get_rank()
    message = ""
    try:
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3 + rank))]})
    except ValueError as error:
        message = str(error)
    # The optimizer goes on without the group.
    params = optimizer.param_groups[0]["params"]
    backward(params, [gradient(0, rank, i, p) for i, p in enumerate(params)])
    optimizer.step()
    return message, len(optimizer.param_groups) == 1


def test_adding_different_groups_adds_none(ranks: Pool) -> None:
    results = ranks.run(2, _add_different_groups)
    assert results[0] == results[1]
    assert "parameter 0 of group 1 of shape (3,)" in results[0][0] and results[0][1]


def _schedule_differently() -> list[str]:
    """A scheduler that looks at the rank's own loss: every shard would get another learning rate."""
    params = make_params(torch.float32)
    optimizer = ShardedAdamax(params)
    rank = dist.get_rank()
    before = [param.detach().clone() for param in params]
    backward(params, [gradient(0, rank, i, p) for i, p in enumerate(params)])
    optimizer.param_groups[0]["lr"] = 1e-3 / (1 + rank)
    messages = []
    try:
        optimizer.step()
    except RuntimeError as error:
        messages.append(str(error))
    for index, (param, old) in enumerate(zip(params, before, strict=True)):
        assert_same_bits(param, old, f"parameter {index}: a refused step must change nothing")
    optimizer.param_groups[0]["lr"] = 1e-3
    optimizer.zero_grad()
    backward(params, [gradient(0, rank, i, p) for i, p in enumerate(params)])
    optimizer.step()
    assert optimizer.state[params[0]]["step"] == 1
    return messages


def test_a_learning_rate_that_drifts_apart_is_refused_at_the_step(ranks: Pool) -> None:
    results = ranks.run(2, _schedule_differently)
    assert results[0] == results[1]
    assert "lr=0.001" in results[0][0] and "rank 1 has group 0: lr=0.0005" in results[0][0]


def _forget_ddp(steps_of_agreement: int) -> None:
    params = make_params(torch.float32)
    optimizer = ShardedAdamax(params, reduce_gradients=False)
    for step in range(10):
        source = 0 if step < steps_of_agreement else dist.get_rank()
        backward(params, [gradient(step, source, i, p) for i, p in enumerate(params)])
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("steps_of_agreement", [0, 5])
def test_gradients_that_differ_where_they_should_be_reduced_name_the_argument(
    ranks: Pool, steps_of_agreement: int
) -> None:
    failures = ranks.run_expecting_failures(2, _forget_ddp, steps_of_agreement, timeout_s=20)
    assert failures[0].message == failures[1].message
    assert failures[0].type_name == "RuntimeError"
    assert "differs between ranks" in failures[0].message and "reduce_gradients=True" in failures[0].message


def _forget_one_gradient() -> None:
    params = make_params(torch.float32)
    optimizer = ShardedAdamax(params, reduce_gradients=False)
    gradients = [gradient(0, 0, i, p) for i, p in enumerate(params)]
    present = [g if i != 6 or dist.get_rank() == 0 else None for i, g in enumerate(gradients)]
    backward(params, present)
    optimizer.step()


def test_a_reduced_gradient_that_is_missing_on_a_rank_is_named(ranks: Pool) -> None:
    failures = ranks.run_expecting_failures(2, _forget_one_gradient, timeout_s=20)
    assert failures[0].message == failures[1].message
    assert failures[0].message.startswith("parameter 6 of group 0 has a gradient on some ranks and None on others")


def _reduce_twice(bucket_as_view: bool) -> None:
    torch.manual_seed(0)
    model = DistributedDataParallel(
        nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3)), gradient_as_bucket_view=bucket_as_view
    )
    optimizer = ShardedAdamax(model.named_parameters(), reduce_gradients=True)
    for _ in range(3):
        model(torch.randn(4, 5)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("bucket_as_view", [False, True])
def test_ddp_under_an_optimizer_that_reduces_names_the_argument(ranks: Pool, bucket_as_view: bool) -> None:
    failures = ranks.run_expecting_failures(2, _reduce_twice, bucket_as_view, timeout_s=20)
    for failure in failures:
        assert isinstance(failure, Failure) and failure.type_name == "RuntimeError"
        assert "reduce_gradients=False" in failure.message and "DistributedDataParallel" in failure.message


def _move_on_one_rank() -> None:
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
    optimizer = ShardedAdamax(model.named_parameters())
    if dist.get_rank() == 1:
        model.double()
    model(torch.randn(4, 5, dtype=model[0].weight.dtype)).sum().backward()
    optimizer.step()


def test_a_model_cast_on_one_rank_stops_all_and_is_named(ranks: Pool) -> None:
    failures = ranks.run_expecting_failures(2, _move_on_one_rank, timeout_s=20)
    assert "is no longer the tensor that ShardedAdamax manages" in failures[1].message
    assert "rank 1" in failures[0].message and "is no longer the tensor" in failures[0].message


def _not_a_member() -> str:
    group = dist.new_group([0, 1])
    if dist.get_rank() == 2:
        try:
            ShardedAdamax(make_params(torch.float32), process_group=group)
        except ValueError as error:
            return str(error)
    params = make_params(torch.float32)
    optimizer = ShardedAdamax(
        params, process_group=group if dist.get_rank() < 2 else dist.new_group([2], use_local_synchronization=True)
    )
    backward(params, [gradient(0, dist.get_rank(), i, p) for i, p in enumerate(params)])
    optimizer.step()
    return str(optimizer.layout.world_size)


def test_a_subgroup_shards_over_its_ranks_and_refuses_others(ranks: Pool) -> None:
    two, also_two, message = ranks.run(3, _not_a_member)
    assert (two, also_two) == ("2", "2")
    assert "rank 2 is not a member of process_group" in message
