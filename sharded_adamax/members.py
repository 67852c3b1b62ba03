"""Parameters and parameter groups as the optimizer knows them, and how they are described to other ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

ParamGroup = dict[str, Any]


@dataclass(frozen=True)
class Member:
    """A parameter, its name for messages, and the group that it is in."""

    param: Tensor
    name: str
    group_index: int


def hyper_line(index: int, group: ParamGroup) -> str:
    """Describe the hyper-parameters of a group. A tensor lr on an accelerator is not read: that would wait for it."""
    lr = group["lr"]
    if isinstance(lr, Tensor):
        lr = lr.item() if lr.device.type == "cpu" else f"a tensor on {lr.device.type}"
    values = ", ".join(f"{key}={group[key]}" for key in ("betas", "eps", "weight_decay", "maximize"))
    return f"group {index}: lr={lr}, {values}"


def hyper_lines(groups: Sequence[ParamGroup]) -> list[str]:
    """Describe the hyper-parameters of all groups."""
    return [hyper_line(index, group) for index, group in enumerate(groups)]
