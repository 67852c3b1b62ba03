"""Lightning Fabric and Trainer: their own calls train, clip, schedule, save and resume ShardedAdamax."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric import Fabric
from torch.nn import functional as F
from torch.optim.lr_scheduler import LinearLR
from torch.utils.data import DataLoader

from sharded_adamax.integrations.lightning import FabricStrategy, TrainerStrategy
from tests.distributed.models import Net
from tests.distributed.pool import Pool
from tests.integration.frameworks.comparison import (
    ACCUMULATE,
    MAX_NORM,
    NUM_STEPS,
    Points,
    Run,
    as_launched,
    first_half,
    make_optimizer,
    same_without_ddp,
    second_half,
)

for name in ("lightning.pytorch", "lightning.fabric"):
    logging.getLogger(name).setLevel(logging.ERROR)


def _loader() -> DataLoader[Any]:
    return DataLoader(Points(240), batch_size=4)


def train_fabric(
    kind: str, *, save_to: Path | None = None, resume_from: Path | None = None, max_norm: float | None = MAX_NORM
) -> Run:
    strategy = FabricStrategy() if kind == "reducing" else "ddp"
    fabric = Fabric(accelerator="cpu", devices=torch.distributed.get_world_size(), strategy=strategy)
    fabric.launch()
    net = Net(seed=0 if resume_from is None else 1)
    model = fabric.setup_module(net)
    optimizer = fabric.setup_optimizers(make_optimizer(kind, net.parameters()))
    scheduler = LinearLR(optimizer, total_iters=20)
    loader = fabric.setup_dataloaders(_loader())
    state = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "batch": 0}
    if resume_from is not None:
        fabric.load(resume_from, state)
    losses, norms, start = [], [], state["batch"]
    for index, (x, y) in enumerate(loader):
        if not start <= index < start + NUM_STEPS * ACCUMULATE:
            continue
        is_last = index % ACCUMULATE == ACCUMULATE - 1
        with fabric.no_backward_sync(model, enabled=not is_last):
            loss = F.mse_loss(model(x), y) / ACCUMULATE
            fabric.backward(loss)
        losses.append(loss.item())
        if is_last:
            if max_norm is not None:
                norms.append(fabric.clip_gradients(model, optimizer, max_norm=max_norm).item())
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        state["batch"] = index + 1
    if save_to is not None:
        fabric.save(save_to, state)
    return Run.of(net, losses, norms)


class Module(pl.LightningModule):
    def __init__(self, kind: str, seed: int) -> None:
        super().__init__()
        self.net = Net(seed)
        self.kind = kind
        self.losses: list[float] = []
        self.norms: list[float] = []

    def training_step(self, batch: Any, batch_index: int) -> torch.Tensor:
        x, y = batch
        loss = F.mse_loss(self.net(x), y)
        self.losses.append(loss.item())
        return loss

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        gradients = [param.grad for param in self.parameters() if param.grad is not None]
        self.norms.append(torch.nn.utils.get_total_norm(gradients).item())

    def configure_optimizers(self) -> Any:
        optimizer = make_optimizer(self.kind, self.parameters())
        return [optimizer], [{"scheduler": LinearLR(optimizer, total_iters=20), "interval": "step"}]


def train_trainer(
    kind: str,
    *,
    save_to: Path | None = None,
    resume_from: Path | None = None,
    max_norm: float | None = MAX_NORM,
    **more: Any,
) -> Run:
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=torch.distributed.get_world_size(),
        strategy=TrainerStrategy() if kind == "reducing" else "ddp",
        max_steps=NUM_STEPS if resume_from is None else 2 * NUM_STEPS,
        accumulate_grad_batches=ACCUMULATE,
        gradient_clip_val=max_norm,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **more,
    )
    module = Module(kind, seed=0 if resume_from is None else 1)
    trainer.fit(module, _loader(), ckpt_path=resume_from)
    if save_to is not None:
        trainer.save_checkpoint(save_to)
    return Run.of(module.net, module.losses, [] if max_norm is None else module.norms)


def read_fabric(path: Path) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(path, weights_only=True)["optimizer"]
    return state


def read_trainer(path: Path) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(path, weights_only=True)["optimizer_states"][0]
    return state


TRAIN = {"Fabric": train_fabric, "Trainer": train_trainer}
READ = {"Fabric": read_fabric, "Trainer": read_trainer}


@pytest.fixture(scope="module", params=TRAIN)
def saved(request: pytest.FixtureRequest, ranks: Pool, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    root = tmp_path_factory.mktemp("lightning")
    ranks.run(2, first_half, TRAIN[request.param], READ[request.param], root)
    return request.param, root


@pytest.mark.parametrize("world_size", [1, 3])
def test_what_two_ranks_saved_goes_on_at_another_number_with_the_bits_of_adamax(
    ranks: Pool, saved: tuple[str, Path], world_size: int
) -> None:
    ranks.run(world_size, second_half, TRAIN[saved[0]], saved[1])


@pytest.mark.parametrize("which", TRAIN)
def test_without_ddp_two_ranks_have_the_bits_of_ddp(ranks: Pool, which: str) -> None:
    ranks.run(2, same_without_ddp, TRAIN[which])


def _clipped_without_ddp() -> None:
    with as_launched():
        for train in (train_fabric, train_trainer):
            expected = train("adamax")
            got = train("reducing")
            assert got.losses[:ACCUMULATE] == expected.losses[:ACCUMULATE]
            # The norm is summed over shards, so it is equal but for rounding, and so is what follows.
            torch.testing.assert_close(torch.tensor(got.losses), torch.tensor(expected.losses))
            assert got.losses != train("reducing", max_norm=None).losses, "clipping changed nothing"
            for name, param in got.params.items():
                torch.testing.assert_close(param, expected.params[name])


def test_without_ddp_clipping_goes_to_the_optimizer(ranks: Pool) -> None:
    ranks.run(2, _clipped_without_ddp)


def _refusals() -> dict[str, str]:
    found = {}
    with as_launched():
        with pytest.raises(NotImplementedError) as by_value:
            train_trainer("reducing", gradient_clip_algorithm="value")
        found["clipping by value in Trainer"] = str(by_value.value)
        for kind in ("adamax", "sharded"):
            for strategy in (FabricStrategy(), TrainerStrategy()):
                with pytest.raises(TypeError) as refused:
                    _run_with(strategy, kind)
                found[f"{kind} in {type(strategy).__name__}"] = str(refused.value)
        fabric = Fabric(accelerator="cpu", devices=1, strategy=FabricStrategy())
        fabric.launch()
        optimizer = fabric.setup_optimizers(make_optimizer("reducing", Net(0).parameters()))
        with pytest.raises(NotImplementedError) as by_value:
            fabric.clip_gradients(Net(0), optimizer, clip_val=1.0)
        found["clipping by value in Fabric"] = str(by_value.value)
    return found


def _run_with(strategy: Any, kind: str) -> None:
    if isinstance(strategy, FabricStrategy):
        fabric = Fabric(accelerator="cpu", devices=1, strategy=strategy)
        fabric.launch()
        fabric.setup_optimizers(make_optimizer(kind, Net(0).parameters()))
    else:
        trainer = pl.Trainer(
            accelerator="cpu",
            devices=1,
            strategy=strategy,
            max_steps=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(Module(kind, 0), _loader())


def test_without_ddp_whatever_would_be_silently_wrong_is_refused(ranks: Pool) -> None:
    found = ranks.run(1, _refusals)[0]
    assert "by value" in found.pop("clipping by value in Fabric")
    assert "by value" in found.pop("clipping by value in Trainer")
    assert len(found) == 4
    for name, message in found.items():
        assert "expected ShardedAdamax with reduce_gradients=True" in message, name
