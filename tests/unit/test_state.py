"""A FlatShard is a plain tensor where it is whole, refuses what it cannot know where not, and speaks DCP's protocol."""

from __future__ import annotations

import copy
import io
import math
import pickle
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorProperties, TensorStorageMetadata
from torch.distributed.checkpoint.planner import WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from sharded_adamax import ShardedAdamax, state
from sharded_adamax.collectives import LocalGroup
from sharded_adamax.layout import ParamSpec, build
from sharded_adamax.ranges import Range
from sharded_adamax.state import STATE_KEYS, FlatShard, gather_full, local_part
from tests.distributed.problems import assert_same_bits, assert_same_state, gradient, make_params

shapes = st.lists(st.integers(0, 5), max_size=4).map(tuple)


def _values(shape: tuple[int, ...]) -> Tensor:
    return torch.arange(1.0, math.prod(shape) + 1).view(shape)


def _part(shape: tuple[int, ...], start: int, stop: int) -> FlatShard:
    """The elements ``start`` to ``stop`` of 1, 2, 3, ..., in memory of their own."""
    return FlatShard(_values(shape).reshape(-1)[start:stop].clone(), shape, Range(start, stop))


def _shard(tensor: Tensor) -> FlatShard:
    assert isinstance(tensor, FlatShard)
    return tensor


def _whole(shape: tuple[int, ...] = (4, 3)) -> FlatShard:
    return _part(shape, 0, math.prod(shape))


# --- What it looks like


