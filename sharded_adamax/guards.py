"""Steps that are better not taken.

Adamax does not forget: one Inf in a gradient makes a parameter NaN for ever, and one huge gradient stands in
``exp_inf`` for thousands of steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sharded_adamax import agreement
from sharded_adamax.collectives import ControlPlane


@dataclass
class Guards:
    """When all ranks skip a step together. Each makes the host wait for the device once per step."""

    skip_nonfinite: bool
    skip_norm_above: float | None = None

    def set_norm_limit(self, limit: float | None) -> None:
        """Change the limit.

        Raises:
            ValueError: No norm could be below it.
        """
        if limit is not None and not limit > 0:
            raise ValueError(f"expected skip_grad_norm_above to be None or > 0, got {limit}")
        self.skip_norm_above = limit

    def line(self) -> str:
        """Describe what may change between steps, for comparison between ranks."""
        return f"skip_grad_norm_above={self.skip_norm_above}"

    def refuse_nonfinite(self, control: ControlPlane, shards: Sequence[Tensor], step: int) -> bool:
        """Return whether to skip because of an Inf or NaN in the mean gradient of any rank's shard. Collective."""
        if not self.skip_nonfinite:
            return False
        found = bool(shards) and not bool(torch.stack([shard.isfinite().all() for shard in shards]).all())
        vote = agreement.start_vote(control, any_rank={"found": agreement.flags([found])}, same={})
        with control.traffic.waiting("vote", "vote on Inf and NaN"):
            outcome = vote.wait(f"the vote on Inf and NaN of step {step}")
        return bool(outcome.any_rank["found"].any())

    def refuse_norm(self, norm: Tensor) -> bool:
        """Return whether to skip because of the L2 norm of the whole gradient, which all ranks hold to the last bit."""
        # Not "norm > limit": a norm of NaN is to be skipped, too.
        return self.skip_norm_above is not None and not bool(norm <= self.skip_norm_above)
