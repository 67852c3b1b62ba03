"""The only room that talks to other ranks, and the only one that knows backends.

[Note: data plane and control plane]  Gradients and parameters travel on the *data plane*: the process group of the
parameters' device (NCCL on CUDA, gloo on the CPU). What ranks must agree on travels on the *control plane*: a CPU
group, so that a decision taken on the host never waits for a device. A gloo group serves as both. Beside any other, a
CPU group over the same ranks is made: the two planes are not in the same order on all ranks (a rank without a gradient
launches its bucket after the vote), and only gloo matches collectives by kind and not by their order.

`control.py` has the control plane, `groups.py` the data plane over any backend and in a world of one, `gloo.py` that
over gloo, with `neighbours.py` and, below it, `lines.py` for the ranks of one host; `traffic.py` what both planes
count, `objects.py` picklable objects as bytes, `loans.py` what torch.distributed may still hold when the program ends.
"""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist

from sharded_adamax.collectives.control import ControlPlane, backend_name
from sharded_adamax.collectives.gloo import GlooGroup
from sharded_adamax.collectives.groups import Group, LocalGroup, ProcessGroup
from sharded_adamax.collectives.traffic import Traffic

__all__ = [
    "ControlPlane",
    "GlooGroup",
    "Group",
    "LocalGroup",
    "ProcessGroup",
    "Traffic",
    "control_plane",
    "data_plane",
]

# The CPU groups made beside groups of other backends than gloo: one for each, however often it is asked for.
_cpu_groups: WeakKeyDictionary[dist.ProcessGroup, dist.ProcessGroup] = WeakKeyDictionary()


def control_plane(process_group: dist.ProcessGroup | None) -> ControlPlane:
    """Return the control plane of ``process_group``. Collective where a CPU group has to be made.

    Args:
        process_group: The ranks that share the state; None for all. With torch.distributed not initialised: a world of
            one.

    Raises:
        ValueError: This rank is not in ``process_group``, or torch.distributed is not initialised.
    """
    group = _resolve(process_group)
    backend = None if group is None else backend_name(group, torch.device("cpu"))
    if group is None or backend == "gloo":
        return ControlPlane(group)
    if group not in _cpu_groups:
        ranks = dist.get_process_group_ranks(group)
        cpu_group = dist.new_group(
            ranks, backend=backend or "gloo", use_local_synchronization=True, group_desc="sharded_adamax"
        )
        assert isinstance(cpu_group, dist.ProcessGroup)
        _cpu_groups[group] = cpu_group
    return ControlPlane(_cpu_groups[group])


def data_plane(process_group: dist.ProcessGroup | None, device: torch.device) -> Group:
    """Return the group that carries tensors of ``device``, with the fastest primitives of its backend. Local.

    Raises:
        ValueError: The group's backend cannot reduce tensors of ``device``.
    """
    group = _resolve(process_group)
    if group is None:
        return LocalGroup()
    backend = backend_name(group, device)
    if backend is None or (backend == "gloo" and device.type != "cpu"):
        raise ValueError(
            f"rank {group.rank()}: the parameters are on {device}, but the process group "
            f"({dist.get_backend(group)}) has no backend for such tensors: initialise it with init_distributed(), "
            "or move the model to the group's device before the optimizer is built"
        )
    return GlooGroup(group) if backend == "gloo" else ProcessGroup(group)


def _resolve(process_group: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    """Return the process group to use; None for a world of one."""
    if not (dist.is_available() and dist.is_initialized()):
        if process_group is not None:
            raise ValueError(
                "process_group was given, but torch.distributed is not initialised: call init_distributed() first"
            )
        return None
    group = process_group if process_group is not None else dist.group.WORLD
    if not isinstance(group, dist.ProcessGroup):
        raise ValueError(
            f"rank {dist.get_rank()} is not a member of process_group (got {group!r}): build the optimizer only on "
            "the ranks of the group, or pass the group that this rank belongs to"
        )
    return group if group.size() > 1 else None
