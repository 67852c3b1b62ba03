"""One pass over memory on the CPU: the update rule, compiled by torch's Inductor, trusted only after a check.

[Note: self-check]  A compiler may round otherwise than torch's own kernels do: whether a product and a sum become one
fused multiply-add is its choice. So each variant is compiled once per process, run beside the plain loop on values that
are chosen to be hard (ragged lengths, zeros, subnormal numbers, huge ones, Inf and NaN), and used only if all bits are
equal. Otherwise, and where there is no compiler, the update goes in chunks as it does by default, and says so once.

A variant is a dtype and the branches of the formula. All numbers (step size, betas, eps, weight decay) are arguments,
as 0-d tensors, and the length is symbolic: a scheduler does not make it compile again.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sharded_adamax.kernels import eager
from sharded_adamax.kernels.chunked import in_chunks
from sharded_adamax.kernels.contract import Hyper, Kernel, is_cuttable
from sharded_adamax.kernels.notices import LOGGER, say_once

_OPTIONS: dict[str, str | int | bool | Callable[..., Any]] = {
    # gcc contracts products and sums in torch's own kernels; without it here about one element in ten differs.
    "cpp.enable_floating_point_contract_flag": "fast",
    # The number of threads at the time of the call, not at that of the compilation.
    "cpp.dynamic_threads": True,
    # One function: a pool of compiling processes would cost more than it saves, and fork beside communication threads.
    "compile_threads": 1,
}
# A length that no vector or thread count divides, large enough that the compiler sees work for several threads.
_CHECK_NUMELS = (131_077, 64, 17, 2)
# Calling compiled code costs a tenth of a millisecond and wakes all threads. Below this, which is also where torch's
# own operations begin to use threads, the loop is faster; and a symbolic length of 0 or 1 would compile again.
_MIN_NUMEL = 32_768
_SLOW: Kernel = in_chunks(eager.update_)

OnePass = Callable[..., None]  # (param, grad, exp_avg, exp_inf, *six 0-d tensors)


class Variant(NamedTuple):
    """What the code of a kernel depends on."""

    dtype: torch.dtype
    decays: bool
    maximize: bool
    near: bool  # Hyper.near

    @classmethod
    def of(cls, dtype: torch.dtype, hyper: Hyper) -> Variant:
        return cls(dtype, hyper.weight_decay != 0, hyper.maximize, hyper.near)


def update_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_infs: Sequence[Tensor],
    steps: Sequence[float],
    hyper: Hyper,
) -> None:
    """Update each tensor in one pass; falls back where that is not the same. See [Note: self-check]."""
    one_pass = _one_pass(Variant.of(params[0].dtype, hyper))
    if one_pass is None:
        _SLOW(params, grads, exp_avgs, exp_infs, steps, hyper)
        return
    for param, grad, exp_avg, exp_inf, step in zip(params, grads, exp_avgs, exp_infs, steps, strict=True):
        if param.numel() < _MIN_NUMEL:
            eager.update_([param], [grad], [exp_avg], [exp_inf], [step], hyper)
        else:
            one_pass(param, grad, exp_avg, exp_inf, *_numbers(param.dtype, step, hyper))


def _numbers(dtype: torch.dtype, step: float, hyper: Hyper) -> list[Tensor]:
    # Rounded to dtype one by one, as torch's operations round the numbers that they are given.
    step_size = -(hyper.lr / (1 - hyper.beta1**step))
    weight = 1 - hyper.beta1
    numbers = (step_size, weight, hyper.beta2, hyper.eps, hyper.weight_decay)
    return [torch.as_tensor(number, dtype=dtype, device="cpu") for number in numbers]


def _formula(variant: Variant) -> OnePass:
    def formula(
        param: Tensor,
        grad: Tensor,
        exp_avg: Tensor,
        exp_inf: Tensor,
        step_size: Tensor,
        weight: Tensor,
        beta2: Tensor,
        eps: Tensor,
        weight_decay: Tensor,
    ) -> None:
        if variant.maximize:
            grad = -grad
        if variant.decays:
            grad = grad + weight_decay * param
        difference = grad - exp_avg
        new_avg = exp_avg + weight * difference if variant.near else grad + (weight - 1) * difference
        new_inf = torch.maximum(exp_inf * beta2, grad.abs() + eps)
        param.add_(step_size * new_avg / new_inf)
        exp_avg.copy_(new_avg)
        exp_inf.copy_(new_inf)

    # A code object of its own for each variant: torch counts the compilations of one, and gives up at eight.
    formula.__code__ = formula.__code__.replace(co_name="_".join(["formula", *map(str, variant)]).replace(".", "_"))
    return formula


def prepare(dtype: torch.dtype, hyper: Hyper) -> None:
    """Compile and check now what `update_` will need, rather than in the first step. Seconds, once per process."""
    _one_pass(Variant.of(dtype, hyper))


_lock = threading.Lock()


def _one_pass(variant: Variant) -> OnePass | None:
    with _lock:
        return _compiled_and_checked(variant)


@functools.cache
def _compiled_and_checked(variant: Variant) -> OnePass | None:
    """Return the compiled kernel; None, and a warning, where the plain loop has to be used."""
    if not is_cuttable(variant.dtype):
        say_once(f"has no one-pass kernel for {variant.dtype} on the CPU")
        return None
    try:
        one_pass: OnePass = torch.compile(_formula(variant), fullgraph=True, dynamic=True, options=_OPTIONS)
        differing = _differing(one_pass, variant)
    except Exception as error:  # a compiler, its options and its caches can fail in every way
        say_once(f"could not compile ({type(error).__name__}: {_first_line(error)}); is a C++ compiler installed?")
        return None
    if differing:
        say_once(f"was compiled to other bits than torch's: {differing} numbers of its self-check differ")
        return None
    LOGGER.info("fused kernel for %s compiled, bits equal to torch's", variant)
    return one_pass


def _differing(one_pass: OnePass, variant: Variant) -> int:
    """Return in how many numbers a few steps differ from the plain loop's, to the bit but for the payload of a NaN."""
    beta1 = 0.9 if variant.near else 0.3
    hyper = Hyper(2e-3, beta1, 0.999, 1e-8, 0.01 if variant.decays else 0.0, variant.maximize)
    generator = torch.Generator().manual_seed(0)
    differing = 0
    for numel in _CHECK_NUMELS:
        # Not views of one tensor: torch would take a place in it that equals a length for a rule, and compile again.
        state = [torch.randn(numel, generator=generator, dtype=variant.dtype)]
        state += [torch.zeros_like(state[0]), torch.zeros_like(state[0])]
        expected = [tensor.clone() for tensor in state]
        for step in (1.0, 2.0, 3.0):
            gradient = _hard_gradient(numel, variant.dtype, generator)
            param, exp_avg, exp_inf = state
            one_pass(param, gradient.clone(), exp_avg, exp_inf, *_numbers(variant.dtype, step, hyper))
            param, exp_avg, exp_inf = expected
            eager.update_([param], [gradient], [exp_avg], [exp_inf], [step], hyper)
        differing += sum(_num_unequal(*pair) for pair in zip(state, expected, strict=True))
    return differing


def _hard_gradient(numel: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    exponents = 8 * torch.randn(numel, generator=generator, dtype=dtype)
    gradient = torch.randn(numel, generator=generator, dtype=dtype) * exponents.exp()
    special = torch.tensor([0.0, -0.0, 1e-42, 3e38, float("inf"), -float("inf"), float("nan")], dtype=dtype)
    gradient[::97] = special[torch.arange(len(gradient[::97])) % len(special)]
    return gradient


def _num_unequal(tensor: Tensor, other: Tensor) -> int:
    integer = torch.int32 if tensor.dtype == torch.float32 else torch.int64
    equal = (tensor.view(integer) == other.view(integer)) | (tensor.isnan() & other.isnan())
    return int(equal.numel() - equal.sum())


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else "no message"
