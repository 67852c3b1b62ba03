"""Draw what one large gradient does to Adamax, for the page on its numerics.

python -m tests.benchmarks.numerics --picture docs/images/numerics.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import torch

from sharded_adamax import ShardedAdamax

SPIKE, SPIKE_AT = 1e8, 1000
NUM_STEPS = 22_000


def train(*, skip_above: float | None) -> tuple[list[float], list[float]]:
    """Give a parameter gradients of 1, but for one spike; returns p and exp_inf after each step."""
    param = torch.nn.Parameter(torch.zeros(1))
    optimizer = ShardedAdamax([param], lr=2e-3)
    optimizer.skip_grad_norm_above = skip_above
    params, exp_infs = [], []
    for step in range(1, NUM_STEPS + 1):
        (param * (SPIKE if step == SPIKE_AT else 1.0)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        params.append(param.item())
        exp_infs.append(optimizer.state[param]["exp_inf"].item())
    return params, exp_infs


def draw(path: Path) -> None:
    plt.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False})
    figure, (upper, lower) = plt.subplots(2, sharex=True, figsize=(9, 5.5), layout="constrained")
    for label, colour, skip_above in (
        ("as torch.optim.Adamax", "#d55e00", None),
        ("skip_grad_norm_above = 100", "#0072b2", 100.0),
    ):
        params, exp_infs = train(skip_above=skip_above)
        upper.semilogy(exp_infs, color=colour, label=label)
        lower.plot(params, color=colour, label=label)
    upper.set_ylabel("exp_inf")
    lower.set_ylabel("the parameter")
    lower.set_xlabel("step; every gradient is 1, but that of step 1,000 is 1e8")
    upper.set_title("One gradient of 1e8 among ones")
    upper.legend(frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--picture", type=Path, default=Path("docs/images/numerics.png"))
    draw(parser.parse_args().picture)
