"""Hugging Face Accelerate: its own calls train, clip, schedule, save and resume ShardedAdamax."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch.nn import functional as F
from torch.optim.lr_scheduler import LinearLR
from torch.utils.data import DataLoader

from sharded_adamax import load, save
from sharded_adamax.integrations.accelerate import gather_on_save
from tests.distributed.models import Net
from tests.distributed.pool import Failure, Pool
from tests.integration.frameworks.comparison import (
    ACCUMULATE,
    MAX_NORM,
    NUM_STEPS,
    Points,
    Run,
    as_launched,
    assert_same_run,
    first_half,
    make_optimizer,
    same_without_ddp,
    second_half,
)


def _accelerator() -> Accelerator:
    for state in (AcceleratorState, GradientState, PartialState):  # of the run before: they are singletons
        state._reset_state()
    return Accelerator(cpu=True, gradient_accumulation_steps=ACCUMULATE)


def train(
    kind: str,
    *,
    save_to: Path | None = None,
    resume_from: Path | None = None,
    max_norm: float | None = MAX_NORM,
    gather: bool = True,
    through_ours: bool = False,
) -> Run:
    """With ``through_ours``, what the framework saved is not looked at, but what `sharded_adamax.save` did."""
    accelerator = _accelerator()
    net = Net(seed=0 if resume_from is None else 1)
    model = accelerator.prepare_model(net, evaluation_mode=kind == "reducing")  # which means: without DDP
    optimizer = make_optimizer(kind, net.parameters())
    optimizer, scheduler, loader = accelerator.prepare(
        optimizer, LinearLR(optimizer, total_iters=20), DataLoader(Points(240), batch_size=4)
    )
    if gather and kind != "adamax":
        gather_on_save(accelerator, optimizer)
    if resume_from is not None:
        if through_ours:
            scheduler.load_state_dict(load(f"{resume_from} of ours", model, optimizer))
        else:
            accelerator.load_state(str(resume_from))
        loader = accelerator.skip_first_batches(loader, NUM_STEPS * ACCUMULATE)
    losses, norms, num_steps = [], [], 0
    for x, y in loader:
        with accelerator.accumulate(model), _no_sync(optimizer, kind == "reducing" and not accelerator.sync_gradients):
            loss = F.mse_loss(model(x), y)
            accelerator.backward(loss)
            losses.append(loss.item())
            if accelerator.sync_gradients and max_norm is not None:
                norms.append(accelerator.clip_grad_norm_(model.parameters(), max_norm).item())
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        num_steps += accelerator.sync_gradients
        if num_steps == NUM_STEPS:
            break
    if save_to is not None:
        accelerator.save_state(str(save_to))
        if kind == "sharded":
            save(f"{save_to} of ours", model, optimizer, extra=scheduler.state_dict())
    return Run.of(net, losses, norms)


def _no_sync(optimizer: Any, enabled: bool) -> AbstractContextManager[None]:
    return optimizer.optimizer.no_sync() if enabled else nullcontext()


def read_state(directory: Path) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(directory / "optimizer.bin", weights_only=True)
    return state


@pytest.fixture(scope="module")
def saved(ranks: Pool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("accelerate")
    ranks.run(2, first_half, train, read_state, root)
    return root


@pytest.mark.parametrize("world_size", [1, 3])
def test_what_two_ranks_saved_goes_on_at_another_number_with_the_bits_of_adamax(
    ranks: Pool, saved: Path, world_size: int
) -> None:
    ranks.run(world_size, second_half, train, saved)


def _second_half_through_ours(root: Path) -> None:
    with as_launched():
        expected = train("adamax", resume_from=root / "adamax")
        got = train("sharded", resume_from=root / "sharded", through_ours=True)
        assert_same_run(got, expected, "from sharded_adamax.save")


@pytest.mark.parametrize("world_size", [1, 3])
def test_a_prepared_optimizer_is_saved_and_loaded_by_ours_without_gathering_it(
    ranks: Pool, saved: Path, world_size: int
) -> None:
    ranks.run(world_size, _second_half_through_ours, saved)


def test_without_ddp_two_ranks_have_the_bits_of_ddp(ranks: Pool) -> None:
    ranks.run(2, same_without_ddp, train)


def _without_gathering(directory: Path) -> None:
    with as_launched():
        train("sharded", save_to=directory, gather=False)


def test_without_the_hook_the_save_fails_names_it_and_leaves_no_state_behind(ranks: Pool, tmp_path: Path) -> None:
    failure, _ = ranks.run_expecting_failures(2, _without_gathering, tmp_path / "saved")
    assert isinstance(failure, Failure)
    assert "integrations.accelerate.gather_on_save(accelerator, optimizer)" in failure.message
    with pytest.raises(RuntimeError, match="file not found"):
        read_state(tmp_path / "saved")


def _hook_another_optimizer() -> str:
    with as_launched():
        accelerator = _accelerator()
        optimizer = accelerator.prepare(torch.optim.Adamax([torch.zeros(3)]))
        with pytest.raises(TypeError) as raised:
            gather_on_save(accelerator, optimizer)
        return str(raised.value)


def test_the_hook_is_for_sharded_adamax(ranks: Pool) -> None:
    assert ranks.run(1, _hook_another_optimizer) == ["expected ShardedAdamax optimizers, got ['Adamax']"]
