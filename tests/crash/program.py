"""The job that is killed, and the run that nobody interrupts, which says what it must arrive at.

Gradients are known beforehand but for a factor from torch's random number generator, so a resume arrives at the same
bits only if parameters, state, learning rate and generators are all those of the checkpoint.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ExponentialLR

from sharded_adamax import CheckpointManager, ShardedAdamax
from tests.distributed.problems import backward, gradient

SHAPES: list[tuple[int, ...]] = [(5, 13), (7,), (), (65, 2)]
LEARNING_RATE = 1e-2
DECAY = 0.999


class Small(nn.Module):
    """A few parameters and a buffer."""

    seen: Tensor  # (), steps

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        for index, shape in enumerate(SHAPES):
            self.register_parameter(f"p{index}", nn.Parameter(torch.randn(shape, generator=generator)))
        self.register_buffer("seen", torch.zeros(()))


def rank_and_world_size() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def full_digest(model: nn.Module, state: dict[str, Any], learning_rate: float | Tensor) -> str:
    """Return one digest of everything that training has changed."""
    digest = hashlib.sha256(repr(learning_rate).encode())
    tensors = [*model.state_dict().values()]
    for index in sorted(state["state"]):
        tensors += [state["state"][index][key] for key in ("step", "exp_avg", "exp_inf")]
    for tensor in tensors:
        digest.update(tensor.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()


class Job:
    """Model, optimizer and scheduler of one life."""

    def __init__(self, *, seed: int = 0) -> None:
        self.model = Small(seed)
        self.optimizer = ShardedAdamax(self.model.named_parameters(), lr=LEARNING_RATE, bucket_mib=0.0005)
        self.scheduler = ExponentialLR(self.optimizer, DECAY)
        self.step = 0
        self.rank, self.world_size = rank_and_world_size()

    def train(self, num_steps: int) -> None:
        for _ in range(num_steps):
            params = list(self.model.parameters())
            factor = 1 + torch.rand(())
            backward(params, [gradient(self.step, self.rank, i, p) * factor for i, p in enumerate(params)])
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.scheduler.step()
            self.model.seen += 1
            self.step += 1

    def save(self, manager: CheckpointManager) -> None:
        manager.save(self.step, self.model, self.optimizer, extra=self.extra())

    def extra(self) -> dict[str, Any]:
        return {"step": self.step, "scheduler": self.scheduler.state_dict(), "position": torch.arange(self.step % 50)}

    def restore(self, manager: CheckpointManager, step: int | None = None) -> int | None:
        """Take over a checkpoint, the newest if not told; return its step, None if there is none."""
        restored = manager.restore(self.model, self.optimizer, step)
        if restored is None:
            return None
        self.step, extra = restored
        assert extra["step"] == self.step, (extra, self.step)
        assert torch.equal(extra["position"], torch.arange(self.step % 50))
        self.scheduler.load_state_dict(extra["scheduler"])
        return self.step

    def digest(self) -> str | None:
        """Return the digest on the first rank, None elsewhere. Collective."""
        full = self.optimizer.full_state_dict()
        return None if full is None else full_digest(self.model, full, self.scheduler.get_last_lr()[0])

    def digest_of_model(self) -> str:
        """Return a digest that all ranks can make."""
        return full_digest(self.model, {"state": {}}, self.scheduler.get_last_lr()[0])


class Uninterrupted:
    """torch.optim.Adamax in one process on the mean of the gradients of ``world_size`` ranks."""

    def __init__(self, world_size: int) -> None:
        self._generators = [torch.Generator().manual_seed(1000 + rank) for rank in range(world_size)]
        self._model = Small()
        self._optimizer: Optimizer = torch.optim.Adamax(self._model.parameters(), lr=LEARNING_RATE, foreach=False)
        self._scheduler = ExponentialLR(self._optimizer, DECAY)
        self._digests: list[str] = []
        self._model_digests: list[str] = []
        self._note()

    def digest(self, step: int) -> str:
        self._go_to(step)
        return self._digests[step]

    def digest_of_model(self, step: int) -> str:
        self._go_to(step)
        return self._model_digests[step]

    def _go_to(self, step: int) -> None:
        while len(self._digests) <= step:
            self._train()
            self._note()

    def _train(self) -> None:
        step = len(self._digests) - 1
        factors = [1 + torch.rand((), generator=generator) for generator in self._generators]
        for index, param in enumerate(self._model.parameters()):
            param.grad = sum_in_rank_order(gradient(step, r, index, param) * f for r, f in enumerate(factors))
            param.grad /= len(factors)
        self._optimizer.step()
        self._scheduler.step()
        self._model.seen += 1

    def _note(self) -> None:
        rate = self._scheduler.get_last_lr()[0]
        state = self._optimizer.state_dict()
        self._digests.append(full_digest(self._model, state, rate) if state["state"] else "nothing trained")
        self._model_digests.append(full_digest(self._model, {"state": {}}, rate))


def sum_in_rank_order(terms: Iterable[Tensor]) -> Tensor:
    total, *rest = terms
    for term in rest:
        total = total + term
    return total


def strangers(root: Path) -> list[str]:
    """Return what is in a manager's directory beside whole checkpoints and the manager's own two files."""
    return sorted(
        path.name for path in root.iterdir() if not path.name.isdigit() and path.name not in ("latest", ".lock")
    )
