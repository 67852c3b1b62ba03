"""What a checkpoint of a training job holds, and how it gets back into the job.

Keys are those of torch.distributed.checkpoint's own state dicts, so other programs read them: ``model.<name>``,
``optim.state.<name>.exp_avg``, ``optim.param_groups.<name>.lr``. Names do not contain the prefixes that
DistributedDataParallel, torch.compile and activation checkpointing put before them.
"""

from __future__ import annotations

import ctypes
import io
import random
import sys
from collections.abc import Container
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
)
from torch.optim import Optimizer

from sharded_adamax.state import MASTER_KEY

# One key per parameter and state, not one per parameter number: numbers change when a model is edited, names do not.
_OPTIONS = StateDictOptions(flatten_optimizer_state_dict=True)
EXTRA = "extra"
RNG = "rng"  # rng.<rank>


def collect(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """Return the live tensors of model and optimizer, nested as they are saved."""
    # A consolidated state is there for torch.save on one rank; here every rank gives its shard.
    forget = getattr(optimizer, "forget_consolidated_state", None)
    if forget is not None:
        forget()
    return {
        "model": get_model_state_dict(model),
        "optim": _without_param_names(get_optimizer_state_dict(model, optimizer, options=_OPTIONS)),
    }


def forgo_masters(state: dict[str, Any], stored: Container[str]) -> None:
    """Take those masters out of what is to be read that a checkpoint of a job without them does not have.

    Masters follow the weights that are loaded, see [Note: master] in buckets.py.
    """
    for key in [key for key in state["optim"] if key.endswith(f".{MASTER_KEY}") and f"optim.{key}" not in stored]:
        del state["optim"][key]


def put_back(model: nn.Module, optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Load what `collect` gave and a checkpoint has filled.

    The tensors of ``state`` are those of the optimizer and filled already. torch's set_optimizer_state_dict would drop
    the states of parameters that are frozen by now, so only the hyper-parameters are taken from it, by name.
    """
    set_model_state_dict(model, state["model"])
    named_groups: Any = get_optimizer_state_dict(model, optimizer)["param_groups"]
    current = optimizer.state_dict()
    for group, named in zip(current["param_groups"], named_groups, strict=True):
        for key in group:
            if key not in ("params", "param_names") and named["params"]:
                group[key] = state["optim"][f"param_groups.{named['params'][0]}.{key}"]
    optimizer.load_state_dict(current)


def to_bytes(extra: Any) -> Tensor:
    """Serialise to a uint8 tensor.

    Raises:
        ValueError: It holds objects that could not be read back without running code.
    """
    file = io.BytesIO()
    torch.save(extra, file)
    data = torch.frombuffer(bytearray(file.getbuffer()), dtype=torch.uint8)
    try:
        from_bytes(data)
    except Exception as error:
        raise ValueError(
            "extra holds objects that torch.load(weights_only=True) refuses: keep numbers, strings, lists, dicts and "
            f"tensors in it, for example the state_dict() of a scheduler ({error})"
        ) from error
    return data


def from_bytes(data: Tensor) -> Any:
    """Return what `to_bytes` was given."""
    # Not data.numpy(): the package needs torch alone.
    return torch.load(io.BytesIO(ctypes.string_at(data.data_ptr(), data.nbytes)), map_location="cpu", weights_only=True)


def rng_state() -> dict[str, Any]:
    """Return the state of the random number generators that training programs use, as plain values."""
    state: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    numpy = sys.modules.get("numpy")  # only a program that uses it has a state of it worth keeping
    if numpy is not None:
        name, keys, *rest = numpy.random.get_state()
        state["numpy"] = (name, keys.tolist(), *rest)
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    """Set what `rng_state` returned, as far as this process has it."""
    torch.set_rng_state(state["torch"])
    random.setstate(state["python"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    numpy = sys.modules.get("numpy")
    if "numpy" in state and numpy is not None:
        numpy.random.set_state(state["numpy"])


def _is_param_names(key: str) -> bool:
    return key.startswith("param_groups.") and key.endswith(".param_names")


def _without_param_names(state: dict[str, Any]) -> dict[str, Any]:
    # torch would repeat the names of a whole group under every parameter, and other programs' files do not have them.
    return {key: value for key, value in state.items() if not _is_param_names(key)}
