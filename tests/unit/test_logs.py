"""What is said through logging, and how a user turns it up: TORCH_LOGS, in processes of their own."""

from __future__ import annotations

import logging
import os
import subprocess
import sys

import pytest
import torch

from sharded_adamax import ShardedAdamax

PROGRAM = """
import sys
import torch
import sharded_adamax

param = torch.nn.Parameter(torch.ones(7))
optimizer = sharded_adamax.ShardedAdamax([param], skip_nonfinite=True)
(param * float("nan")).sum().backward()
optimizer.step()
assert not any(name.startswith("mpi4py") for name in sys.modules), "TORCH_LOGS has started MPI"
"""
BUILT = "rank 0: 7 parameters in 1 tensor, 1 bucket, 1 rank; each rank holds"
SKIPPED = "rank 0: step 1 is skipped: the mean gradient has Inf or NaN"


def _said(torch_logs: str) -> list[str]:
    environment = {**os.environ, "TORCH_LOGS": torch_logs}
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM], env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == ""
    return [line for line in result.stderr.splitlines() if "rank 0" in line]


def test_torch_logs_turns_the_whole_package_up() -> None:
    built, skipped = _said("+sharded_adamax")
    # torch's own format: level and date, process, file and line, message.
    assert built.startswith("I") and "sharded_adamax/optimizer.py:" in built and BUILT in built
    assert skipped.startswith("W") and "sharded_adamax/engine.py:" in skipped and SKIPPED in skipped


def test_torch_logs_turns_one_room_up_and_warnings_are_seen_in_any_case() -> None:
    (skipped,) = _said("sharded_adamax.checkpoint")
    assert skipped == SKIPPED, "nobody has configured logging for this room: Python's last resort prints it"


def test_what_nobody_hears_is_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    # For thousands of ranks a summary takes seconds.
    monkeypatch.setattr(ShardedAdamax, "summary", lambda self: pytest.fail("a summary was made"))
    logging.getLogger("sharded_adamax").setLevel(logging.WARNING)
    try:
        ShardedAdamax([torch.nn.Parameter(torch.ones(3))])
    finally:
        logging.getLogger("sharded_adamax").setLevel(logging.NOTSET)
