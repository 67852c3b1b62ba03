"""A state as a sharded tensor that torch.distributed.checkpoint can write, read and reshard; full <-> sharded.

[Note: FlatShard]  ``optimizer.state[p]["exp_avg"]`` has the shape of the parameter, so tools that match state to
parameters by shape work, but holds only the elements that this rank owns: a flat range of it. To
torch.distributed.checkpoint it presents that range as boxes. Nothing here communicates except `gather_full`.

The elements are counted in the order of memory, which is that of the parameter (``memory_order``): a range of a
channels_last tensor is a box of its permuted dimensions, and so a box of the tensor. Files know only the latter.

A FlatShard that happens to be whole (a world of one, or a parameter that lies inside one shard) behaves as the plain
tensor it
is: any operation, torch.save included. One that is not refuses whatever would need elements of other ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.utils._pytree import tree_flatten, tree_unflatten

from sharded_adamax.collectives import Group
from sharded_adamax.layout import BucketLayout
from sharded_adamax.ranges import Box, Range, boxes, cut_at_rows

aten = torch.ops.aten
STATE_KEYS = ("exp_avg", "exp_inf")
MASTER_KEY = "master_param"  # beside them where there is a master; never required of what is loaded
# Files hold a state in pieces of at most this size. A rank that loads at another world size reads whole pieces, so
# small ones keep it from reading much more than its shard; smaller still would only grow the metadata.
CHUNK_BYTES = 1 << 19


class FlatShard(Tensor):
    """This rank's part of a tensor of global shape ``shape``: the elements ``owned`` of the flattened tensor."""

    local: Tensor  # (owned.numel,), a view of a bucket's shard or a copy of one
    owned: Range
    memory_order: tuple[int, ...]  # dimensions from the outermost in memory to the innermost

    @staticmethod
    def __new__(cls, local: Tensor, shape: Sequence[int], owned: Range, memory_order: Sequence[int] = ()) -> FlatShard:
        """Wrap ``local``; without ``memory_order`` the elements are in row-major order."""
        if local.shape != (owned.numel,):
            raise ValueError(f"expected a local tensor of shape ({owned.numel},), got {tuple(local.shape)}")
        order = tuple(memory_order) or tuple(range(len(shape)))
        strides = torch.empty_permuted(tuple(shape), order, device="meta").stride()
        self = torch.Tensor._make_wrapper_subclass(
            cls, torch.Size(shape), strides=strides, dtype=local.dtype, device=local.device
        )
        self.local = local
        self.owned = owned
        self.memory_order = order
        return self

    def __init__(self, local: Tensor, shape: Sequence[int], owned: Range, memory_order: Sequence[int] = ()) -> None:
        pass

    @property
    def is_whole(self) -> bool:
        return self.owned.numel == self.numel()

    @cached_property
    def chunks(self) -> dict[tuple[int, ...], tuple[Box, Range]]:
        """The boxes by which files know this part, by their first corner, each with its place in ``local``."""
        # A tensor without elements still needs one chunk for its shape to be known in the file.
        if self.numel() == 0:
            nothing = Box((0,) * self.dim(), tuple(self.shape))
            return {nothing.offsets: (nothing, Range(0, 0))}
        shape = tuple(self.shape[dim] for dim in self.memory_order)
        found = {}
        start = 0
        for part in cut_at_rows(shape, self.owned, max(1, CHUNK_BYTES // self.dtype.itemsize)):
            for in_memory in boxes(shape, part):
                box = Box(self._logical(in_memory.offsets), self._logical(in_memory.sizes))
                found[box.offsets] = (box, Range(start, start + box.numel))
                start += box.numel
        return found

    def _logical(self, in_memory: Sequence[int]) -> tuple[int, ...]:
        """Return one number per dimension, given in the order of memory, in the order of the tensor's dimensions."""
        by_dim = dict(zip(self.memory_order, in_memory, strict=True))
        return tuple(by_dim[dim] for dim in range(self.dim()))

    def _shaped(self, flat: Tensor, sizes: Sequence[int]) -> Tensor:
        """Return the elements of a box of ``sizes``, one after another in memory, as a tensor of these sizes."""
        in_memory = flat.view([sizes[dim] for dim in self.memory_order])
        return in_memory.permute(self._logical(range(self.dim())))

    def whole(self) -> Tensor:
        """Return the plain tensor, a view of ``local``; only where this is all of it."""
        return self._shaped(self.local, self.shape)

    def with_local(self, local: Tensor) -> FlatShard:
        """Return the same part of the same global tensor with other values."""
        return FlatShard(local, self.shape, self.owned, self.memory_order)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return (
            f"FlatShard(shape={tuple(self.shape)}, dtype={self.dtype}, elements {self.owned.start}:{self.owned.stop} "
            f"of {self.numel()})"
        )

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        first = args[0]
        if func in _ON_LOCAL and isinstance(first, FlatShard):
            return first.with_local(func(first.local, *args[1:], **kwargs))
        if func in _ALLOCATING and isinstance(first, FlatShard) and _allocates_the_same(func, first, args, kwargs):
            return first.with_local(torch.empty_like(first.local, device=kwargs.get("device")))
        if func is aten.copy_.default and _same_part(*args[:2]):
            first.local.copy_(args[1].local)
            return first
        if func is aten.zero_.default:
            first.local.zero_()
            return first
        leaves, structure = tree_flatten((args, kwargs))
        shards = [leaf for leaf in leaves if isinstance(leaf, FlatShard)]
        partial = next((shard for shard in shards if not shard.is_whole), None)
        if partial is not None:
            raise NotImplementedError(
                f"{func} on a sharded optimizer state: this rank holds only elements {partial.owned.start}:"
                f"{partial.owned.stop} of {partial.numel()}. Use .local for this rank's part, or "
                "optimizer.full_state_dict(to=rank) on all ranks for whole tensors"
            )

        plain = [leaf.whole() if isinstance(leaf, FlatShard) else leaf for leaf in leaves]
        plain_args, plain_kwargs = tree_unflatten(plain, structure)
        return func(*plain_args, **plain_kwargs)

    # Pickle: torch.save on one rank would write that rank's part only, and nobody would notice until the resume.
    def __reduce_ex__(self, protocol: Any) -> Any:
        if self.is_whole:
            return self.whole().detach().clone().__reduce_ex__(protocol)  # type: ignore[no-untyped-call]
        raise RuntimeError(
            f"this is a sharded optimizer state (elements {self.owned.start}:{self.owned.stop} of {self.numel()} on "
            "this rank): saving it with torch.save or pickle would lose the other ranks' parts. Call "
            "sharded_adamax.save(path, model, optimizer) on all ranks, or optimizer.full_state_dict(to=0) "
            "(consolidate_state_dict) on all ranks and torch.save its result on rank 0. With Hugging Face Accelerate: "
            "sharded_adamax.integrations.accelerate.gather_on_save(accelerator, optimizer) before save_state; instead "
            "of its Trainer: sharded_adamax.integrations.transformers.ShardedTrainer"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> FlatShard:
        if id(self) not in memo:
            memo[id(self)] = self.with_local(self.local.detach().clone())
        return cast(FlatShard, memo[id(self)])

    # The protocol of torch.distributed.checkpoint for tensors that are sharded in their own way
    # (torch/distributed/_checkpointable.py).
    def __create_write_items__(self, fqn: str, object: Any) -> list[WriteItem]:
        return [
            WriteItem(
                index=MetadataIndex(fqn, torch.Size(box.offsets)),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=_chunk(box),
                    properties=TensorProperties.create_from_tensor(self.local),
                    size=self.size(),
                ),
            )
            for box, _ in self.chunks.values()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [_chunk(box) for box, _ in self.chunks.values()]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        place = self.chunks.get(tuple(index.offset or ()))
        if place is None:
            raise ValueError(f"{index} is not a part of {self!r}")
        box, in_local = place
        return self._shaped(self.local[in_local.as_slice()], box.sizes)


_ON_LOCAL = {aten.detach.default, aten.clone.default, aten._to_copy.default, aten.alias.default}
_ALLOCATING = {aten.new_empty.default, aten.empty_like.default}


def _allocates_the_same(func: Any, shard: FlatShard, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Return whether new memory of the shard's own size and dtype is asked for."""
    size = args[1] if func is aten.new_empty.default else shard.shape
    return tuple(size) == tuple(shard.shape) and kwargs.get("dtype") in (None, shard.dtype)


def _chunk(box: Box) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(offsets=torch.Size(box.offsets), sizes=torch.Size(box.sizes))


def _same_part(one: object, other: object) -> bool:
    return (
        isinstance(one, FlatShard)
        and isinstance(other, FlatShard)
        and one.shape == other.shape
        and one.owned == other.owned
        and one.memory_order == other.memory_order
    )


def local_part(value: Tensor, target: FlatShard, name: str) -> Tensor:
    """Return the elements of ``value`` that ``target`` owns, in the dtype and on the device of ``target``.

    Args:
        value: A whole tensor of the same shape, or a FlatShard of the same part.
        target: The state to be filled.
        name: For the message: "exp_avg of layer.weight".

    Raises:
        ValueError: Another shape, or a FlatShard of another part.
    """
    if tuple(value.shape) != tuple(target.shape):
        raise ValueError(f"{name}: expected shape {tuple(target.shape)}, got {tuple(value.shape)}")
    if _same_part(value, target):
        return cast(FlatShard, value).local.to(target.device, target.dtype)
    if isinstance(value, FlatShard) and value.is_whole:
        value = value.whole()
    if not isinstance(value, FlatShard):
        in_memory = value.detach().permute(target.memory_order).reshape(-1)
        return in_memory[target.owned.as_slice()].to(target.device, target.dtype)
    raise ValueError(
        f"{name}: expected elements {target.owned.start}:{target.owned.stop} of the flattened tensor, got a shard of "
        f"elements {value.owned.start}:{value.owned.stop}: it was made by another rank or world size. Use "
        "sharded_adamax.save and load, which reshard, or full_state_dict()"
    )


def gather_full(group: Group, bucket: BucketLayout, shard: Tensor, like: Sequence[Tensor], to: int) -> list[Tensor]:
    """Gather one state of one bucket. Collective.

    Args:
        shard: Shape (shard_numel,), this rank's.
        like: A dense tensor for each slot, whose shape and strides count: the parameters.
        to: The rank that receives.

    Returns:
        On rank ``to`` one new CPU tensor per slot, each of its own storage; elsewhere nothing.
    """
    flat = group.gather(shard, to)
    if flat is None:
        return []
    # clone, also from CPU to CPU: a view would keep the whole bucket alive and torch.save would write all of it.
    return [
        flat.as_strided(other.shape, other.stride(), slot.start).to("cpu", copy=True)
        for slot, other in zip(bucket.slots, like, strict=True)
    ]
