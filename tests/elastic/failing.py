"""train.py, but one rank raises in one step, as it may when a disk or the code of a batch fails."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "launch"))
import train  # type: ignore[import-not-found]

MESSAGE = "no such row in the table of users"
BAD_RANK = 1
BAD_STEP = 5

train_one_step = train.train_one_step
num_calls = 0


def fail_once(training: object, windows: Tensor, share: float) -> Tensor:
    global num_calls
    num_calls += 1
    if num_calls == BAD_STEP and os.environ["RANK"] == str(BAD_RANK):
        Path(os.environ["FAILED_AT"]).write_text(str(time.time()))
        raise KeyError(MESSAGE)
    loss: Tensor = train_one_step(training, windows, share)
    return loss


train.train_one_step = fail_once

if __name__ == "__main__":
    train.main()
