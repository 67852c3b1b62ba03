"""torch.amp.GradScaler in the loops of torch's own documentation, against torch.optim.Adamax in one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.nn.parallel import DistributedDataParallel

from sharded_adamax import ShardedAdamax
from tests.distributed.pool import Pool
from tests.distributed.problems import assert_same_params, assert_same_state, gradient, make_params

NUM_STEPS = 8
# Steps in which one rank overflows, and which: the first step, in the middle, two in a row.
OVERFLOWS = {0: 1, 3: 0, 4: 1}


def _scaler(enabled: bool = True) -> GradScaler:
    return GradScaler("cpu", init_scale=2.0**10, growth_interval=2, enabled=enabled)


def _loss(params: list[nn.Parameter], step: int, rank: int, *, overflow: bool) -> Tensor:
    """A loss with the gradients of `gradient`; too large for float32 once scaled, where asked to overflow.

    It overflows in a parameter of 7 elements: the Inf is in the shard of one rank, and the others have to be told.
    """
    terms = [(p * gradient(step, rank, i, p)).sum() for i, p in enumerate(params)]
    loss = torch.stack(terms).sum()
    return loss + params[2].sum() * 1e38 if overflow else loss


def _mean_of_scaled(params: list[nn.Parameter], step: int, scale: float) -> list[Tensor]:
    """What the ranks' scaled gradients give when they are summed in rank order and divided."""
    sums: list[Tensor] = []
    for rank in range(dist.get_world_size()):
        fresh = [nn.Parameter(param.detach().clone()) for param in params]
        (_loss(fresh, step, rank, overflow=OVERFLOWS.get(step) == rank) * scale).backward()
        grads = [param.grad for param in fresh]
        sums = (
            [a + b for a, b in zip(sums, grads, strict=True)] if sums else [g.clone() for g in grads if g is not None]
        )
    return [total / dist.get_world_size() for total in sums]


def _train(unscale: bool, clip: bool, clear: str) -> list[float]:
    params, expected = make_params(torch.float32), make_params(torch.float32)
    optimizer = ShardedAdamax(params, lr=0.02, bucket_mib=0.01)
    reference = torch.optim.Adamax(expected, lr=0.02)
    module = nn.ParameterList(params)
    scaler, of_reference = _scaler(), _scaler()
    of_reference.scale(torch.ones(()))  # it makes its scale when it is first used
    scales = []
    for step in range(NUM_STEPS):
        loss = _loss(params, step, dist.get_rank(), overflow=OVERFLOWS.get(step) == dist.get_rank())
        scaler.scale(loss).backward()
        for param, mean in zip(expected, _mean_of_scaled(expected, step, of_reference.get_scale()), strict=True):
            param.grad = mean
        if unscale:
            scaler.unscale_(optimizer)
            of_reference.unscale_(reference)
        if clip:
            norm = optimizer.clip_grad_norm_(1e9)  # far above: clipping is compared elsewhere, to its bound
            want = torch.nn.utils.clip_grad_norm_(expected, 1e9)
            if step in OVERFLOWS:
                assert not torch.isfinite(norm) and not torch.isfinite(want)
            else:
                torch.testing.assert_close(norm, want, rtol=1e-6, atol=0)
        scaler.step(optimizer)
        of_reference.step(reference)
        scaler.update()
        of_reference.update()
        module.zero_grad() if clear == "model" else optimizer.zero_grad(set_to_none=clear == "optimizer")
        reference.zero_grad()
        assert scaler.get_scale() == of_reference.get_scale(), step
        scales.append(scaler.get_scale())
        assert_same_params(params, expected, f"after step {step}")
    assert optimizer.state[params[0]]["step"] == NUM_STEPS - len(OVERFLOWS)
    full = optimizer.full_state_dict()
    if full is not None:
        assert_same_state(full, reference)
    return scales


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("clear", ["optimizer", "optimizer, to zero", "model"])
@pytest.mark.parametrize(("unscale", "clip"), [(False, False), (True, False), (True, True)])
def test_an_overflow_on_one_rank_makes_all_skip_and_lower_their_scale(
    ranks: Pool, world_size: int, clear: str, unscale: bool, clip: bool
) -> None:
    scales = ranks.run(world_size, _train, unscale, clip, clear)
    assert all(of_rank == scales[0] for of_rank in scales)
    assert len(set(scales[0])) > 2, "the scale went down and up"


