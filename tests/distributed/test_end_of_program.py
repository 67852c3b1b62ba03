"""A program that ends right after a collective ends well. See [Note: the end of a program]."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Ends in the moment in which gloo's thread holds what it was lent and waits for Python's lock, which by the switch
# interval is the main thread's until that gives it up by itself. The other rank, left alone, then ends as well.
# Arguments: rank, store, kind of collective.
JOB = """
import sys
import torch, torch.distributed as dist
from sharded_adamax.collectives import control_plane, loans
from sharded_adamax.pending import LostRankError

torch.set_num_threads(1)
sys.setswitchinterval(100)
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2)
plane = control_plane(None)
communicate = {
    "vote": lambda: plane.maximum(torch.ones(1, dtype=torch.uint8)).wait("a vote"),
    "objects": lambda: plane.exchange("an object"),
}[sys.argv[3]]
for attempt in range(2000):
    try:
        communicate()
    except RuntimeError:
        break
    if loans._lent:
        print("caught")
        break
"""


@pytest.mark.parametrize("kind", ["vote", "objects"])
def test_a_rank_that_ends_while_gloo_holds_its_tensors_does_not_abort(tmp_path: Path, kind: str) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", JOB, str(rank), str(tmp_path / "store"), kind],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=ROOT,
        )
        for rank in range(2)
    ]  # fmt: skip
    outputs = [process.communicate(timeout=50) for process in processes]
    assert any("caught" in output for output, _ in outputs), "no rank ended in that moment: nothing was tried"
    for rank, process in enumerate(processes):
        assert process.returncode == 0, (rank, outputs[rank])