def test_a_shard_has_the_shape_and_dtype_of_the_whole_and_holds_its_part() -> None:
    shard = FlatShard(torch.arange(5, dtype=torch.float64), (4, 3), Range(2, 7))
    assert shard.shape == (4, 3) and shard.numel() == 12 and shard.dim() == 2
    assert shard.dtype == torch.float64 and shard.device == torch.device("cpu")
    assert shard.local.shape == (5,)
    assert not shard.requires_grad
    assert not shard.is_whole and _whole().is_whole
    chunks = [(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in shard.__create_chunk_list__()]
    assert chunks == [((0, 2), (1, 1)), ((1, 0), (1, 3)), ((2, 0), (1, 1))]


def test_a_shard_prints_what_it_holds_and_not_its_values() -> None:
    assert repr(_part((4, 3), 2, 7)) == "FlatShard(shape=(4, 3), dtype=torch.float32, elements 2:7 of 12)"
    assert str(_whole(())) == "FlatShard(shape=(), dtype=torch.float32, elements 0:1 of 1)"


@pytest.mark.parametrize("local", [torch.ones(4), torch.ones(6), torch.ones(1, 5), torch.ones(())], ids=str)
def test_a_local_tensor_of_another_size_is_refused(local: Tensor) -> None:
    with pytest.raises(
        ValueError, match=rf"expected a local tensor of shape \(5,\), got {re.escape(str(tuple(local.shape)))}"
    ):
        FlatShard(local, (4, 3), Range(2, 7))


# --- Whole: a plain tensor


READS: dict[str, Callable[[Tensor], Any]] = {
    "add": lambda t: t + 1,
    "add to plain": lambda t: torch.ones(4, 3) + t,
    "product": lambda t: t @ t.t(),
    "sum": lambda t: t.sum(dim=0),
    "index": lambda t: t[1:, 2],
    "reshape": lambda t: t.reshape(-1),
    "compare": lambda t: t > 5,
    "norm": lambda t: torch.linalg.vector_norm(t),
    "zeros_like": lambda t: torch.zeros_like(t),
    "where": lambda t: torch.where(t > 3, t, -t),
    "as keyword": lambda t: torch.add(input=t, other=t),
}


# Tensors in lists, and new ones made after a whole shard.
READS_IN_LISTS_AND_NEW: dict[str, Callable[[Tensor], Any]] = {
    "in a list": lambda t: torch.stack([t, t]),
    "foreach": lambda t: torch.stack(torch._foreach_norm([t, t])),
    "new_empty of another size": lambda t: t.new_empty((3,)).zero_(),
    "empty_like of another dtype": lambda t: torch.empty_like(t, dtype=torch.float64).zero_() * 1,
}


@pytest.mark.parametrize("read", READS)
def test_a_whole_shard_reads_as_the_plain_tensor(read: str) -> None:
    got, expected = READS[read](_whole()), READS[read](_values((4, 3)))
    assert type(got) is Tensor
    assert_same_bits(got, expected, read)


@pytest.mark.parametrize("read", READS_IN_LISTS_AND_NEW)
def test_a_whole_shard_reads_as_the_plain_tensor_here_too(read: str) -> None:
    got, expected = READS_IN_LISTS_AND_NEW[read](_whole()), READS_IN_LISTS_AND_NEW[read](_values((4, 3)))
    assert_same_bits(got, expected, read)


def test_a_partial_shard_in_a_list_is_refused() -> None:
    with pytest.raises(NotImplementedError, match="elements 2:7 of 12"):
        torch.stack([_part((4, 3), 2, 7)])


def _assign(tensor: Tensor) -> None:
    tensor[1] = -1.0


WRITES: dict[str, Callable[[Tensor], object]] = {
    "mul_": lambda t: t.mul_(2),
    "add_": lambda t: t.add_(torch.ones(3)),
    "fill_": lambda t: t.fill_(7),
    "zero_": lambda t: t.zero_(),
    "copy_": lambda t: t.copy_(torch.full((4, 3), 5.0)),
    "assign": _assign,
    "out": lambda t: torch.add(t, 1, out=t),
}


@pytest.mark.parametrize("write", WRITES)
def test_writing_into_a_whole_shard_writes_into_its_memory(write: str) -> None:
    bucket = torch.zeros(64)
    shard = FlatShard(bucket[:12], (4, 3), Range(0, 12))
    shard.copy_(_values((4, 3)))
    expected = _values((4, 3))
    WRITES[write](shard)
    WRITES[write](expected)
    assert_same_bits(bucket[:12], expected.reshape(-1), write)
    assert not bucket[12:].any()


def test_a_whole_shard_is_saved_as_the_plain_tensor_it_is_without_the_bucket_around_it() -> None:
    bucket = torch.zeros(100_000)
    bucket[64:76] = torch.arange(12.0)
    file = io.BytesIO()
    torch.save({"exp_avg": FlatShard(bucket[64:76], (4, 3), Range(0, 12))}, file)
    assert file.tell() < 10_000
    file.seek(0)
    loaded = torch.load(file, weights_only=True)["exp_avg"]
    assert type(loaded) is Tensor
    assert_same_bits(loaded, torch.arange(12.0).view(4, 3), "exp_avg")
    assert loaded.untyped_storage().nbytes() == 12 * 4


def test_a_whole_shard_is_pickled_and_copied_as_a_plain_tensor() -> None:
    for copied in (pickle.loads(pickle.dumps(_whole())), copy.copy(_whole())):
        assert type(copied) is Tensor
        assert_same_bits(copied, _values((4, 3)), "a copy")


# --- Partial: refuses what it cannot know


REFUSED: dict[str, Callable[[Tensor], Any]] = {
    **READS,
    **{name: write for name, write in WRITES.items() if name != "zero_"},
    "equal": lambda t: torch.equal(t, t),
    "item": lambda t: t.sum().item(),
}
del REFUSED["zeros_like"]  # tested with the other allocations, when it is decided what it should be


@pytest.mark.parametrize("operation", REFUSED)
def test_a_partial_shard_refuses_what_needs_other_ranks_and_names_the_remedy(operation: str) -> None:
    shard = _part((4, 3), 2, 7)
    with pytest.raises(NotImplementedError) as caught:
        REFUSED[operation](shard)
    assert "holds only elements 2:7 of 12" in str(caught.value)
    assert ".local" in str(caught.value) and "optimizer.full_state_dict(to=rank)" in str(caught.value)
    assert_same_bits(shard.local, torch.arange(3.0, 8.0), "the local part")


def test_a_partial_shard_beside_a_whole_one_is_refused_too() -> None:
    with pytest.raises(NotImplementedError, match="elements 2:7 of 12"):
        _whole() + _part((4, 3), 2, 7)


@pytest.mark.parametrize("save", [pickle.dumps, copy.copy, lambda shard: torch.save({"a": [shard]}, io.BytesIO())])
def test_a_partial_shard_refuses_to_be_pickled_and_names_the_remedy(save: Callable[[Any], object]) -> None:
    with pytest.raises(RuntimeError) as caught:
        save(_part((4, 3), 2, 7))
    for told in (
        "elements 2:7 of 12",
        "torch.save",
        "sharded_adamax.save(path, model, optimizer)",
        "full_state_dict(to=0)",
    ):
        assert told in str(caught.value)


# --- Copies


def test_detach_shares_memory_and_clone_and_deepcopy_do_not() -> None:
    shard = _part((4, 3), 2, 7)
    detached, cloned, copied = map(_shard, (shard.detach(), shard.clone(), copy.deepcopy(shard)))
    shard.local.fill_(-1)
    for other in (detached, cloned, copied):
        assert other.owned == Range(2, 7) and other.shape == (4, 3)
    assert_same_bits(detached.local, torch.full((5,), -1.0), "detached")
    assert_same_bits(cloned.local, torch.arange(3.0, 8.0), "the clone")
    assert_same_bits(copied.local, torch.arange(3.0, 8.0), "the deep copy")
    assert copied.local.untyped_storage().nbytes() == 5 * 4, "a deep copy must not take the bucket along"


def test_a_deepcopy_of_one_shard_in_two_places_is_one_shard() -> None:
    shard = _part((4, 3), 2, 7)
    one, two = copy.deepcopy([shard, shard])
    assert one is two is not shard


def test_to_converts_the_local_part() -> None:
    converted = _part((4, 3), 2, 7).to(torch.float64)
    assert isinstance(converted, FlatShard)
    assert converted.dtype == converted.local.dtype == torch.float64
    assert_same_bits(converted.local, torch.arange(3.0, 8.0, dtype=torch.float64), "the local part")
    shard = _part((4, 3), 2, 7)
    assert shard.to("cpu") is shard
    assert isinstance(shard.cpu(), FlatShard)


def test_zero_and_copy_of_the_same_part_write_into_the_memory() -> None:
    bucket = torch.full((64,), 9.0)
    shard = FlatShard(bucket[10:15], (4, 3), Range(2, 7))
    assert shard.zero_() is shard
    assert bucket.tolist() == [9.0] * 10 + [0.0] * 5 + [9.0] * 49
    assert shard.copy_(_part((4, 3), 2, 7)) is shard
    assert bucket.tolist() == [9.0] * 10 + [3.0, 4.0, 5.0, 6.0, 7.0] + [9.0] * 49


@pytest.mark.parametrize(
    "other", [_part((4, 3), 3, 8), _part((3, 4), 2, 7), _part((4, 3), 0, 12), torch.ones(4, 3)], ids=str
)
def test_copy_into_a_part_from_anything_but_the_same_part_is_refused(other: Tensor) -> None:
    shard = _part((4, 3), 2, 7)
    with pytest.raises(NotImplementedError, match=r"on a sharded optimizer state"):
        shard.copy_(other)
    assert_same_bits(shard.local, torch.arange(3.0, 8.0), "the local part")


def test_empty_like_is_the_same_part_in_new_memory() -> None:
    shard = _part((4, 3), 2, 7)
    for empty in (torch.empty_like(shard), shard.new_empty(shard.shape)):
        assert isinstance(empty, FlatShard)
        assert (empty.shape, empty.owned, empty.dtype) == (shard.shape, shard.owned, shard.dtype)
        assert empty.local.data_ptr() != shard.local.data_ptr()


# --- The protocol of torch.distributed.checkpoint


@contextmanager
def _chunks_of(max_numel: int) -> Iterator[None]:
    """Cut parts into small chunks, as large parameters are cut."""
    with mock.patch.object(state, "CHUNK_BYTES", 4 * max_numel):
        yield


def _cuts(data: st.DataObject, numel: int, shape: tuple[int, ...]) -> list[FlatShard]:
    inner = sorted(data.draw(st.lists(st.integers(0, numel), max_size=5)))
    return [_part(shape, start, stop) for start, stop in zip([0, *inner], [*inner, numel], strict=True)]


@settings(max_examples=200, deadline=None)
@given(shape=shapes, max_numel=st.sampled_from([1, 2, 7, 1000]), data=st.data())
def test_chunks_hold_exactly_the_elements_of_the_part(
    shape: tuple[int, ...], max_numel: int, data: st.DataObject
) -> None:
    whole = _values(shape)
    start = data.draw(st.integers(0, whole.numel()))
    stop = data.draw(st.integers(start, whole.numel()))
    shard = _part(shape, start, stop)
    with _chunks_of(max_numel):
        chunks = shard.__create_chunk_list__()
        items: list[WriteItem] = shard.__create_write_items__("w", shard)
    assert all(math.prod(chunk.sizes) <= max_numel for chunk in chunks)
    assert [item.tensor_data.chunk for item in items if item.tensor_data] == chunks
    elements: list[float] = []
    for item, chunk in zip(items, chunks, strict=True):
        assert item.type == WriteItemType.SHARD and item.index == MetadataIndex("w", chunk.offsets)
        assert item.tensor_data is not None and item.tensor_data.size == torch.Size(shape)
        assert item.tensor_data.properties.dtype == torch.float32
        assert len(chunk.offsets) == len(chunk.sizes) == len(shape)
        read = shard.__get_tensor_shard__(item.index)
        corner = tuple(slice(o, o + s) for o, s in zip(chunk.offsets, chunk.sizes, strict=True))
        assert type(read) is Tensor and torch.equal(read, whole[corner])
        if read.numel():
            assert read.untyped_storage().data_ptr() == shard.local.untyped_storage().data_ptr()
        elements += read.reshape(-1).tolist()
    assert elements == [float(value) for value in range(start + 1, stop + 1)]
    if whole.numel() == 0:
        assert [tuple(chunk.sizes) for chunk in chunks] == [shape], "the shape must be known in the file"


@settings(max_examples=200, deadline=None)
@given(shape=shapes, max_numels=st.tuples(*[st.sampled_from([1, 2, 7, 1000])] * 2), data=st.data())
def test_what_any_number_of_ranks_wrote_is_read_by_any_other_number(
    shape: tuple[int, ...], max_numels: tuple[int, int], data: st.DataObject
) -> None:
    """DCP's own planner finds the reads; only the files are missing."""
    numel = math.prod(shape)
    writers, readers = _cuts(data, numel, shape), _cuts(data, numel, shape)
    stored: dict[torch.Size, Tensor] = {}
    chunks = []
    for writer in writers:
        with _chunks_of(max_numels[0]):
            items: list[WriteItem] = writer.__create_write_items__("w", writer)
        for item, chunk in zip(items, writer.__create_chunk_list__(), strict=True):
            assert item.index.offset is not None
            if numel:
                assert item.index.offset not in stored, "two ranks write the same chunk"
            stored[item.index.offset] = writer.__get_tensor_shard__(item.index).clone()
            chunks.append(chunk)
    metadata = TensorStorageMetadata(TensorProperties(), torch.Size(shape), chunks)
    for reader in readers:
        expected = reader.local.clone()
        reader.zero_()
        with _chunks_of(max_numels[1]):
            wanted = reader.__create_chunk_list__()
        for read in create_read_items_for_chunk_list("w", metadata, wanted):
            assert read.storage_index.offset is not None
            source, target = stored[read.storage_index.offset], reader.__get_tensor_shard__(read.dest_index)
            for dim, numel_of_dim in enumerate(read.lengths):
                source = source.narrow(dim, read.storage_offsets[dim], numel_of_dim)
                target = target.narrow(dim, read.dest_offsets[dim], numel_of_dim)
            target.copy_(source)
        assert_same_bits(reader.local, expected, "what was read")


def test_a_chunk_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match=r"is not a part of FlatShard\(shape=\(4, 3\)"):
        _part((4, 3), 2, 7).__get_tensor_shard__(MetadataIndex("w", torch.Size((3, 0))))


