"""Every scheduler of torch moves ShardedAdamax as it moves torch.optim.Adamax, lr a number or a Tensor."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from itertools import chain
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import lr_scheduler as lrs
from torch.optim import swa_utils
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.optimizer import Optimizer

from sharded_adamax import ShardedAdamax
from tests.distributed.models import compare_groups
from tests.distributed.pool import Pool
from tests.distributed.problems import assert_same_params, backward, local_gradients, make_params, mean_gradients

SHAPES: list[tuple[int, ...]] = [(), (7,), (5, 13), (0, 2), (65,)]
NUM_STEPS = 12


class Case(NamedTuple):
    """One scheduler and its arguments."""

    scheduler: type[LRScheduler]
    what: str
    make: Callable[[Optimizer], LRScheduler]

    @property
    def name(self) -> str:
        return f"{self.scheduler.__name__} {self.what}".strip()


class Halving:
    """A function of the epoch with a state of its own, which LambdaLR saves."""

    def __init__(self, every: int) -> None:
        self.every = every

    def __call__(self, epoch: int) -> float:
        return float(0.5 ** (epoch // self.every))


def _sequential(optimizer: Optimizer) -> LRScheduler:
    parts: list[LRScheduler] = [
        lrs.LinearLR(optimizer, start_factor=0.1, total_iters=4),
        lrs.ConstantLR(optimizer, factor=0.7, total_iters=2),
        lrs.CosineAnnealingLR(optimizer, T_max=5),
    ]
    return lrs.SequentialLR(optimizer, parts, milestones=[4, 7])


def _chained(optimizer: Optimizer) -> LRScheduler:
    parts: list[LRScheduler] = [
        lrs.ConstantLR(optimizer, factor=0.1, total_iters=3),
        lrs.ExponentialLR(optimizer, gamma=0.9),
    ]
    return lrs.ChainedScheduler(parts, optimizer=optimizer)


def _cyclic(**options: Any) -> Callable[[Optimizer], LRScheduler]:
    return lambda o: lrs.CyclicLR(o, base_lr=1e-3, max_lr=[0.1, 0.2], step_size_up=3, **options)


def _one_cycle(**options: Any) -> Callable[[Optimizer], LRScheduler]:
    return lambda o: lrs.OneCycleLR(o, max_lr=[0.1, 0.2], total_steps=NUM_STEPS + 1, **options)


CASES = [
    Case(lrs.LambdaLR, "", lambda o: lrs.LambdaLR(o, [lambda epoch: 0.9**epoch, Halving(3)])),
    Case(lrs.MultiplicativeLR, "", lambda o: lrs.MultiplicativeLR(o, lambda epoch: 0.95)),
    Case(lrs.StepLR, "", lambda o: lrs.StepLR(o, step_size=3, gamma=0.5)),
    Case(lrs.MultiStepLR, "", lambda o: lrs.MultiStepLR(o, milestones=[2, 5, 5, 9], gamma=0.3)),
    Case(lrs.ConstantLR, "", lambda o: lrs.ConstantLR(o, factor=0.25, total_iters=4)),
    Case(lrs.LinearLR, "", lambda o: lrs.LinearLR(o, start_factor=0.1, total_iters=8)),
    Case(lrs.ExponentialLR, "", lambda o: lrs.ExponentialLR(o, gamma=0.8)),
    Case(lrs.PolynomialLR, "", lambda o: lrs.PolynomialLR(o, total_iters=10, power=1.5)),
    Case(lrs.SequentialLR, "", _sequential),
    Case(lrs.ChainedScheduler, "", _chained),
    Case(lrs.CosineAnnealingLR, "", lambda o: lrs.CosineAnnealingLR(o, T_max=5, eta_min=1e-4)),
    Case(lrs.CosineAnnealingWarmRestarts, "", lambda o: lrs.CosineAnnealingWarmRestarts(o, T_0=2, T_mult=2)),
    Case(lrs.ReduceLROnPlateau, "", lambda o: lrs.ReduceLROnPlateau(o, factor=0.5, patience=1, min_lr=[1e-4, 2e-3])),
    Case(lrs.ReduceLROnPlateau, "of the best", lambda o: lrs.ReduceLROnPlateau(o, mode="max", patience=0, cooldown=2)),
    Case(lrs.CyclicLR, "with momentum", _cyclic(base_momentum=0.7, max_momentum=0.95)),
    Case(lrs.CyclicLR, "of lr alone", _cyclic(cycle_momentum=False, mode="triangular2")),
    Case(lrs.CyclicLR, "exp_range", _cyclic(mode="exp_range", gamma=0.97)),
    Case(lrs.CyclicLR, "own scale", _cyclic(scale_fn=lambda cycle: 1 / cycle)),
    Case(lrs.OneCycleLR, "with momentum", _one_cycle()),
    Case(lrs.OneCycleLR, "in three phases", _one_cycle(three_phase=True, anneal_strategy="linear")),
    Case(lrs.OneCycleLR, "of lr alone", _one_cycle(cycle_momentum=False)),
    Case(swa_utils.SWALR, "", lambda o: swa_utils.SWALR(o, swa_lr=[0.05, 0.01], anneal_epochs=5)),
    Case(
        swa_utils.SWALR, "linear", lambda o: swa_utils.SWALR(o, swa_lr=0.05, anneal_epochs=7, anneal_strategy="linear")
    ),
]
LRS: dict[str, Callable[[], Any]] = {
    "number": lambda: 0.03,
    "0-d tensor": lambda: torch.tensor(0.03),
    "0-d fp64 tensor": lambda: torch.tensor(0.03, dtype=torch.float64),
    "1-element tensor": lambda: torch.tensor([0.03]),
}


def _schedulers_in(module: ModuleType) -> set[type[LRScheduler]]:
    return {
        value
        for name, value in vars(module).items()
        if inspect.isclass(value) and issubclass(value, LRScheduler) and not name.startswith("_")
    } - {LRScheduler}


def test_every_scheduler_of_torch_is_tried_here() -> None:
    found = _schedulers_in(lrs) | _schedulers_in(swa_utils)
    assert found == {case.scheduler for case in CASES}, "a scheduler that torch has and this file does not, or no more"


class Side:
    """One optimizer, its scheduler and its parameters in two groups."""

    def __init__(self, kind: type[Optimizer], lr: str, foreach: bool | None, seed: int, **options: Any) -> None:
        self.params: list[nn.Parameter] = make_params(torch.float32, SHAPES, seed)
        groups = [{"params": self.params[::2]}, {"params": self.params[1::2], "lr": LRS[lr](), "betas": (0.8, 0.99)}]
        self.optimizer = kind(groups, lr=LRS[lr](), foreach=foreach, **options)  # type: ignore[call-arg]
        self.scheduler: LRScheduler | None = None

    def schedule(self, case: Case) -> None:
        self.scheduler = case.make(self.optimizer)

    def advance(self, step: int) -> None:
        assert self.scheduler is not None
        if isinstance(self.scheduler, lrs.ReduceLROnPlateau):
            self.scheduler.step([5.0, 4.0, 4.5, 4.2, 4.1, 3.0, 3.0, 3.1, 3.2, 2.0, 2.5, 2.6][step])
        else:
            self.scheduler.step()

    def resume_from(self, other: Side) -> None:
        """Go on where ``other`` is, through state dicts alone."""
        assert self.scheduler is not None and other.scheduler is not None
        with torch.no_grad():
            for param, value in zip(self.params, other.params, strict=True):
                param.copy_(value)
        self.optimizer.load_state_dict(other.optimizer.state_dict())
        self.scheduler.load_state_dict(copy.deepcopy(other.scheduler.state_dict()))


def _sides(lr: str, foreach: bool | None) -> tuple[Side, Side]:
    ours = Side(ShardedAdamax, lr, foreach, seed=dist.get_rank(), bucket_mib=0.0005)
    return ours, Side(torch.optim.Adamax, lr, foreach, seed=0)


def _both(ours: Callable[[], None], torchs: Callable[[], None]) -> bool:
    """Do both; if torch refuses, so must we, in its words. Returns whether it was done."""
    errors = []
    for action in (torchs, ours):
        try:
            action()
            errors.append("")
        except (RuntimeError, TypeError, ValueError) as error:
            errors.append(f"{type(error).__name__}: {error}")
    assert errors[0] == errors[1]
    return not errors[0]


def _step(ours: Side, expected: Side, step: int) -> bool:
    backward(ours.params, local_gradients(step, ours.params))
    means = mean_gradients(step, expected.params, dist.get_world_size())
    for param, mean in zip(expected.params, means, strict=True):
        param.grad = mean
    ours.optimizer.step()
    expected.optimizer.step()
    ours.optimizer.zero_grad()
    assert_same_params(ours.params, expected.params, f"after step {step}")
    if not _both(lambda: ours.advance(step), lambda: expected.advance(step)):
        return False
    assert ours.scheduler is not None and expected.scheduler is not None
    compare_groups(ours.optimizer, expected.optimizer, f"after step {step}")
    last, other_last = ours.scheduler.get_last_lr(), expected.scheduler.get_last_lr()
    assert all(bool(torch.as_tensor(one == other).all()) for one, other in zip(last, other_last, strict=True))
    return True


def _schedule(index: int, lr: str, foreach: bool | None) -> int:
    """Train, in the middle go on in new objects from state dicts; return the number of steps that torch lets us do."""
    ours, expected = _sides(lr, foreach)
    if not _both(lambda: ours.schedule(CASES[index]), lambda: expected.schedule(CASES[index])):
        return 0
    compare_groups(ours.optimizer, expected.optimizer, "before any step")
    seen = set()
    for step in range(NUM_STEPS):
        seen.add(float(ours.optimizer.param_groups[1]["lr"]))
        if step == NUM_STEPS // 2:
            resumed, resumed_expected = _sides(lr, foreach)
            for new, old in ((resumed, ours), (resumed_expected, expected)):
                new.schedule(CASES[index])
                new.resume_from(old)
            ours, expected = resumed, resumed_expected
            compare_groups(ours.optimizer, expected.optimizer, "after resuming")
        if not _step(ours, expected, step):
            return step
    assert len(seen) > 1, "a scheduler that moves nothing shows nothing"
    return NUM_STEPS


@pytest.mark.parametrize("index", range(len(CASES)), ids=[case.name for case in CASES])
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_scheduler_moves_it_as_it_moves_adamax_and_resumes(ranks: Pool, world_size: int, index: int) -> None:
    assert ranks.run(world_size, _schedule, index, "number", None) == [NUM_STEPS] * world_size


@pytest.mark.parametrize("index", range(len(CASES)), ids=[case.name for case in CASES])
@pytest.mark.parametrize("lr", ["0-d tensor", "1-element tensor"])
def test_a_scheduler_moves_a_tensor_lr_as_in_adamax_or_is_refused_as_there(ranks: Pool, lr: str, index: int) -> None:
    steps = ranks.run(2, _schedule, index, lr, None)
    assert len(set(steps)) == 1
    assert steps[0] == NUM_STEPS or lr == "1-element tensor", "torch moves 0-d tensors with all of its schedulers"


@pytest.mark.parametrize("foreach", [True, False, None])
@pytest.mark.parametrize("lr", LRS)
def test_a_tensor_lr_gives_the_bits_of_adamax_with_the_same_foreach(ranks: Pool, lr: str, foreach: bool | None) -> None:
    """The loop divides the lr in its own dtype, fp64 or fp32; foreach divides Python floats."""
    step_lr = next(index for index, case in enumerate(CASES) if case.scheduler is lrs.StepLR)
    assert ranks.run(3, _schedule, step_lr, lr, foreach)[0] == NUM_STEPS


def _edit_in_place() -> None:
    """The user's own schedule: fills the tensor that the group holds."""
    ours, expected = _sides("0-d tensor", True)
    tensors: list[list[Tensor]] = [[g["lr"] for g in side.optimizer.param_groups] for side in (ours, expected)]
    for side in (ours, expected):
        side.schedule(CASES[0])
    for step in range(4):
        for lr in chain(*tensors):
            lr.fill_(0.1 / (step + 1))
        _step(ours, expected, step)


def test_a_tensor_lr_that_is_changed_in_place_counts(ranks: Pool) -> None:
    ranks.run(2, _edit_in_place)
