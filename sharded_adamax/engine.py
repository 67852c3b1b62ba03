"""One step: vote, reduce, update, gather. Owns all mutable state of the optimizer but its parameter groups.

[Note: phases of a step]

::

    backward   bucket complete -> reduce_scatter (async)            reduction.py
    step       vote of all ranks (async), flush, read the vote      agreement.py
               for bucket k: wait reduce k -> kernel -> launch all_gather k
               wait for the all-gathers                             gathering.py

The ranks decide together before the first parameter is touched: a step is taken by all of them or by none.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sharded_adamax import agreement, clipping
from sharded_adamax import layout as layouts
from sharded_adamax.buckets import Bucket
from sharded_adamax.collectives import ControlPlane, Group
from sharded_adamax.gathering import ParameterGathering
from sharded_adamax.kernels import Hyper, choose
from sharded_adamax.layout import Layout, ParamSpec
from sharded_adamax.reduction import BackwardReduction, GradientSource, LocalView, ReducedGradients
from sharded_adamax.state import FlatShard

ParamGroup = dict[str, Any]


class HeldBytes(NamedTuple):
    """Bytes this rank holds, counted from its live tensors. The peaks are since construction."""

    parameters: int
    gradient_shards_peak: int
    state: int
    buckets_peak: int


@dataclass(frozen=True)
class Member:
    """A parameter as the optimizer knows it."""

    param: Tensor
    name: str
    group_index: int


class Engine:
    """The buckets of a job and what moves through them."""

    def __init__(
        self,
        control: ControlPlane,
        group: Group,
        *,
        reduce_gradients: bool,
        bucket_bytes: int,
        skip_nonfinite: bool,
    ) -> None:
        self.control = control
        self.group = group
        self.bucket_bytes = bucket_bytes
        self.skip_nonfinite = skip_nonfinite
        self.source: GradientSource = BackwardReduction(group) if reduce_gradients else ReducedGradients(group)
        self.gathering = ParameterGathering(group)
        self.layout = Layout(group.size, (), ())
        self.members: list[Member] = []  # in the order of layout.specs
        self.buckets: list[Bucket] = []
        self.frozen: list[Member] = []  # have no bucket and no state until they get a gradient
        self.num_skipped_steps = 0
        self._reduced: list[bool] = []  # per slot: has a gradient that `reduce` has already reduced for the next step

    def extend(self, members: Sequence[Member], state: dict[Tensor, Any]) -> None:
        """Lay out, broadcast from the first rank and give state to more parameters. Collective.

        Args:
            members: The same on all ranks; the caller has compared them.
            state: The optimizer's; gets ``step``, ``exp_avg`` and ``exp_inf`` of each parameter.
        """
        offset = len(self.members)
        specs = [ParamSpec(m.name, tuple(m.param.shape), m.param.dtype) for m in members]
        new = layouts.build(specs, world_size=self.group.size, bucket_bytes=self.bucket_bytes)
        self.layout = self.layout.extended(new)
        self.members += members
        for bucket_layout in self.layout.buckets[len(self.buckets) :]:
            owners = [members[slot.param - offset] for slot in bucket_layout.slots]
            bucket = Bucket(bucket_layout, [m.param for m in owners], self.group.rank)
            self.group.broadcast(bucket.flat_param)
            self.buckets.append(bucket)
            self.source.add(bucket, [m.name for m in owners])
            for piece, param in zip(bucket.pieces, bucket.params, strict=True):
                state[param] = {
                    "step": bucket.steps[piece.slot],
                    "exp_avg": FlatShard(bucket.exp_avg[piece.in_shard.as_slice()], param.shape, piece.in_param),
                    "exp_inf": FlatShard(bucket.exp_inf[piece.in_shard.as_slice()], param.shape, piece.in_param),
                }

    @torch.no_grad()
    def step(self, groups: list[ParamGroup], state: dict[Tensor, Any]) -> None:
        """Take one step, all ranks together or none. Collective.

        Raises:
            RuntimeError: On every rank: a parameter was moved, gradients or hyper-parameters differ between ranks, a
                sparse
                gradient. Nothing was changed and the gradients are dropped.
        """
        hypers = [Hyper.of(group) for group in groups]
        used = self.reduce(groups, state)
        if self.skip_nonfinite and not self._all_finite():
            self.num_skipped_steps += 1
            self._forget_gradients()
            return
        for index, flags in enumerate(used):
            self._update(index, flags, groups, hypers)
        self.gathering.wait_all()
        self._forget_gradients()

    @torch.no_grad()
    def reduce(self, groups: list[ParamGroup], state: dict[Tensor, Any]) -> list[list[bool]]:
        """Bring all gradients of all ranks into the shards. Collective; may be called several times before a step.

        Returns:
            For each bucket, which slots have a gradient on any rank.

        Raises:
            RuntimeError: As `step`.
        """
        used = self._agree_and_reduce(groups, state)
        earlier = self._reduced + [False] * (len(used) - len(self._reduced))
        self._reduced = [now or before for now, before in zip(used, earlier, strict=True)]
        flags = iter(self._reduced)
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
        shards = [self.source.shard(index) for index in range(len(self.buckets))]
        norm = clipping.total_norm(self.group, self.buckets, shards, used, norm_type)
        if error_if_nonfinite and not torch.isfinite(norm):
            raise RuntimeError(
                f"The total norm of order {norm_type} for gradients from `parameters` is non-finite, so it cannot be "
                "clipped. To disable this error and scale the gradients by the non-finite norm anyway, set "
                "`error_if_nonfinite=False`"
            )
        self.source.scale_(clipping.clip_coefficient(norm, max_norm))
        return norm

    def discard(self) -> None:
        """Forget the gradients since the last step. Collective where there are any."""
        self.source.discard()
        self._reduced = []

    def _forget_gradients(self) -> None:
        self.source.drop()
        self._reduced = []

    def _all_finite(self) -> bool:
        """Return whether the mean gradient has neither Inf nor NaN on any rank. Collective; waits for the device."""
        found = any(not bool(self.source.shard(index).isfinite().all()) for index in range(len(self.buckets)))
        vote = agreement.start_vote(self.control, any_rank={"nonfinite": _bytes([found])}, same={})
        return not vote.wait().any_rank["nonfinite"].any()

    def _agree_and_reduce(self, groups: list[ParamGroup], state: dict[Tensor, Any]) -> list[bool]:
        """Hold the vote, launch all that is not launched, and return which slots have a gradient on any rank."""
        view = self.source.view()
        # Moved first: a parameter that was moved gets gradients that look wrong for other reasons, too.
        problem = self._moved_problem() or view.problem or self._frozen_problem()
        frozen_used = [member.param.grad is not None for member in self.frozen]
        same = {"hyper": _hyper_digest(groups), "gradients": view.fingerprints}
        if self.source.gradients_agree:
            same["presence"] = _bytes(view.used + frozen_used)
        vote = agreement.start_vote(
            self.control,
            any_rank={
                "problem": _bytes([problem is not None]),
                "used": _bytes(view.used),
                "again": _bytes(view.again),
                "frozen_used": _bytes(frozen_used),
            },
            same=same,
        )
        self.source.flush()
        outcome = vote.wait()
        try:
            self._raise_on_disagreement(outcome, problem, groups, view)
        except RuntimeError:
            self._forget_gradients()
            raise
        for index, again in enumerate(outcome.any_rank["again"].tolist()):
            if again:
                self.source.launch_again(index)
        used = [bool(value) for value in outcome.any_rank["used"].tolist()]
        return used + self._thaw([bool(value) for value in outcome.any_rank["frozen_used"].tolist()], state)

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
        gradient = self.source.take_shard(index)
        if not any(used):
            return
        bucket.steps.add_(torch.tensor(used, dtype=bucket.steps.dtype))
        steps = bucket.steps.tolist()
        by_group: dict[int, list[int]] = {}
        for slot, piece in enumerate(bucket.pieces):
            if used[slot] and piece.in_shard.numel:
                by_group.setdefault(self.members[piece.param].group_index, []).append(slot)
        with torch.profiler.record_function(f"sharded_adamax::update bucket {index}"):
            for group_index, slots in by_group.items():
                parts = [bucket.pieces[slot].in_shard.as_slice() for slot in slots]
                update_ = choose(groups[group_index]["foreach"], gradient.device)
                update_(
                    [bucket.param_shard[part] for part in parts],
                    [gradient[part] for part in parts],
                    [bucket.exp_avg[part] for part in parts],
                    [bucket.exp_inf[part] for part in parts],
                    [steps[slot] for slot in slots],
                    hypers[group_index],
                )
        self.gathering.launch(index, bucket)

    def _moved_problem(self) -> str | None:
        for bucket in self.buckets:
            for slot in bucket.moved_params():
                name = self.members[bucket.pieces[slot].param].name
                return (
                    f"rank {self.group.rank}: {name} is no longer the tensor that ShardedAdamax manages: its .data, "
                    "shape, dtype or device changed after the optimizer was built (model.to(...), param.data = ...). "
                    "Move and cast the model first, then build the optimizer; change values in place, with copy_"
                )
        return None

    def _frozen_problem(self) -> str | None:
        gradients = [member.param.grad for member in self.frozen]
        if any(gradient is not None and gradient.is_sparse for gradient in gradients):
            return "Adamax does not support sparse gradients"  # torch's own words
        return None

    def _raise_on_disagreement(
        self, outcome: agreement.Outcome, problem: str | None, groups: list[ParamGroup], view: LocalView
    ) -> None:
        if outcome.any_rank["problem"].any():
            agreement.raise_together(self.control, RuntimeError(problem) if problem else None, "taking a step")
        if outcome.differs["hyper"].any():
            agreement.compare(self.control, _hyper_lines(groups), "the hyper-parameters", error=RuntimeError)
        names = [m.name for m in self._slot_members()] + [m.name for m in self.frozen]
        advice = (
            "reduce_gradients=False expects gradients that are already the same on all ranks. Wrap the model in "
            "DistributedDataParallel, or build ShardedAdamax with reduce_gradients=True to let it reduce them"
        )
        presence = outcome.differs.get("presence")
        if presence is not None and presence.any():
            name = names[int(presence.nonzero()[0])]
            raise RuntimeError(f"{name} has a gradient on some ranks and None on others; {advice}")
        if outcome.differs["gradients"].any():
            name = names[int(outcome.differs["gradients"].nonzero()[0]) // 8]
            raise RuntimeError(f"the gradient of {name} differs between ranks; {advice}")

    def _slot_members(self) -> list[Member]:
        slots = chain.from_iterable(bucket.layout.slots for bucket in self.buckets)
        return [self.members[slot.param] for slot in slots]

    def held_bytes(self) -> HeldBytes:
        peaks = self.source.peaks
        return HeldBytes(
            parameters=sum(bucket.flat_param.nbytes for bucket in self.buckets),
            gradient_shards_peak=peaks.shard_bytes,
            state=sum(bucket.exp_avg.nbytes + bucket.exp_inf.nbytes for bucket in self.buckets),
            buckets_peak=peaks.bucket_bytes,
        )


def _bytes(flags: Sequence[bool]) -> Tensor:
    return torch.tensor(flags, dtype=torch.uint8)


def hyper_line(index: int, group: ParamGroup) -> str:
    """Describe the hyper-parameters of a group. A tensor lr on an accelerator is not read: that would wait for it."""
    lr = group["lr"]
    if isinstance(lr, Tensor):
        lr = lr.item() if lr.device.type == "cpu" else f"a tensor on {lr.device.type}"
    values = ", ".join(f"{key}={group[key]}" for key in ("betas", "eps", "weight_decay", "maximize"))
    return f"group {index}: lr={lr}, {values}"


def _hyper_lines(groups: list[ParamGroup]) -> list[str]:
    return [hyper_line(index, group) for index, group in enumerate(groups)]


def _hyper_digest(groups: list[ParamGroup]) -> Tensor:
    digest = hashlib.sha256("\n".join(_hyper_lines(groups)).encode()).digest()[:8]
    return torch.tensor(list(digest), dtype=torch.uint8)