def test_the_checkpoint_reader_fills_a_part_from_a_whole_on_disk(tmp_path: Path) -> None:
    saved = {"w": _whole((5, 2, 3)), "scalar": _whole(()), "empty": _whole((3, 0))}
    dcp_save(saved, checkpoint_id=tmp_path / "x", no_dist=True)
    bucket = torch.zeros(64)
    part = FlatShard(bucket[5:17], (5, 2, 3), Range(8, 20))
    plain = {"scalar": torch.zeros(()), "empty": torch.zeros(3, 0)}
    dcp_load({"w": part, **plain}, checkpoint_id=tmp_path / "x", no_dist=True)
    assert_same_bits(bucket[5:17], torch.arange(9.0, 21.0), "the part")
    assert not bucket[:5].any() and not bucket[17:].any()
    assert plain["scalar"] == 1


# --- local_part and gather_full


def test_local_part_is_the_owned_range_of_a_plain_tensor() -> None:
    target = _part((4, 3), 2, 7)
    expected = torch.arange(3.0, 8.0)
    assert_same_bits(local_part(_values((4, 3)), target, "w"), expected, "contiguous")
    assert_same_bits(local_part(_values((4, 3)).t().contiguous().t(), target, "w"), expected, "not contiguous")
    assert_same_bits(local_part(_values((4, 3)).double(), target, "w"), expected, "another dtype")
    assert_same_bits(local_part(_whole().to(torch.float64), target, "w"), expected, "a whole shard")
    assert_same_bits(local_part(target.clone(), target, "w"), expected, "the same part")
    assert type(local_part(nn.Parameter(_values((4, 3))), target, "w")) is Tensor
    assert local_part(_values((4, 3)), _part((4, 3), 5, 5), "w").shape == (0,)
    assert local_part(torch.tensor(3.0), _whole(()), "w").tolist() == [3.0]


