"""What all ranks must agree on, and how they fail: together.

[Note: fail together]  Before a rank enters a collective that the others wait in, all ranks exchange whether they are
well. If one is not, every rank raises in the same place: the ranks that failed their own error, the others one that
names the rank and repeats its message. A mistake on one rank is then an error within seconds, never a hang.

[Note: ballot]  Once a step the ranks hold one vote: a small uint8 tensor on the CPU, combined by its element-wise
maximum. It answers two kinds of question. "Does any rank say 1?" is the maximum itself. "Do all ranks hold the same
bytes?" is asked by sending each byte b and its complement 255 - b: the two maxima add up to 255 exactly if all are
equal.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sharded_adamax.collectives import ControlPlane
from sharded_adamax.pending import Pending


class RemoteError(RuntimeError):
    """Another rank failed; this one stops with it."""

    def __init__(self, message: str, error_type: str) -> None:
        super().__init__(message)
        self.error_type = error_type  # the name of the other rank's exception class


def raise_together(control: ControlPlane, error: Exception | None, doing: str) -> None:
    """Raise on every rank if ``error`` is set on any. Collective.

    Args:
        error: What went wrong on this rank, or None.
        doing: What was being done, for the message: "building ShardedAdamax".

    Raises:
        The rank's own ``error``, or RemoteError with the first failing rank's message.
    """
    errors = control.exchange(None if error is None else (type(error).__name__, str(error)))
    if error is not None:
        raise error
    for rank, other in enumerate(errors):
        if other is not None:
            error_type, message = other
            raise RemoteError(f"rank {rank} failed while {doing}; its error: {error_type}: {message}", error_type)


def run_together(control: ControlPlane, action: Callable[[], None], doing: str) -> None:
    """Run the local ``action``; if it raises on any rank, raise on all. Collective. See [Note: fail together]."""
    error = None
    try:
        action()
    except Exception as caught:
        error = caught
    raise_together(control, error, doing)


def compare(control: ControlPlane, lines: Sequence[str], what: str, *, error: type[Exception] = ValueError) -> None:
    """Raise the same error on every rank if ``lines`` are not the same on all. Collective.

    Args:
        lines: A description in which each line stands for one thing that must be equal, the most general first.
        what: What is described: "the parameters".
        error: The type to raise.

    Raises:
        error: Names the first line that differs and which ranks hold what.
    """
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    digests = control.exchange(digest)
    if len(set(digests)) == 1:
        return
    # Only now is it worth sending everything.
    descriptions = control.exchange(list(lines))
    for index in range(max(len(description) for description in descriptions)):
        values = [description[index] if index < len(description) else "nothing" for description in descriptions]
        if len(set(values)) > 1:
            raise error(f"{what} differ between ranks. The first difference: {by_rank(values)}")


def by_rank(values: Sequence[str]) -> str:
    """Return "ranks 0, 2 have X; rank 1 has Y"."""
    holders: dict[str, list[int]] = {}
    for rank, value in enumerate(values):
        holders.setdefault(value, []).append(rank)
    parts = []
    for value, ranks in holders.items():
        shown = ", ".join(str(rank) for rank in ranks[:8]) + (", ..." if len(ranks) > 8 else "")
        parts.append(f"rank {shown} has {value}" if len(ranks) == 1 else f"ranks {shown} have {value}")
    return "; ".join(parts)


@dataclass(frozen=True)
class Outcome:
    """What the ranks said. Tensors are uint8 on the CPU, shaped as they were given."""

    any_rank: dict[str, Tensor]
    differs: dict[str, Tensor]  # 1 where not all ranks hold the same byte


@dataclass
class Vote:
    """A vote under way."""

    pending: Pending[Tensor]
    any_rank_numels: dict[str, int]
    same_numels: dict[str, int]

    def wait(self, doing: str) -> Outcome:
        """Return what the ranks said; ``doing`` is for the message if one of them does not vote."""
        ballot = self.pending.wait(doing)
        any_rank, differs = {}, {}
        start = 0
        for name, numel in self.any_rank_numels.items():
            any_rank[name] = ballot[start : start + numel]
            start += numel
        for name, numel in self.same_numels.items():
            value = ballot[start : start + numel]
            complement = ballot[start + numel : start + 2 * numel]
            differs[name] = (value != 255 - complement).to(torch.uint8)
            start += 2 * numel
        return Outcome(any_rank, differs)


def flags(values: Sequence[bool]) -> Tensor:
    """Return them as bytes, for a ballot."""
    return torch.tensor(values, dtype=torch.uint8)


def start_vote(control: ControlPlane, *, any_rank: Mapping[str, Tensor], same: Mapping[str, Tensor]) -> Vote:
    """Start the vote of a step. Collective; every rank passes the same names and sizes. See [Note: ballot].

    Args:
        any_rank: uint8 tensors of 0 and 1, 1-D.
        same: uint8 tensors, 1-D, whose bytes should be equal on all ranks.
    """
    parts = list(any_rank.values())
    for value in same.values():
        parts += [value, 255 - value]
    ballot = torch.cat(parts) if parts else torch.zeros(0, dtype=torch.uint8)
    return Vote(
        control.maximum(ballot),
        {name: value.numel() for name, value in any_rank.items()},
        {name: value.numel() for name, value in same.items()},
    )