def _half_precision(master: bool, wrapped: bool) -> None:
    """fp16 autocast on the CPU, or a model in fp16 with a master: real overflows, a real model."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
    settings: dict[str, Any] = {"lr": 0.05, "bucket_mib": 0.0005}
    if master:
        model = model.half()
        settings["master_dtype"] = torch.float32
    net: Any = DistributedDataParallel(model) if wrapped else model
    optimizer = ShardedAdamax(model.named_parameters(), reduce_gradients=not wrapped, **settings)
    scaler = GradScaler("cpu", init_scale=2.0**20, growth_interval=20)
    generator = torch.Generator().manual_seed(dist.get_rank())
    losses = []
    for step in range(60):
        inputs = torch.randn(16, 8, generator=generator)
        with torch.autocast("cpu", dtype=torch.float16, enabled=not master):
            outputs = net(inputs.half() if master else inputs)
            loss = (outputs.float() - inputs[:, :4].square()).square().mean()
        scaler.scale(loss * (1e4 if step == 30 and dist.get_rank() == 1 else 1)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(loss.item())
        found: list[Any] = [None] * dist.get_world_size()
        mine = (scaler.get_scale(), optimizer.state[model[0].weight]["step"].item(), model[2].bias.detach().tolist())
        dist.all_gather_object(found, mine)
        assert all(one == found[0] for one in found), step
    assert 40 <= optimizer.state[model[0].weight]["step"] < 60, "some steps overflowed, most did not"
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])


@pytest.mark.parametrize(("master", "wrapped"), [(False, False), (True, False), (False, True)])
def test_half_precision_trains_with_a_scaler_that_is_equal_everywhere(ranks: Pool, master: bool, wrapped: bool) -> None:
    ranks.run(2, _half_precision, master, wrapped)


def _fp16_without_a_master() -> str:
    params = make_params(torch.float16)
    optimizer, scaler = ShardedAdamax(params), _scaler()
    scaler.scale(torch.stack([param.sum() for param in params]).sum()).backward()
    try:
        scaler.unscale_(optimizer)
    except ValueError as error:
        return str(error)
    return "nothing raised"


def test_fp16_gradients_without_a_master_are_refused_in_torchs_words(ranks: Pool) -> None:
    assert set(ranks.run(2, _fp16_without_a_master)) == {"Attempting to unscale FP16 gradients."}


def _nothing_to_unscale() -> str:
    optimizer, scaler = ShardedAdamax(make_params(torch.float32)), _scaler()
    scaler.scale(torch.ones(()))
    try:
        scaler.step(optimizer)
    except AssertionError as error:
        return str(error)
    return "nothing raised"


def test_a_step_without_any_gradient_is_refused_in_torchs_words(ranks: Pool) -> None:
    assert set(ranks.run(2, _nothing_to_unscale)) == {"No inf checks were recorded for this optimizer."}


def _one_rank_without_gradients() -> None:
    """A rank whose batch uses no parameter takes part in the scaling all the same."""
    params, expected = make_params(torch.float32), make_params(torch.float32)
    optimizer, reference = ShardedAdamax(params, bucket_mib=0.01), torch.optim.Adamax(expected)
    scaler, of_reference = _scaler(), _scaler()
    of_reference.scale(torch.ones(()))
    for step in range(3):
        if dist.get_rank() != 1:
            scaler.scale(_loss(params, 10 + step, dist.get_rank(), overflow=False)).backward()
        else:
            scaler.scale(torch.ones(()))
        (_loss(expected, 10 + step, 0, overflow=False) * of_reference.get_scale()).backward()
        for param in expected:
            assert param.grad is not None
            param.grad /= 2
        for either, of_either in ((scaler, optimizer), (of_reference, reference)):
            either.step(of_either)
            either.update()
            of_either.zero_grad()
        assert_same_params(params, expected, f"after step {step}")


def test_a_rank_without_gradients_scales_with_the_others(ranks: Pool) -> None:
    ranks.run(2, _one_rank_without_gradients)


def _forgotten_after_a_skip() -> str:
    """After an overflow only rank 0 runs backward, and nobody told the optimizer that the old gradients are void."""
    params = make_params(torch.float32)
    optimizer, scaler = ShardedAdamax(params, bucket_mib=0.001), _scaler()
    assert len(optimizer.layout.buckets) > 2, "so many that rank 0 would wait in backward if it launched them"
    scaler.scale(_loss(params, 0, 0, overflow=True)).backward()
    scaler.step(optimizer)
    scaler.update()
    if dist.get_rank() == 0:
        scaler.scale(_loss(params[:1] * 8, 1, 0, overflow=False)).backward()
    try:
        scaler.step(optimizer)
    except RuntimeError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing raised"


def test_ranks_that_differ_in_what_came_after_a_skipped_step_are_told(ranks: Pool) -> None:
    for message in ranks.run(2, _forgotten_after_a_skip):
        assert message.startswith("RoundError: the ranks are not at the same place in step 1"), message
        assert "backward after a step that GradScaler skipped" in message


def _other_optimizers() -> None:
    """The scaler treats every other optimizer as before, also beside ours."""
    ShardedAdamax(make_params(torch.float32))
    ShardedAdamax(make_params(torch.float32))  # teaching twice changes nothing
    param = nn.Parameter(torch.ones(3))
    optimizer, scaler = torch.optim.SGD([param], lr=1.0), _scaler()
    scaler.scale((param * torch.tensor([1.0, 2.0, 3.0])).sum()).backward()
    scaler.unscale_(optimizer)
    assert param.grad is not None and param.grad.tolist() == [1.0, 2.0, 3.0]
    scaler.step(optimizer)
    assert param.tolist() == [0.0, -1.0, -2.0]
    assert not hasattr(GradScaler._unscale_grads_.__wrapped__, "__wrapped__")  # type: ignore[attr-defined]


def test_other_optimizers_are_scaled_as_ever(ranks: Pool) -> None:
    ranks.run(1, _other_optimizers)