@pytest.mark.parametrize("value", [torch.ones(3, 4), torch.ones(12), _whole((12,)), _part((3, 4), 2, 7)], ids=str)
def test_local_part_of_another_shape_names_state_and_shapes(value: Tensor) -> None:
    shape = re.escape(str(tuple(value.shape)))
    with pytest.raises(ValueError, match=rf"^exp_avg of layer\.weight: expected shape \(4, 3\), got {shape}$"):
        local_part(value, _part((4, 3), 2, 7), "exp_avg of layer.weight")


@pytest.mark.parametrize("other", [(3, 8), (0, 7), (2, 6), (7, 7)])
def test_local_part_of_another_part_names_both_and_the_remedy(other: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"^exp_inf of w: expected elements 2:7 .*got a shard of elements") as caught:
        local_part(_part((4, 3), *other), _part((4, 3), 2, 7), "exp_inf of w")
    assert f"elements {other[0]}:{other[1]}: it was made by another rank or world size" in str(caught.value)
    assert "sharded_adamax.save and load" in str(caught.value) and "full_state_dict()" in str(caught.value)


def test_gathered_tensors_have_memory_of_their_own() -> None:
    shapes_ = [(4, 3), (), (7,)]
    specs = [ParamSpec(f"p{i}", shape, torch.float32) for i, shape in enumerate(shapes_)]
    (bucket,) = build(specs, world_size=1, bucket_bytes=1 << 20).buckets
    shard = torch.arange(float(bucket.shard_numel))
    in_slots = [torch.empty(shapes_[slot.param], device="meta") for slot in bucket.slots]
    tensors = gather_full(LocalGroup(), bucket, shard, in_slots, to=0)
    expected = [shard[slot.in_bucket.as_slice()].view(shapes_[slot.param]).clone() for slot in bucket.slots]
    shard.fill_(-1)
    for tensor, values in zip(tensors, expected, strict=True):
        assert_same_bits(tensor, values, "a gathered tensor")
        assert tensor.untyped_storage().nbytes() == 4 * tensor.numel()


