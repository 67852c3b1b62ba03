"""The model of a step, and that the predictions in the documentation are what it says."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.benchmarks import model_of_step as model

DOCS = Path(__file__).parents[2] / "docs" / "performance.md"
MIB = 1 << 20


def _simulated(first: float, second: float, num_pieces: int) -> float:
    """Move pieces through two stages, one after another."""
    first_free = second_free = 0.0
    for _ in range(num_pieces):
        first_free += first
        second_free = max(first_free, second_free) + second
    return second_free


@pytest.mark.parametrize(("first", "second"), [(2.0, 3.0), (3.0, 2.0), (1.0, 1.0), (0.0, 5.0), (5.0, 0.0)])
@pytest.mark.parametrize("num_pieces", [1, 2, 4, 9])
def test_pieces_in_two_stages_take_what_a_simulation_says(first: float, second: float, num_pieces: int) -> None:
    assert model.overlapped(first, second, num_pieces) == _simulated(first, second, num_pieces)


@pytest.mark.parametrize("link", model.LINKS)
@pytest.mark.parametrize("ranks", [2, 8, 512])
@pytest.mark.parametrize("step", [model.overlapping_step, model.waiting_step, model.ddp_step])
def test_no_step_is_faster_than_its_computation_or_its_bytes(step, ranks: int, link: model.Link) -> None:  # type: ignore[no-untyped-def]
    job = model.on_gpus(1e9, ranks)
    assert step(job, link) > max(job.compute_seconds, job.wire_seconds(link))


def test_a_world_of_one_computes_and_updates() -> None:
    job = model.Job(1e6, 1, forward_seconds=1.0, backward_seconds=2.0, update_bytes_per_second=28e6)
    for step in (model.overlapping_step, model.waiting_step, model.ddp_step):
        assert step(job, model.NVLINK) == pytest.approx(4.0)


def test_a_step_over_a_slow_link_is_its_bytes_and_one_bucket_at_either_end() -> None:
    # 8 buckets; the link never rests but while the first and the last bucket are computed, and while the update runs.
    job = model.Job(8 * MIB / 4, 2, 0.4, 0.8, update_bytes_per_second=1e18, bucket_bytes=MIB)
    link = model.Link("slow", 1e6, 0.0)
    expected = 8 * MIB / 1e6 + 0.4 / 8 + 0.8 / 8 + 2 * model.HOP_SECONDS
    assert model.overlapping_step(job, link) == pytest.approx(expected)


def test_the_predictions_in_the_documentation_are_those_of_the_model() -> None:
    assert f"\n\n{model.table()}\n\n" in DOCS.read_text(), (
        "write what `python -m tests.benchmarks.model_of_step` prints"
    )
