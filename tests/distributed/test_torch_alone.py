"""The package needs torch and nothing else: not even numpy, which torch itself can do without."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import os
import sys
others = "numpy rich tqdm psutil matplotlib safetensors mpi4py triton accelerate transformers lightning"
for name in others.split():
    sys.modules[name] = None  # an import of it raises
import torch
import torch.distributed as dist
from sharded_adamax import CheckpointManager, ShardedAdamax, load, plan, save

folder, world_size = sys.argv[1], int(sys.argv[2])
child = os.fork() if world_size == 2 else None
rank = 1 if child == 0 else 0
if world_size == 2:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
model = torch.nn.Linear(70, 50)
optimizer = ShardedAdamax(model.named_parameters())
for _ in range(2):
    model(torch.ones(3, 70)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
save(f"{folder}/one", model, optimizer, extra={"epoch": 3})
assert load(f"{folder}/one", model, optimizer, restore_rng=True) == {"epoch": 3}
manager = CheckpointManager(f"{folder}/many")
manager.save(2, model, optimizer)
assert manager.restore(model, optimizer) == (2, None)
full = optimizer.full_state_dict()
assert "3550 parameters in 2 tensors" in str(optimizer.summary()).replace(",", "")
assert optimizer.metrics()["shard_exp_inf_max"] > 0
if world_size == 1:
    assert plan(model).rows[0].sharded_adamax.state == optimizer.held_bytes().state
    try:
        optimizer.summary().draw("buckets.png")
    except ModuleNotFoundError as error:
        assert str(error) == "a picture of a summary needs matplotlib: pip install 'sharded-adamax[demo]'"
    else:
        raise AssertionError("matplotlib was found")
assert rank == 1 or full["state"][0]["step"] == 2
if child:
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.parametrize("world_size", [1, 2])
def test_training_saving_and_restoring_need_torch_alone(world_size: int, tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM, str(tmp_path), str(world_size)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