def test_gathering_a_bucket_without_elements_gives_their_shapes() -> None:
    (bucket,) = build([ParamSpec("p", (3, 0), torch.float64)], world_size=1, bucket_bytes=100).buckets
    (tensor,) = gather_full(LocalGroup(), bucket, torch.zeros(0, dtype=torch.float64), [torch.empty(3, 0)], to=0)
    assert tensor.shape == (3, 0) and tensor.dtype == torch.float64


# --- The state of the optimizer


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("default", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_the_state_is_there_from_the_start_with_torchs_dtypes(dtype: torch.dtype, default: torch.dtype) -> None:
    with _default_dtype(default):
        params, expected = make_params(dtype), make_params(dtype)
        optimizer, reference = ShardedAdamax(params), torch.optim.Adamax(expected)
        for param in expected:
            param.grad = torch.zeros_like(param)
        reference.step()  # torch makes the state now
    for param, other in zip(params, expected, strict=True):
        ours, of_torch = optimizer.state[param], reference.state[other]
        assert list(ours) == list(of_torch) == ["step", *STATE_KEYS]
        for key in ours:
            assert (ours[key].dtype, ours[key].shape) == (of_torch[key].dtype, of_torch[key].shape), key
            assert ours[key].device == of_torch[key].device
            assert not ours[key].any()
        assert type(ours["step"]) is Tensor
        assert all(isinstance(ours[key], FlatShard) for key in STATE_KEYS)


def test_a_frozen_parameter_has_no_state() -> None:
    params = make_params(torch.float32)
    params[2].requires_grad_(False)
    optimizer = ShardedAdamax(params)
    assert params[2] not in optimizer.state and len(optimizer.state) == len(params) - 1
    assert 2 not in optimizer.state_dict()["state"]


def test_get_optimizer_state_dict_runs_no_hidden_step() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    optimizer = ShardedAdamax(model.parameters(), lr=0.1, weight_decay=0.5, eps=0.0)
    before = [param.detach().clone() for param in model.parameters()]
    stepped: list[object] = []
    optimizer.register_step_pre_hook(lambda *args: stepped.append(args))
    state_dict: dict[str, Any] = get_optimizer_state_dict(model, optimizer)
    assert not stepped
    assert all(not value.any() for entry in state_dict["state"].values() for value in entry.values())
    assert set(state_dict["state"]) == {name for name, _ in model.named_parameters()}
    for param, old in zip(model.parameters(), before, strict=True):
        assert_same_bits(param, old, "a parameter")
        assert optimizer.state[param]["step"] == 0 and param.grad is None


def _stepped(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], step: int) -> None:
    for index, param in enumerate(params):
        param.grad = gradient(step, 0, index, param)
    optimizer.step()
    optimizer.zero_grad()


