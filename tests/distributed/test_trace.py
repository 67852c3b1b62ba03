"""What a profiler shows of a step: every phase and bucket by name, and reduce-scatter under backward, on both ranks."""

from __future__ import annotations

from pathlib import Path

import torch.distributed as dist

from tests.benchmarks.trace import NUM_LAYERS, Range, last_step, record, under_way
from tests.distributed.pool import Pool


def _ranges(directory: str) -> list[Range]:
    return last_step(record(f"{directory}/rank{dist.get_rank()}.json", num_steps=2).ranges)


def test_reduce_scatters_are_under_way_while_backward_runs(ranks: Pool, tmp_path: Path) -> None:
    for ranges in ranks.run(2, _ranges, str(tmp_path)):
        (backward,) = (one for one in ranges if one.name == "backward")
        (step,) = (one for one in ranges if one.name == "step")
        reduced = under_way(ranges, "reduce_scatter", "wait reduce")
        gathered = under_way(ranges, "all_gather", "wait gather")
        updated = [one for one in ranges if one.name.startswith("sharded_adamax::update")]
        assert [bucket for bucket, _, _ in reduced] == [bucket for bucket, _, _ in gathered] == list(range(NUM_LAYERS))
        assert len(updated) == NUM_LAYERS
        launches = [launch for _, launch, _ in reduced]
        assert launches == sorted(launches), "in the order of the buckets"
        assert all(backward.start < launch < backward.stop for launch in launches), "launched by hooks"
        # Waited for not before the next one is launched: two are under way at a time.
        assert all(waited > launches[bucket + 1] for bucket, _, waited in reduced[:-1])
        # The update of a bucket comes before the gathers of the later ones are launched: they overlap, too.
        for update, (_, launch, _), (_, following, _) in zip(updated, gathered, gathered[1:], strict=False):
            assert step.start < update.stop <= launch < following < step.stop
