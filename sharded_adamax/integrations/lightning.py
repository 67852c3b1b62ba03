"""Lightning Fabric and Trainer without DistributedDataParallel: the optimizer reduces the gradients.

With DistributedDataParallel (``strategy="ddp"`` and ``reduce_gradients=False``) nothing of this is needed: Lightning
calls `ShardedAdamax.consolidate_state_dict` by itself before it saves.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import lightning.pytorch
from lightning.fabric.strategies.ddp import DDPStrategy as FabricDDPStrategy
from lightning.fabric.strategies.strategy import _BackwardSyncControl
from lightning.pytorch.strategies.ddp import DDPStrategy as TrainerDDPStrategy
from torch import Tensor, nn
from torch.optim import Optimizer

from sharded_adamax.optimizer import ShardedAdamax
from sharded_adamax.wrappers import unwrapped


def _reducing(optimizer: Optimizer) -> ShardedAdamax:
    """Return the ShardedAdamax inside Lightning's wrapper; with any other optimizer nobody would reduce gradients."""
    inner = unwrapped(optimizer)
    if not isinstance(inner, ShardedAdamax) or not inner.reduces_gradients:
        raise TypeError(
            "this strategy leaves the reduction of gradients to the optimizer: expected ShardedAdamax with "
            f'reduce_gradients=True, got {type(inner).__name__}. Otherwise use strategy="ddp"'
        )
    return inner


def _no_sync(optimizers: Iterable[Optimizer]) -> ExitStack:
    with ExitStack() as stack:
        for optimizer in optimizers:
            stack.enter_context(_reducing(optimizer).no_sync())
        return stack.pop_all()


def _clip_norm(optimizer: Optimizer, clip_val: float) -> None:
    _reducing(optimizer).clip_grad_norm_(clip_val)


def _refuse_to_clip_values(optimizer: Optimizer, clip_val: float) -> None:
    raise NotImplementedError("gradients cannot be clipped by value while they are sharded: clip their norm")


class FabricStrategy(FabricDDPStrategy):
    """Fabric's DDPStrategy without DistributedDataParallel: gradients are sharded, too, and reduced during backward.

    ``fabric.clip_gradients(module, optimizer, max_norm=...)`` and ``fabric.no_backward_sync`` go to the optimizer;
    clipping by value is refused. Buffers (of batch norm, say) are not broadcast from rank 0 as DistributedDataParallel
    does.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._optimizers: list[Optimizer] = []
        self._backward_sync_control = _NoSync(self._optimizers)

    def setup_module(self, module: nn.Module) -> nn.Module:  # type: ignore[override]
        return module

    def setup_optimizer(self, optimizer: Optimizer) -> Optimizer:
        """Take an optimizer on.

        Raises:
            TypeError: It does not reduce gradients.
        """
        self._optimizers.append(_reducing(optimizer))
        return super().setup_optimizer(optimizer)

    def clip_gradients_norm(
        self,
        module: nn.Module,
        optimizer: Optimizer,
        max_norm: float,
        norm_type: float = 2.0,
        error_if_nonfinite: bool = True,
    ) -> Tensor:
        self.precision.unscale_gradients(optimizer)
        return _reducing(optimizer).clip_grad_norm_(max_norm, norm_type, error_if_nonfinite)

    def clip_gradients_value(self, module: nn.Module, optimizer: Optimizer, clip_val: float) -> None:
        _refuse_to_clip_values(optimizer, clip_val)


class _NoSync(_BackwardSyncControl):
    def __init__(self, optimizers: list[Optimizer]) -> None:
        self._optimizers = optimizers

    def no_backward_sync(self, module: nn.Module, enabled: bool) -> AbstractContextManager[Any]:
        return _no_sync(self._optimizers) if enabled else nullcontext()


class TrainerStrategy(TrainerDDPStrategy):
    """The Trainer's DDPStrategy without DistributedDataParallel: gradients are sharded, too, and reduced in backward.

    ``gradient_clip_val``, `LightningModule.clip_gradients` and the accumulation of gradients go to the optimizer;
    clipping by value is refused. Buffers (of batch norm, say) are not broadcast from rank 0 as DistributedDataParallel
    does.
    """

    def configure_ddp(self) -> None:
        """Leave the module as it is."""

    def setup_optimizers(self, trainer: lightning.pytorch.Trainer) -> None:
        """Build the optimizers.

        Raises:
            TypeError: One does not reduce gradients.
        """
        super().setup_optimizers(trainer)
        for optimizer in self.optimizers:
            _reducing(optimizer)
        # All of Lightning's clipping comes through these two, finds nothing in p.grad, and would do nothing.
        self.precision_plugin.clip_grad_by_norm = _clip_norm  # type: ignore[method-assign]
        self.precision_plugin.clip_grad_by_value = _refuse_to_clip_values  # type: ignore[method-assign]

    @contextmanager
    def block_backward_sync(self) -> Generator[None]:
        with _no_sync(self.optimizers):
            yield
