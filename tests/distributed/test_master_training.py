"""bfloat16 with a float32 master trains as float32 does: 300 steps of the byte model on real text.

`python -m tests.benchmarks.precision` is the same with a larger model and more seeds.
"""

from __future__ import annotations

import pytest

from tests.benchmarks.precision import Sizes, train
from tests.distributed.pool import Pool

NUM_STEPS = 300
SIZES = Sizes()
SEEDS = (0, 1)


@pytest.fixture(scope="module")
def float32_losses(ranks: Pool) -> list[float]:
    return [ranks.run(2, train, "float32", seed, NUM_STEPS, SIZES)[0].final_loss for seed in SEEDS]


def test_300_steps_with_a_master_end_within_the_noise_of_float32(ranks: Pool, float32_losses: list[float]) -> None:
    outcomes = ranks.run(2, train, "bfloat16 with a float32 master", SEEDS[0], NUM_STEPS, SIZES)
    noise = abs(float32_losses[0] - float32_losses[1])
    assert float32_losses[0] < 3.5, "the model has learned: it began at log 256 = 5.5"
    assert abs(outcomes[0].final_loss - float32_losses[0]) <= noise, (outcomes[0].final_loss, float32_losses)
    for outcome in outcomes:
        held = outcome.bytes_per_parameter
        # 2P + 4P/N + 8P/N, and gradients of 4P/N from backward to the update; the rest is padding of the buckets.
        assert [held[kind] for kind in ("parameters", "masters", "state", "gradient_shards_peak")] == pytest.approx(
            [2, 4 / 2, 8 / 2, 4 / 2], rel=0.02
        )
