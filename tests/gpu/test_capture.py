"""What only a GPU can tell of ``capturable=True``. On a machine that has one, with a CUDA build of torch:

    python -m pytest tests/gpu

verifies that backward and step of a world of one can be captured in one CUDA graph, that its replays train as those of
torch.optim.Adamax do, to the bit, and that a tensor lr may change between them. Over NCCL it would take several GPUs.
The project's machines have none: nothing here has ever run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sharded_adamax import ShardedAdamax

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: nothing here can be tried")

DEVICE = torch.device("cuda")
NUM_WARM_UP, NUM_REPLAYS = 3, 5


def _train(build: Callable[..., torch.optim.Optimizer], **flags: Any) -> tuple[list[Tensor], list[float]]:
    """Warm up, capture, replay with other data and another lr each time; return the parameters and their steps."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(300, 100), nn.Tanh(), nn.Linear(100, 7)).to(DEVICE)
    lr = torch.tensor(2e-3, device=DEVICE)
    optimizer = build(model.parameters(), lr=lr, capturable=True, weight_decay=0.01, **flags)
    inputs = torch.randn(32, 300, device=DEVICE)

    def iterate() -> None:
        optimizer.zero_grad()
        model(inputs).square().mean().backward()
        optimizer.step()

    side_stream = torch.cuda.Stream()
    side_stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side_stream):
        for _ in range(NUM_WARM_UP):
            iterate()
    torch.cuda.current_stream().wait_stream(side_stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        iterate()
    for index in range(NUM_REPLAYS):
        inputs.copy_(torch.randn(32, 300, device=DEVICE))
        lr.mul_(0.9 if index % 2 else 1.3)
        graph.replay()
    steps = [float(optimizer.state[param]["step"]) for param in model.parameters()]
    return [param.detach() for param in model.parameters()], steps


@pytest.mark.parametrize("fused", [None, True])
def test_replays_of_a_captured_iteration_train_as_those_of_torch(fused: bool | None) -> None:
    ours, steps = _train(ShardedAdamax, fused=fused)
    expected, _ = _train(torch.optim.Adamax, foreach=True)
    assert steps == [NUM_WARM_UP + NUM_REPLAYS] * len(steps), "capturing does not run, each replay does"
    assert all(torch.equal(*pair) for pair in zip(ours, expected, strict=True))
