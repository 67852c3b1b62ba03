"""The description of a checkpoint: written, read back the same, and believed only where it is possible."""

from __future__ import annotations

import dataclasses
import io
import json
import pickle
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from sharded_adamax.checkpoint import CheckpointDamagedError, CheckpointError, foreign, manifest, parts
from sharded_adamax.checkpoint.manifest import Chunk, Manifest, Record, StoredFile, StoredTensor
from sharded_adamax.checkpoint.writing import RecordStream, Written, plan
from sharded_adamax.collectives import ControlPlane

PATH = Path("somewhere") / manifest.MANIFEST_NAME
RECORD = Record("__0_0.distcp", 7, 100, 12345)


def _manifest(**changes: Any) -> Manifest:
    found = Manifest(
        run_id="run",
        save_id="save",
        step=3,
        metric=1e-05,
        world_size=2,
        layout_digest=None,
        created="2026-01-01T00:00:00+00:00",
        torch_version="2.13.0",
        files={"__0_0.distcp": StoredFile(107, "ab")},
        tensors={
            "model.größe": StoredTensor((4, 3), "float32", (Chunk((0, 0), (4, 3), RECORD),)),
            "model.scalar": StoredTensor((), "float64", (Chunk((), (), RECORD),)),
            "model.nothing": StoredTensor((0, 5), "bfloat16", ()),
        },
        values={"optim.param_groups.w.lr": dataclasses.replace(RECORD, crc32=None)},
    )
    return dataclasses.replace(found, **changes)


# --- Round trips


def test_a_manifest_is_read_as_it_was_written() -> None:
    written = _manifest()
    assert manifest.parse(written.to_json(), PATH) == written


sizes = st.integers(0, 2**40)
names = st.text(min_size=1, max_size=8)
records = st.builds(Record, st.just("__3_0.distcp"), sizes, sizes, st.none() | st.integers(0, 2**32 - 1))


@st.composite
def _tensors(draw: st.DrawFn) -> StoredTensor:
    shape = tuple(draw(st.lists(st.integers(0, 9), max_size=3)))
    offsets = tuple(draw(st.integers(0, extent)) for extent in shape)
    box = tuple(draw(st.integers(0, extent - offset)) for extent, offset in zip(shape, offsets, strict=True))
    return StoredTensor(shape, "float32", (Chunk(offsets, box, draw(records)),) * draw(st.integers(0, 2)))


@settings(max_examples=100, deadline=None)
@given(
    st.dictionaries(names, _tensors(), max_size=4),
    st.dictionaries(names, records, max_size=4),
    st.none() | st.integers(0, 2**62),
    st.none() | st.floats(allow_nan=False),
)
def test_any_manifest_is_read_as_it_was_written(
    tensors: dict[str, StoredTensor], values: dict[str, Record], step: int | None, metric: float | None
) -> None:
    written = _manifest(tensors=tensors, values=values, step=step, metric=metric)
    assert manifest.parse(written.to_json(), PATH) == written


def test_a_metric_that_is_not_a_number_is_kept() -> None:
    found = manifest.parse(_manifest(metric=float("nan")).to_json(), PATH)
    assert found.metric is not None and found.metric != found.metric


def test_a_part_is_read_as_it_was_written() -> None:
    box = Chunk((0, 0), (4, 3), RECORD)
    written = Written("__0_0.distcp", StoredFile(107, "ab"), [("a", box), ("a", box), ("größe", box)], [("v", RECORD)])
    assert parts.parse(parts.to_json(written)) == written
    assert parts.name(3) == "__3.part"


def test_the_records_of_a_stream_are_where_it_says_with_their_checksums(tmp_path: Path) -> None:
    state: dict[str, Any] = {"a": torch.arange(12.0).view(4, 3), "b": {"c": 5, "d": torch.zeros(0, 2)}}
    stream = RecordStream(plan(ControlPlane(None), state).items, "__0_0.distcp")
    data = b"".join(bytes(part) for part in stream)
    written = stream.written()
    assert written.stored == manifest.file_of(data)
    found = [record for _, record in written.values] + [chunk.record for _, chunk in written.chunks]
    assert sum(record.length for record in found) == len(data)
    assert {record.offset for record in found} - {0} == {r.offset + r.length for r in found} - {len(data)}  # no gaps
    for name, chunk in written.chunks:
        piece = data[chunk.record.offset : chunk.record.offset + chunk.record.length]
        assert zlib.crc32(piece) == chunk.record.crc32
        loaded = torch.load(io.BytesIO(piece), weights_only=True)
        assert torch.equal(loaded, state["a"] if name == "a" else state["b"]["d"])


# --- Damage


