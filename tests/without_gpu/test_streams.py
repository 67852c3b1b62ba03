"""On a GPU no stream reads what another is still writing, and no memory is given away too early; see races.py.

Every wait and every word to the allocator that the package puts into a training run is taken out by itself, and has to
be missed. What is tried is the host's program, on tensors without values. No GPU and no NCCL were there.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

import sharded_adamax
from tests.without_gpu import races
from tests.without_gpu.process import answer_of

if TYPE_CHECKING:
    from tests.without_gpu.streamed_job import StreamedJob

SPLIT = ("one", "step_apart", "branches", "all_apart")  # how the user's work is split over streams; see streamed_job.py
ORDINARY = ("one", "all_apart")

# What is trained -> over which streams.
CASES: dict[str, tuple[str, ...]] = {
    "plain": SPLIT,
    "a world of one": SPLIT,
    "gathers under the next forward": SPLIT,
    "two rounds of reductions": ORDINARY,
    "accumulated under no_sync": ("all_apart",),
    "clipped": ORDINARY,
    "unscaled by a GradScaler": ("all_apart",),
    "skip_nonfinite": ("all_apart",),
    "bfloat16 with a master, float32 on the wire": ORDINARY,
    "gradients thrown away by zero_grad": ORDINARY,
    "gradients set by hand": ("step_apart",),
    "gradients that arrive reduced": ("all_apart",),
    "frozen parameters that come alive": ("all_apart",),
}
RUNS = [f"{case}, {split}" for case, splits in CASES.items() for split in splits]
NUM_STEPS = 3
# The user's own mistakes, and one of ours: the checker finds them.
CONTROLS = (
    "step does not wait for backward",
    "forward does not wait for step",
    "memory of a collective is not kept until it is over",
)


@dataclass
class Result:
    """What is known of one run."""

    findings: list[str]
    host_waits: dict[str, float]
    num_precautions: int
    unmissed: list[str]  # precautions that could be left out without anybody noticing
    needed_lines: set[str]  # of the package, that asked for a precaution which is missed
    num_holds: float = 0  # words to the allocator in each step for each bucket, also those that change nothing


def _job(case: str) -> Callable[..., StreamedJob]:
    from functools import partial

    from tests.without_gpu.streamed_job import StreamedJob

    arguments: dict[str, dict[str, Any]] = {
        "plain": {},
        "a world of one": {"world_size": 1},
        "gathers under the next forward": {"overlap": True},
        "two rounds of reductions": {"backward": lambda job: [job.deliver(), job.deliver()]},
        "accumulated under no_sync": {"backward": StreamedJob.accumulate},
        "clipped": {"between": StreamedJob.clip},
        "unscaled by a GradScaler": {"between": StreamedJob.unscale},
        "skip_nonfinite": {"settings": {"skip_nonfinite": True}},
        "bfloat16 with a master, float32 on the wire": {
            "dtype": torch.bfloat16,
            "settings": {"master_dtype": torch.float32, "reduce_dtype": torch.float32},
        },
        "gradients thrown away by zero_grad": {"between": StreamedJob.zero_grad},
        "gradients set by hand": {"backward": lambda job: job.deliver(by_hand=True)},
        "gradients that arrive reduced": {
            "backward": StreamedJob.deliver_reduced,
            "settings": {"reduce_gradients": False},
        },
        "frozen parameters that come alive": {"frozen": ("left_out.weight", "right_in.bias")},
    }
    return partial(StreamedJob, **arguments[case])


def _is_missed(trace: list[races.Event], precaution: frozenset[int]) -> bool:
    """Return whether something can go wrong without a precaution."""
    act = trace[min(precaution)]
    assert isinstance(act, races.Wait | races.Hold)
    if races.findings(trace, precaution):
        return True
    if isinstance(act, races.Hold):
        return _is_missed_if_let_go(trace, act, precaution)
    # `follow` waits for all that other streams have waited for, whatever the module uses: it is one precaution.
    return ":follow" in act.site and bool(races.findings(trace, _at_once(trace, act, min(precaution))))


def _is_missed_if_let_go(trace: list[races.Event], hold: races.Hold, precaution: frozenset[int]) -> bool:
    """Return whether a word to the allocator is missed when the memory is let go after the stream's next use of it.

    Later the word of the next stream to use it may cover this one. But an exception may make its holder let go.
    """
    place = min(precaution)
    for use, event in enumerate(trace[place:], place):
        if isinstance(event, races.Access) and event[:2] == hold[:2]:
            let_go = [*trace[: use + 1], races.Free(hold.storage)]
            so_far = frozenset(i for i in precaution if i <= use)
            return not races.findings(let_go) and bool(races.findings(let_go, so_far))
    return False


def _at_once(trace: list[races.Event], wait: races.Wait, place: int) -> frozenset[int]:
    """Return the waits of the same line of the package that a stream has without doing anything between them."""
    uses = [i for i, event in enumerate(trace) if isinstance(event, races.Access) and event.stream == wait.stream]
    start = max((i for i in uses if i < place), default=0)
    stop = min((i for i in uses if i > place), default=len(trace))
    same = (i for i in range(start, stop) if isinstance(trace[i], races.Wait) and trace[i][0::2] == wait[0::2])
    return frozenset(same)


def _lines(act: Any) -> list[str]:
    return [place.rpartition(":")[0] for place in act.site.split(" < ")]


def _num_holds(trace: list[races.Event]) -> int:
    """Return how often the package spoke to the allocator after the optimizer was built."""
    return sum(isinstance(event, races.Hold) and event.site != "" and "buckets.py" not in event.site for event in trace)


def _try_all() -> dict[str, Result]:
    from tests.without_gpu.streamed_job import Streams

    results = {}
    for run in RUNS:
        case, split = run.rsplit(", ", 1)
        job = _job(case)(getattr(Streams, split)())
        trace, host_waits = job.train(NUM_STEPS)
        precautions = races.precautions(trace)
        missed = {precaution: _is_missed(trace, precaution) for precaution in precautions}
        results[run] = Result(
            races.findings(trace),
            host_waits,
            len(precautions),
            [str(trace[min(precaution)]) for precaution, is_missed in missed.items() if not is_missed],
            {line for p in precautions if missed[p] for line in _lines(trace[min(p)])},
            _num_holds(trace) / NUM_STEPS / len(job.engine.buckets),
        )
    return results | _controls()


def _controls() -> dict[str, Result]:
    from unittest.mock import patch

    from sharded_adamax.pending import Native
    from tests.without_gpu.streamed_job import StreamedJob, Streams

    def careless(forgotten: Callable[[StreamedJob, Any, Any], bool]) -> list[str]:
        after = StreamedJob.after

        def forgetful(job: StreamedJob, earlier: Any, later: Any = None) -> None:
            if not forgotten(job, earlier, later):
                after(job, earlier, later)

        with patch.object(StreamedJob, "after", forgetful):
            return races.findings(StreamedJob(Streams.step_apart()).train()[0])

    def without_memory(self: Any, *args: Any, keep_alive: object = None, **kwargs: Any) -> None:
        create(self, *args, **kwargs)

    create = Native.__init__
    with patch.object(Native, "__init__", without_memory):
        unkept = races.findings(StreamedJob(Streams.one()).train()[0])
    found = (
        careless(lambda job, earlier, later: earlier is job.streams.model and later is job.streams.step),
        careless(lambda job, earlier, later: earlier is job.streams.step and later is job.streams.model),
        unkept,
    )
    return {name: Result(findings, {}, 0, [], set()) for name, findings in zip(CONTROLS, found, strict=True)}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    return answer_of(_try_all, tmp_path_factory.mktemp("guard"), seconds=100)


@pytest.mark.parametrize("run", RUNS)
def test_nothing_races_and_no_memory_is_given_away(results: dict[str, Result], run: str) -> None:
    assert results[run].findings == []


@pytest.mark.parametrize("run", RUNS)
def test_every_wait_and_every_word_to_the_allocator_is_missed_when_it_is_left_out(
    results: dict[str, Result], run: str
) -> None:
    assert results[run].unmissed == []
    # A world of one on one stream has nothing to wait for.
    assert (results[run].num_precautions > 0) == (run != "a world of one, one")


@pytest.mark.parametrize("run", RUNS)
def test_streams_do_not_make_the_host_wait(results: dict[str, Result], run: str) -> None:
    # Asked for: the host decides by a value. See test_host_waits.py.
    assert results[run].host_waits == ({"value read": 1.0} if run.startswith("skip_nonfinite") else {})


def test_every_line_that_asks_for_a_precaution_is_needed(results: dict[str, Result]) -> None:
    lines = set()
    for path in Path(sharded_adamax.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                if name in ("take_over", "wait_stream", "record_stream"):
                    lines.add(f"{path.name}:{node.lineno}")
    assert len(lines) > 5
    assert lines - set().union(*(result.needed_lines for result in results.values())) == set()


@pytest.mark.parametrize("control", CONTROLS)
def test_the_checker_finds(results: dict[str, Result], control: str) -> None:
    assert results[control].findings != []


def test_one_stream_costs_three_words_to_the_allocator_per_bucket(results: dict[str, Result]) -> None:
    """Which it ignores; not one per parameter."""
    assert results["plain, one"].num_holds == 3


def test_every_case_was_tried(results: dict[str, Result]) -> None:
    assert set(results) == {*RUNS, *CONTROLS}
