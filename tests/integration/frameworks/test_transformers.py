"""Hugging Face Trainer: it trains, clips, schedules, saves and resumes ShardedAdamax."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import Tensor
from torch.utils.data import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

from sharded_adamax import ShardedAdamax
from sharded_adamax.integrations.transformers import ShardedTrainer
from sharded_adamax.state import FlatShard
from tests.distributed.models import SMALL_BUCKET_MIB
from tests.distributed.pool import Failure, Pool
from tests.integration.frameworks.comparison import (
    ACCUMULATE,
    MAX_NORM,
    NUM_STEPS,
    OPTIONS,
    Run,
    as_launched,
    first_half,
    second_half,
)


class Sentences(Dataset[dict[str, Tensor]]):
    def __init__(self) -> None:
        self.tokens = torch.randint(0, 32, (240, 6), generator=torch.Generator().manual_seed(3))

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.tokens[index], "labels": self.tokens[index]}


class _Recorder(TrainerCallback):
    """Keeps the norms of the gradients as they are before clipping."""

    def __init__(self) -> None:
        self.norms: list[float] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "grad_norm" in logs:
            self.norms.append(float(logs["grad_norm"]))


class PlainTrainer(Trainer):
    """Keeps the losses; the Trainer's own log rounds them."""

    losses: list[float]

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss: Tensor = super().training_step(*args, **kwargs)
        self.losses.append(loss.item())
        return loss


class OurTrainer(ShardedTrainer, PlainTrainer):
    """Ours beside another subclass of Trainer, as the page says."""


def _model(seed: int) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=32,
        n_positions=8,
        n_embd=16,
        n_layer=1,
        n_head=2,
        resid_pdrop=0,
        embd_pdrop=0,
        attn_pdrop=0,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config)


def build(kind: str, directory: Path, *, num_steps: int, trainer_class: Any, seed: int = 0, **more: Any) -> Any:
    for state in (AcceleratorState, GradientState, PartialState):  # of the run before: they are singletons
        state._reset_state()
    args = TrainingArguments(
        output_dir=str(directory),
        use_cpu=True,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=ACCUMULATE,
        max_grad_norm=MAX_NORM,
        max_steps=num_steps,
        lr_scheduler_type="linear",
        learning_rate=OPTIONS["lr"],
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        **({"save_steps": NUM_STEPS} | more),
    )
    options = {"lr": OPTIONS["lr"]}
    cls: Any = torch.optim.Adamax
    if kind == "sharded":
        cls, options = ShardedAdamax, options | {"reduce_gradients": False, "bucket_mib": SMALL_BUCKET_MIB}
    trainer = trainer_class(
        model=_model(seed),
        args=args,
        train_dataset=Sentences(),
        eval_dataset=Sentences(),
        optimizer_cls_and_kwargs=(cls, options),
        callbacks=[_Recorder()],
    )
    trainer.losses = []
    return trainer


def train(
    kind: str, *, save_to: Path | None = None, resume_from: Path | None = None, max_norm: float | None = MAX_NORM
) -> Run:
    trainer = build(
        kind,
        save_to or Path(f"{resume_from}-{kind}-on-{os.environ['WORLD_SIZE']}"),
        num_steps=2 * NUM_STEPS if resume_from else NUM_STEPS,
        trainer_class=OurTrainer if kind == "sharded" else PlainTrainer,
        seed=1 if resume_from else 0,
    )
    trainer.train(resume_from_checkpoint=str(_checkpoint(resume_from)) if resume_from else None)
    recorder = next(each for each in trainer.callback_handler.callbacks if isinstance(each, _Recorder))
    return Run.of(trainer.model, trainer.losses, recorder.norms)


def _checkpoint(directory: Path) -> Path:
    return directory / f"checkpoint-{NUM_STEPS}"


def read_state(directory: Path) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(_checkpoint(directory) / "optimizer.pt", weights_only=True)
    return state


@pytest.fixture(scope="module")
def saved(ranks: Pool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("transformers")
    ranks.run(2, first_half, train, read_state, root)
    return root


@pytest.mark.parametrize("world_size", [1, 3])
def test_what_two_ranks_saved_goes_on_at_another_number_with_the_bits_of_adamax(
    ranks: Pool, saved: Path, world_size: int
) -> None:
    ranks.run(world_size, second_half, train, saved)


def _without_integration(directory: Path, device_placement: bool) -> None:
    with as_launched():
        trainer = build("sharded", directory, num_steps=2 * NUM_STEPS, trainer_class=PlainTrainer)
        trainer.accelerator.device_placement = device_placement
        trainer.train()


def test_the_plain_trainer_fails_to_save_names_ours_and_leaves_nothing_to_resume_from(
    ranks: Pool, tmp_path: Path
) -> None:
    failure, other = ranks.run_expecting_failures(2, _without_integration, tmp_path, False)
    assert isinstance(failure, Failure) and "integrations.transformers.ShardedTrainer" in failure.message
    assert isinstance(other, Failure), "the other rank went on without rank 0"
    with pytest.raises(RuntimeError, match="file not found"):
        read_state(tmp_path)
    assert not (_checkpoint(tmp_path) / "trainer_state.json").exists(), "the Trainer could resume from this"


def test_the_plain_trainer_on_the_cpu_moves_the_parameters_and_is_told_so_at_the_first_step(
    ranks: Pool, tmp_path: Path
) -> None:
    failures = ranks.run_expecting_failures(2, _without_integration, tmp_path, True)
    assert all("integrations.transformers.ShardedTrainer" in failure.message for failure in failures)


def _with_adamax(directory: Path) -> None:
    with as_launched():
        build("adamax", directory, num_steps=NUM_STEPS, trainer_class=OurTrainer).train()
    assert read_state(directory)["state"][0]["step"] == NUM_STEPS


def test_with_another_optimizer_our_trainer_is_the_trainer(ranks: Pool, tmp_path: Path) -> None:
    ranks.run(1, _with_adamax, tmp_path)


def _save_the_best(directory: Path) -> None:
    """No callback is asked between the decision that this is the best and the save."""
    more = {"save_strategy": "best", "metric_for_best_model": "loss", "eval_strategy": "steps", "eval_steps": NUM_STEPS}
    with as_launched():
        trainer = build("sharded", directory, num_steps=NUM_STEPS, trainer_class=OurTrainer, **more)
        trainer.train()
        inner = trainer.optimizer.optimizer
        assert isinstance(inner.state_dict()["state"][0]["exp_avg"], FlatShard), "rank 0 still holds the whole state"


def test_a_checkpoint_of_the_best_metric_is_whole_too_and_its_memory_is_freed(ranks: Pool, tmp_path: Path) -> None:
    ranks.run(2, _save_the_best, tmp_path)
    assert read_state(tmp_path)["state"][0]["step"] == NUM_STEPS
