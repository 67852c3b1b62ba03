"""``fused=True`` on the CPU: bits, no recompilation, and what happens where it cannot be trusted or had."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from sharded_adamax import ShardedAdamax
from sharded_adamax.kernels import Hyper, compiled, notices

NUMEL = 40_000  # large enough not to go to the loop, and a multiple of no vector times threads
FLAGS: list[dict[str, Any]] = [
    {},
    {"weight_decay": 0.1, "maximize": True},
    {"betas": (0.4, 0.99), "eps": 1e-3},
    {"lr": torch.tensor(3e-3)},
]


@pytest.fixture(autouse=True)
def _warnings_are_errors() -> Iterator[None]:
    """A machine without a compiler would make these tests pass with the loop, and say so in a warning."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="fused=True")
        yield


@pytest.fixture
def _forget() -> Iterator[None]:
    """What a test breaks is neither kept nor taken from what was compiled before."""
    kept = dict.fromkeys(notices._said)
    notices._said.clear()
    compiled._compiled_and_checked.cache_clear()
    yield
    compiled._compiled_and_checked.cache_clear()
    notices._said.update(kept)


def _train(param: Tensor, optimizer: torch.optim.Optimizer, num_steps: int, lr_factor: float = 0.9) -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(num_steps):
        param.grad = torch.randn(param.shape, generator=generator, dtype=param.dtype)
        optimizer.step()
        optimizer.zero_grad()
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] * lr_factor


@pytest.mark.timeout(300)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("flags", FLAGS, ids=str)
def test_one_pass_has_the_bits_of_torch(
    flags: dict[str, Any], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[float] = []
    numbers = compiled._numbers

    def spy(dtype: torch.dtype, step: float, hyper: Hyper) -> list[Tensor]:
        calls.append(step)
        return numbers(dtype, step, hyper)

    values = torch.randn(NUMEL + 13, generator=torch.Generator().manual_seed(0), dtype=dtype)
    ours, expected = (torch.nn.Parameter(values.clone()) for _ in range(2))
    optimizer, reference = ShardedAdamax([ours], fused=True, **flags), torch.optim.Adamax([expected], **flags)
    monkeypatch.setattr(compiled, "_numbers", spy)  # what only the compiled kernel is called with
    _train(ours, optimizer, 5)
    assert calls == [1.0, 2.0, 3.0, 4.0, 5.0]
    _train(expected, reference, 5)
    assert torch.equal(ours, expected)
    for key in ("exp_avg", "exp_inf"):
        assert torch.equal(optimizer.full_state_dict()["state"][0][key], reference.state[expected][key])  # type: ignore[index]


@pytest.mark.timeout(300)
def test_schedules_lengths_and_places_in_memory_do_not_compile_again() -> None:
    hyper = Hyper(2e-3, 0.9, 0.999, 1e-8, 0.0, False)
    compiled.prepare(torch.float32, hyper)
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    memory = torch.rand(4, 5 * NUMEL)
    with torch.no_grad():
        for step in range(1, 8):
            numel = NUMEL + 64 * step
            parts = [[row[64 * step * (index + 1) :][:numel]] for index, row in enumerate(memory)]
            compiled.update_(*parts, [float(step)], hyper._replace(lr=1 / step, beta2=1 - 0.1 / step, eps=1e-6 * step))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before


def test_small_tensors_are_not_worth_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[int] = []
    monkeypatch.setattr(compiled, "_one_pass", lambda variant: lambda param, *rest: called.append(param.numel()))
    tensors = [torch.ones(100), torch.ones(NUMEL), torch.ones(1)]
    compiled.update_(tensors, tensors, tensors, tensors, [1.0] * 3, Hyper(1.0, 0.9, 0.999, 1e-8, 0.0, False))
    assert called == [NUMEL]


@pytest.mark.timeout(300)
@pytest.mark.usefixtures("_forget")
def test_other_bits_are_found_and_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    # The compiler as it is by default: it does not make one rounding of a product and a sum, as torch's kernels do.
    monkeypatch.setitem(compiled._OPTIONS, "cpp.enable_floating_point_contract_flag", "off")
    values = torch.randn(NUMEL, generator=torch.Generator().manual_seed(0))
    ours, expected = (torch.nn.Parameter(values.clone()) for _ in range(2))
    with pytest.warns(RuntimeWarning, match=r"fused=True was compiled to other bits than torch's: \d+ numbers"):
        optimizer = ShardedAdamax([ours], fused=True)
    _train(ours, optimizer, 3)  # a second warning would be an error
    _train(expected, torch.optim.Adamax([expected]), 3)
    assert torch.equal(ours, expected)


@pytest.mark.usefixtures("_forget")
def test_sixteen_bits_without_a_master_run_as_without_fused() -> None:
    ours = torch.nn.Parameter(torch.ones(NUMEL, dtype=torch.bfloat16))
    with pytest.warns(RuntimeWarning, match=r"no one-pass kernel for torch.bfloat16 on the CPU"):
        optimizer = ShardedAdamax([ours], fused=True)
    expected = torch.nn.Parameter(torch.ones(NUMEL, dtype=torch.bfloat16))
    _train(ours, optimizer, 2)
    _train(expected, torch.optim.Adamax([expected]), 2)
    assert torch.equal(ours, expected)


WITHOUT_A_COMPILER = """
import logging, os, sys, warnings
import torch
from sharded_adamax import ShardedAdamax
lines = []
handler = logging.Handler()
handler.emit = lambda record: lines.append(record.getMessage())
logging.getLogger("sharded_adamax.kernels").addHandler(handler)
param, other = (torch.nn.Parameter(torch.ones(40_000)) for _ in range(2))
optimizer = ShardedAdamax([{"params": [param]}, {"params": [other], "weight_decay": 0.1}], fused=True)
for _ in range(3):
    param.grad, other.grad = torch.ones(2, 40_000)
    optimizer.step()
assert len(lines) == 1 and "could not compile" in lines[0] and "C++ compiler" in lines[0], lines
expected = torch.nn.Parameter(torch.ones(40_000))
reference = torch.optim.Adamax([expected])
for _ in range(3):
    expected.grad = torch.ones(40_000)
    reference.step()
assert torch.equal(param, expected)
"""


def test_without_a_compiler_the_update_runs_and_says_so_once(tmp_path: Any) -> None:
    environment = {"PATH": "/nowhere", "CXX": "/nowhere/g++", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    environment["PYTHONPATH"] = ":".join(path for path in sys.path if path)
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT_A_COMPILER], capture_output=True, text=True, check=False, env=environment
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stderr.count("RuntimeWarning: fused=True") == 1
