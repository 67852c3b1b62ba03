"""What a plan says of one rank."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Footprint:
    """What one rank holds at the moment when it holds most, and what it sends in a step. All in bytes."""

    parameters: int  # that are trained; with the padding of the buckets they live in
    frozen: int  # other parameters, and the buffers of the model
    state: int  # exp_avg and exp_inf
    masters: int
    gradients: int  # in p.grad, at the peak
    gradient_shards: int  # reduced, waiting for the update, at the peak
    buckets: int  # in flight, at the peak: what is sent and what is received
    temporaries: int  # at the peak
    peak_at: str  # where in a step that is
    sent_per_step: int
    gradient_shards_peak: int = 0  # the most of each at any moment, as `ShardedAdamax.held_bytes` counts them
    buckets_peak: int = 0

    @property
    def steady(self) -> int:
        """Bytes between two steps."""
        return self.parameters + self.frozen + self.state + self.masters

    @property
    def peak(self) -> int:
        """The most bytes at one moment."""
        return self.steady + self.gradients + self.gradient_shards + self.buckets + self.temporaries