def test_every_flipped_bit_of_a_manifest_is_refused_by_name() -> None:
    whole = _manifest().to_json()
    for place in range(len(whole) * 8):
        damaged = bytearray(whole)
        damaged[place // 8] ^= 1 << place % 8
        with pytest.raises(CheckpointDamagedError, match=r"manifest\.json is damaged"):
            manifest.parse(bytes(damaged), PATH)


def test_every_cut_of_a_manifest_is_refused_by_name() -> None:
    whole = _manifest().to_json()
    for length in range(len(whole)):
        with pytest.raises(CheckpointDamagedError, match=r"manifest\.json is damaged"):
            manifest.parse(whole[:length], PATH)
    with pytest.raises(CheckpointDamagedError, match=r"manifest\.json is damaged"):
        manifest.parse(whole + b"\n", PATH)


@pytest.mark.parametrize(
    "data", [b"", b"7", b"[]", b"null", b'"digest"', b"{}", b"\xff\xfe", b"[" * 100_000, b"\x80\x04."]
)
def test_what_is_no_manifest_is_refused_by_name(data: bytes) -> None:
    with pytest.raises(CheckpointDamagedError, match=r"manifest\.json is damaged"):
        manifest.parse(data, PATH)


def _with(**changes: Any) -> bytes:
    """A manifest with a right digest and other contents."""
    body = json.loads(_manifest().to_json())
    body.pop("digest")
    body.update(changes)
    return manifest._canonical({**body, "digest": manifest._digest(body)})


def test_a_newer_format_is_refused_with_what_to_do() -> None:
    with pytest.raises(CheckpointError, match="has format version 2, this release reads up to 1: upgrade") as caught:
        manifest.parse(_with(version=2), PATH)
    assert not isinstance(caught.value, CheckpointDamagedError)  # it is whole: do not fall back to an older one


def test_another_format_is_refused() -> None:
    with pytest.raises(CheckpointDamagedError):
        manifest.parse(_with(format="something else"), PATH)


# --- Places that cannot be

OUTSIDE = ["../x", "/etc/passwd", "a/b", "a\\b", "..", ".", "", "a\0", "x" * 256, "ä" * 128, 5, None, b"x"]


@pytest.mark.parametrize("name", OUTSIDE, ids=lambda name: repr(name)[:20].replace("\0", "0"))
def test_only_plain_names_are_files_of_a_directory(name: object) -> None:
    assert not manifest.is_file_name(name)
    with pytest.raises(ValueError, match="outside of the directory"):
        manifest.check_places({}, {"v": Record(name, 0, 1, None)})  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "...", "größe", "x" * 255])
def test_plain_names_are(name: str) -> None:
    assert manifest.is_file_name(name)


