"""The flat tensors of one bucket and their views. No communication.

[Note: who owns which memory]  The values of the parameters live in ``Bucket.flat_param``; each ``param.data`` is a
view of it, so that an all-gather writes straight into the tensors that the model uses. m and u exist only for the
rank's own shard. Gradients have no home here: a bucket-sized buffer exists from the moment a bucket is complete until
it is reduced.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sharded_adamax.layout import BucketLayout, Piece


class Identity(NamedTuple):
    """What must stay as it is for a parameter to be the view that the bucket knows."""

    data_ptr: int
    shape: torch.Size
    stride: tuple[int, ...]

    @classmethod
    def of(cls, param: Tensor) -> Identity:
        return cls(param.data_ptr(), param.shape, param.stride())


class Bucket:
    """The parameters of one bucket, flat, with this rank's shard of them and of the state."""

    layout: BucketLayout
    params: list[Tensor]  # one per slot
    pieces: list[Piece]  # one per slot: what this rank owns of it
    flat_param: Tensor  # (numel,)
    param_shard: Tensor  # (shard_numel,), view of flat_param
    exp_avg: Tensor  # (shard_numel,), m
    exp_inf: Tensor  # (shard_numel,), u
    steps: Tensor  # (num_slots,) on the CPU: updates each parameter has seen, the same on all ranks

    def __init__(self, layout: BucketLayout, params: Sequence[Tensor], rank: int) -> None:
        """Copy ``params`` into a new flat tensor and make each a view of it. Modifies ``params``: their ``data``."""
        self.layout = layout
        self.params = list(params)
        self.pieces = layout.pieces(rank)
        device = self.params[0].device
        self.flat_param = torch.zeros(layout.numel, dtype=layout.dtype, device=device)
        self.param_shard = self.flat_param[layout.shard(rank).as_slice()]
        self.exp_avg = torch.zeros_like(self.param_shard)
        self.exp_inf = torch.zeros_like(self.param_shard)
        # torch keeps step in the default dtype where that is float64, and in float32 otherwise.
        step_dtype = torch.float64 if torch.get_default_dtype() is torch.float64 else torch.float32
        self.steps = torch.zeros(len(layout.slots), dtype=step_dtype)
        self._adopt_params()
        self._identities = [Identity.of(param) for param in self.params]

    def _adopt_params(self) -> None:
        # One at a time: the old tensor is freed as soon as its values are in the bucket.
        for slot, param in zip(self.layout.slots, self.params, strict=True):
            view = self.flat_param[slot.in_bucket.as_slice()].view(param.shape)
            view.copy_(param.data)
            param.data = view

    def moved_params(self) -> list[int]:
        """Return the slots whose parameter is no longer the view that was given to it, by ``param.data = ...`` say."""
        return [
            index
            for index, (param, identity) in enumerate(zip(self.params, self._identities, strict=True))
            if Identity.of(param) != identity
        ]

    def collect_gradients(self) -> Tensor:
        """Move the gradients into one new flat buffer, zeros where there is none.

        Every ``param.grad`` that is taken is set to None. A sparse one, or one of another shape, stays and counts as
        none: `step` will complain of it on all ranks together, which cannot be done in the middle of backward.

        Returns:
            Shape (numel,), the dtype of the bucket.
        """
        buffer = torch.empty_like(self.flat_param)
        views, gradients = [], []
        written = 0
        for slot, param, identity in zip(self.layout.slots, self.params, self._identities, strict=True):
            gradient = param.grad
            if gradient is None or gradient.is_sparse or gradient.shape != identity.shape:
                continue
            buffer[written : slot.start].zero_()
            views.append(buffer[slot.in_bucket.as_slice()].view(identity.shape))
            gradients.append(gradient.detach())
            written = slot.in_bucket.stop
            param.grad = None
        buffer[written:].zero_()
        if views:
            torch._foreach_copy_(views, gradients)
        return buffer

    def collect_gradient_shard(self, used: Sequence[bool]) -> Tensor:
        """Copy this rank's part of gradients that are already reduced; ``param.grad`` stays.

        Args:
            used: For each slot, whether it has a gradient.

        Returns:
            Shape (shard_numel,), the dtype of the bucket; zeros where there is no gradient.
        """
        shard = torch.zeros_like(self.param_shard)
        for piece, param, has_gradient in zip(self.pieces, self.params, used, strict=True):
            if has_gradient and piece.in_param.numel:
                assert param.grad is not None
                shard[piece.in_shard.as_slice()].copy_(param.grad.reshape(-1)[piece.in_param.as_slice()])
        return shard
