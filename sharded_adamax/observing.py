"""What can be seen of a `ShardedAdamax` at any time. Nothing here changes it."""

from __future__ import annotations

from torch import Tensor

from sharded_adamax import metrics
from sharded_adamax.engine import Engine, HeldBytes
from sharded_adamax.layout import Layout
from sharded_adamax.summary import Summary, summarize


class Observed:
    """The part of `ShardedAdamax` that is for looking at it."""

    _engine: Engine | None

    def _get_engine(self) -> Engine:
        if self._engine is None:
            raise RuntimeError("ShardedAdamax is not built: its constructor did not finish")
        return self._engine

    @property
    def layout(self) -> Layout:
        """Which rank owns what. Parameters that are frozen and never had a gradient are not in it."""
        return self._get_engine().layout

    def summary(self) -> Summary:
        """Return the buckets, who owns what of them, their bytes, and what a step sends. Local, the same on every rank.

        ``print(optimizer.summary())`` shows a table; ``optimizer.summary().draw("buckets.png")`` draws a picture.
        """
        settings = self._get_engine().settings
        return summarize(self.layout, settings.precision, reduce_gradients=settings.reduce_gradients)

    def held_bytes(self) -> HeldBytes:
        """Return the bytes that this rank holds, counted from live tensors."""
        return self._get_engine().held_bytes()

    def metrics(self) -> dict[str, float]:
        """Return figures of the last step, as this rank knows them, for W&B or TensorBoard. Local.

        Their names are explained in [Note: metrics] in metrics.py. Waits for the device, once.
        """
        return metrics.of_rank(self._get_engine())

    def metrics_of_all_ranks(self) -> dict[str, float]:
        """Return figures of the last step over all ranks: the largest exp_inf, and who waited least and most.

        Collective: call it on all ranks, also if only one logs. Waits for the device, once.
        """
        return metrics.of_all_ranks(self._get_engine())

    @property
    def skipped_steps(self) -> int:
        """Steps that ``skip_nonfinite`` and `skip_grad_norm_above` have skipped."""
        return self._get_engine().num_skipped_steps

    @property
    def grad_norm(self) -> Tensor | None:
        """L2 norm of the last step's mean gradient, 0-d, before it was clipped; also where the step was skipped.

        None where nothing computed it: `clip_grad_norm_` with norm_type 2 does, and `skip_grad_norm_above`. Reading it
        costs nothing.
        """
        return self._get_engine().grad_norm