IMPOSSIBLE: dict[str, StoredTensor] = {
    "a negative extent": StoredTensor((-1, 3), "float32", ()),
    "a fractional extent": StoredTensor((1.5, 3), "float32", ()),  # type: ignore[arg-type]
    "an extent that is a truth": StoredTensor((True, 3), "float32", ()),
    "an extent beyond 63 bits": StoredTensor((1 << 63,), "float32", ()),
    "a dtype that is no name": StoredTensor((1,), 5, ()),  # type: ignore[arg-type]
    "a box of fewer dimensions": StoredTensor((4, 3), "float32", (Chunk((0,), (4,), RECORD),)),
    "a box of more sizes than offsets": StoredTensor((4, 3), "float32", (Chunk((0, 0), (4, 3, 1), RECORD),)),
    "a box that sticks out": StoredTensor((4, 3), "float32", (Chunk((1, 0), (4, 3), RECORD),)),
    "a box that begins before": StoredTensor((4, 3), "float32", (Chunk((-1, 0), (4, 3), RECORD),)),
    "a record that begins before": StoredTensor((1,), "float32", (Chunk((0,), (1,), Record("a", -1, 1, None)),)),
    "a record of no length": StoredTensor((1,), "float32", (Chunk((0,), (1,), Record("a", 0, None, None)),)),  # type: ignore[arg-type]
    "a checksum that is text": StoredTensor((1,), "float32", (Chunk((0,), (1,), Record("a", 0, 1, "7")),)),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("kind", IMPOSSIBLE)
def test_what_cannot_be_is_refused_by_name(kind: str) -> None:
    with pytest.raises(ValueError, match=r"model\.w is|model\.w has"):
        manifest.check_places({"model.w": IMPOSSIBLE[kind]}, {})
    with pytest.raises(CheckpointDamagedError, match=r"manifest\.json"):
        manifest.parse(_manifest(tensors={"model.w": IMPOSSIBLE[kind]}).to_json(), PATH)


# --- The metadata of other programs


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """A checkpoint of torch.distributed.checkpoint: every dtype that it may hold, values, 0-d and empty tensors."""
    dtypes = (torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.bool, torch.complex64, torch.uint8)
    state: dict[str, Any] = {str(dtype): torch.zeros(3, 2, dtype=dtype) for dtype in dtypes}
    state |= {"scalar": torch.tensor(1.0), "nothing": torch.zeros(0, 4), "nested": {"lr": 0.1, "betas": (0.9, 0.99)}}
    with pytest.warns(UserWarning, match="single process"):
        dcp_save(state, checkpoint_id=tmp_path / "foreign")
    return tmp_path / "foreign" / foreign.METADATA_NAME


def test_foreign_metadata_says_the_same_as_torchs_own_reader(written: Path) -> None:
    tensors, values = foreign.read_metadata(written)
    expected: metadata.Metadata = filesystem.FileSystemReader(written.parent).read_metadata()
    assert set(tensors) | set(values) == set(expected.state_dict_metadata)
    assert set(values) == {"nested.lr", "nested.betas"}
    for name, entry in expected.state_dict_metadata.items():
        if isinstance(entry, metadata.TensorStorageMetadata):
            assert (tensors[name].shape, tensors[name].dtype) == (
                tuple(entry.size),
                str(entry.properties.dtype).removeprefix("torch."),
            )
            places = [expected.storage_data[metadata.MetadataIndex(name, chunk.offsets)] for chunk in entry.chunks]
            found = [chunk.record for chunk in tensors[name].chunks]
        else:
            places, found = [expected.storage_data[metadata.MetadataIndex(name)]], [values[name]]
        assert [(r.file, r.offset, r.length, r.crc32) for r in found] == [
            (place.relative_path, place.offset, place.length, None) for place in places
        ]
    again = foreign.dcp_metadata(tensors, values)
    for name, entry in expected.state_dict_metadata.items():
        if isinstance(entry, metadata.TensorStorageMetadata):
            ours = again.state_dict_metadata[name]
            assert isinstance(ours, metadata.TensorStorageMetadata)
            assert (ours.size, ours.chunks, ours.properties.dtype) == (entry.size, entry.chunks, entry.properties.dtype)


def test_our_metadata_is_what_torchs_own_reader_expects(tmp_path: Path) -> None:
    state = {"a": torch.arange(6.0).view(2, 3), "b": {"lr": 0.1}}
    planned = plan(ControlPlane(None), state)
    stream = RecordStream(planned.items, "__0_0.distcp")
    (tmp_path / stream.file).write_bytes(b"".join(bytes(part) for part in stream))
    done = stream.written()
    described = _manifest(
        tensors={"a": StoredTensor((2, 3), "float32", tuple(chunk for _, chunk in done.chunks))},
        values=dict(done.values),
    )
    assert planned.metadata is not None
    (tmp_path / foreign.METADATA_NAME).write_bytes(foreign.metadata_bytes(planned.metadata, described))
    into: dict[str, Any] = {"a": torch.zeros(2, 3), "b": {"lr": 0.0}}
    with pytest.warns(UserWarning, match="single process"):
        dcp_load(into, checkpoint_id=tmp_path)
    assert torch.equal(into["a"], state["a"]) and into["b"] == {"lr": 0.1}  # type: ignore[arg-type]


BREAKS: dict[str, Callable[[metadata.Metadata], object]] = {
    "no entries": lambda found: setattr(found, "state_dict_metadata", None),
    "no places": lambda found: found.storage_data.clear(),
    "places that are a list": lambda found: setattr(found, "storage_data", [1, 2]),
    "an entry that is text": lambda found: found.state_dict_metadata.update({"scalar": "x"}),  # type: ignore[dict-item]
    "a shape that is text": lambda found: setattr(found.state_dict_metadata["scalar"], "size", "x"),
    "a dtype that is text": lambda found: setattr(found.state_dict_metadata["scalar"].properties, "dtype", 7),  # type: ignore[union-attr]
    "a place that is text": lambda found: setattr(found, "storage_data", dict.fromkeys(found.storage_data, "x")),
}


@pytest.mark.parametrize("kind", BREAKS)
def test_foreign_metadata_that_makes_no_sense_is_refused_by_name(written: Path, kind: str) -> None:
    found = pickle.loads(written.read_bytes())  # written by this test
    BREAKS[kind](found)
    written.write_bytes(pickle.dumps(found))
    with pytest.raises(CheckpointError, match=r"\.metadata"):
        foreign.dcp_metadata(*foreign.read_metadata(written))


def test_every_cut_of_foreign_metadata_is_refused_by_name(written: Path) -> None:
    whole = written.read_bytes()
    for length in range(0, len(whole), 7):
        written.write_bytes(whole[:length])
        with pytest.raises(CheckpointDamagedError, match=r"\.metadata is damaged"):
            foreign.read_metadata(written)


@pytest.mark.parametrize("name", ["load", "os.system", "", "float32 ", "Tensor", "__dict__"])
def test_only_dtypes_are_dtypes(name: str) -> None:
    with pytest.raises(CheckpointError, match="expected the name of a torch dtype"):
        foreign.dtype_of(name)
    assert foreign.dtype_of(foreign.dtype_name(torch.bfloat16)) is torch.bfloat16
