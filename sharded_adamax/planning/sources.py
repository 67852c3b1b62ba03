"""The ways in which the command is told of a model. Modules are built on the meta device: nothing is allocated."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

SUFFIXES = {"K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


class SourceError(ValueError):
    """What was said of a model leads to none; the message says why, and what to do."""


def number(text: str) -> float:
    """Return a number of parameters: ``7e9``, ``7B``, ``350M``, ``7000000000``."""
    factor = SUFFIXES.get(text[-1:].upper(), 1)
    try:
        return round(float(text[:-1] if factor > 1 else text) * factor, 6)
    except (ValueError, OverflowError):
        raise SourceError(f"expected a number of parameters such as 7e9, 7B or 350M, got {text!r}") from None


def from_factory(name: str) -> nn.Module:
    """Return the model that ``module:factory`` makes; the module is looked for here and where Python looks.

    Raises:
        SourceError: There is no such module or factory, it raises, or what it returns is not an nn.Module.
    """
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute:
        raise SourceError(f"expected module:factory, such as my_package.models:make_model, got {name!r}")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        found = import_module(module_name)
    except ModuleNotFoundError as error:
        raise SourceError(f"no module {error.name} is found from {Path.cwd()}; PYTHONPATH says where else") from error
    except Exception as error:
        raise SourceError(f"the import of {module_name} raised {type(error).__name__}: {error}") from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise SourceError(f"{module_name} has no {attribute}")
        found = getattr(found, part)
    if isinstance(found, nn.Module):
        return found
    if not callable(found):
        raise SourceError(f"expected {name} to be a function that returns an nn.Module, got {type(found).__name__}")
    return _built(found, name)


def from_hf_config(path: Path) -> nn.Module:
    """Return the Transformers model that a ``config.json`` describes. Reads the local file only.

    Args:
        path: The file, or the directory that it is in.

    Raises:
        SourceError: Transformers is not installed, the file is not there, or it describes no model.
    """
    if find_spec("transformers") is None:
        raise SourceError("--hf-config needs Transformers: pip install sharded-adamax[plan]")
    directory = path.parent if path.is_file() else path
    if not (directory / "config.json").is_file():
        raise SourceError(f"expected a config.json or a directory with one, got {path}; nothing is downloaded")
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # of many types, some of them of Transformers alone
        raise SourceError(f"Transformers cannot use {directory / 'config.json'}: {error}") from error
    # The class that was trained, with its head; AutoModel would leave the head out.
    architecture = next(iter(config.architectures or ()), None)
    model_class = getattr(transformers, architecture, None) if architecture else None
    return _built(lambda: (model_class or transformers.AutoModel.from_config)(config), f"{architecture or 'AutoModel'}")


def _built(factory: Callable[[], Any], name: str) -> nn.Module:
    try:
        with torch.device("meta"):
            model = factory()
    except Exception as error:
        raise SourceError(
            f"{name} raised {type(error).__name__}: {error}. It is called without arguments, on the meta device, where "
            "tensors have no values"
        ) from error
    if not isinstance(model, nn.Module):
        raise SourceError(f"expected {name} to return an nn.Module, got {type(model).__name__}")
    return model
