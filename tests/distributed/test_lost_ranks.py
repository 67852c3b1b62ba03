"""A rank that raises, dies or hangs: the others stop in bounded time and name the rank, the bucket and the step."""

from __future__ import annotations

import re
import signal
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from sharded_adamax import ShardedAdamax
from sharded_adamax.collectives.lines import SWITCH
from tests.distributed.pool import Pool
from tests.distributed.problems import backward, gradient, make_params
from tests.distributed.programs import TIMEOUT_SECONDS, Ended, run_ranks, start_rank

LOST_AT_STEP = 3

# Run as a job of its own, because the pool's processes are to live on. Arguments: rank, store, world size, how.
JOB = """
import datetime, os, signal, sys, time
import torch, torch.distributed as dist
from sharded_adamax import ShardedAdamax
from tests.distributed.problems import backward, local_gradients, make_params

rank, store, world_size, how = int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4]
torch.set_num_threads(1)
timeout = datetime.timedelta(seconds=5 if how == "hangs" else 60)
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size, timeout=timeout)
params = make_params(torch.float32)
optimizer = ShardedAdamax(params, bucket_mib=0.01)
if how == "dies with gathers to come":
    optimizer.overlap_forward(torch.nn.ParameterList(params))
for step in range(1, 6):
    if step == LOST_AT_STEP and rank == 1:
        if how == "in backward":
            def fail(_):
                raise ValueError("a bad batch")
            params[4].register_post_accumulate_grad_hook(fail)
        elif how == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        elif how == "before step":
            backward(params, local_gradients(step, params))
            raise ValueError("a bad batch")
        elif how == "hangs":
            time.sleep(600)
        elif how == "dies with gathers to come":
            optimizer._engine.gathering.updated = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    backward(params, local_gradients(step, params))
    optimizer.step()
    optimizer.zero_grad()
    if how == "dies with gathers to come" and step == LOST_AT_STEP:
        for index in (4, 4, 7):  # again, and another one: nobody may see what has not arrived
            try:
                params[index].sum()
            except RuntimeError as error:
                print(f"look {index}: {error}", file=sys.stderr)
            else:
                sys.exit(f"parameter {index} was shown")
""".replace("LOST_AT_STEP", str(LOST_AT_STEP))


def _run_job(tmp_path: Path, how: str, world_size: int) -> list[Ended]:
    return run_ranks(JOB, tmp_path, str(world_size), how, world_size=world_size)


@pytest.fixture(params=["1", "0"], ids=["reading", "messages"])
def _by(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the ranks of the job read each other's memory, or send messages."""
    monkeypatch.setenv(SWITCH, request.param)


WHERE = r"(the vote of|the (reduce-scatter|all-gather) of bucket \d,) step"


@pytest.mark.usefixtures("_by")
@pytest.mark.parametrize(("how", "world_size"), [("in backward", 3), ("before step", 2), ("dies", 3)])
def test_the_others_stop_at_once_and_name_the_rank_and_the_step(tmp_path: Path, how: str, world_size: int) -> None:
    results = _run_job(tmp_path, how, world_size)
    assert results[1].status == (-signal.SIGKILL if how == "dies" else 1), results[1]
    culprits = []
    for rank in set(range(world_size)) - {1}:
        status, _, errors = results[rank]
        assert status == 1, (status, errors)  # an exception, not SIGABRT
        last = errors.strip().splitlines()[-1]
        found = re.search(
            rf"LostRankError: rank {rank} waited in vain for ranks? ([\d, ]+) in {WHERE} {LOST_AT_STEP}\.", last
        )
        assert found, errors
        culprits.append(found[1])
    # The first to notice names the culprit. Another may notice that one's end before.
    assert any("1" in named for named in culprits), culprits


# Rank 1 is gone before rank 0 posts anything, and gloo has noticed. Arguments: rank, store.
GONE = """
import os, sys, time
import torch, torch.distributed as dist
from sharded_adamax.collectives import GlooGroup

rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2)
dist.barrier()
if rank == 1:
    os._exit(0)
try:
    dist.recv(torch.zeros(1), 1)
except RuntimeError:
    pending = GlooGroup(dist.group.WORLD).reduce_scatter(torch.ones(4))
    print("missing:", pending.missing(), file=sys.stderr)
    pending.wait("the reduce-scatter of bucket 0")
"""


def test_a_message_that_cannot_even_be_posted_names_the_rank_when_it_is_waited_for(tmp_path: Path) -> None:
    first, other = run_ranks(GONE, tmp_path)
    assert other.status == 0
    assert "missing: [1]" in first.errors, first
    assert "LostRankError: rank 0 waited in vain for rank 1 in the reduce-scatter of bucket 0" in first.errors


@pytest.mark.usefixtures("_by")
def test_with_overlap_whoever_looks_at_a_parameter_that_never_comes_is_told(tmp_path: Path) -> None:
    (status, _, errors), other = _run_job(tmp_path, "dies with gathers to come", 2)
    assert other.status == -signal.SIGKILL
    assert status == 1, (status, errors)
    looks = re.findall(r"look (\d): rank 0 waited in vain for rank 1 in the all-gather of bucket \d, step 3\.", errors)
    assert looks == ["4", "4", "7"], errors
    assert "LostRankError" in errors.strip().splitlines()[-1], errors  # the next step


@pytest.mark.usefixtures("_by")
def test_a_rank_that_hangs_is_named_when_the_timeout_is_over(tmp_path: Path) -> None:
    with start_rank(JOB, 0, tmp_path, "2", "hangs") as waiting, start_rank(JOB, 1, tmp_path, "2", "hangs") as hanging:
        try:
            _, errors = waiting.communicate(timeout=TIMEOUT_SECONDS)
            assert hanging.poll() is None
        finally:
            waiting.kill()
            hanging.kill()
    assert waiting.returncode == 1, (waiting.returncode, errors)
    last = errors.strip().splitlines()[-1]
    assert re.search(rf"rank 0 waited in vain for rank 1 in {WHERE} {LOST_AT_STEP}\.", last), errors


def _thrown_away_alone() -> str:
    """Rank 0 has gradients to throw away, rank 1 has none and cannot know."""
    params = make_params(torch.float32)
    optimizer = ShardedAdamax(params, bucket_mib=0.001)
    assert len(optimizer.layout.buckets) > 2, "so many that rank 0 would wait in backward if it launched them"
    if dist.get_rank() == 0:
        backward(params, [gradient(0, 0, i, p) for i, p in enumerate(params)])
    optimizer.zero_grad()
    backward(params, [gradient(1, 0, i, p) for i, p in enumerate(params)])
    before = [param.detach().clone() for param in params]
    try:
        optimizer.step()
    except RuntimeError as error:
        assert all(torch.equal(param, old) for param, old in zip(params, before, strict=True))
        return f"{type(error).__name__}: {error}"
    return "nothing raised"


def test_ranks_that_lost_step_are_told_before_gradients_of_two_steps_are_mixed(ranks: Pool) -> None:
    for message in ranks.run(2, _thrown_away_alone):
        assert message.startswith("RoundError: the ranks are not at the same place in step 1 "), message
        assert "(rounds of reductions: rank 0 has 1; rank 1 has 0)" in message
