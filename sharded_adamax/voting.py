"""The vote of a step: what each rank says, and what all conclude from it.

Nothing in it can differ between ranks afterwards: they read one outcome. It is held on the CPU, beside the reductions.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sharded_adamax import agreement
from sharded_adamax.collectives import ControlPlane
from sharded_adamax.gradients import GradientSource, sparse_problem
from sharded_adamax.members import Member
from sharded_adamax.pending import LostRankError


@dataclass(frozen=True)
class Decision:
    """What all ranks do now."""

    used: list[bool]  # per slot, over all buckets: some rank has a gradient
    again: list[bool]  # per bucket: some rank has gradients that came after it was launched
    frozen_used: list[bool]  # per frozen parameter: some rank has a gradient
    order: list[int]  # buckets, as the first rank wants them gathered


class StepVote:
    """One vote, begun when it is made. Collective: every rank makes one and waits for it."""

    def __init__(
        self,
        control: ControlPlane,
        source: GradientSource,
        *,
        hypers: Sequence[str],
        frozen: Sequence[Member],
        names: Callable[[], list[str]],
        problem: str | None,
        order: Sequence[int],
    ) -> None:
        """Say what this rank knows.

        Args:
            hypers: The hyper-parameters, line by line.
            frozen: The parameters that have no bucket yet.
            names: Gives those of the parameters in the order of the buckets' slots, then of the frozen ones.
            problem: What is wrong on this rank, beside what its gradients say.
            order: Buckets as this rank wants them gathered; that of the first rank counts.
        """
        view = source.view()
        self._control = control
        self._source = source
        self._hypers = hypers
        self._names = names
        self._problem = problem or view.problem or sparse_problem(member.param for member in frozen)
        self._num_rounds = view.num_rounds
        frozen_used = [member.param.grad is not None for member in frozen]
        same = {
            "round": _number(view.num_rounds),
            "hyper": _digest(hypers),
            "gradients": view.fingerprints,
        }
        if source.gradients_agree:
            same["presence"] = agreement.flags(view.used + frozen_used)
        self._vote = agreement.start_vote(
            control,
            any_rank={
                "problem": agreement.flags([self._problem is not None]),
                "used": agreement.flags(view.used),
                "again": agreement.flags(view.again),
                "frozen_used": agreement.flags(frozen_used),
                # The other ranks say zeros, so that the maximum is what the first rank says.
                "order": _numbers_or_zeros(order if control.rank == 0 else (), len(view.again)),
            },
            same=same,
        )

    def wait(self) -> Decision:
        """Return what is to be done.

        Raises:
            RoundError: The ranks are not in the same round.
            RuntimeError: They disagree, or one has a problem. Like the former, on every rank.
            LostRankError: A rank does not vote.
        """
        try:
            with self._control.traffic.waiting("vote", "vote"):
                outcome = self._vote.wait(f"the vote of step {self._source.step}")
        except LostRankError as error:
            # The vote does not say who is missing; the messages between pairs of ranks do.
            raise error.naming(self._source.missing() or self._control.dead_ranks()) from error.__cause__
        self._raise_on_disagreement(outcome)
        used, again, frozen_used = (_bools(outcome.any_rank[name]) for name in ("used", "again", "frozen_used"))
        return Decision(used, again, frozen_used, _numbers(outcome.any_rank["order"]))

    def _raise_on_disagreement(self, outcome: agreement.Outcome) -> None:
        if outcome.differs["round"].any():
            rounds = agreement.by_rank([str(number) for number in self._control.exchange(self._num_rounds)])
            raise RoundError(
                f"the ranks are not at the same place in step {self._source.step} (rounds of reductions: {rounds}). "
                "Some ranks threw gradients away (zero_grad after backward, or backward after a step that "
                "GradScaler skipped) and others had none, or did not: gradients of different steps would be mixed. "
                "Call step on all ranks alike, also on one without data or with a bad batch; after backward without "
                "step, zero_grad on all. Start again from a checkpoint"
            )
        if outcome.any_rank["problem"].any():
            error = RuntimeError(self._problem) if self._problem else None
            agreement.raise_together(self._control, error, "taking a step")
        if outcome.differs["hyper"].any():
            agreement.compare(self._control, self._hypers, "the hyper-parameters", error=RuntimeError)
        advice = (
            "reduce_gradients=False expects gradients that are already the same on all ranks. Wrap the model in "
            "DistributedDataParallel, or build ShardedAdamax with reduce_gradients=True to let it reduce them"
        )
        presence = outcome.differs.get("presence")
        if presence is not None and presence.any():
            name = self._names()[int(presence.nonzero()[0])]
            raise RuntimeError(f"{name} has a gradient on some ranks and None on others; {advice}")
        if outcome.differs["gradients"].any():
            name = self._names()[int(outcome.differs["gradients"].nonzero()[0]) // 8]
            raise RuntimeError(f"the gradient of {name} differs between ranks; {advice}")


class RoundError(RuntimeError):
    """The ranks are in different rounds of reductions. What is under way has no partner any more."""


def _bools(values: Tensor) -> list[bool]:
    return [bool(value) for value in values.tolist()]


def _numbers_or_zeros(values: Sequence[int], count: int) -> Tensor:
    """Return at most ``count`` numbers as bytes; zeros where there are fewer, so each is one more than it was."""
    padded = [value + 1 for value in values] + [0] * (count - len(values))
    return torch.tensor(padded, dtype=torch.int32).view(torch.uint8)


def _numbers(values: Tensor) -> list[int]:
    return [value - 1 for value in values.clone().view(torch.int32).tolist() if value]  # a copy is aligned


def _number(value: int) -> Tensor:
    return torch.tensor(list(value.to_bytes(8, "little")), dtype=torch.uint8)


def _digest(lines: Sequence[str]) -> Tensor:
    return torch.tensor(list(hashlib.sha256("\n".join(lines).encode()).digest()[:8]), dtype=torch.uint8)
