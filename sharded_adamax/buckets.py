"""The flat tensors of one bucket and their views. No communication.

[Note: who owns which memory]  The values of the parameters live in ``Bucket.flat_param``; each ``param.data`` is a
view of it (with a storage of its own, see `_with_its_own_storage`), so that an all-gather writes straight into the
tensors that the model uses. m and u exist only for the rank's own shard, and so does the master. Gradients have no home
here: a bucket-sized buffer exists from the moment a bucket is complete until it is reduced.

[Note: master]  With a master dtype, parameters of 16 bits are updated in a copy of more bits, and are that copy
rounded, bit for bit. So wherever a parameter is not its rounded master, somebody has written to the parameter since
(loaded a checkpoint, averaged weights, clamped some), and there the master takes the new value. No write can be
overlooked. Autograd's version counter tells more: if a write went through the parameter itself, as those of
`load_state_dict` do, and changed anything of it, the master takes all of it, so that the state after loading does not
depend on what was there before. Without a change (averaged weights swapped in and out) the digits that the parameter
does not show are kept; so are those of the elements that a write through ``param.data`` left alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import compress
from typing import NamedTuple

import torch
from torch import Tensor

from sharded_adamax.layout import ALIGNMENT_NUMEL, BucketLayout, Piece, dense_strides
from sharded_adamax.ranges import Range, dim_order, round_up
from sharded_adamax.streams import take_over

LOW_PRECISION = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Precision:
    """In which dtypes gradients travel and the update is computed."""

    reduce_dtype: torch.dtype | None = None  # None: the parameter's
    master_dtype: torch.dtype | None = None  # None: no master

    def on_wire(self, param_dtype: torch.dtype) -> torch.dtype:
        return self.reduce_dtype or param_dtype

    def of_update(self, param_dtype: torch.dtype) -> torch.dtype:
        """Return the dtype of m, u, the gradient shard and what is updated; a master is for 16 bits only."""
        return self.master_dtype if self.master_dtype and param_dtype in LOW_PRECISION else param_dtype


def part(flat: Tensor, elements: Range) -> Tensor:
    """Return some elements of a flat tensor, as a view."""
    return flat.narrow(0, elements.start, elements.numel)


def _with_its_own_storage(view: Tensor) -> Tensor:
    """Return the memory of a dense view as a tensor that shows no more of it. It keeps the whole alive.

    Programs tell by their storage which weights are one: safetensors takes the views of a bucket for one tensor and
    leaves out all but one of them, and torch.save writes the bucket for the sake of one view.
    """
    storage = view.untyped_storage()
    if storage.device.type == "meta":  # there is no memory
        return view
    start = view.storage_offset() * view.itemsize
    return view.new_empty(0).set_(storage[start : start + view.nbytes], 0, view.shape, view.stride())


class Identity(NamedTuple):
    """What must stay as it is for a parameter to be the view that the bucket knows."""

    data_ptr: int
    shape: torch.Size
    stride: tuple[int, ...]

    @classmethod
    def of(cls, param: Tensor) -> Identity:
        return cls(param.data_ptr(), param.shape, param.stride())


class Run(NamedTuple):
    """Neighbouring pieces of one shard that are updated as one tensor."""

    in_shard: Range
    step: float | Tensor  # of all of them; capturable: 0-d, on the device


class Bucket:
    """The parameters of one bucket, flat, with this rank's shard of them and of the state."""

    layout: BucketLayout
    params: list[Tensor]  # one per slot
    pieces: list[Piece]  # one per slot: what this rank owns of it
    flat_param: Tensor  # (numel,)
    param_shard: Tensor  # (shard_numel,), view of flat_param
    master: Tensor | None  # (shard_numel,) in the dtype of the update; see [Note: master]
    exp_avg: Tensor  # (shard_numel,), m, in the dtype of the update
    exp_inf: Tensor  # (shard_numel,), u, in the dtype of the update
    steps: Tensor  # (num_slots,): updates each parameter has seen, the same on all ranks
    step_views: list[Tensor]  # one per slot, 0-d, views of steps
    capturable: bool  # steps are on the device, else on the CPU

    def __init__(
        self,
        layout: BucketLayout,
        params: Sequence[Tensor],
        rank: int,
        precision: Precision,
        *,
        capturable: bool = False,
    ) -> None:
        """Copy ``params`` into a new flat tensor and make each a view of it. Modifies ``params``: their ``data``."""
        self.layout = layout
        self.params = list(params)
        self.pieces = layout.pieces(rank)
        self.wire_dtype = precision.on_wire(layout.dtype)
        self.flat_param = self.params[0].detach().new_zeros(layout.numel)
        self.param_shard = part(self.flat_param, layout.shard(rank))
        update_dtype = precision.of_update(layout.dtype)
        self.exp_avg = torch.zeros_like(self.param_shard, dtype=update_dtype)
        self.exp_inf = torch.zeros_like(self.param_shard, dtype=update_dtype)
        self.master = None if update_dtype == layout.dtype else torch.zeros_like(self.exp_avg)
        # torch keeps step in the default dtype where that is float64, and in float32 otherwise.
        step_dtype = torch.float64 if torch.get_default_dtype() is torch.float64 else torch.float32
        new_zeros = self.flat_param.new_zeros if capturable else torch.zeros
        self.steps = new_zeros(len(layout.slots), dtype=step_dtype)
        self.step_views = list(self.steps.unbind())
        self.capturable = capturable
        self._adopt_params()
        self.note_versions()
        self._identities = [Identity.of(param) for param in self.params]

    def _adopt_params(self) -> None:
        # One at a time: the old tensor is freed as soon as its values are in the bucket.
        for slot, param in zip(self.layout.slots, self.params, strict=True):
            view = self.flat_param.as_strided(param.shape, dense_strides(param), slot.start)
            view.copy_(param.detach())
            take_over([param])
            param.data = _with_its_own_storage(view)

    def count_update(self, used: Sequence[bool]) -> None:
        """Add one to the steps of the used slots."""
        if all(used):
            self.steps.add_(1)
        elif self.capturable:
            # Not the mask below: it would be copied from the host, which a graph cannot hold.
            torch._foreach_add_(list(compress(self.step_views, used)), 1)
        else:
            self.steps.add_(torch.tensor(used, dtype=self.steps.dtype))

    def runs(self, slots: Sequence[int], longest_gap: int) -> list[Run]:
        """Return what is to be updated of ``slots``, neighbours that are at the same step merged into one run.

        Steps on the device are the device's to know, and there every piece is a run of its own. The host could keep
        count beside it, but not for a graph: what was merged when the graph was captured would stay merged in every
        replay, also after a step in which only one of two parameters had a gradient.

        Args:
            slots: In ascending order. Without elements in this shard they give nothing.
            longest_gap: Elements of padding between two pieces over which they may be merged; -1: merge nothing. Where
                it is positive, a run ends with its padding, at a multiple of 64 elements: vector loads stay whole.

        Example: slots of 100, 20 and 70 elements start at 0, 128 and 192. With a gap of 63 they are one run [0, 320),
        of which [100, 128), [148, 192) and [262, 320) is padding.
        """
        found: list[Run] = []
        steps: Sequence[float | Tensor] = self.step_views if self.capturable else self.steps.tolist()
        start = stop = 0
        step = None
        for slot in slots:
            piece = self.pieces[slot].in_shard
            if piece.start == piece.stop:
                continue
            if self.capturable or step != steps[slot] or piece.start - stop > longest_gap:
                if step is not None:
                    found.append(Run(Range(start, stop), step))
                start, step = piece.start, steps[slot]
            stop = round_up(piece.stop, ALIGNMENT_NUMEL) if longest_gap > 0 else piece.stop
        if step is not None:
            found.append(Run(Range(start, stop), step))
        return found

    @property
    def target(self) -> Tensor:
        """Return what an update changes, shape (shard_numel,): the master, or the parameters where there is none."""
        return self.param_shard if self.master is None else self.master

    def refresh_master(self) -> None:
        """Take over what was written to the parameters since the last update. See [Note: master]."""
        if self.master is None:
            return
        rounded = self.master.to(self.layout.dtype)
        # Bits, because NaN is not equal to itself and 0 is equal to -0.
        written = rounded.view(torch.int16) != self.param_shard.view(torch.int16)
        for index, (param, piece) in enumerate(zip(self.params, self.pieces, strict=True)):
            if param._version != self._versions[index]:
                self._versions[index] = param._version
                of_param = part(written, piece.in_shard)
                of_param |= of_param.any()
        self.master.copy_(torch.where(written, self.param_shard, self.master))

    def note_versions(self) -> None:
        """Take writes to the parameters up to now as this optimizer's own."""
        self._versions = [] if self.master is None else [param._version for param in self.params]

    def moved_params(self) -> list[int]:
        """Return the slots whose parameter is no longer the view that was given to it, by ``param.data = ...`` say."""
        # Field by field: an Identity for each parameter at each step would be a third of the step of tiny parameters.
        return [
            index
            for index, (param, (data_ptr, shape, stride)) in enumerate(zip(self.params, self._identities, strict=True))
            if param.data_ptr() != data_ptr or param.shape != shape or param.stride() != stride
        ]

    def collect_gradients(self) -> Tensor:
        """Move the gradients into one new flat buffer, zeros where there is none.

        Every ``param.grad`` that is taken is set to None. A sparse one, or one of another shape, stays and counts as
        none: `step` will complain of it on all ranks together, which cannot be done in the middle of backward.

        Returns:
            Shape (numel,), the dtype of the wire.
        """
        buffer = torch.empty_like(self.flat_param, dtype=self.wire_dtype)
        views, gradients = [], []
        written = 0
        for slot, param, identity in zip(self.layout.slots, self.params, self._identities, strict=True):
            gradient = param.grad
            if gradient is None or gradient.is_sparse or gradient.shape != identity.shape:
                continue
            part(buffer, Range(written, slot.start)).zero_()
            views.append(buffer.as_strided(identity.shape, identity.stride, slot.start))
            gradients.append(gradient.detach())
            written = slot.in_bucket.stop
            param.grad = None
        part(buffer, Range(written, self.layout.numel)).zero_()
        if views:
            torch._foreach_copy_(views, gradients)
        return buffer

    def mean_shard(self, total: Tensor, num_ranks: int) -> Tensor:
        """Return the mean gradient from the sum over the ranks, rounded once, to the dtype of the update.

        Args:
            total: Shape (shard_numel,), the dtype of the wire; consumed.
        """
        # Divided in the wider of both: a sum of 16-bit gradients must not lose digits on the way into a master.
        wide = torch.promote_types(total.dtype, self.exp_avg.dtype)
        return total.to(wide).div_(num_ranks).to(self.exp_avg.dtype)

    def collect_gradient_shard(self, used: Sequence[bool]) -> Tensor:
        """Copy this rank's part of gradients that are already reduced; ``param.grad`` stays.

        Args:
            used: For each slot, whether it has a gradient.

        Returns:
            Shape (shard_numel,), the dtype of the update; zeros where there is no gradient.
        """
        shard = torch.zeros_like(self.exp_avg)
        for piece, param, has_gradient in zip(self.pieces, self.params, used, strict=True):
            if has_gradient and piece.in_param.numel:
                assert param.grad is not None
                in_memory = param.grad.permute(dim_order(param.stride())).reshape(-1)
                part(shard, piece.in_shard).copy_(part(in_memory, piece.in_param))
        return shard
