"""An exception on one rank under torchrun: everything ends, and the user sees what failed."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.elastic import failing
from tests.elastic.torchrun import TINY, Job, read_lives

GONE_SECONDS = 15


@pytest.mark.parametrize("async_save", [[], ["--async-save"]], ids=["", "saving in the background"])
def test_an_exception_on_one_rank_ends_the_job_and_is_what_the_user_sees_last(
    tmp_path: Path, async_save: list[str]
) -> None:
    failed_at = tmp_path / "failed_at"
    arguments = [*TINY, "--batch=12", "--steps=1000", "--checkpoint-every=1", *async_save, f"--out={tmp_path / 'run'}"]
    with Job(tmp_path / "job") as job:
        agent = job.start(*arguments, PROGRAM=failing.__file__, PET_MAX_RESTARTS="0", FAILED_AT=str(failed_at))
        assert agent.wait(90) != 0
        assert job.processes() == []
        assert time.time() - float(failed_at.read_text()) < GONE_SECONDS
    print(agent.output())
    last = agent.output()[agent.output().rindex("Traceback (most recent call last)") :]
    assert f"KeyError: '{failing.MESSAGE}'" in last
    assert "Connection closed" not in last
    root_cause = agent.output()[agent.output().rindex("Root Cause (first observed failure)") :]
    assert f"rank      : {failing.BAD_RANK} " in root_cause


def test_ranks_that_outlive_their_torchrun_keep_a_new_job_from_their_checkpoints(tmp_path: Path) -> None:
    out = tmp_path / "run"
    arguments = [*TINY, "--batch=12", "--steps=10000", f"--out={out}"]
    with Job(tmp_path / "old") as old, Job(tmp_path / "new") as new:
        killed = old.start(*arguments)
        old.wait_until(lambda: any(life.losses for life in read_lives(out)), "its first step")
        first_rank = killed.workers()[0]
        killed.process.kill()
        second = new.start(*arguments, PET_MAX_RESTARTS="0")
        assert second.wait(60) != 0
        assert f'another job writes checkpoints to {out / "checkpoints"}: {{"pid": {first_rank.pid}' in second.output()
        assert first_rank.is_running()
