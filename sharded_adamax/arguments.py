"""The border: what the constructor is given, checked once, before any rank waits for another."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from sharded_adamax.buckets import LOW_PRECISION, Precision
from sharded_adamax.engine import Settings
from sharded_adamax.kernels import refuse_flags
from sharded_adamax.layout import ParamSpec
from sharded_adamax.members import Member, ParamGroup, hyper_line


def process_group_of(process_group: dist.ProcessGroup | None, mesh: DeviceMesh | None) -> dist.ProcessGroup | None:
    """Return the group that ``mesh`` stands for, or ``process_group``."""
    if mesh is None:
        return process_group
    if process_group is not None:
        raise ValueError("expected process_group or mesh, got both: pass one")
    if mesh.ndim != 1:
        raise NotImplementedError(
            f"mesh with {mesh.ndim} dimensions is not implemented yet: expected a 1-D mesh; pass mesh['name'] of the "
            "dimension to shard over"
        )
    return mesh.get_group()


def refuse_unsupported(*, state_format: str) -> None:
    """Raise NotImplementedError naming the first argument whose capability does not exist yet."""
    if state_format != "full":
        raise NotImplementedError(f"state_format={state_format!r} is not implemented yet: expected 'full'")


def checked_settings(
    *,
    reduce_gradients: bool,
    bucket_mib: float,
    reduce_dtype: torch.dtype | None,
    master_dtype: torch.dtype | None,
    skip_nonfinite: bool,
    capturable: bool,
    fused: bool | None,
) -> Settings:
    """Return the settings of the whole optimizer.

    Raises:
        ValueError: No bucket could hold anything; a dtype in which gradients cannot be summed, or nothing is reduced; a
            master of another dtype than float32.
    """
    if not bucket_mib > 0:
        raise ValueError(f"expected bucket_mib > 0, got {bucket_mib}")
    if math.isinf(bucket_mib) or bucket_mib * 2**20 < 1:
        raise ValueError(f"expected bucket_mib to be a finite number of MiB, at least one byte, got {bucket_mib}")
    if reduce_dtype is not None:
        if reduce_dtype not in (*LOW_PRECISION, torch.float32, torch.float64):
            raise ValueError(f"expected reduce_dtype to be bfloat16, float16, float32 or float64, got {reduce_dtype}")
        if not reduce_gradients:
            raise ValueError(
                f"reduce_dtype={reduce_dtype} has no effect with reduce_gradients=False: the gradients arrive reduced. "
                "Leave it out; in DistributedDataParallel a communication hook sets the dtype on the wire"
            )
    if master_dtype not in (None, torch.float32):
        raise ValueError(f"expected master_dtype to be None or torch.float32, got {master_dtype}")
    return Settings(
        reduce_gradients=reduce_gradients,
        bucket_bytes=int(bucket_mib * 2**20),
        skip_nonfinite=skip_nonfinite,
        precision=Precision(reduce_dtype, master_dtype),
        fused=bool(fused),
        capturable=bool(capturable),
    )


def check_groups(groups: Sequence[ParamGroup], first_group: int, settings: Settings) -> None:
    """Check the groups from ``first_group`` on for what torch.optim.Adamax allows and this optimizer does not."""
    for group in groups[first_group:]:
        refuse_flags(group)
        if bool(group["capturable"]) != settings.capturable:
            raise NotImplementedError(
                f"expected capturable={settings.capturable} in every parameter group, as for the whole optimizer, got "
                f"{group['capturable']}: parameters of several groups share a bucket, whose steps are in one place. "
                "Give capturable to ShardedAdamax and not to a group"
            )
        if settings.fused and group["foreach"]:
            # The words of torch's optimizers that have both, Adam for one.
            raise RuntimeError("`fused` and `foreach` cannot be `True` together.")
    reduce_dtype = settings.precision.reduce_dtype
    members = members_of(groups, 0)
    for member in members:
        param = member.param
        if type(param.data) is not Tensor:
            raise NotImplementedError(
                f"{member.name} is a {type(param.data).__name__}: expected a plain tensor. Parameters that are sharded "
                "already (FSDP2, tensor parallelism) go with torch.optim.Adamax"
            )
        if param.is_complex() and reduce_dtype is not None:
            raise ValueError(f"{member.name} is complex ({param.dtype}): reduce_dtype={reduce_dtype} cannot carry it")
        if param.layout is not torch.strided or param.is_meta:
            raise ValueError(
                f"{member.name}: expected a dense tensor with storage, got layout {param.layout} on {param.device}"
            )
    _refuse_shared_memory(members)


def _refuse_shared_memory(members: Sequence[Member]) -> None:
    """Two parameters over the same memory would become two: each gets a place of its own in a bucket."""
    spans = []
    for member in members:
        if member.param.numel():
            start = member.param.data_ptr()
            last = sum(
                (size - 1) * stride for size, stride in zip(member.param.shape, member.param.stride(), strict=True)
            )
            spans.append((start, start + (last + 1) * member.param.element_size(), member.name))
    spans.sort()
    for (_, stop, name), (start, _, other) in pairwise(spans):
        if start < stop:
            raise ValueError(
                f"{name} and {other} share memory but are different parameters: sharding would separate them. Tie "
                "weights by using one Parameter object in both places"
            )


def common_device(groups: Sequence[ParamGroup]) -> torch.device:
    """Return the device of all parameters; the CPU where there are none.

    Raises:
        ValueError: There is more than one; names the first two parameters that differ.
    """
    members = members_of(groups, 0)
    if not members:
        return torch.device("cpu")
    first = members[0]
    for member in members:
        if member.param.device != first.param.device:
            raise ValueError(
                f"expected all parameters on one device, got {first.name} on {first.param.device} and {member.name} on "
                f"{member.param.device}"
            )
    return first.param.device


def members_of(groups: Sequence[ParamGroup], first_group: int) -> list[Member]:
    """Return the parameters of the groups from ``first_group`` on, each once, in order."""
    members: dict[int, Member] = {}
    for group_index, group in enumerate(groups):
        if group_index < first_group:
            continue
        names: list[Any] = group.get("param_names", [])
        for index, param in enumerate(group["params"]):
            name = str(names[index]) if names else f"parameter {index} of group {group_index}"
            members.setdefault(id(param), Member(param, name, group_index))
    return list(members.values())


def describe(groups: Sequence[ParamGroup], members: Sequence[Member], first_group: int) -> list[str]:
    """Describe groups and parameters line by line, for comparison between ranks."""
    lines = []
    for group_index in range(first_group, len(groups)):
        lines.append(hyper_line(group_index, groups[group_index]))
        for member in members:
            if member.group_index == group_index:
                spec = ParamSpec.of(member.name, member.param)
                frozen = "" if member.param.requires_grad else ", frozen"
                order = f", dimensions in memory order {spec.dim_order}" if spec.dim_order else ""
                lines.append(
                    f"{spec.name} of shape {spec.shape} and dtype {spec.dtype}{order}{frozen} in group {group_index}"
                )
    return lines
