"""A parameter whose new value is still on its way: whoever uses it waits first.

[Note: late parameter]  Between a step and the arrival of its all-gather a parameter is partly old. In that time it is
an instance of a subclass of its own class, made here, whose ``__torch_function__`` waits for the arrival before
anything looks at the value: an operation, ``p.data``, ``state_dict()``, a copy, printing. On arrival the parameter has
its own class again, and nothing is left of this. What does not look at the value (``p.grad``, ``p.shape``, ...) does
not wait: `zero_grad` comes right after `step` in every loop.

torch does the same to lazy parameters: ``torch.nn.parameter.UninitializedParameter`` changes its class when it is
materialised.

C++ code that is handed a parameter without any torch function does not ask. So a module waits for its own parameters
before it runs; and because compiled code asks at its entrance only, that waits for all parameters behind it. What
nobody can see is memory used behind torch's back: a tensor that was made from ``p.data`` before the step.

On a GPU it is a stream that waits, and others have not waited with it. But for them, too, a parameter that has arrived
is a plain one. So a module, before it runs, makes its stream follow those that have waited.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any, Protocol
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

# Late parameter -> what waits until it is there, and makes it plain.
_arrivals: WeakIdKeyDictionary = WeakIdKeyDictionary()


class Follower(Protocol):
    """Knows which stream of a device has waited for what."""

    def follow(self) -> None:
        """Make the current stream wait for all that other streams have waited for."""


# Empty where there are no streams.
_followers: WeakSet[Follower] = WeakSet()

# What does not look at the values of a tensor.
_ATTRIBUTES = (
    *("grad", "requires_grad", "is_leaf", "grad_fn", "_version", "_backward_hooks", "_post_accumulate_grad_hooks"),
    *("shape", "ndim", "dtype", "device", "layout", "is_sparse", "is_meta", "is_cuda", "is_cpu", "nbytes"),
)
_METHODS = (
    *("size", "dim", "numel", "stride", "element_size", "is_contiguous", "is_complex", "is_floating_point"),
    *("requires_grad_", "register_hook", "register_post_accumulate_grad_hook", "__hash__", "__len__"),
)
_BLIND: set[Any] = (
    {getattr(Tensor, name).__get__ for name in _ATTRIBUTES}
    | {getattr(Tensor, name).__set__ for name in ("grad", "requires_grad")}
    | {getattr(Tensor, name) for name in _METHODS}
)


class _Late:
    """What the class of a late parameter has beside its own."""

    arrived_class: type[Tensor]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in _BLIND:
            wait_for(tree_leaves((args, kwargs)))
            return func(*args, **kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    # torch's own versions ask for the class before they look at the value.
    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        wait_for([self])
        return copy.deepcopy(self, memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        wait_for([self])
        return self.__reduce_ex__(protocol)


@cache
def _late_class(arrived_class: type[Tensor]) -> type[Tensor]:
    attributes = {"arrived_class": arrived_class, "__module__": __name__}
    make_class: Any = type(arrived_class)  # that of nn.Parameter is not type
    late: type[Tensor] = make_class(f"Late{arrived_class.__name__}", (_Late, arrived_class), attributes)
    return late


def ask_to_follow(follower: Follower) -> None:
    """Let modules that wait, and whoever looks at a late parameter, call `Follower.follow` before."""
    _followers.add(follower)


def make_late(params: Iterable[Tensor], arrive: Callable[[], None]) -> None:
    """Let everybody who looks at the values of ``params`` call ``arrive`` first, which must make them plain again."""
    for param in params:
        _arrivals[param] = arrive
        param.__class__ = _late_class(type(param))


def make_plain(params: Iterable[Tensor]) -> None:
    """Give ``params`` their own class back, those that are late."""
    for param in params:
        if isinstance(param, _Late):
            del _arrivals[param]
            param.__class__ = param.arrived_class  # type: ignore[assignment]


def wait_for(values: Iterable[object]) -> None:
    """Wait until those of ``values`` that are late parameters are there.

    Raises:
        LostRankError: The rank that has one of them is missing.
    """
    if _followers:
        for follower in list(_followers):
            follower.follow()
    for value in values:
        if isinstance(value, _Late):
            arrive: Callable[[], None] | None = _arrivals.get(value)  # type: ignore[no-untyped-call]
            if arrive is not None:  # otherwise another thread is making it plain
                arrive()


def await_in_forward(model: nn.Module) -> None:
    """Make every module of ``model`` wait for its own parameters before it runs. Any number of times.

    Raises:
        NotImplementedError: A module reads its parameters where nothing can make it wait.
    """
    modules = list(model.named_modules())
    for name, module in modules:
        if isinstance(module, torch.jit.ScriptModule):
            raise NotImplementedError(
                f"{name or 'the model'} is a {type(module).__name__}, and TorchScript reads parameters without asking "
                "anybody to wait for them: use torch.compile, or leave out overlap_forward"
            )
    global _wait_outside
    _wait_outside = torch.compiler.disable(wait_for)  # type: ignore[no-untyped-call]
    for _, module in modules:
        is_entrance = module is model or _is_compiled(module)
        module.register_forward_pre_hook(_wait_at_entrance if is_entrance else _wait_for_own)


# Functions of this module, because a hook is pickled with its model.
def _wait_for_own(module: nn.Module, arguments: Any) -> None:
    # In compiled code the entrance has waited already.
    if not torch.compiler.is_compiling():
        wait_for(module._parameters.values())


def _wait_at_entrance(module: nn.Module, arguments: Any) -> None:
    """Wait as a module that is the entrance of compiled code, or may become one: the whole model."""
    if torch.compiler.is_compiling():
        _wait_outside(list(module.parameters()))
    else:
        wait_for(module.parameters() if _is_compiled(module) else module._parameters.values())


# `wait_for`, at which the compiler stops compiling. Making it imports the compiler, which takes seconds.
_wait_outside: Callable[[Iterable[object]], None] = wait_for


def _is_compiled(module: nn.Module) -> bool:
    if module._compiled_call_impl is not None:
        return True
    # Where nobody has imported it, nothing is compiled.
    return "torch._dynamo" in sys.modules and isinstance(module, torch._dynamo.OptimizedModule)
