"""Each kernel has the bits of torch.optim.Adamax for the same flags, on slices of any flat cut."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sharded_adamax.kernels import Hyper, Kernel, eager, foreach

KERNELS = {"eager": (eager.update_, False), "foreach": (foreach.update_, True)}
FLAGS: list[dict[str, Any]] = [
    {},
    {"weight_decay": 0.1},
    {"maximize": True},
    {"maximize": True, "weight_decay": 0.1},
    {"betas": (0.0, 0.5)},
    {"betas": (0.4, 0.0)},  # beta1 < 0.5 takes the other branch of lerp
    {"eps": 1e-3, "lr": 1e-2},
    {"lr": torch.tensor(3e-3)},
    {"lr": torch.tensor([3e-3])},
]


def _cut(tensor: Tensor) -> list[Tensor]:
    return [tensor[:64], tensor[64:704], tensor[704:]]


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("flags", FLAGS, ids=str)
def test_kernel_has_the_bits_of_torch(name: str, dtype: torch.dtype, flags: dict[str, Any]) -> None:
    update_, use_foreach = KERNELS[name]
    generator = torch.Generator().manual_seed(0)
    param = torch.randn(1000, generator=generator, dtype=dtype)
    expected = torch.nn.Parameter(param.clone())
    exp_avg, exp_inf = torch.zeros_like(param), torch.zeros_like(param)
    reference = torch.optim.Adamax([expected], foreach=use_foreach, **flags)
    hyper = Hyper.of(reference.param_groups[0])
    for step in range(1, 21):
        gradient = torch.randn(1000, generator=generator, dtype=dtype) * 10.0 ** (step % 7 - 3)
        gradient[::17] = 0
        expected.grad = gradient.clone()
        reference.step()
        parts = [_cut(tensor) for tensor in (param, gradient, exp_avg, exp_inf)]
        update_(*parts, [float(step)] * 3, hyper)
        state = reference.state[expected]
        assert torch.equal(param, expected), f"step {step}"
        assert torch.equal(exp_avg, state["exp_avg"])
        assert torch.equal(exp_inf, state["exp_inf"])


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_low_precision_has_the_bits_of_torch_when_cut_at_multiples_of_64(name: str, dtype: torch.dtype) -> None:
    update_, use_foreach = KERNELS[name]
    generator = torch.Generator().manual_seed(0)
    param = torch.randn(1000, generator=generator).to(dtype)
    expected = torch.nn.Parameter(param.clone())
    exp_avg, exp_inf = torch.zeros_like(param), torch.zeros_like(param)
    reference = torch.optim.Adamax([expected], foreach=use_foreach, eps=1e-3)
    for step in range(1, 11):
        gradient = torch.randn(1000, generator=generator).to(dtype)
        expected.grad = gradient.clone()
        reference.step()
        parts = [_cut(tensor) for tensor in (param, gradient, exp_avg, exp_inf)]
        update_(*parts, [float(step)] * 3, Hyper.of(reference.param_groups[0]))
        assert torch.equal(param, expected), f"step {step}"


def test_an_infinite_gradient_and_eps_zero_end_where_torch_ends() -> None:
    for update_, use_foreach in KERNELS.values():
        _check_hazards(update_, use_foreach)


def _check_hazards(update_: Kernel, use_foreach: bool) -> None:
    gradient = torch.tensor([float("inf"), 0.0, 1.0, float("nan")])
    expected = torch.nn.Parameter(torch.ones(4))
    expected.grad = gradient.clone()
    reference = torch.optim.Adamax([expected], eps=0.0, foreach=use_foreach)
    reference.step()
    param, exp_avg, exp_inf = torch.ones(4), torch.zeros(4), torch.zeros(4)
    update_([param], [gradient], [exp_avg], [exp_inf], [1.0], Hyper.of(reference.param_groups[0]))
    assert torch.equal(param.isnan(), expected.isnan())
    assert param[2] == expected[2]
