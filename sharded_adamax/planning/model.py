"""What a plan needs to know of a model: the shapes and dtypes of its parameters, and the order of their gradients."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import NamedTuple

import torch
from torch import nn

from sharded_adamax.layout import ParamSpec

MAX_NUM_PARAMS = 10**13


class Parameter(NamedTuple):
    """A parameter of a model, each once however often it is used."""

    spec: ParamSpec
    is_trained: bool


@dataclass(frozen=True)
class ModelShape:
    """A model without its values.

    [Note: order of gradients]  Backward is taken to make gradients ready in the reverse order of ``uses``, which is the
    order in which the modules of the model were registered. Each use is of one parameter, or of a weight and its bias,
    whose gradients autograd makes together. A tied weight occurs as often as it is used; its gradient begins with the
    last use and is complete at the first.
    """

    parameters: tuple[Parameter, ...]
    uses: tuple[tuple[int, ...], ...]  # indices into `trained`, in the order of the forward pass
    buffer_bytes: int = 0  # of what the model keeps beside its parameters, such as running means
    assumption: str | None = None  # what was made up because it was not given

    @property
    def trained(self) -> list[ParamSpec]:
        return [parameter.spec for parameter in self.parameters if parameter.is_trained]

    @property
    def gradient_bytes(self) -> list[int]:
        """For each trained parameter, the bytes of its gradient."""
        return [nbytes(spec) for spec in self.trained]

    @property
    def largest_in_autograd(self) -> int:
        """The most bytes that autograd holds of one gradient at a time: all three of a sum, for a tied weight."""
        num_uses = Counter(chain.from_iterable(self.uses))
        return max(size * (3 if num_uses[index] > 1 else 1) for index, size in enumerate(self.gradient_bytes))

    @property
    def num_params(self) -> int:
        return sum(parameter.spec.numel for parameter in self.parameters)

    @property
    def frozen_bytes(self) -> int:
        """Bytes of the parameters that are not trained, and of the buffers."""
        return self.buffer_bytes + sum(nbytes(spec) for spec, is_trained in self.parameters if not is_trained)

    def to(self, dtype: torch.dtype | None, *, only: Collection[torch.dtype] = ()) -> ModelShape:
        """Return the model as ``nn.Module.to(dtype)`` would make it: real parameters cast, complex ones as they are.

        Args:
            only: The dtypes to cast; empty: all.
        """
        if dtype is None:
            return self

        def cast(parameter: Parameter) -> Parameter:
            old = parameter.spec.dtype
            if not old.is_floating_point or (only and old not in only):
                return parameter
            return Parameter(replace(parameter.spec, dtype=dtype), parameter.is_trained)

        return replace(self, parameters=tuple(map(cast, self.parameters)))


def nbytes(spec: ParamSpec) -> int:
    """Return the bytes of a parameter, without padding."""
    return spec.numel * spec.dtype.itemsize


def shape_of(model: object, dtype: torch.dtype, bucket_bytes: int) -> ModelShape:
    """Return the shape of a model that is given as a module, as shapes, or as a number of parameters.

    Args:
        dtype: Of parameters that are given without one.
        bucket_bytes: A bare number is cut into parameters of this size.

    Raises:
        TypeError, ValueError: It is none of these, or there is nothing to train.
    """
    if isinstance(model, nn.Module):
        shape = _of_module(model)
    elif isinstance(model, (int, float)) and not isinstance(model, bool):
        shape = _of_number(model, dtype, bucket_bytes)
    elif isinstance(model, Sequence) and not isinstance(model, str):
        shape = _of_shapes(model, dtype)
    else:
        raise TypeError(
            f"expected a model as an nn.Module, a list of shapes or a number of parameters, got {type(model).__name__}"
        )
    if not any(spec.numel for spec in shape.trained):
        raise ValueError(f"expected a model with parameters to train, got one with {shape.num_params:,}, none of them")
    return shape


def _of_module(model: nn.Module) -> ModelShape:
    names: dict[int, str] = {}
    parameters: list[Parameter] = []
    trained: dict[int, int] = {}  # id of a parameter -> index into ModelShape.trained
    uses: list[tuple[str, int]] = []
    for name, param in model.named_parameters(remove_duplicate=False):
        if isinstance(param, nn.parameter.UninitializedParameter):
            raise ValueError(f"{name} has no shape yet: give the lazy modules their sizes")
        if id(param) not in names:
            names[id(param)] = name
            parameters.append(Parameter(ParamSpec.of(name, param), param.requires_grad))
            if param.requires_grad:
                trained[id(param)] = len(trained)
        if param.requires_grad:
            uses.append((name, trained[id(param)]))
    buffer_bytes = sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())
    return ModelShape(tuple(parameters), with_biases(uses), buffer_bytes)


def with_biases(uses: Sequence[tuple[str, int]]) -> tuple[tuple[int, ...], ...]:
    """Return the indices of ``(name, index)`` pairs, a weight and the bias behind it as one.

    Example: ("a.weight", 0), ("a.bias", 1), ("b.weight", 2) are (0, 1), (2,).
    """
    grouped: list[tuple[int, ...]] = []
    awaited = None  # the name of the bias that goes with the weight before
    for name, index in uses:
        grouped.append((*grouped.pop(), index) if name == awaited else (index,))
        awaited = "bias".join(name.rsplit("weight", 1)) if "weight" in name else None
    return tuple(grouped)


def _of_shapes(shapes: Sequence[object], dtype: torch.dtype) -> ModelShape:
    parameters = []
    for index, shape in enumerate(shapes):
        if not isinstance(shape, Sequence) or not all(isinstance(size, int) and size >= 0 for size in shape):
            raise ValueError(f"expected shapes as sequences of sizes of at least 0, got {shape!r} at index {index}")
        parameters.append(Parameter(ParamSpec(f"parameter {index}", tuple(shape), dtype), is_trained=True))
    return ModelShape(tuple(parameters), tuple((index,) for index in range(len(parameters))))


def _of_number(num_params: float, dtype: torch.dtype, bucket_bytes: int) -> ModelShape:
    if not 0 < num_params <= MAX_NUM_PARAMS or math.floor(num_params) != num_params:
        raise ValueError(f"expected a whole number of parameters from 1 to {MAX_NUM_PARAMS:,}, got {num_params:,}")
    whole, rest = divmod(int(num_params), max(1, bucket_bytes // dtype.itemsize))
    numels = [max(1, bucket_bytes // dtype.itemsize)] * whole + [rest] * (rest > 0)
    assumption = (
        "of the model only the number of parameters is known: taken to fill buckets exactly. A parameter larger than a "
        "bucket (an embedding) makes the bucket that it is in larger, and the peak by a few times that"
    )
    return replace(_of_shapes([(numel,) for numel in numels], dtype), assumption=assumption)
