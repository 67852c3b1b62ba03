"""Train a deep VAE on scikit-learn's digits with Adamax as NVAE sets it, sharded, and draw what it has learned.

    python launch/vae.py --out vae_run
    torchrun --standalone --nproc-per-node=2 launch/vae.py --out vae_run
    torchrun --standalone --nproc-per-node=3 launch/vae.py --out vae_run --steps 1200

A run goes on from its newest checkpoint, at any number of ranks, and draws OUT/digits.png at its end.

Deep VAEs are where Adamax is at home (NVAE, VDVAE's relatives): a large learning rate, a large eps, gradients that are
clipped, and steps with a wild gradient skipped. A spike that got through would stay in exp_inf for thousands of steps.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # files only: no window system is needed

import matplotlib.pyplot as plt
import torch
import torch.distributed as dist
import torch.nn.functional as F
from matplotlib.axes import Axes
from sklearn.datasets import load_digits
from torch import Tensor
from torch.distributed.elastic.multiprocessing.errors import record
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

from digits_vae import MAX_COUNT, DigitsVae, Terms, VaeSizes
from sharded_adamax import CheckpointManager, DistributedContext, ShardedAdamax, init_distributed
from train import mean_over_ranks, positive, say

NUM_TEST_IMAGES = 297  # the last of 1,797; the file is in no order
WARMUP_SHARE = 0.3  # of the steps, in which the weight of the divergence grows from 0 to 1, as in NVAE
PICTURE_ROWS, PICTURE_COLUMNS = 6, 12
SAMPLE_TEMPERATURE = 0.8  # of the noise that samples are drawn with; 1.0 is the model itself


@dataclass(frozen=True)
class Options:
    """The command line."""

    out: Path
    steps: int
    batch: int
    lr: float
    eps: float
    weight_decay: float
    clip: float
    skip_above: float
    seed: int
    checkpoint_every: int
    width: int
    groups: int
    latents: int
    threads: int | None


@dataclass(frozen=True)
class Training:
    """What has to be saved and loaded together, and the images."""

    model: DigitsVae
    optimizer: ShardedAdamax
    scheduler: LambdaLR
    train_images: Tensor  # (1500, 64), counts from 0 to 16
    test_images: Tensor  # (297, 64)


def build(options: Options, context: DistributedContext) -> Training:
    """Make model, optimizer and schedule; every rank then has the parameters of rank 0."""
    images = torch.from_numpy(load_digits().data).float().to(context.device)
    torch.manual_seed(options.seed)
    model = DigitsVae(VaeSizes(options.width, options.groups, options.latents)).to(context.device)
    optimizer = ShardedAdamax(
        model.named_parameters(),
        lr=options.lr,
        eps=options.eps,
        weight_decay=options.weight_decay,
        bucket_mib=1,  # the model is small: several buckets show that there are some
        skip_nonfinite=True,
    )
    optimizer.skip_grad_norm_above = options.skip_above
    scheduler = LambdaLR(optimizer, lambda step: warmup_then_cosine(step, options.steps))
    return Training(model, optimizer, scheduler, images[:-NUM_TEST_IMAGES], images[-NUM_TEST_IMAGES:])


def train(training: Training, options: Options, context: DistributedContext) -> None:
    """Train from the first step, or from the newest checkpoint, to the last step."""
    checkpoints = CheckpointManager(options.out / "checkpoints", keep_last=2)
    start_step = resume(checkpoints, training)
    say(context, f"{context.world_size} rank(s), from step {start_step} to {options.steps}")

    steps = range(start_step + 1, options.steps + 1)
    bar = tqdm(steps, initial=start_step, total=options.steps, unit="step", mininterval=0.5, disable=context.rank != 0)
    for step in bar:
        images, noise = my_part_of_batch(training, step, options, context)
        warmup = min(1.0, step / (WARMUP_SHARE * options.steps))
        # The mean over ranks of these is the mean over the batch, also where the ranks cannot share it evenly.
        loss, norm = train_one_step(
            training,
            images,
            noise,
            divergence_weight=warmup,
            rows_per_rank=options.batch / context.world_size,
            max_norm=options.clip,
        )
        mean_loss = mean_over_ranks(loss, context)
        bar.set_postfix_str(f"loss {mean_loss:.1f} nats, gradient norm {norm.item():.0f}", refresh=False)
        if step % options.checkpoint_every == 0 or step == options.steps:
            extra = {"scheduler": training.scheduler.state_dict()}
            checkpoints.save(step, training.model, training.optimizer, extra)
    checkpoints.close()


def resume(checkpoints: CheckpointManager, training: Training) -> int:
    """Load the newest whole checkpoint, which any number of ranks wrote; returns the number of steps done."""
    restored = checkpoints.restore(training.model, training.optimizer)
    if restored is None:
        return 0
    step, extra = restored
    training.scheduler.load_state_dict(extra["scheduler"])
    return step


def train_one_step(
    training: Training,
    images: Tensor,
    noise: Tensor,
    *,
    divergence_weight: float,
    rows_per_rank: float,
    max_norm: float,
) -> tuple[Tensor, Tensor]:
    """Run forward, backward and update.

    Returns:
        This rank's part of the mean loss over ranks, and the norm of the mean gradient before clipping; both 0-d.
    """
    terms: Terms = training.model(images, noise)
    loss = (terms.reconstruction + divergence_weight * terms.divergence).sum() / rows_per_rank
    loss.backward()  # type: ignore[no-untyped-call]
    norm = training.optimizer.clip_grad_norm_(max_norm)
    training.optimizer.step()  # skipped, on all ranks, where the norm is not finite or too large
    training.scheduler.step()
    training.optimizer.zero_grad()
    return loss.detach(), norm


def my_part_of_batch(
    training: Training, step: int, options: Options, context: DistributedContext
) -> tuple[Tensor, Tensor]:
    """Take this rank's rows of the global batch: images (rows, 64) and noise (rows, groups, latents).

    Images and noise are drawn for all ranks together, so that they are the same at every number of ranks.
    """
    generator = torch.Generator().manual_seed(options.seed * 1_000_003 + step)
    rows = torch.randint(len(training.train_images), (options.batch,), generator=generator)
    noise = torch.randn(options.batch, options.groups, options.latents, generator=generator)
    mine = slice(context.rank, None, context.world_size)
    return training.train_images[rows[mine]], noise[mine].to(context.device)


def warmup_then_cosine(step: int, total_steps: int) -> float:
    """Return the factor of the learning rate: up to 1 in twenty steps, then down to 0.01 along a cosine."""
    progress = min(step / total_steps, 1.0)
    return min(1.0, (step + 1) / 20) * (0.01 + 0.495 * (1.0 + math.cos(math.pi * progress)))


def finish(training: Training, options: Options, context: DistributedContext) -> None:
    """Say how good the model is on images that it has not seen, and draw them."""
    terms = loss_on_test_images(training)
    say(
        context,
        f"test images: {terms.reconstruction + terms.divergence:.1f} nats, of which {terms.divergence:.1f} divergence; "
        f"{training.optimizer.skipped_steps} steps skipped in this life",
    )
    if context.rank == 0:
        draw_digits(training, options.out / "digits.png")
        print(f"picture: {options.out / 'digits.png'}")


@torch.no_grad()
def loss_on_test_images(training: Training) -> Terms:
    """Return the mean terms of the loss on images that were not trained on: two 0-d tensors, in nats per image."""
    model, images = training.model, training.test_images
    noise = torch.randn(
        len(images), model.sizes.groups, model.sizes.latents, generator=torch.Generator().manual_seed(0)
    )
    terms: Terms = model(images, noise.to(images.device))
    return Terms(terms.reconstruction.mean(), terms.divergence.mean())


@torch.no_grad()
def draw_digits(training: Training, path: Path) -> None:
    """Draw test digits with what the model makes of them, and samples."""
    model, (rows, columns) = training.model, (PICTURE_ROWS, PICTURE_COLUMNS)
    noise = torch.randn(
        rows * columns, model.sizes.groups, model.sizes.latents, generator=torch.Generator().manual_seed(0)
    ).to(training.test_images.device)
    samples = torch.sigmoid(model.decode(SAMPLE_TEMPERATURE * noise)[0])
    images = training.test_images[: rows // 2 * columns]
    means = torch.sigmoid(model.decode(torch.zeros_like(noise[: len(images)]), images)[0])
    # Each row of test digits, and under it the row of their reconstructions.
    pairs = torch.stack([(images / MAX_COUNT).view(-1, columns, 64), means.view(-1, columns, 64)], dim=1)

    figure, panels = plt.subplots(1, 2, figsize=(12, 3.4), layout="constrained")
    draw_panel(panels[0], pairs.flatten(0, 2), "test digits, each above its reconstruction")
    draw_panel(panels[1], samples, f"samples (temperature {SAMPLE_TEMPERATURE})")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_panel(axes: Axes, images: Tensor, title: str) -> None:
    """Draw (rows * columns, 64) images from 0 to 1 in a grid, with a gap between neighbours."""
    tiles = F.pad(images.view(PICTURE_ROWS, PICTURE_COLUMNS, 8, 8), (0, 1, 0, 1), value=0.35)
    axes.imshow(tiles.permute(0, 2, 1, 3).flatten(0, 1).flatten(1, 2).cpu(), cmap="gray", vmin=0, vmax=1)
    axes.set_axis_off()
    axes.set_title(title)


def parse_options() -> Options:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="Train a deep VAE on digits with sharded Adamax state, on any number of ranks.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--out", type=Path, default=Path("vae_run"), help="directory for checkpoints/ and digits.png")
    add("--steps", type=positive, default=800, help="training steps in all, over all lives of the run")
    add("--batch", type=positive, default=64, help="images per step over all ranks")
    add("--lr", type=float, default=1e-2, help="learning rate after the warmup")
    add("--eps", type=float, default=1e-3, help="eps of Adamax")
    add("--weight-decay", type=float, default=3e-4, help="L2 penalty")
    add("--clip", type=float, default=200, help="largest gradient norm")
    add("--skip-above", type=float, default=500, help="skip steps whose gradient norm is larger, before clipping")
    add("--seed", type=int, default=0, help="seed of the parameters, the batches and the noise")
    add("--checkpoint-every", type=positive, default=200, help="steps between checkpoints")
    add("--width", type=positive, default=128, help="size of the hidden states")
    add("--groups", type=positive, default=5, help="groups of latents, one above the other")
    add("--latents", type=positive, default=6, help="latents in each group")
    add("--threads", type=positive, default=None, help="CPU threads per rank; None: what torch chooses")
    return Options(**vars(parser.parse_args()))


@record  # torchrun then names the error of the rank that failed first
def main() -> None:
    """Run the program on this rank."""
    options = parse_options()
    if options.threads:
        torch.set_num_threads(options.threads)
    context = init_distributed()
    training = build(options, context)
    train(training, options, context)
    finish(training, options, context)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
