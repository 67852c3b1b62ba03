"""What training scripts do beside the straight road: accumulate, freeze, add groups, clear, use closures and hooks."""

from __future__ import annotations

import gc

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.optim.optimizer import register_optimizer_step_post_hook

from sharded_adamax import ShardedAdamax
from tests.distributed.pool import Pool
from tests.distributed.problems import (
    assert_same_bits,
    assert_same_params,
    assert_same_state,
    backward,
    feed_mean,
    gradient,
    local_gradients,
    make_params,
    mean_gradients,
)


def _freeze_and_thaw() -> None:
    params, expected = make_params(torch.float32), make_params(torch.float32)
    for either in (params, expected):
        for index in (2, 7):
            either[index].requires_grad_(False)
    optimizer, reference = ShardedAdamax(params, bucket_mib=0.01), torch.optim.Adamax(expected)
    assert params[2] not in optimizer.state, "a frozen parameter costs no state"
    num_buckets = len(optimizer.layout.buckets)
    for step in range(9):
        if step == 3:
            params[7].requires_grad_(True)
        if step == 6:
            params[0].requires_grad_(False)
            params[2].requires_grad_(True)
        trained = [param.requires_grad for param in params]
        backward(params, [g if on else None for g, on in zip(local_gradients(step, params), trained, strict=True)])
        feed_mean(expected, step)
        for param, on in zip(expected, trained, strict=True):
            param.grad = param.grad if on else None
        optimizer.step()
        reference.step()
        optimizer.zero_grad()
        assert_same_params(params, expected, f"after step {step}")
    assert len(optimizer.layout.buckets) == num_buckets + 2
    full = optimizer.full_state_dict()
    if full is not None:
        assert_same_state(full, reference)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_frozen_parameters_cost_nothing_until_they_get_a_gradient(ranks: Pool, world_size: int) -> None:
    ranks.run(world_size, _freeze_and_thaw)


def _add_groups() -> None:
    params, expected = make_params(torch.float32, seed=dist.get_rank()), make_params(torch.float32)
    optimizer, reference = ShardedAdamax(params[:5], bucket_mib=0.01), torch.optim.Adamax(expected[:5])
    for step in range(6):
        if step == 2:
            for either, owned in ((optimizer, params), (reference, expected)):
                either.add_param_group({"params": owned[5:8], "lr": 0.1, "weight_decay": 0.5})
        if step == 4:
            for either, owned in ((optimizer, params), (reference, expected)):
                either.add_param_group({"params": owned[8:]})
        count = 5 if step < 2 else 8 if step < 4 else len(params)
        backward(params[:count], local_gradients(step, params[:count]))
        feed_mean(expected[:count], step)
        optimizer.step()
        reference.step()
        optimizer.zero_grad()
        assert_same_params(params[:count], expected[:count], f"after step {step}")


@pytest.mark.parametrize("world_size", [1, 3])
def test_groups_added_in_the_middle_train_as_in_adamax(ranks: Pool, world_size: int) -> None:
    ranks.run(world_size, _add_groups)


def _accumulate(with_no_sync: bool) -> None:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    params, expected = make_params(torch.float64), make_params(torch.float64)
    optimizer, reference = ShardedAdamax(params, bucket_mib=0.01), torch.optim.Adamax(expected)
    for step in range(4):
        micro = [[gradient(10 * step + m, rank, i, p) for i, p in enumerate(params)] for m in range(3)]
        if with_no_sync:
            with optimizer.no_sync():
                backward(params, micro[0])
                backward(params, micro[1])
            assert all(param.grad is not None for param in params)
            backward(params, micro[2])
        else:
            for gradients in micro:
                backward(params, gradients)
        for index, param in enumerate(expected):
            of_ranks = [[gradient(10 * step + m, r, index, param) for m in range(3)] for r in range(world_size)]
            if with_no_sync:  # each rank accumulates, then one reduction
                sums = [one[0] + one[1] + one[2] for one in of_ranks]
                total = sums[0].clone()
                for other in sums[1:]:
                    total += other
                param.grad = total / world_size
            else:  # the first backward is reduced at once, the others accumulate and are reduced in step
                first, rest = of_ranks[0][0].clone(), of_ranks[0][1] + of_ranks[0][2]
                for one in of_ranks[1:]:
                    first += one[0]
                    rest = rest + (one[1] + one[2])
                param.grad = first / world_size + rest / world_size
        optimizer.step()
        reference.step()
        optimizer.zero_grad()
        assert_same_params(params, expected, f"after step {step}")


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("with_no_sync", [True, False])
def test_accumulated_gradients_are_the_sum_of_the_passes(ranks: Pool, world_size: int, with_no_sync: bool) -> None:
    ranks.run(world_size, _accumulate, with_no_sync)


