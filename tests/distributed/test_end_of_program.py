"""A program that ends right after a collective or a step ends well, and so do those of the other ranks."""

from __future__ import annotations

from pathlib import Path

import pytest

from sharded_adamax.collectives.lines import SWITCH
from tests.distributed.programs import run_ranks

# See [Note: the end of a program]. Ends in the moment in which gloo's thread holds what it was lent and waits for
# Python's lock, which by the switch interval is the main thread's until that gives it up by itself. The other rank,
# left alone, then ends as well. Arguments: rank, store, kind of collective.
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


# Rank 1 ends right after its last step, while rank 0, which is late, is to evaluate the model. Arguments: rank, store.
LATE = """
import sys, time
import torch, torch.distributed as dist
from sharded_adamax import ShardedAdamax

torch.set_num_threads(1)
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2)
model = torch.nn.Sequential(torch.nn.Linear(40, 40), torch.nn.Linear(40, 40))
with torch.no_grad():
    for param in model.parameters():
        param.fill_(0.5)
optimizer = ShardedAdamax(model.parameters(), lr=0.25, bucket_mib=0.005)
optimizer.overlap_forward(model)
model(torch.ones(2, 40)).sum().backward()
if rank == 0:
    updated = optimizer._engine.gathering.updated
    def late(*arguments):
        time.sleep(0.5)
        updated(*arguments)
    optimizer._engine.gathering.updated = late
optimizer.step()
if rank == 0:
    print([param.unique().tolist() for param in model.parameters()])
"""


@pytest.mark.parametrize("switch", ["1", "0"], ids=["reading", "messages"])
def test_a_rank_that_ends_after_its_last_step_has_given_the_others_its_shard(
    tmp_path: Path, switch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(SWITCH, switch)
    first, second = run_ranks(LATE, tmp_path)
    assert first.status == second.status == 0, (first, second)
    assert not first.errors and not second.errors
    # The first step of Adamax is lr times the sign of the gradient.
    assert first.output.strip() == str([[0.25]] * 4)


@pytest.mark.parametrize("kind", ["vote", "objects"])
def test_a_rank_that_ends_while_gloo_holds_its_tensors_does_not_abort(tmp_path: Path, kind: str) -> None:
    ranks = run_ranks(JOB, tmp_path, kind)
    assert any("caught" in rank.output for rank in ranks), "no rank ended in that moment: nothing was tried"
    assert [rank.status for rank in ranks] == [0, 0], ranks
