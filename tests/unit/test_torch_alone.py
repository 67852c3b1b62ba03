"""The package needs torch and nothing else: not even numpy, which torch itself can do without."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

PROGRAM = """
import sys
others = "numpy rich tqdm psutil matplotlib safetensors mpi4py triton accelerate transformers lightning"
for name in others.split():
    sys.modules[name] = None  # an import of it raises
import torch
from sharded_adamax import CheckpointManager, ShardedAdamax, load, plan, save

model = torch.nn.Linear(7, 5)
optimizer = ShardedAdamax(model.named_parameters())
for _ in range(2):
    model(torch.ones(3, 7)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
save(sys.argv[1] + "/one", model, optimizer, extra={"epoch": 3})
assert load(sys.argv[1] + "/one", model, optimizer, restore_rng=True) == {"epoch": 3}
manager = CheckpointManager(sys.argv[1] + "/many")
manager.save(2, model, optimizer)
assert manager.restore(model, optimizer) == (2, None)
assert plan(model).rows[0].sharded_adamax.state == optimizer.held_bytes().state
assert optimizer.full_state_dict()["state"][0]["step"] == 2
assert "40 parameters in 2 tensors" in str(optimizer.summary())
assert optimizer.metrics()["shard_exp_inf_max"] > 0
try:
    optimizer.summary().draw("buckets.png")
except ModuleNotFoundError as error:
    assert str(error) == "a picture of a summary needs matplotlib: pip install 'sharded-adamax[demo]'"
else:
    raise AssertionError("drew without matplotlib")
"""


def test_training_saving_restoring_and_looking_at_it_need_torch_alone(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
