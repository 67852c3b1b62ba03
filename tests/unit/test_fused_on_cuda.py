"""``fused=True`` on CUDA, as far as it goes without a GPU: which kernel is chosen, and how it is launched.

What the compiled kernel does is in tests/ptx; what only a GPU can tell in tests/gpu.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from sharded_adamax.kernels import choose, cuda, foreach, notices

CUDA = torch.device("cuda")


def test_the_one_pass_kernel_is_chosen_only_where_it_is_asked_for() -> None:
    assert choose(None, CUDA, fused=True) is cuda.update_
    assert choose(None, CUDA) is foreach.update_
    assert choose(True, CUDA) is foreach.update_


def test_other_dtypes_go_to_foreach_and_say_so() -> None:
    notices._said.clear()
    with pytest.warns(RuntimeWarning, match=r"fused=True has no one-pass kernel for torch.float64 on CUDA"):
        assert choose(None, CUDA, dtype=torch.float64, fused=True) is foreach.update_


def test_an_accelerator_without_a_kernel_says_so() -> None:
    notices._said.clear()
    with pytest.warns(RuntimeWarning, match="fused=True has no kernel for xpu"):
        assert choose(None, torch.device("xpu"), fused=True) is foreach.update_


WITHOUT_TRITON = """
import sys, warnings
sys.modules["triton"] = None
import torch
from sharded_adamax.kernels import choose, foreach
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    for _ in range(3):
        assert choose(None, torch.device("cuda"), fused=True) is foreach.update_
assert len(said) == 1 and "needs Triton: pip install triton" in str(said[0].message), said
"""

# Triton's interpreter runs the launch as it is written on CPU tensors. It rounds a fused multiply-add twice, so the
# numbers are compared to a few units in the last place; their bits are compared in tests/ptx.
INTERPRETED = """
import torch
from sharded_adamax.kernels import Hyper, cuda
for numel in (1, 1000, 1024, 5000):
    for flags in ({}, {"weight_decay": 0.1, "maximize": True}, {"betas": (0.4, 0.9), "lr": torch.tensor(0.1)}):
        torch.manual_seed(0)
        param = torch.randn(numel)
        expected = torch.nn.Parameter(param.clone())
        reference = torch.optim.Adamax([expected], **flags)
        exp_avg, exp_inf = torch.zeros(2, numel)
        for step in (1.0, 2.0, 3.0):
            gradient = torch.randn(numel)
            expected.grad = gradient.clone()
            reference.step()
            hyper, lists = Hyper.of(reference.param_groups[0]), ([param], [gradient], [exp_avg], [exp_inf])
            if numel == 1000:
                cuda.update_capturable_(*lists, [torch.tensor(step)], hyper)
            else:
                cuda.update_(*lists, [step], hyper)
            assert torch.equal(gradient, expected.grad)
        state = reference.state[expected]
        for ours, of_torch in ((param, expected), (exp_avg, state["exp_avg"]), (exp_inf, state["exp_inf"])):
            torch.testing.assert_close(ours, of_torch, rtol=1e-6, atol=1e-6)
param, gradient, exp_avg, exp_inf = torch.ones(100), torch.full((100,), 6.0), torch.zeros(100), torch.zeros(100)
rounded = torch.zeros(100, dtype=torch.float16)
cuda.launch_(
    param, gradient, exp_avg, exp_inf, step_size=5.0, hyper=Hyper(0.5, 0.9, 0.999, 0.0, 0.0, False), rounded=rounded,
    grad_scale=torch.tensor(0.5),
)
assert exp_inf.eq(3).all() and rounded.eq(0.5).all() and (param - 0.5).abs().max() < 1e-6, (param, rounded)

# The optimizer hands over the clip factor and the parameters of 16 bits.
from sharded_adamax import ShardedAdamax, engine
engine.choose = lambda *_, **__: cuda.update_
values = [torch.randn(numel).half() for numel in (300, 7)]
ours = [torch.nn.Parameter(value.clone()) for value in values]
expected = [torch.nn.Parameter(value.float()) for value in values]
optimizer, reference = ShardedAdamax(ours, master_dtype=torch.float32), torch.optim.Adamax(expected)
for step in range(4):
    for param, other in zip(ours, expected):
        gradient = None if step == 1 and len(param) == 7 else torch.randn(len(param)).half()
        param.grad, other.grad = gradient, None if gradient is None else gradient.float()
    optimizer.clip_grad_norm_(0.1)
    torch.nn.utils.clip_grad_norm_(expected, 0.1)
    optimizer.step()
    reference.step()
for param, other in zip(ours, expected):
    master = optimizer.state[param]["master_param"].whole()
    torch.testing.assert_close(master, other.detach(), rtol=1e-6, atol=1e-6)
    assert torch.equal(param, master.half())
"""


@pytest.mark.parametrize(
    ("program", "variables"),
    [(WITHOUT_TRITON, {}), (INTERPRETED, {"TRITON_INTERPRET": "1"})],
    ids=["without Triton", "interpreted"],
)
def test_in_a_process_of_its_own(program: str, variables: dict[str, str]) -> None:
    environment = {**os.environ, **variables, "PYTHONPATH": ":".join(path for path in sys.path if path)}
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, env=environment
    )
    assert result.returncode == 0, result.stderr[-3000:]
