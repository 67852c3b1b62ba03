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

    @property
    def reduces_gradients(self) -> bool:
        """Whether this optimizer averages the gradients over the ranks, or something else has to."""
        return self._get_engine().settings.reduce_gradients

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

        Waits for the device, once. `step` computes nothing for them.

        Returns:
            ``skipped_steps`` so far; ``grad_norm`` where `grad_norm` is not None; ``shard_exp_inf_max``, the largest
            element of exp_inf that this rank owns; ``host_wait_seconds``, exposed communication: how long this host
            waited for other ranks, from the end of the step before to the end of the last one, and the same for
            ``reduce_scatter``, ``vote``, ``all_gather`` and ``all_reduce``. Over NCCL the device waits and the host
            does not: look at the ranges ``sharded_adamax::...`` in a profile.

        Example:
            >>> wandb.log(optimizer.metrics())
            >>> writer.add_scalars("optimizer", optimizer.metrics(), step)
        """
        return metrics.of_rank(self._get_engine())

    def metrics_of_all_ranks(self) -> dict[str, float]:
        """Return figures of the last step over all ranks. Collective: call it on all, also if only one logs.

        Waits for the device, once.

        Returns:
            The same on all ranks: ``skipped_steps``; ``grad_norm`` as in `metrics`; ``exp_inf_max``; and of the hosts'
            ``host_wait_seconds`` the ``_min`` and ``_max``. Others wait for a rank that hardly waits itself.
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
