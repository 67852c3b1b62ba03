"""Train a byte-level language model on the standard library's source, with sharded Adamax state.

One program for every launcher and every number of ranks:

    python launch/train.py --out run
    torchrun --standalone --nproc-per-node=2 launch/train.py --out run
    torchrun --standalone --nproc-per-node=3 launch/train.py --out run --resume
    mpirun -n 2 python launch/train.py --out run --backend mpi
    srun -n 2 python launch/train.py --out run

A run can go on at any number of ranks. On the CPU, with as many ranks and threads as before, it goes on bit for bit.
README.md beside this file says which launcher to take, and what each does when a rank dies.
"""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.elastic.multiprocessing.errors import record
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

from byte_model import ByteModel, ModelSizes
from run_log import RunLog, layout_as_json
from sharded_adamax import CheckpointManager, DistributedContext, ShardedAdamax, init_distributed
from stdlib_text import Text, read_stdlib_text, sample_windows


@dataclass(frozen=True)
class Options:
    """The command line."""

    out: Path
    resume: bool
    steps: int
    batch: int
    context: int
    lr: float
    seed: int
    checkpoint_every: int
    keep_checkpoints: int
    async_save: bool
    bucket_mib: float
    width: int
    layers: int
    heads: int
    table_rows: int
    threads: int | None
    backend: str | None
    timeout: float | None


class RefusedError(Exception):
    """What was asked for cannot be done, on any rank; the message says what to change."""


@dataclass(frozen=True)
class Training:
    """What has to be saved and loaded together."""

    model: ByteModel
    optimizer: ShardedAdamax
    scheduler: LambdaLR


def train(options: Options, context: DistributedContext) -> None:
    """Train from the first step, or from the newest checkpoint, to the last step."""
    check_options(options, context.world_size)
    checkpoints = open_checkpoints(options)
    text = read_stdlib_text()
    say(context, f"text: {text.num_files} files, {text.data.numel():,} bytes, sha256 {text.sha256}")

    training = build(options, context)
    start_step = resume(checkpoints, training, text)
    say(context, f"{context.world_size} rank(s), from step {start_step} to {options.steps}")
    log = start_log(options, context, training, start_step)

    bar = tqdm(
        range(start_step + 1, options.steps + 1),
        initial=start_step,
        total=options.steps,
        unit="step",
        mininterval=0.5,
        disable=context.rank != 0,
    )
    for step in bar:
        began = time.perf_counter()
        windows = my_part_of_batch(text, step, options, context)
        # Where the ranks cannot share the batch evenly, the mean over ranks would count a row of a small part more.
        share = len(windows) * context.world_size / options.batch
        loss = train_one_step(training, windows, share)
        mean_loss = mean_over_ranks(loss, context)
        seconds = time.perf_counter() - began

        rate = options.batch * options.context / seconds
        status = f"loss {mean_loss:.3f}, {rate:,.0f} tokens/s, {seconds * 1e3:.0f} ms/step"
        bar.set_postfix_str(status, refresh=False)
        if step == start_step + 1:
            log_held_bytes(log, training.optimizer, context)
        if log:
            log.append("step", step=step, loss=mean_loss, seconds=seconds, tokens_per_second=rate)
        if step % options.checkpoint_every == 0 or step == options.steps:
            save_checkpoint(checkpoints, training, text, step)
    checkpoints.close()


def build(options: Options, context: DistributedContext) -> Training:
    """Make model, optimizer and schedule; every rank then has the parameters of rank 0."""
    torch.manual_seed(options.seed)
    sizes = ModelSizes(
        context=options.context,
        width=options.width,
        layers=options.layers,
        heads=options.heads,
        table_rows=options.table_rows,
    )
    model = ByteModel(sizes).to(context.device)
    # Not wrapped in DDP: the optimizer averages the gradients itself, and each rank receives its shard only.
    optimizer = ShardedAdamax(model.named_parameters(), lr=options.lr, bucket_mib=options.bucket_mib)
    scheduler = LambdaLR(optimizer, lambda step: warmup_then_cosine(step, options.steps))
    return Training(model, optimizer, scheduler)


def train_one_step(training: Training, windows: Tensor, share: float) -> Tensor:
    """Run forward, backward and update; returns this rank's part of the mean loss over ranks.

    Args:
        share: Rows of this rank over the mean rows of a rank: 1.0, which changes no bit, where all have as many.
    """
    loss: Tensor = training.model(windows[:, :-1], windows[:, 1:]) * share
    loss.backward()  # type: ignore[no-untyped-call]
    training.optimizer.step()
    training.scheduler.step()
    training.optimizer.zero_grad()
    return loss.detach()


def my_part_of_batch(text: Text, step: int, options: Options, context: DistributedContext) -> Tensor:
    """Take this rank's rows of the global batch: (batch / world size, rounded up or down, context + 1)."""
    windows = sample_windows(text.data, step=step, seed=options.seed, batch=options.batch, context=options.context)
    return windows.tensor_split(context.world_size)[context.rank].to(context.device)


def mean_over_ranks(loss: Tensor, context: DistributedContext) -> float:
    """Average a scalar over all ranks."""
    if context.world_size > 1:
        dist.all_reduce(loss)
    return loss.item() / context.world_size


def warmup_then_cosine(step: int, total_steps: int) -> float:
    """Return the factor of the learning rate: up to 1 in ten steps, then down to 0.1 along a cosine."""
    progress = min(step / total_steps, 1.0)
    return min(1.0, (step + 1) / 10) * (0.1 + 0.45 * (1.0 + math.cos(math.pi * progress)))


