"""Train the byte model of launch/ in float32 and in bfloat16, with and without a master, and compare the losses.

    python -m tests.benchmarks.precision --steps 300 --seeds 3

The noise is measured, not assumed: it is how far float32 runs from different seeds are apart.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

LAUNCH = Path(__file__).resolve().parents[2] / "launch"
BATCH = 16
MODES: dict[str, dict[str, Any]] = {
    "float32": {"dtype": torch.float32},
    "bfloat16 with a float32 master": {"dtype": torch.bfloat16, "master_dtype": torch.float32},
    "bfloat16 alone": {"dtype": torch.bfloat16},
}


@dataclass(frozen=True)
class Sizes:
    """The model and the data; the defaults are those of a test, not of launch/train.py."""

    context: int = 32
    width: int = 32
    layers: int = 1
    heads: int = 2
    table_rows: int = 1024


@dataclass(frozen=True)
class Outcome:
    """One run on this rank."""

    final_loss: float  # nats per byte, mean of the last 30 steps over all ranks
    bytes_per_parameter: dict[str, float]  # held by this rank, by kind


def train(mode: str, seed: int, num_steps: int, sizes: Sizes) -> Outcome:
    """Train on the ranks of the default process group."""
    if str(LAUNCH) not in sys.path:
        sys.path.insert(0, str(LAUNCH))
    from byte_model import ByteModel, ModelSizes
    from sharded_adamax import ShardedAdamax
    from stdlib_text import read_stdlib_text, sample_windows

    settings = dict(MODES[mode])
    text = read_stdlib_text()
    torch.manual_seed(seed)
    model = ByteModel(ModelSizes(**asdict(sizes))).to(settings.pop("dtype"))
    optimizer = ShardedAdamax(model.named_parameters(), lr=6e-3, bucket_mib=0.05, **settings)
    losses = []
    for step in range(num_steps):
        for group in optimizer.param_groups:
            group["lr"] = 6e-3 * min(1.0, (step + 1) / 10) * (1 - 0.9 * step / num_steps)
        windows = sample_windows(text.data, step=step, seed=seed, batch=BATCH, context=sizes.context)
        mine = windows.chunk(dist.get_world_size())[dist.get_rank()]
        loss = model(mine[:, :-1], mine[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach().float())
    final = torch.stack(losses[-30:]).mean()
    dist.all_reduce(final)
    num_parameters = sum(param.numel() for param in model.parameters())
    held = optimizer.held_bytes()._asdict()
    return Outcome(final.item() / dist.get_world_size(), {kind: held[kind] / num_parameters for kind in held})


def main() -> None:
    """Run every mode for every seed in turn, and print what came out."""
    from tests.distributed.pool import Pool

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--table-rows", type=int, default=16384)
    options = parser.parse_args()
    sizes = Sizes(context=64, width=options.width, layers=2, heads=4, table_rows=options.table_rows)
    print(
        f"torch {torch.__version__}, Python {platform.python_version()}, {platform.processor() or platform.machine()}"
    )
    print(f"{options.ranks} ranks, {options.steps} steps, batch {BATCH} windows, {sizes}")
    pool = Pool()
    found: dict[str, list[float]] = {mode: [] for mode in MODES}
    for seed in range(options.seeds):
        for mode in MODES:
            outcomes = pool.run(options.ranks, train, mode, seed, options.steps, sizes, timeout_s=1800)
            found[mode].append(outcomes[0].final_loss)
            held = ", ".join(f"{kind} {number:.3f}" for kind, number in outcomes[0].bytes_per_parameter.items())
            print(
                f"seed {seed}, {mode}: {outcomes[0].final_loss:.4f} nats per byte; bytes per parameter: {held}",
                flush=True,
            )
    pool.close()
    spread = max(found["float32"]) - min(found["float32"])
    for mode, losses in found.items():
        away = [loss - exact for loss, exact in zip(losses, found["float32"], strict=True)]
        apart = f"from float32 of the same seed {min(away):+.4f} to {max(away):+.4f}"
        print(f"{mode}: median {statistics.median(losses):.4f}, {apart}")
    print(f"float32 from seed to seed: {spread:.4f}")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