def test_state_dict_never_communicates_and_holds_the_live_tensors() -> None:
    params = make_params(torch.float32)
    optimizer = ShardedAdamax(params)
    _stepped(optimizer, params, 0)
    engine = optimizer._engine
    assert engine is not None
    engine.group.traffic.calls.clear()
    engine.control.traffic.calls.clear()
    state_dict = optimizer.state_dict()
    assert not engine.group.traffic.calls and not engine.control.traffic.calls
    for index, param in enumerate(params):
        assert state_dict["state"][index]["exp_avg"] is optimizer.state[param]["exp_avg"]


def test_a_bucket_in_which_nothing_has_a_gradient_is_not_gathered() -> None:
    params = make_params(torch.float32)
    optimizer = ShardedAdamax(params, bucket_mib=0.005)
    engine = optimizer._engine
    assert engine is not None and len(engine.buckets) > 2
    optimizer.step()
    assert engine.group.traffic.calls["all_gather"] == 0
    params[-1].grad = torch.ones_like(params[-1])
    optimizer.step()
    assert engine.group.traffic.calls["all_gather"] == 1


def test_a_full_state_dict_is_a_snapshot_of_plain_cpu_tensors() -> None:
    params, expected = make_params(torch.float32), make_params(torch.float32)
    optimizer, reference = ShardedAdamax(params, bucket_mib=0.005), torch.optim.Adamax(expected)
    for step in range(3):
        _stepped(optimizer, params, step)
        _stepped(reference, expected, step)
    full = optimizer.full_state_dict()
    assert full is not None
    for step in range(3, 5):
        _stepped(optimizer, params, step)
    assert_same_state(full, reference)
    assert list(full["state"]) == list(range(len(params)))
    for entry in full["state"].values():
        for key, value in entry.items():
            assert type(value) is Tensor and value.device == torch.device("cpu")
            assert value.untyped_storage().nbytes() == value.nbytes, f"{key} keeps more than itself alive"


def test_a_consolidated_state_is_handed_out_until_the_next_change() -> None:
    params = make_params(torch.float32)
    optimizer = ShardedAdamax(params)
    _stepped(optimizer, params, 0)
    sharded = optimizer.state_dict()

    def is_plain() -> bool:
        return type(optimizer.state_dict()["state"][0]["exp_avg"]) is Tensor

    def consolidate() -> None:
        optimizer.consolidate_state_dict()
        assert is_plain()

    consolidate()
    _stepped(optimizer, params, 1)
    assert not is_plain(), "stale after a step"
    consolidate()
    optimizer.load_state_dict(sharded)
    assert not is_plain(), "stale after loading"
    consolidate()
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))]})
    assert not is_plain() and len(optimizer.state_dict()["param_groups"]) == 2, "stale after a group was added"
