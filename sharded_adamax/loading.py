"""`load_state_dict`: a state dict, sharded or plain, into the shards that are there.

torch.optim.Optimizer's own would put a whole copy of the state on the device of every rank before each keeps its part,
and replace the tensors that are views of the buckets.
"""

from __future__ import annotations

from copy import deepcopy
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from sharded_adamax.kernels import refuse_flags
from sharded_adamax.state import MASTER_KEY, STATE_KEYS, FlatShard, local_part

StateDict = dict[str, Any]
_FLAGS_ONCE_MISSING = {"foreach": None, "maximize": False, "differentiable": False, "capturable": False}


def load_state_dict(optimizer: Optimizer, state_dict: StateDict) -> None:
    """Check everything, then copy. Fires torch's hooks before and after, as Optimizer.load_state_dict does.

    Source: torch/optim/optimizer.py, Optimizer.load_state_dict; errors in its words.
    """
    state_dict = state_dict.copy()
    for pre_hook in optimizer._optimizer_load_state_dict_pre_hooks.values():
        replaced = pre_hook(optimizer, state_dict)
        if replaced is not None:
            state_dict = replaced
    groups = _checked_groups(optimizer, state_dict)
    ids = chain.from_iterable(group["params"] for group in groups)
    params = chain.from_iterable(group["params"] for group in optimizer.param_groups)
    names = chain.from_iterable(_names(group, index) for index, group in enumerate(optimizer.param_groups))
    parts = [
        _Part.of(optimizer.state.get(param, {}), state_dict["state"].get(param_id, {}), name)
        for param_id, param, name in zip(ids, params, names, strict=True)
    ]
    for part in parts:
        part.copy_()
    for group, loaded in zip(optimizer.param_groups, groups, strict=True):
        loaded["params"] = group["params"]
        if "param_names" in group:
            loaded.setdefault("param_names", group["param_names"])
        # In place: schedulers and users hold on to these dicts in the same way as to the optimizer.
        group.clear()
        group.update(loaded)
    for post_hook in optimizer._optimizer_load_state_dict_post_hooks.values():
        post_hook(optimizer)


def _checked_groups(optimizer: Optimizer, state_dict: StateDict) -> list[dict[str, Any]]:
    groups = deepcopy(state_dict["param_groups"])
    if len(groups) != len(optimizer.param_groups):
        raise ValueError("loaded state dict has a different number of parameter groups")
    for group, loaded in zip(optimizer.param_groups, groups, strict=True):
        if len(group["params"]) != len(loaded["params"]):
            raise ValueError(
                "loaded state dict contains a parameter group that doesn't match the size of optimizer's group"
            )
        # Files of older torch releases lack the newer flags; they were off then. So does torch's __setstate__.
        for flag, value in _FLAGS_ONCE_MISSING.items():
            loaded.setdefault(flag, value)
        # This job's. In torch the loaded one wins, and moves `step` with it; here graphs and others hold on to `step`.
        loaded["capturable"] = group["capturable"]
        refuse_flags(loaded)
    return list(groups)


class _Part:
    """One parameter's state and what is to be copied into it."""

    def __init__(self, target: dict[str, Any], step: float, locals_: dict[str, Tensor | None]) -> None:
        self.target = target
        self.step = step
        self.locals = locals_

    @classmethod
    def of(cls, target: dict[str, Any], loaded: dict[str, Any], name: str) -> _Part:
        """Check ``loaded`` against ``target``. An empty ``loaded`` is a parameter that never had a gradient: zeros."""
        if not loaded:
            return cls(target, 0.0, dict.fromkeys(STATE_KEYS))
        missing = [key for key in ("step", *STATE_KEYS) if key not in loaded]
        if missing:
            raise ValueError(
                f"the state of {name} lacks {', '.join(missing)}; it has {', '.join(map(str, loaded))}. Expected the "
                "state dict of torch.optim.Adamax or ShardedAdamax"
            )
        if not target:
            raise ValueError(
                f"got a state for {name}, which is frozen and has had no gradient: unfreeze it before the optimizer is "
                "built"
            )
        return cls(
            target,
            float(loaded["step"]),
            {
                key: local_part(loaded[key], target[key], f"{key} of {name}")
                for key in (*STATE_KEYS, MASTER_KEY)
                # Without a stored master the one that is there goes on; it follows the parameters that are loaded.
                if key in STATE_KEYS or (key in target and key in loaded)
            },
        )

    @torch.no_grad()
    def copy_(self) -> None:
        if not self.target:
            return
        self.target["step"].fill_(self.step)
        for key, local in self.locals.items():
            shard = self.target[key]
            assert isinstance(shard, FlatShard)
            if local is None:
                shard.local.zero_()
            else:
                shard.local.copy_(local)


def _names(group: dict[str, Any], group_index: int) -> list[str]:
    if "param_names" in group:
        return [str(name) for name in group["param_names"]]
    return [f"parameter {index} of group {group_index}" for index in range(len(group["params"]))]
