"""One step: vote, reduce, update, gather. Owns all mutable state of the optimizer but its parameter groups.

[Note: phases of a step]

::

    backward   bucket complete -> reduce_scatter (async)            reduction.py
    step       vote of all ranks (async), flush, read the vote      agreement.py
               for bucket k: wait reduce k -> kernel -> launch all_gather k
               wait for the all-gathers, or leave that to the forward   gathering.py

The ranks decide together before the first parameter is touched: a step is taken by all of them or by none.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, compress, islice
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sharded_adamax import clipping
from sharded_adamax import layout as layouts
from sharded_adamax.buckets import Bucket, Precision, part
from sharded_adamax.collectives import ControlPlane, Group
from sharded_adamax.gathering import OverlappedGathering, ParameterGathering
from sharded_adamax.gradients import GradientSource, ReducedGradients
from sharded_adamax.guards import Guards
from sharded_adamax.kernels import Hyper, capture_problem, choose, folded, longest_merged_gap, prepare
from sharded_adamax.late import await_in_forward
from sharded_adamax.layout import Layout, ParamSpec
from sharded_adamax.logs import log_for_all
from sharded_adamax.members import Member, ParamGroup, hyper_lines
from sharded_adamax.pending import LostRankError
from sharded_adamax.reduction import BackwardReduction
from sharded_adamax.state import MASTER_KEY, STATE_KEYS, FlatShard
from sharded_adamax.voting import RoundError, StepVote

logger = logging.getLogger(__name__)


class HeldBytes(NamedTuple):
    """Bytes this rank holds, counted from its live tensors. The peaks are since construction."""

    parameters: int
    gradient_shards_peak: int
    state: int  # exp_avg and exp_inf
    buckets_peak: int
    masters: int


@dataclass(frozen=True)
class Settings:
    """What the user chose for the whole optimizer, the same on all ranks."""

    reduce_gradients: bool
    bucket_bytes: int
    skip_nonfinite: bool
    precision: Precision
    fused: bool = False  # a wish, of this rank: the numbers do not depend on it
    capturable: bool = False  # see [Note: capturable] in kernels/captured.py


class Engine:
    """The buckets of a job and what moves through them."""

    def __init__(self, control: ControlPlane, group: Group, settings: Settings) -> None:
        self.control = control
        self.group = group
        self.settings = settings
        self.guards = Guards(settings.skip_nonfinite)
        self.source: GradientSource = BackwardReduction(group) if settings.reduce_gradients else ReducedGradients(group)
        self.gathering: ParameterGathering = ParameterGathering(group)
        self.layout = Layout(group.size, (), ())
        self.members: list[Member] = []  # in the order of layout.specs
        self.buckets: list[Bucket] = []
        self.frozen: list[Member] = []  # have no bucket and no state until they get a gradient
        self.num_skipped_steps = 0
        self.grad_norm: Tensor | None = None  # of the last step, where it was computed
        self.waited_seconds: dict[str, float] = {}  # by this host for other ranks, from the step before to the last one
        # Of the gradients as they were reduced, before they were clipped: by round and norm type.
        self._norms: dict[tuple[int, float], Tensor] = {}

    def extend(self, members: Sequence[Member], state: dict[Tensor, Any]) -> None:
        """Lay out, broadcast from the first rank and give state to more parameters. Collective.

        Args:
            members: The same on all ranks; the caller has compared them.
            state: The optimizer's; gets ``step``, ``exp_avg`` and ``exp_inf`` of each parameter, and ``master_param``
                where there is one.
        """
        offset = len(self.members)
        specs = [ParamSpec.of(m.name, m.param) for m in members]
        new = layouts.build(specs, world_size=self.group.size, bucket_bytes=self.settings.bucket_bytes)
        self.layout = self.layout.extended(new)
        self.members += members
        for bucket_layout in self.layout.buckets[len(self.buckets) :]:
            owners = [members[slot.param - offset] for slot in bucket_layout.slots]
            bucket = Bucket(
                bucket_layout,
                [m.param for m in owners],
                self.group.rank,
                self.settings.precision,
                capturable=self.settings.capturable,
            )
            self.group.broadcast(bucket.flat_param)
            bucket.refresh_master()
            self.buckets.append(bucket)
            self.source.add(bucket, [m.name for m in owners])
            for piece, param in zip(bucket.pieces, bucket.params, strict=True):
                spec = self.layout.specs[piece.param]
                state[param] = {"step": bucket.step_views[piece.slot]}
                for key, flat in sharded_state(bucket).items():
                    local = part(flat, piece.in_shard)
                    state[param][key] = FlatShard(local, spec.shape, piece.in_param, spec.dim_order)

    def prepare_kernels(self, groups: list[ParamGroup]) -> None:
        """Compile what ``fused=True`` needs, so that the first step does not have to. Local."""
        if self.settings.fused:
            for bucket in self.buckets:
                for index in sorted({self.members[piece.param].group_index for piece in bucket.pieces}):
                    prepare(bucket.exp_avg.dtype, bucket.exp_avg.device, Hyper.of(groups[index]))

    def overlap_forward(self, model: nn.Module) -> None:
        """Leave it to the modules of ``model`` to wait for the all-gathers of a step. Local."""
        of_model = {id(param) for param in model.parameters()}
        if not any(id(member.param) in of_model for member in (*self.members, *self.frozen)):
            raise ValueError("expected a model that uses parameters of this optimizer, got one that has none of them")
        await_in_forward(model)
        if not isinstance(self.gathering, OverlappedGathering):
            self.gathering = OverlappedGathering(self.group)

    @torch.no_grad()
    def step(self, groups: list[ParamGroup], state: dict[Tensor, Any]) -> None:
        """Take one step, all ranks together or none. Collective.

        Raises:
            RuntimeError: On every rank: a parameter was moved, gradients or hyper-parameters differ between ranks, a
                sparse gradient. Nothing was changed and the gradients are dropped.
        """
        hypers = [Hyper.of(group) for group in groups]
        used = self.reduce(groups, state)
        refusal = self._refusal(used)
        if refusal is not None:
            self.num_skipped_steps += 1
            log_for_all(logger, self.group.rank, logging.WARNING, "step %d is skipped: %s", self.source.step, refusal)
        else:
            for index in self.gathering.sequence(len(self.buckets)):
                self._update(index, used[index], groups, hypers)
            self.gathering.complete()
        self.grad_norm = self._norms.get((self.source.num_rounds, 2.0))
        self._forget_gradients()
        self.waited_seconds = {**self.group.traffic.take_waited_seconds(), **self.control.traffic.take_waited_seconds()}
        self.source.step += 1

    def _refusal(self, used: list[list[bool]]) -> str | None:
        """Return why all ranks skip this step; None: they take it. Collective."""
        guards = self.guards
        if guards.skip_nonfinite and guards.refuse_nonfinite(self.control, self._shards(), self.source.step):
            return "the mean gradient has Inf or NaN"
        if guards.skip_norm_above is not None and guards.refuse_norm(self._norm(used, 2.0)):
            return f"the norm of the mean gradient is above {guards.skip_norm_above}, or NaN"
        return None

    def _shards(self) -> list[Tensor]:
        return [self.source.shard(index) for index in range(len(self.buckets))]

    def _norm(self, used: list[list[bool]], norm_type: float) -> Tensor:
        """Return the norm of the reduced gradients before they were clipped. Collective where it is not known yet."""
        key = (self.source.num_rounds, norm_type)
        if key not in self._norms:
            self._norms[key] = clipping.total_norm(self.group, self.buckets, self._shards(), used, norm_type)
        return self._norms[key]

    @torch.no_grad()
    def reduce(self, groups: list[ParamGroup], state: dict[Tensor, Any]) -> list[list[bool]]:
        """Bring all gradients of all ranks into the shards. Collective; may be called several times before a step.

        Returns:
            For each bucket, which slots have a gradient on any rank.

        Raises:
            RuntimeError: As `step`.
        """
        flags = iter(self._agree_and_reduce(groups, state))
        return [list(islice(flags, len(bucket.params))) for bucket in self.buckets]

    @torch.no_grad()
    def clip_(
        self,
        groups: list[ParamGroup],
        state: dict[Tensor, Any],
        max_norm: float,
        norm_type: float,
        error_if_nonfinite: bool,
    ) -> Tensor:
        """Scale all gradients so that their norm is at most ``max_norm``; returns the norm before. Collective."""
        used = self.reduce(groups, state)
        self._norms.pop((self.source.num_rounds, norm_type), None)  # before an earlier call clipped them
        norm = self._norm(used, norm_type)
        if error_if_nonfinite and not torch.isfinite(norm):
            raise RuntimeError(
                f"The total norm of order {norm_type} for gradients from `parameters` is non-finite, so it cannot be "
                "clipped. To disable this error and scale the gradients by the non-finite norm anyway, set "
                "`error_if_nonfinite=False`"
            )
        self.source.scale_(clipping.clip_coefficient(norm, max_norm))
        return norm

    @torch.no_grad()
    def unscale_(
        self,
        groups: list[ParamGroup],
        state: dict[Tensor, Any],
        inv_scale: Tensor,
        found_inf: Tensor,
        *,
        allow_fp16: bool,
    ) -> Tensor | None:
        """Multiply all gradients by ``inv_scale``, for a GradScaler. Collective.

        Returns:
            ``found_inf``, modified in place: 1 where any rank found Inf or NaN. None where no parameter has a gradient.

        Raises:
            ValueError: The gradients are float16, in torch's words. With a master they are not.
        """
        assert isinstance(self.source, BackwardReduction)
        used = self.reduce(groups, state)
        if not any(chain.from_iterable(used)):
            return None
        if not allow_fp16 and any(
            any(slots) and bucket.exp_avg.dtype == torch.float16
            for bucket, slots in zip(self.buckets, used, strict=True)
        ):
            raise ValueError("Attempting to unscale FP16 gradients.")
        self.source.unscale_(inv_scale, found_inf)
        self.group.all_reduce(found_inf, "max")
        self._norms.clear()
        return found_inf

    def discard(self, *, set_to_none: bool) -> None:
        """Forget the gradients since the last step. Collective where there are any."""
        self.source.discard(set_to_none=set_to_none)
        self._norms.clear()

    def _forget_gradients(self) -> None:
        self.source.drop()
        self._norms.clear()

    def refresh_masters(self) -> None:
        """Take over what was written to the parameters since the last step. Local."""
        for bucket in self.buckets:
            bucket.refresh_master()

    def _agree_and_reduce(self, groups: list[ParamGroup], state: dict[Tensor, Any]) -> list[bool]:
        """Hold the vote, launch all that is not launched, and return which slots have a gradient on any rank."""
        self.gathering.settle()
        # A parameter that was moved gets gradients that look wrong for other reasons, too: its problem comes first.
        problem = self._moved_problem() or self._capture_problem(groups)
        vote = StepVote(
            self.control,
            self.source,
            hypers=[*hyper_lines(groups), self.guards.line(), self.gathering.line()],
            frozen=self.frozen,
            names=self._names,
            problem=problem,
            order=self.gathering.wanted_order(),
        )
        try:
            if not self.source.must_agree_first:
                self.source.flush()
            decision = vote.wait()
            self.source.flush()
        except (RoundError, LostRankError):
            raise  # what is under way will never be over: there is nothing to wait for
        except RuntimeError:
            self._forget_gradients()
            raise
        self.gathering.order = decision.order
        for index, again in enumerate(decision.again):
            if again:
                self._norms.clear()
                self.source.launch_again(index)
        return decision.used + self._thaw(decision.frozen_used, state)

    def _thaw(self, frozen_used: list[bool], state: dict[Tensor, Any]) -> list[bool]:
        """Give a bucket and state to parameters that were frozen until now. Returns the used-flags of their slots."""
        thawed = [member for member, is_used in zip(self.frozen, frozen_used, strict=True) if is_used]
        if not thawed:
            return []
        self.frozen = [m for m, is_used in zip(self.frozen, frozen_used, strict=True) if not is_used]
        num_old = len(self.buckets)
        self.extend(thawed, state)
        self.source.flush()
        return [True for bucket in self.buckets[num_old:] for _ in bucket.params]

    def _update(self, index: int, used: list[bool], groups: list[ParamGroup], hypers: list[Hyper]) -> None:
        """Update this rank's shard of bucket ``index`` and launch its all-gather; nothing if no gradient went in."""
        bucket = self.buckets[index]
        gradient, grad_scale = self.source.take_shard(index)
        if not any(used):
            return
        bucket.refresh_master()
        bucket.count_update(used)
        by_group: dict[int, list[int]] = {}
        for slot, (piece, is_used) in enumerate(zip(bucket.pieces, used, strict=True)):
            if is_used:
                by_group.setdefault(self.members[piece.param].group_index, []).append(slot)
        with torch.profiler.record_function(f"sharded_adamax::update bucket {index}"):
            for group_index, slots in by_group.items():
                hyper = hypers[group_index]
                runs = bucket.runs(slots, longest_merged_gap(gradient.dtype, hyper.eps))
                if not runs:  # this rank owns nothing of these parameters; foreach wants at least one tensor
                    continue
                update_ = choose(
                    groups[group_index]["foreach"],
                    gradient.device,
                    dtype=gradient.dtype,
                    fused=self.settings.fused,
                    capturable=self.settings.capturable,
                )
                rounded = (
                    [part(bucket.param_shard, run.in_shard) for run in runs] if bucket.master is not None else None
                )
                folded(update_, grad_scale=grad_scale, rounded=rounded)(
                    [part(bucket.target, run.in_shard) for run in runs],
                    [part(gradient, run.in_shard) for run in runs],
                    [part(bucket.exp_avg, run.in_shard) for run in runs],
                    [part(bucket.exp_inf, run.in_shard) for run in runs],
                    [run.step for run in runs],
                    hyper,
                )
        # A backward through a graph from before this step fails in torch's words, as after any in-place update.
        torch.autograd.graph.increment_version(list(compress(bucket.params, used)))
        bucket.note_versions()
        self.gathering.updated(index, bucket, self.source.step)

    def _moved_problem(self) -> str | None:
        for bucket in self.buckets:
            for slot in bucket.moved_params():
                name = self.members[bucket.pieces[slot].param].name
                return (
                    f"rank {self.group.rank}: {name} is no longer the tensor that ShardedAdamax manages: its .data, "
                    "shape, dtype or device changed after the optimizer was built (model.to(...), param.data = ...). "
                    "Move and cast the model first, then build the optimizer; change values in place, with copy_. With "
                    "Hugging Face Accelerate, prepare the model before the optimizer is built; instead of its Trainer "
                    "use sharded_adamax.integrations.transformers.ShardedTrainer"
                )
        return None

    def _capture_problem(self, groups: list[ParamGroup]) -> str | None:
        if not self.buckets:
            return None
        return capture_problem(groups, self.buckets[0].flat_param.device, capturable=self.settings.capturable)

    def _names(self) -> list[str]:
        """Return the names of all parameters, in the order of the slots and then of the frozen ones."""
        slots = chain.from_iterable(bucket.layout.slots for bucket in self.buckets)
        return [member.name for member in (*(self.members[slot.param] for slot in slots), *self.frozen)]

    def held_bytes(self) -> HeldBytes:
        peaks = self.source.peaks
        return HeldBytes(
            parameters=sum(bucket.flat_param.nbytes for bucket in self.buckets),
            gradient_shards_peak=peaks.shard_bytes,
            state=sum(bucket.exp_avg.nbytes + bucket.exp_inf.nbytes for bucket in self.buckets),
            buckets_peak=peaks.bucket_bytes,
            masters=sum(bucket.master.nbytes for bucket in self.buckets if bucket.master is not None),
        )


def sharded_state(bucket: Bucket) -> dict[str, Tensor]:
    """Return what `optimizer.state` shows of a bucket, by its key there, each of shape (shard_numel,)."""
    state = dict(zip(STATE_KEYS, (bucket.exp_avg, bucket.exp_inf), strict=True))
    return state if bucket.master is None else {**state, MASTER_KEY: bucket.master}
