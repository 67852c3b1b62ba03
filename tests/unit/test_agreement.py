"""The vote and the common errors, with ranks that are played by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sharded_adamax.agreement import (
    Outcome,
    RemoteError,
    Vote,
    by_rank,
    compare,
    raise_together,
    run_together,
    start_vote,
)
from sharded_adamax.collectives import ControlPlane
from sharded_adamax.members import hyper_line

ALONE = ControlPlane(None)


def _bytes(values: Sequence[int]) -> Tensor:
    return torch.tensor(list(values), dtype=torch.uint8)


class _Combined:
    """A vote whose ballots were combined by hand."""

    held_bytes = 0

    def __init__(self, ballot: Tensor) -> None:
        self.ballot = ballot

    def wait(self, doing: str) -> Tensor:
        return self.ballot

    def missing(self) -> list[int]:
        return []


def _vote(any_rank: list[dict[str, Tensor]], same: list[dict[str, Tensor]]) -> Outcome:
    """Hold the vote of as many ranks as there are entries."""
    votes = [start_vote(ALONE, any_rank=one, same=other) for one, other in zip(any_rank, same, strict=True)]
    ballots = [vote.pending.wait("a vote") for vote in votes]
    assert all(ballot.dtype == torch.uint8 and ballot.device == torch.device("cpu") for ballot in ballots)
    maximum = torch.stack(ballots).amax(dim=0)
    return Vote(_Combined(maximum), votes[-1].any_rank_numels, votes[-1].same_numels).wait("a vote")


@settings(max_examples=300, deadline=None)
@given(data=st.data(), num_ranks=st.integers(1, 6))
def test_the_vote_finds_exactly_what_any_rank_says_and_what_is_not_the_same(
    data: st.DataObject, num_ranks: int
) -> None:
    any_sizes = data.draw(st.lists(st.integers(0, 4), max_size=3))
    same_sizes = data.draw(st.lists(st.integers(0, 9), max_size=3))
    flags = st.integers(0, 1)
    few_bytes = st.one_of(st.sampled_from([0, 1, 127, 128, 254, 255]), st.integers(0, 255))

    def draw(sizes: list[int], value: st.SearchStrategy[int], agree: bool) -> list[dict[str, Tensor]]:
        first = {f"{i}": data.draw(st.lists(value, min_size=size, max_size=size)) for i, size in enumerate(sizes)}
        ranks = [first]
        for _ in range(num_ranks - 1):
            ranks.append({name: [v if agree or data.draw(st.booleans()) else data.draw(value) for v in values]
                          for name, values in first.items()})  # fmt: skip
        return [{name: _bytes(values) for name, values in one.items()} for one in ranks]

    any_rank, same = draw(any_sizes, flags, False), draw(same_sizes, few_bytes, data.draw(st.booleans()))
    outcome = _vote([{k: v.clone() for k, v in one.items()} for one in any_rank], same)
    assert list(outcome.any_rank) == list(any_rank[0]) and list(outcome.differs) == list(same[0])
    for name, value in outcome.any_rank.items():
        expected = [int(any(bool(one[name][i]) for one in any_rank)) for i in range(value.numel())]
        assert value.dtype == torch.uint8 and value.tolist() == expected
    for name, value in outcome.differs.items():
        assert value.dtype == torch.uint8 and value.shape == same[0][name].shape
        expected = [int(len({int(one[name][i]) for one in same}) > 1) for i in range(value.numel())]
        assert value.tolist() == expected


def test_in_a_world_of_one_nothing_differs_and_any_rank_is_this_rank() -> None:
    outcome = start_vote(
        ALONE, any_rank={"problem": _bytes([0, 1])}, same={"hyper": _bytes(range(256)), "nothing": _bytes([])}
    ).wait("a vote")
    assert outcome.any_rank["problem"].tolist() == [0, 1]
    assert not outcome.differs["hyper"].any() and outcome.differs["hyper"].numel() == 256
    assert outcome.differs["nothing"].numel() == 0


def test_a_vote_on_nothing_has_no_outcome() -> None:
    assert start_vote(ALONE, any_rank={}, same={}).wait("a vote") == Outcome({}, {})


def test_voting_leaves_what_was_asked_as_it_was() -> None:
    asked = _bytes([1, 2, 3])
    start_vote(ALONE, any_rank={}, same={"x": asked})
    assert asked.tolist() == [1, 2, 3]


class _Played(ControlPlane):
    """A control plane on which the other ranks say what the test says."""

    def __init__(self, others: list[list[Any]]) -> None:
        super().__init__(None)
        self.others = others  # per exchange, what the ranks after this one say

    def exchange(self, value: Any) -> list[Any]:
        self.traffic.record("exchange", 0)
        return [value, *self.others.pop(0)]


class _Noting(ControlPlane):
    """A world of one that notes what is told to the other ranks."""

    def __init__(self) -> None:
        super().__init__(None)
        self.told: list[Any] = []

    def exchange(self, value: Any) -> list[Any]:
        self.told.append(value)
        return [value]


def _told_of(error: Exception) -> Any:
    """Return what a rank that failed with ``error`` tells the others."""
    control = _Noting()
    with pytest.raises(type(error)):
        raise_together(control, error, "building")
    return control.told[0]


def test_a_rank_that_failed_raises_its_own_error_and_the_others_repeat_it() -> None:
    mine = ValueError("Invalid learning rate: -1.0")
    later = _told_of(TypeError("later"))
    with pytest.raises(ValueError, match=r"^Invalid learning rate: -1\.0$") as caught:
        raise_together(_Played([[None, later]]), mine, "building")
    assert caught.value is mine
    told = r"^rank 2 failed while building; its error: ValueError: Invalid learning rate: -1\.0$"
    with pytest.raises(RemoteError, match=told):
        raise_together(_Played([[None, _told_of(mine), later]]), None, "building")
    raise_together(_Played([[None, None]]), None, "building")


def test_what_runs_together_raises_only_after_the_others_were_told() -> None:
    def fail() -> None:
        raise TypeError("no")

    control = _Noting()
    with pytest.raises(TypeError, match=r"^no$"):
        run_together(control, fail, "trying")
    done: list[int] = []
    run_together(control, lambda: done.append(1), "trying")
    assert control.told == [_told_of(TypeError("no")), None] and done == [1]


def _digest_of(lines: list[str]) -> str:
    control = _Noting()
    compare(control, lines, "x")
    digest: str = control.told[0]
    return digest


def test_equal_descriptions_cost_one_small_exchange() -> None:
    lines = ["group 0", "weight"] * 1000
    control = _Played([[_digest_of(lines)] * 3])
    compare(control, lines, "the parameters")
    assert control.traffic.calls == {"exchange": 1}
    assert len(_digest_of(lines)) == 64


@pytest.mark.parametrize(
    ("mine", "other", "told"),
    [
        (["a", "b", "c"], ["a", "x", "y"], "rank 0 has b; rank 1 has x"),
        (["a", "b"], ["a"], "rank 0 has b; rank 1 has nothing"),
        ([], ["a"], "rank 0 has nothing; rank 1 has a"),
        (["a", "b"], ["b", "a"], "rank 0 has a; rank 1 has b"),
    ],
)
@pytest.mark.parametrize("error", [ValueError, RuntimeError])
def test_the_first_difference_is_named(mine: list[str], other: list[str], told: str, error: type[Exception]) -> None:
    control = _Played([[_digest_of(other)], [other]])
    with pytest.raises(error) as caught:
        compare(control, mine, "the parameters", error=error)
    assert str(caught.value) == f"the parameters differ between ranks. The first difference: {told}"


@pytest.mark.parametrize(
    ("name", "value"),
    [("lr", 2.0000000001e-3), ("betas", (0.9, 0.99)), ("eps", 0.0), ("weight_decay", 1e-12), ("maximize", True)],
)
def test_every_hyper_parameter_is_among_what_the_ranks_compare(name: str, value: Any) -> None:
    group = torch.optim.Adamax([torch.zeros(1)]).param_groups[0]
    assert hyper_line(0, group) == hyper_line(0, {**group, "params": []})
    assert hyper_line(0, group) != hyper_line(0, {**group, name: value})
    assert f"{name}={value}" in hyper_line(0, {**group, name: value})


def test_a_learning_rate_in_a_tensor_is_compared_by_its_value() -> None:
    group = torch.optim.Adamax([torch.zeros(1)], lr=torch.tensor(0.5)).param_groups[0]
    assert hyper_line(3, group) == hyper_line(3, {**group, "lr": 0.5})
    assert hyper_line(3, group) == hyper_line(3, {**group, "lr": torch.tensor([0.5])})
    assert hyper_line(3, group).startswith("group 3: lr=0.5, ")
    # On an accelerator it is not read: that would wait for the device. meta has nothing to read at all.
    assert "lr=a tensor on meta" in hyper_line(3, {**group, "lr": torch.ones((), device="meta")})


BY_RANK: list[tuple[list[str], str]] = [
    (["X"], "rank 0 has X"),
    (["X", "X"], "ranks 0, 1 have X"),
    (["X", "Y", "X"], "ranks 0, 2 have X; rank 1 has Y"),
    (["X", "Y", "Y"], "rank 0 has X; ranks 1, 2 have Y"),
    (["X", "Y", "Z"], "rank 0 has X; rank 1 has Y; rank 2 has Z"),
    (["X"] * 8, "ranks 0, 1, 2, 3, 4, 5, 6, 7 have X"),
    (["X"] * 9 + ["Y"], "ranks 0, 1, 2, 3, 4, 5, 6, 7, ... have X; rank 9 has Y"),
]


@pytest.mark.parametrize(("values", "told"), BY_RANK)
def test_by_rank_says_who_holds_what(values: list[str], told: str) -> None:
    assert by_rank(values) == told
