"""launch/vae.py: trains, skips, resumes at another number of ranks, and draws."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import torch

from tests.crash.nursery import Nursery

ROOT = Path(__file__).resolve().parents[2]
TINY = ["--batch=7", "--width=16", "--groups=2", "--latents=2", "--checkpoint-every=2", "--threads=1"]


def _run(out: Path, *arguments: str) -> dict[str, Any]:
    """Run the program on this rank; returns what it trained."""
    sys.path.insert(0, str(ROOT / "launch"))
    import vae
    from sharded_adamax import init_distributed

    sys.argv = ["vae.py", f"--out={out}", *TINY, *arguments]
    options, context = vae.parse_options(), init_distributed()
    training = vae.build(options, context)
    vae.train(training, options, context)
    vae.finish(training, options, context)
    return {"model": training.model.state_dict(), "skipped": training.optimizer.skipped_steps}


def test_a_run_resumes_on_as_many_ranks_bit_for_bit_and_on_another_number_to_rounding(
    nursery: Nursery, tmp_path: Path
) -> None:
    through = tmp_path / "through"
    expected = nursery.run(2, _run, through, "--steps=4")[0]["model"]
    assert (through / "digits.png").stat().st_size > 10_000
    for ranks, tolerance in ((2, 0.0), (1, 1e-5)):  # on one rank the sums have another order; two had 4 and 3 rows
        out = tmp_path / f"resumed on {ranks}"
        shutil.copytree(through / "checkpoints" / "00000002", out / "checkpoints" / "00000002")
        resumed = nursery.run(ranks, _run, out, "--steps=4")[0]["model"]
        for name, tensor in expected.items():
            torch.testing.assert_close(resumed[name], tensor, rtol=tolerance, atol=tolerance)


def test_a_step_with_a_wild_gradient_is_skipped(nursery: Nursery, tmp_path: Path) -> None:
    results = nursery.run(1, _run, tmp_path, "--steps=3", "--skip-above=1e-3")
    assert [result["skipped"] for result in results] == [3]