def _uneven_passes() -> None:
    """Rank 0 runs backward twice, the others once; on rank 1 one parameter has a gradient in no pass."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    params, expected = make_params(torch.float64), make_params(torch.float64)
    optimizer, reference = ShardedAdamax(params, bucket_mib=0.01), torch.optim.Adamax(expected)
    for step in range(3):
        gradients = local_gradients(step, params)
        if rank == 1:
            gradients[8] = None
        backward(params, gradients)
        if rank == 0:
            backward(params, [gradient(50 + step, rank, i, p) for i, p in enumerate(params)])
        for index, param in enumerate(expected):
            total = gradient(step, 0, index, param)
            for other in range(1, world_size):
                if not (other == 1 and index == 8):
                    total = total + gradient(step, other, index, param)
            param.grad = total / world_size + gradient(50 + step, 0, index, param) / world_size
        optimizer.step()
        reference.step()
        for param, other in zip(params, expected, strict=True):
            assert torch.allclose(param, other, rtol=1e-12, atol=0), "which pass a gradient travels in may differ"


def test_ranks_may_run_different_numbers_of_backward_passes(ranks: Pool) -> None:
    ranks.run(3, _uneven_passes)


def _clear() -> None:
    params, expected = make_params(torch.float32), make_params(torch.float32)
    optimizer, reference = ShardedAdamax(params, bucket_mib=0.01), torch.optim.Adamax(expected)
    for step in range(4):
        backward(params[: 3 + dist.get_rank()], local_gradients(90 + step, params)[: 3 + dist.get_rank()])
        optimizer.zero_grad(set_to_none=step % 2 == 0)  # not these
        backward(params, local_gradients(step, params))
        feed_mean(expected, step)
        optimizer.step()
        reference.step()
        optimizer.zero_grad()
        assert_same_params(params, expected, f"after step {step}")


@pytest.mark.parametrize("world_size", [1, 3])
def test_zero_grad_forgets_what_was_already_reduced(ranks: Pool, world_size: int) -> None:
    ranks.run(world_size, _clear)


def _by_hand() -> None:
    """Gradients that no backward made, as tests and meta-learning set them."""
    params, expected = make_params(torch.float32), make_params(torch.float32)
    optimizer, reference = ShardedAdamax(params, bucket_mib=0.01), torch.optim.Adamax(expected)
    for step in range(3):
        for param, value in zip(params, local_gradients(step, params), strict=True):
            param.grad = value
        feed_mean(expected, step)
        optimizer.step()
        reference.step()
        assert_same_params(params, expected, f"after step {step}")


@pytest.mark.parametrize("world_size", [1, 2])
def test_gradients_set_by_hand_count(ranks: Pool, world_size: int) -> None:
    ranks.run(world_size, _by_hand)


def _hooks_and_closure() -> None:
    params, expected = make_params(torch.float32), make_params(torch.float32)
    optimizer, reference = ShardedAdamax(params, bucket_mib=0.01), torch.optim.Adamax(expected)
    fired: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: fired.append("pre"))
    optimizer.register_step_post_hook(lambda *_: fired.append("post"))
    handle = register_optimizer_step_post_hook(lambda *_: fired.append("global"))

    def closure() -> float:
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        backward(params, local_gradients(0, params))
        return 42.0

    assert optimizer.step(closure) == 42.0
    handle.remove()
    assert fired == ["pre", "post", "global"], "each hook once"
    feed_mean(expected, 0)
    reference.step()
    assert_same_params(params, expected, "after the closure")


@pytest.mark.parametrize("world_size", [1, 2])
def test_hooks_fire_once_and_closures_run_with_gradients(ranks: Pool, world_size: int) -> None:
    ranks.run(world_size, _hooks_and_closure)


def _sparse_on_one_rank() -> str:
    embedding = nn.Embedding(10, 3, sparse=dist.get_rank() == 1)
    linear = nn.Linear(3, 2)
    optimizer = ShardedAdamax([*embedding.parameters(), *linear.parameters()])
    linear(embedding(torch.tensor([1, 2]))).sum().backward()
    before = linear.weight.detach().clone()
    try:
        optimizer.step()
    except RuntimeError as error:
        assert_same_bits(linear.weight, before, "weight")
        return str(error)
    return ""


def test_a_sparse_gradient_is_refused_in_torchs_words_on_all_ranks(ranks: Pool) -> None:
    other, own = ranks.run(2, _sparse_on_one_rank)
    assert own == "Adamax does not support sparse gradients"
    assert "rank 1" in other and own in other


def _replace_optimizer() -> None:
    """A dropped optimizer takes no gradients, and one that is replaced hands its parameters over."""
    params, expected = make_params(torch.float32), make_params(torch.float32)
    dropped = ShardedAdamax(params, lr=1.0)
    del dropped
    assert all(param.grad is None for param in params)
    backward(params, local_gradients(0, params))
    assert all(param.grad is not None for param in params), "a dropped optimizer must not take gradients"
    for param in params:
        param.grad = None
    first = ShardedAdamax(params, lr=1.0)
    optimizer, reference = ShardedAdamax(params), torch.optim.Adamax(expected)
    backward(params, local_gradients(0, params))
    feed_mean(expected, 0)
    optimizer.step()
    reference.step()
    assert_same_params(params, expected, "after the step of the second optimizer")
    with pytest.raises(RuntimeError, match="no longer the tensor"):
        first.step()
    gc.collect()


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_second_optimizer_takes_the_parameters_over(ranks: Pool, world_size: int) -> None:
    ranks.run(world_size, _replace_optimizer)


def _low_precision(dtype: torch.dtype) -> None:
    params, expected = make_params(dtype), make_params(dtype)
    optimizer, reference = ShardedAdamax(params, eps=1e-3, bucket_mib=0.01), torch.optim.Adamax(expected, eps=1e-3)
    for step in range(5):
        backward(params, local_gradients(step, params))
        feed_mean(expected, step)
        optimizer.step()
        reference.step()
        assert_same_params(params, expected, f"after step {step}")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_low_precision_without_a_master_is_adamax_in_that_precision(ranks: Pool, dtype: torch.dtype) -> None:
    ranks.run(3, _low_precision, dtype)


def _in_a_subgroup(as_mesh: bool) -> None:
    """Ranks 1 and 2 of three share a state; in the group they are 0 and 1."""
    rank = dist.get_rank()
    group = dist.new_group([1, 2])
    if rank == 0:
        return
    params, expected = make_params(torch.float32, seed=rank), make_params(torch.float32, seed=1)
    mesh = DeviceMesh.from_group(group, "cpu") if as_mesh else None
    optimizer = ShardedAdamax(params, bucket_mib=0.01, process_group=None if as_mesh else group, mesh=mesh)
    reference = torch.optim.Adamax(expected)
    assert optimizer.layout.world_size == 2
    for step in range(3):
        backward(params, [gradient(step, rank - 1, i, p) for i, p in enumerate(params)])
        for param, mean in zip(expected, mean_gradients(step, expected, 2), strict=True):
            param.grad = mean
        optimizer.step()
        reference.step()
        assert_same_params(params, expected, f"after step {step}")
    full = optimizer.full_state_dict(to=1)
    assert (full is None) == (rank == 1), "`to` is a rank of the group"
    if full is not None:
        assert_same_state(full, reference)


@pytest.mark.parametrize("as_mesh", [False, True])
def test_a_subgroup_shards_over_its_own_ranks(ranks: Pool, as_mesh: bool) -> None:
    ranks.run(3, _in_a_subgroup, as_mesh)


def _only_empty() -> None:
    params, expected = make_params(torch.float32, [(0,), (3, 0)]), make_params(torch.float32, [(0,), (3, 0)])
    optimizer, reference = ShardedAdamax(params), torch.optim.Adamax(expected)
    for step in range(2):
        backward(params, local_gradients(step, params))
        feed_mean(expected, step)
        optimizer.step()
        reference.step()
        optimizer.zero_grad()
    full = optimizer.full_state_dict()
    if full is not None:
        assert_same_state(full, reference)


@pytest.mark.parametrize("world_size", [1, 3])
def test_a_model_without_elements_trains(ranks: Pool, world_size: int) -> None:
    ranks.run(world_size, _only_empty)