def open_checkpoints(options: Options) -> CheckpointManager:
    """Open OUT/checkpoints; a run that has some already is gone on with only if asked to."""
    manager = CheckpointManager(
        options.out / "checkpoints", keep_last=options.keep_checkpoints, async_save=options.async_save
    )
    if manager.steps() and not options.resume:
        raise RefusedError(
            f"expected no checkpoints in {manager.root}, got {len(manager.steps())}; "
            "pass --resume to go on from the newest, or another --out"
        )
    return manager


def save_checkpoint(checkpoints: CheckpointManager, training: Training, text: Text, step: int) -> None:
    """Save everything that a resume needs; every rank writes its own shard of the state."""
    extra = {"scheduler": training.scheduler.state_dict(), "text_sha256": text.sha256}
    checkpoints.save(step, training.model, training.optimizer, extra)


def resume(checkpoints: CheckpointManager, training: Training, text: Text) -> int:
    """Load the newest whole checkpoint, which any number of ranks wrote; returns the number of steps done."""
    restored = checkpoints.restore(training.model, training.optimizer)
    if restored is None:
        return 0
    step, extra = restored
    if extra["text_sha256"] != text.sha256:
        raise RefusedError(
            f"expected the text that {checkpoints.root} was trained on (sha256 {extra['text_sha256']}), "
            f"got {text.sha256}; resume with the same Python version"
        )
    training.scheduler.load_state_dict(extra["scheduler"])
    return step


def start_log(options: Options, context: DistributedContext, training: Training, start_step: int) -> RunLog | None:
    """Open OUT/metrics.jsonl on rank 0 and write which rank owns what."""
    if context.rank != 0:
        return None
    options.out.mkdir(parents=True, exist_ok=True)
    log = RunLog.next_life(options.out / "metrics.jsonl", world_size=context.world_size)
    log.append(
        "start",
        start_step=start_step,
        total_steps=options.steps,
        num_parameters=sum(param.numel() for param in training.model.parameters()),
        buckets=layout_as_json(training.optimizer.layout),
    )
    return log


def log_held_bytes(log: RunLog | None, optimizer: ShardedAdamax, context: DistributedContext) -> None:
    """Collect from every rank how many bytes it holds, and write them to the log."""
    mine = optimizer.held_bytes()._asdict()
    ranks: list[dict[str, int]] = [mine] * context.world_size
    if context.world_size > 1:
        dist.all_gather_object(ranks, mine)
    if log:
        log.append("held", ranks=ranks)


def say(context: DistributedContext, message: str) -> None:
    """Print on rank 0."""
    if context.rank == 0:
        print(message, flush=True)


def check_options(options: Options, world_size: int) -> None:
    """Refuse what cannot work before anything is built, on every rank alike."""
    if options.batch < world_size:
        raise RefusedError(
            f"expected --batch to be at least the world size, got --batch {options.batch} for "
            f"{world_size} ranks; try --batch {world_size}"
        )
    if options.width % options.heads:
        raise RefusedError(
            f"expected --width to be a multiple of --heads, got --width {options.width} for "
            f"{options.heads} heads; change one of them"
        )


def positive(value: str) -> int:
    """Parse an integer of at least 1."""
    number = int(value)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {number}")
    return number


def positive_seconds(value: str) -> float:
    """Parse a time of more than nothing."""
    seconds = float(value)
    if not 0 < seconds < math.inf:
        raise argparse.ArgumentTypeError(f"expected more than 0 seconds, got {value}")
    return seconds


def parse_options() -> Options:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="Train a byte-level language model with sharded Adamax state, on any number of ranks.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--out", type=Path, default=Path("run"), help="directory for metrics.jsonl and checkpoints/")
    add("--resume", action="store_true", help="go on from the newest checkpoint, if there is one")
    add("--steps", type=positive, default=300, help="training steps in all, over all lives of the run")
    add("--batch", type=positive, default=24, help="windows per step over all ranks")
    add("--context", type=positive, default=128, help="bytes per window")
    add("--lr", type=float, default=6e-3, help="learning rate after the warmup")
    add("--seed", type=int, default=0, help="seed of the parameters and of the batches")
    add("--checkpoint-every", type=positive, default=50, help="steps between checkpoints")
    add("--keep-checkpoints", type=positive, default=3, help="how many of the newest checkpoints stay")
    add("--async-save", action="store_true", help="write checkpoints in the background")
    add("--bucket-mib", type=float, default=25, help="size of a gradient bucket in MiB")
    add("--width", type=positive, default=128, help="size of the embeddings and hidden states")
    add("--layers", type=positive, default=2, help="transformer blocks")
    add("--heads", type=positive, default=4, help="attention heads")
    add("--table-rows", type=positive, default=16384, help="rows of each n-gram table")
    add("--threads", type=positive, default=None, help="CPU threads per rank; None: what torch chooses")
    add("--backend", default=None, help="how tensors travel: gloo, nccl, or mpi under mpirun; None: by the device")
    add("--timeout", type=positive_seconds, default=None, help="seconds to wait for other ranks; None: 30 minutes")
    return Options(**vars(parser.parse_args()))


# torchrun sums up a failed job at its end. With the traceback that `record` leaves it can name the error of the rank
# that failed first; what the other ranks then say of lost connections scrolls by above.
@record
def main() -> None:
    """Run the program on this rank."""
    options = parse_options()
    if options.threads:
        torch.set_num_threads(options.threads)
    context = init_distributed(options.backend, timeout_s=options.timeout)
    train(options, context)
    # Only here: a rank that failed must end at once, and taking a group down may wait for the others.
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
