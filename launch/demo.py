"""Train, kill, resume on more ranks, kill, finish on one; then draw what happened.

`demo.sh` starts this in an environment of its own. Everything is written to demo_out/.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table

from pictures import draw_all, ranks_text
from run_log import Life, RunLog, Step, read_lives

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "demo_out"
RUN = OUT / "run"
LOG = RUN / "metrics.jsonl"
STEPS = 300
CHECKPOINT_EVERY = 50
BUCKET_MIB = 4  # the n-gram tables are larger and get a bucket each; the transformer shares one
LIFE_TIMEOUT_SECONDS = 600
# A step that is computed again on another number of ranks, from the same parameters and the same batch,
# differs only in the order of the sums.
SAME_LOSS_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Plan:
    """What one life is to do."""

    ranks: int
    kill_after_step: int | None  # None: train to the end


PLANS = (Plan(2, kill_after_step=115), Plan(3, kill_after_step=215), Plan(1, kill_after_step=None))


class DemoError(Exception):
    """Something did not go as the demo promises."""


def run_life(number: int, plan: Plan) -> None:
    """Start one life and wait until it has finished or is to be killed."""
    print(f"\nlife {number}: {plan.ranks} rank(s)", flush=True)
    environment = os.environ | {"OMP_NUM_THREADS": str(max(1, min(4, os.cpu_count() or 1) // plan.ranks))}
    process = psutil.Popen(train_command(number, plan), cwd=ROOT, env=environment)
    deadline = time.monotonic() + LIFE_TIMEOUT_SECONDS
    try:
        while process.poll() is None:
            if plan.kill_after_step and last_step(number) >= plan.kill_after_step:
                num_killed = kill_tree(process)
                print(f"\nSIGKILL to {num_killed} processes after step {last_step(number)}", flush=True)
                RunLog(LOG, life=number, world_size=plan.ranks).append("end", how="SIGKILL")
                return
            if time.monotonic() > deadline:
                raise DemoError(f"life {number}: expected an end within {LIFE_TIMEOUT_SECONDS} s, got none")
            time.sleep(0.05)
    finally:
        kill_tree(process)
    if process.returncode != 0:
        raise DemoError(f"life {number}: expected exit status 0, got {process.returncode}; its output is above")
    if plan.kill_after_step:
        raise DemoError(f"life {number}: expected to kill it after step {plan.kill_after_step}, but it had ended")
    RunLog(LOG, life=number, world_size=plan.ranks).append("end", how="finished")


def train_command(number: int, plan: Plan) -> list[str]:
    """Build the command: torchrun for several ranks, plain python for one."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={plan.ranks}"]
    return [
        sys.executable,
        *(launcher if plan.ranks > 1 else []),
        str(ROOT / "launch" / "train.py"),
        f"--out={RUN}",
        f"--steps={STEPS}",
        f"--checkpoint-every={CHECKPOINT_EVERY}",
        "--keep-checkpoints=1",  # nothing reads older ones, and each takes some 150 MB
        f"--bucket-mib={BUCKET_MIB}",
        *(["--resume"] if number > 1 else []),
    ]


def kill_tree(process: psutil.Process) -> int:
    """Kill a launcher and its workers, and say how many that were.

    Workers of torchrun live in sessions of their own: a signal to the launcher's group would miss them.
    """
    if not process.is_running() or process.status() == psutil.STATUS_ZOMBIE:
        return 0
    processes = [process, *process.children(recursive=True)]
    for each in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            each.kill()
    psutil.wait_procs(processes, timeout=10)
    return len(processes)


def last_step(number: int) -> int:
    """Return the last step that a life has finished; 0 before its first."""
    lives = read_lives(LOG)
    return lives[number - 1].last_step if len(lives) == number else 0


def newest_checkpoint_step() -> int:
    """Return the step of the newest checkpoint; 0 where there is none."""
    return int(checkpoints()[-1].name) if checkpoints() else 0


def checkpoints() -> list[Path]:
    """List the checkpoints, oldest first."""
    return sorted(path for path in (RUN / "checkpoints").glob("*") if path.name.isdigit())


def check_life(lives: list[Life], plan: Plan, resumed_step: int) -> None:
    """Compare the newest life with what was promised."""
    life = lives[-1]
    if life.world_size != plan.ranks or len(life.held) != plan.ranks:
        raise DemoError(f"life {life.number}: expected {plan.ranks} ranks, got {life.world_size}")
    if life.start_step != resumed_step:
        raise DemoError(
            f"life {life.number}: expected to start from the checkpoint of step {resumed_step}, "
            f"got step {life.start_step}"
        )
    before, after = same_step_losses(lives, life)
    if abs(before - after) > SAME_LOSS_TOLERANCE:
        raise DemoError(f"life {life.number}: expected the loss {before} of step {resumed_step + 1} again, got {after}")


def same_step_losses(lives: list[Life], life: Life) -> tuple[float, float]:
    """Return the loss of a life's first step as the life before it had computed it, and as this one did."""
    first = life.steps[0]
    if life.number == 1:
        return first.loss, first.loss
    earlier = [step.loss for step in lives[life.number - 2].steps if step.step == first.step]
    if not earlier:
        raise DemoError(f"life {life.number - 1}: expected it to be killed past the checkpoint, got no step to compare")
    return earlier[0], first.loss


def check_end(lives: list[Life]) -> None:
    """Check that the run is complete and has learned."""
    if lives[-1].last_step != STEPS:
        raise DemoError(f"expected {STEPS} steps, got {lives[-1].last_step}")
    first, last = mean_loss(lives[0].steps[:10]), mean_loss(lives[-1].steps[-10:])
    if not last < first:
        raise DemoError(f"expected the loss to fall, got {first:.3f} in the first ten steps, {last:.3f} in the last")


def mean_loss(steps: list[Step]) -> float:
    """Average the loss of some steps; each step has another batch, so that one alone says little."""
    return sum(step.loss for step in steps) / len(steps)


def print_summary(lives: list[Life], seconds: list[float], pictures: list[Path]) -> None:
    """Print what happened in each life, and where the pictures are."""
    table = Table(title="What happened", title_justify="left")
    for heading in ("life", "ranks", "steps", "ended by", "loss *", "seconds", "MiB held per rank"):
        table.add_column(heading)
    for life, life_seconds in zip(lives, seconds, strict=True):
        table.add_row(
            str(life.number),
            str(life.world_size),
            f"{life.start_step + 1} to {life.last_step}",
            " ".join(life.endings),
            f"{mean_loss(life.steps[:10]):.3f} to {mean_loss(life.steps[-10:]):.3f}",
            f"{life_seconds:.0f}",
            f"{max(held.total for held in life.held) / 2**20:.1f}",
        )
    unsharded_mib = 16 * lives[0].num_parameters / 2**20
    table.add_section()
    table.add_row("", "any", "DDP + torch.optim.Adamax", "", "", "", f"{unsharded_mib:.1f} (computed)")
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print()
    console.print(table)
    print("* mean of the first ten steps of the life, and of its last ten")
    for earlier, life in pairwise(lives):
        before, after = same_step_losses(lives, life)
        print(
            f"Step {life.start_step + 1} was computed twice: loss {before:.6f} on {ranks_text(earlier)} "
            f"before the kill, {after:.6f} on {ranks_text(life)} after it."
        )
    print("Pictures:")
    for path in pictures:
        print(f"  {path}")


def main() -> int:
    """Run the demo; returns the exit status."""
    # Without this a SIGTERM would end the demo and leave the workers behind, in their own sessions.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("the demo was terminated"))
    shutil.rmtree(RUN, ignore_errors=True)
    seconds = []
    try:
        for number, plan in enumerate(PLANS, start=1):
            resumed_step = newest_checkpoint_step()
            began = time.monotonic()
            run_life(number, plan)
            seconds.append(time.monotonic() - began)
            check_life(read_lives(LOG), plan, resumed_step)
        lives = read_lives(LOG)
        check_end(lives)
    except DemoError as error:
        print(f"\nthe demo failed: {error}", file=sys.stderr)
        return 1
    print_summary(lives, seconds, draw_all(LOG, OUT))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
