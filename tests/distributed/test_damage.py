"""What is not what was written is refused by name, on every rank; and reading a stranger's checkpoint runs no code."""

from __future__ import annotations

import builtins
import dataclasses
import functools
import importlib
import io
import json
import os
import pickle
import random
import shutil
import warnings
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import filesystem, metadata

from sharded_adamax import CheckpointManager, load, save
from sharded_adamax.checkpoint import CheckpointDamagedError, CheckpointError, manifest
from sharded_adamax.checkpoint.foreign import METADATA_NAME
from sharded_adamax.checkpoint.manifest import MANIFEST_NAME, Chunk, Manifest, Record, StoredFile, StoredTensor
from tests.distributed import jobs
from tests.distributed.pool import Pool
from tests.distributed.problems import assert_same_bits

SAVED_AT = 3
FLIPS_PER_FILE = 80
CUTS_PER_FILE = 12


def _job(seed: int, dtype: torch.dtype = torch.float32) -> jobs.Job:
    return jobs.build("ours", dtype, seed)


def _save_three(root: str) -> None:
    """Two steps of one run, and one of another run with the same shapes."""
    job = _job(0)
    for step, name in ((1, "one"), (2, "two")):
        jobs.advance(job, range(step, step + 1))
        save(f"{root}/{name}", job.module, job.optimizer, extra={"epoch": 1}, step=step)
    other = _job(7)
    jobs.advance(other, range(10, 12))
    save(f"{root}/other", other.module, other.optimizer, extra={"epoch": 1}, step=2)


@pytest.fixture(scope="module")
def saved(ranks: Pool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("saved")
    ranks.run(SAVED_AT, _save_three, str(root))
    return root


FILES = [*(f"__{rank}_0.distcp" for rank in range(SAVED_AT)), METADATA_NAME, MANIFEST_NAME]


def test_every_file_of_a_checkpoint_is_damaged_below(saved: Path) -> None:
    for name in ("one", "two", "other"):
        assert sorted(path.name for path in (saved / name).iterdir()) == sorted(FILES)


@pytest.fixture
def victim(saved: Path, tmp_path: Path) -> Path:
    """A copy of checkpoint two, to be damaged."""
    return Path(shutil.copytree(saved / "two", tmp_path / "victim"))


def _refusal(path: Path, verify: bool = True, job: jobs.Job | None = None) -> Exception:
    """Load where ranks are 1, or as many as run this; return why not."""
    job = job or _job(1)
    try:
        load(path, job.module, job.optimizer, verify=verify)
    except Exception as error:
        return error
    raise AssertionError(f"{path} was loaded")


def _must_name(error: Exception, file: str, what: str) -> None:
    assert isinstance(error, CheckpointDamagedError), (what, repr(error))
    assert file in str(error), (what, error)


# --- Damage in a world of one


@pytest.mark.parametrize("file", FILES)
def test_a_flipped_bit_anywhere_is_refused_by_name(victim: Path, file: str) -> None:
    path = victim / file
    whole = path.read_bytes()
    chance = random.Random(file)
    for place in chance.sample(range(len(whole) * 8), FLIPS_PER_FILE):
        damaged = bytearray(whole)
        damaged[place // 8] ^= 1 << place % 8
        path.write_bytes(damaged)
        _must_name(_refusal(victim), file, f"bit {place} of {len(whole) * 8}")
    path.write_bytes(whole)
    load(victim, *_job(1))  # without damage there is no refusal


@pytest.mark.parametrize("file", [file for file in FILES if file.endswith(".distcp")])  # the others have no records
def test_a_flipped_bit_in_every_record_is_refused_by_name(victim: Path, file: str) -> None:
    # Random places hit large records; here each record has its turn: each value, the 0-element tensor, the generators.
    path = victim / file
    whole = path.read_bytes()
    records = [record for _, record in _records(_manifest(victim)) if record.file == file]
    assert sum(record.length for record in records) == len(whole)
    for record in records:
        damaged = bytearray(whole)
        damaged[record.offset + record.length // 2] ^= 4
        path.write_bytes(damaged)
        _must_name(_refusal(victim), file, str(record))


@pytest.mark.parametrize("file", FILES)
def test_a_cut_an_empty_and_a_missing_file_and_one_with_more_at_its_end_are_refused_by_name(
    victim: Path, file: str
) -> None:
    path = victim / file
    whole = path.read_bytes()
    chance = random.Random(file)
    for length in (0, 1, len(whole) - 1, *chance.sample(range(len(whole)), CUTS_PER_FILE)):
        path.write_bytes(whole[:length])
        _must_name(_refusal(victim), file, f"cut to {length} of {len(whole)} bytes")
    path.write_bytes(whole + b"\0")
    _must_name(_refusal(victim), file, "one byte more")
    path.unlink()
    _must_name(_refusal(victim), file, "missing")


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("source", ["one", "other"])
def test_a_file_of_another_step_and_of_another_run_is_refused_by_name(
    saved: Path, victim: Path, file: str, source: str
) -> None:
    shutil.copyfile(saved / source / file, victim / file)
    error = _refusal(victim)
    if file == MANIFEST_NAME:  # it is whole, so the files that it does not speak of are the wrong ones
        assert isinstance(error, CheckpointDamagedError) and any(name in str(error) for name in FILES), error
    else:
        _must_name(error, file, f"of checkpoint {source}")


def test_two_files_that_changed_places_are_refused_by_name(victim: Path) -> None:
    first, second = victim / FILES[0], victim / FILES[1]
    contents = first.read_bytes(), second.read_bytes()
    second.write_bytes(contents[0])
    first.write_bytes(contents[1])
    _must_name(_refusal(victim), FILES[0], "exchanged")


def test_a_manifest_that_says_the_same_in_other_bytes_is_refused(tmp_path: Path) -> None:
    # 1e-05 and 1E-05 are the same number and one bit apart.
    job = _job(0)
    manager = CheckpointManager(tmp_path)
    manager.save(1, job.module, job.optimizer, metric=1e-05)
    manager.close()
    path = tmp_path / "00000001" / MANIFEST_NAME
    whole = path.read_bytes()
    assert whole.count(b"1e-05") == 1
    path.write_bytes(whole.replace(b"1e-05", b"1E-05"))
    _must_name(_refusal(path.parent), MANIFEST_NAME, "1E-05")


def test_damage_that_is_found_before_reading_changes_nothing(victim: Path) -> None:
    for file in FILES:
        whole = (victim / file).read_bytes()
        (victim / file).write_bytes(whole[:-1])
        job = _job(1)
        before = _snapshot(job)
        _must_name(_refusal(victim, job=job), file, "cut")
        _assert_unchanged(job, before, file)
        (victim / file).write_bytes(whole)


# --- Damage at two ranks


def _damaged_copies(saved: Path, root: Path) -> list[tuple[str, str]]:
    """Return directory and damaged file: each kind of damage for each file."""

    def flip(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[len(data) * 2 // 3] ^= 16
        path.write_bytes(data)

    def cut(path: Path) -> None:
        path.write_bytes(path.read_bytes()[:-7])

    kinds: dict[str, Callable[[Path], object]] = {
        "flip": flip,
        "cut": cut,
        "empty": lambda path: path.write_bytes(b""),
        "missing": lambda path: path.unlink(),
        "step": lambda path: shutil.copyfile(saved / "one" / path.name, path),
        "run": lambda path: shutil.copyfile(saved / "other" / path.name, path),
    }
    copies = []
    for file in FILES:
        for kind, damage in kinds.items():
            copy = root / f"{kind}{file}"
            shutil.copytree(saved / "two", copy)
            damage(copy / file)
            copies.append((str(copy), file))
    return copies


def _refusals(paths: list[str]) -> list[str]:
    job = _job(1)
    found = []
    for path in paths:
        error = _refusal(Path(path), job=job)
        found.append(f"{type(error).__name__}: {error}")
    return found


@pytest.mark.parametrize("world_size", [2, 4])
def test_every_rank_refuses_and_names_the_file(ranks: Pool, saved: Path, tmp_path: Path, world_size: int) -> None:
    copies = _damaged_copies(saved, tmp_path)
    assert len(copies) == 30
    results = ranks.run(world_size, _refusals, [path for path, _ in copies])
    for rank, messages in enumerate(results):
        for (path, file), message in zip(copies, messages, strict=True):
            assert "CheckpointDamagedError" in message, (rank, path, message)
            manifest_of_another = file == MANIFEST_NAME and Path(path).name.startswith(("step", "run"))
            assert file in message or manifest_of_another, (rank, path, message)


# --- The manager falls back


def _restore(root: str, wrong: str) -> str:
    """Restore where the newest is damaged; check that the older one came back. Returns the warning."""
    job = _job(1)
    manager = CheckpointManager(root)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        restored = manager.restore(job.module, job.optimizer)
    assert restored is not None and restored[0] == 1, (wrong, restored)
    expected = _job(0)
    jobs.advance(expected, range(1, 2))
    for (name, got), want in zip(job.module.state_dict().items(), expected.module.state_dict().values(), strict=True):
        assert_same_bits(got, want, f"{wrong}: {name}")
    for param, other in zip(job.module.parameters(), expected.module.parameters(), strict=True):
        for key in ("exp_avg", "exp_inf"):
            assert_same_bits(job.optimizer.state[param][key].local, expected.optimizer.state[other][key].local, key)
    manager.close()
    return "\n".join(str(warning.message) for warning in caught)


def _restore_all(roots: list[str]) -> list[str]:
    return [_restore(root, root) for root in roots]


@pytest.mark.parametrize("world_size", [1, 2])
def test_restore_falls_back_to_the_checkpoint_before_whatever_is_wrong_and_says_so(
    ranks: Pool, saved: Path, tmp_path: Path, world_size: int
) -> None:
    copies = _damaged_copies(saved, tmp_path / "copies")
    roots: list[str] = []
    for path, _ in copies:
        root = tmp_path / f"root{len(roots)}"
        shutil.copytree(saved / "one", root / "00000001")
        shutil.move(path, root / "00000002")
        roots.append(str(root))
    results = [_restore_all(roots)] if world_size == 1 else ranks.run(world_size, _restore_all, roots)
    for messages in results:
        for (path, file), message in zip(copies, messages, strict=True):
            manifest_of_another = file == MANIFEST_NAME and Path(path).name.startswith(("step", "run"))
            assert "00000002" in message and (file in message or manifest_of_another), (path, message)


# --- What does not fit, and what is not covered


def _manifest(directory: Path) -> Manifest:
    path = directory / MANIFEST_NAME
    return manifest.parse(path.read_bytes(), path)


def _records(found: Manifest) -> Iterator[tuple[str, Record]]:
    for name, tensor in found.tensors.items():
        for chunk in tensor.chunks:
            yield name, chunk.record
    yield from found.values.items()


def _rewrite(directory: Path, **changes: Any) -> None:
    """Change the manifest as somebody would who knows the format: its digest is right."""
    changed = dataclasses.replace(_manifest(directory), **changes)
    (directory / MANIFEST_NAME).write_bytes(changed.to_json())


def _snapshot(job: jobs.Job) -> list[tuple[str, Tensor]]:
    """Copies of everything that a load may change."""
    found = [(name, value.detach().clone()) for name, value in job.module.state_dict().items()]
    for name, param in job.module.named_parameters():
        for key, value in job.optimizer.state[param].items():
            found.append((f"{key} of {name}", getattr(value, "local", value).clone()))
    values = [float(value) for group in jobs.hypers(job.optimizer) for value in (group["lr"], *group["betas"])]
    found.append(("hyper-parameters", torch.tensor(values, dtype=torch.float64)))
    return found


def _assert_unchanged(job: jobs.Job, before: list[tuple[str, Tensor]], what: str) -> None:
    for (name, value), (_, old) in zip(_snapshot(job), before, strict=True):
        assert_same_bits(value, old, f"{what}: {name}")


STATE = "optim.state.table.weight.exp_avg"


def _drop_key(found: Manifest) -> dict[str, Any]:
    return {"tensors": {name: tensor for name, tensor in found.tensors.items() if name != STATE}}


def _drop_value(found: Manifest) -> dict[str, Any]:
    name = "optim.param_groups.seven.lr"
    return {"values": {key: record for key, record in found.values.items() if key != name}}


def _change(found: Manifest, **changes: Any) -> dict[str, Any]:
    return {"tensors": {**found.tensors, STATE: dataclasses.replace(found.tensors[STATE], **changes)}}


def _gap(found: Manifest) -> dict[str, Any]:
    return _change(found, chunks=found.tensors[STATE].chunks[:-1])


def _gap_behind_an_overlap(found: Manifest) -> dict[str, Any]:
    """Rows 0 to 64 twice, rows 65 to 128 never: as many elements as there should be."""
    first = Chunk((0, 0), (64, 33), found.tensors[STATE].chunks[0].record)
    return _change(
        found, chunks=(first, dataclasses.replace(first, offsets=(1, 0)), Chunk((128, 0), (1, 33), first.record))
    )


def _as_value(found: Manifest) -> dict[str, Any]:
    record = found.tensors[STATE].chunks[0].record
    return {**_drop_key(found), "values": {**found.values, STATE: record}}


def _value_as_tensor(found: Manifest) -> dict[str, Any]:
    name = "optim.param_groups.seven.lr"
    record = found.values[name]
    tensor = StoredTensor((), "float32", (Chunk((), (), record),))
    return {**_drop_value(found), "tensors": {**found.tensors, name: tensor}}


MISFITS: dict[str, tuple[Callable[[Manifest], dict[str, Any]], str]] = {
    "a missing tensor": (_drop_key, STATE),
    "a missing value": (_drop_value, "optim.param_groups.seven.lr"),
    "another shape": (lambda found: _change(found, shape=(129, 34)), STATE),
    "another number of dimensions": (lambda found: _change(found, shape=(129 * 33,)), STATE),
    "another dtype": (lambda found: _change(found, dtype="float64"), STATE),
    "no such dtype": (lambda found: _change(found, dtype="load"), "load"),
    "a gap": (_gap, STATE),
    "a gap behind an overlap": (_gap_behind_an_overlap, STATE),
    "nothing stored": (lambda found: _change(found, chunks=()), STATE),
    "a value in place of a tensor": (_as_value, STATE),
    "a tensor in place of a value": (_value_as_tensor, "optim.param_groups.seven.lr"),
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_what_does_not_fit_is_refused_by_name_and_changes_nothing(victim: Path, misfit: str) -> None:
    change, named = MISFITS[misfit]
    _rewrite(victim, **change(_manifest(victim)))
    for verify in (True, False):
        job = _job(1)
        before = _snapshot(job)
        error = _refusal(victim, verify=verify, job=job)
        assert isinstance(error, CheckpointError) and named in str(error), error
        assert str(victim) in str(error), error
        _assert_unchanged(job, before, misfit)


def _refuse_another_model(path: str) -> str:
    job = _job(1, torch.float64)
    before = _snapshot(job)
    error = _refusal(Path(path), job=job)
    _assert_unchanged(job, before, "after the refusal")
    return f"{type(error).__name__}: {error}"


def test_a_model_of_another_dtype_is_refused_on_every_rank_and_not_changed(ranks: Pool, saved: Path) -> None:
    for message in ranks.run(2, _refuse_another_model, str(saved / "two")):
        assert message.startswith("CheckpointError") and "float32" in message and "float64" in message, message


def test_a_foreign_checkpoint_with_gaps_or_overlaps_is_refused_by_name(foreign: Path) -> None:
    for chunks in ([(0, 60)], [(0, 65), (64, 64)], [(0, 65), (1, 64)], [(0, 129), (3, 9)]):
        found = _read_pickle(foreign)
        entry = found.state_dict_metadata[STATE]
        assert isinstance(entry, metadata.TensorStorageMetadata)
        place = found.storage_data[metadata.MetadataIndex(STATE, torch.Size((0, 0)))]
        entry.chunks = [
            metadata.ChunkStorageMetadata(torch.Size((start, 0)), torch.Size((num, 33))) for start, num in chunks
        ]
        for chunk in entry.chunks:
            found.storage_data[metadata.MetadataIndex(STATE, chunk.offsets)] = place
        (foreign / METADATA_NAME).write_bytes(pickle.dumps(found))
        job = _job(1)
        before = _snapshot(job)
        error = _refusal(foreign, verify=False, job=job)
        assert isinstance(error, CheckpointError) and STATE in str(error), (chunks, error)
        _assert_unchanged(job, before, str(chunks))


# --- Strangers


@pytest.fixture(scope="module")
def foreign_saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("foreign") / "plain"
    job = jobs.build("plain", torch.float32, 0)
    jobs.advance(job)
    jobs.save_as("plain", str(path), job)
    return path


@pytest.fixture
def foreign(foreign_saved: Path, tmp_path: Path) -> Path:
    """A copy of a checkpoint that torch.distributed.checkpoint wrote."""
    return Path(shutil.copytree(foreign_saved, tmp_path / "foreign"))


class Bomb:
    """Pickles to a call."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


class Chain:
    """Pickles to ``getattr(module, name)(argument)``, each link of it a call."""

    def __init__(self, module: Bomb, name: str, argument: str) -> None:
        self.links = module, name, argument

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        module, name, argument = self.links
        return functools.reduce, (_call, [Bomb(getattr, module, name), argument])


def _call(function: Callable[[str], Any], argument: str) -> Any:
    return function(argument)


def _raw(module: str, name: str, argument: str) -> bytes:
    """A pickle that names its function freely: ``module.name(argument)``."""
    text = argument.encode()
    return (
        b"\x80\x04"
        + b"".join(b"\x8c" + bytes([len(part)]) + part for part in (module.encode(), name.encode()))
        + b"\x93X" + len(text).to_bytes(4, "little") + text + b"\x85R."
    )  # fmt: skip


def _bombs(marker: Path) -> dict[str, bytes]:
    """Pickles that create ``marker`` when they are loaded without care."""
    touch = f"touch {marker}"
    code = f"open({str(marker)!r}, 'w').close()"
    payload = io.BytesIO()
    torch.save(Bomb(os.system, touch), payload)
    inner = marker.with_name("inner.pt")
    inner.write_bytes(payload.getvalue())
    objects: dict[str, Any] = {
        "os.system": Bomb(os.system, touch),
        "builtins.exec": Bomb(exec, code),
        "builtins.eval": Bomb(eval, f"__import__('os').system({touch!r})"),
        "open": Bomb(builtins.open, str(marker), "w"),
        "pathlib": Bomb(Path.touch, Path(marker)),
        "torch.load": Bomb(torch.load, str(inner), None, None),
        "getattr": Bomb(eval, f"getattr(__import__('os'), 'system')({touch!r})"),
        "chain": Chain(Bomb(importlib.import_module, "os"), "system", touch),
        "partial": Bomb(functools.partial(os.system, touch)),
        "in a dictionary": OrderedDict(a=[1, {"b": Bomb(os.system, touch)}]),
    }
    bombs = {f"{name}, protocol {p}": pickle.dumps(value, p) for name, value in objects.items() for p in (0, 2, 4)}
    for module, name in (
        ("os", "system"),
        ("torch", "os.system"),
        ("torch", "serialization.os.system"),
        ("torch.serialization", "os.system"),
        ("torch.distributed.checkpoint.filesystem", "os.system"),
        ("torch.distributed.checkpoint.metadata", "os.system"),
        ("collections", "_sys.modules"),
        ("subprocess", "getoutput"),
        ("posix", "system"),
    ):
        bombs[f"{module}:{name}"] = _raw(module, name, touch)
    return bombs


def test_the_bombs_go_off_where_there_is_no_care(tmp_path: Path) -> None:
    exploded = 0
    bombs = _bombs(tmp_path / "marker")
    for bomb in bombs.values():
        try:
            pickle.loads(bomb)
        except Exception:
            continue
        finally:
            exploded += (tmp_path / "marker").exists()
            (tmp_path / "marker").unlink(missing_ok=True)
    assert exploded > len(bombs) * 0.7, (exploded, len(bombs))


def _read_pickle(directory: Path) -> metadata.Metadata:
    found = pickle.loads((directory / METADATA_NAME).read_bytes())  # written by this test
    assert isinstance(found, metadata.Metadata)
    return found


def _refused_without_a_bang(path: Path, verify: bool, marker: Path, named: str, what: str) -> None:
    error = _refusal(path, verify=verify)
    assert not marker.exists(), what
    assert isinstance(error, CheckpointError), (what, repr(error))
    assert named in str(error), (what, error)


def test_a_bomb_as_the_metadata_of_a_stranger_is_refused_by_name(foreign: Path, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    for name, bomb in _bombs(marker).items():
        (foreign / METADATA_NAME).write_bytes(bomb)
        _refused_without_a_bang(foreign, False, marker, str(foreign / METADATA_NAME), name)


def test_a_bomb_hidden_in_good_metadata_is_refused_by_name(foreign: Path, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    good = _read_pickle(foreign)
    for where in ("planner_data", "storage_meta", "version"):
        hidden: dict[str, Any] = {where: Bomb(os.system, f"touch {marker}")}
        (foreign / METADATA_NAME).write_bytes(pickle.dumps(dataclasses.replace(good, **hidden)))
        _refused_without_a_bang(foreign, False, marker, str(foreign / METADATA_NAME), where)


def test_a_pickle_cannot_change_the_classes_that_it_may_name(foreign: Path) -> None:
    # BUILD with a class on the stack sets attributes of the class itself: for the rest of the process.
    for target in (metadata.Metadata, metadata.MetadataIndex, filesystem._StorageInfo, PurePosixPath):
        module = "pathlib" if target is PurePosixPath else target.__module__
        name = "PosixPath" if target is PurePosixPath else target.__name__
        pickled = f"c{module}\n{name}\n(N(Vpolluted\nI1\ndtb.".encode()
        (foreign / METADATA_NAME).write_bytes(pickled)
        error = _refusal(foreign, verify=False)
        try:
            assert not hasattr(target, "polluted"), target
        finally:
            if hasattr(target, "polluted"):
                del target.polluted
        assert isinstance(error, CheckpointError) and METADATA_NAME in str(error), error


def test_our_own_metadata_is_never_unpickled(victim: Path, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    for name, bomb in _bombs(marker).items():
        (victim / METADATA_NAME).write_bytes(bomb)
        _refused_without_a_bang(victim, True, marker, METADATA_NAME, name)
        files = {**_manifest(victim).files, METADATA_NAME: manifest.file_of(bomb)}
        whole = (victim / MANIFEST_NAME).read_bytes()
        _rewrite(victim, files=files)  # the stranger's manifest says that the bomb is right
        load(victim, *_job(1))
        assert not marker.exists(), name
        (victim / MANIFEST_NAME).write_bytes(whole)


def _plant(directory: Path, name: str, payload: bytes) -> str:
    """Make ``payload`` what is stored under ``name``, with right checksums where there are some. Returns the file."""
    (directory / "__9_0.distcp").write_bytes(payload)
    if not (directory / MANIFEST_NAME).exists():
        found = _read_pickle(directory)
        for index in found.storage_data:
            if index.fqn == name:
                found.storage_data[index] = filesystem._StorageInfo("__9_0.distcp", 0, len(payload))
        (directory / METADATA_NAME).write_bytes(pickle.dumps(found))
        return "__9_0.distcp"
    was = _manifest(directory)
    record = Record("__9_0.distcp", 0, len(payload), zlib.crc32(payload))
    changes: dict[str, Any] = {"files": {**was.files, record.file: manifest.file_of(payload)}}
    if name in was.values:
        changes["values"] = {**was.values, name: record}
    else:
        chunks = tuple(dataclasses.replace(chunk, record=record) for chunk in was.tensors[name].chunks)
        changes["tensors"] = {**was.tensors, name: dataclasses.replace(was.tensors[name], chunks=chunks)}
    _rewrite(directory, **changes)
    return record.file


def _saved_bytes(value: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


OTHER_VALUES: dict[str, Any] = {
    "fp64": torch.zeros(129, 33, dtype=torch.float64),
    "int32": torch.zeros(129, 33, dtype=torch.int32),
    "transposed": torch.zeros(33, 129),
    "larger": torch.zeros(200, 50),
    "one element": torch.zeros(1),
    "one row": nn.Parameter(torch.zeros(1, 33)),
    "0-d": torch.zeros(()),
    "sparse": torch.zeros(129, 33).to_sparse(),
    "meta": torch.zeros(129, 33, device="meta"),
    "dictionary": {"a": 1},
    "list": [torch.zeros(129, 33)],
    "text": "text",
    "None": None,
}
RECORDS = ["model.seven", STATE, "optim.state.seven.step", "optim.param_groups.seven.lr"]


@pytest.mark.parametrize("whose", ["victim", "foreign"])
@pytest.mark.parametrize("name", RECORDS)
def test_a_bomb_in_a_record_of_a_tensor_or_value_is_refused_by_name(
    request: pytest.FixtureRequest, tmp_path: Path, whose: str, name: str
) -> None:
    directory: Path = request.getfixturevalue(whose)
    marker = tmp_path / "marker"
    good = {file.name: file.read_bytes() for file in directory.iterdir()}
    payloads = _bombs(marker)
    for bomb, call in (("torch.save of os.system", os.system), ("torch.save of eval", eval)):
        text = f"touch {marker}" if call is os.system else f"open({str(marker)!r}, 'w')"
        payloads[bomb] = _saved_bytes(Bomb(call, text))
        payloads[f"{bomb} in a dictionary"] = _saved_bytes({"x": [Bomb(call, text)]})
    for what, payload in payloads.items():
        file = _plant(directory, name, payload)
        _refused_without_a_bang(directory, whose == "victim", marker, file, f"{what} in {name}")
        for old, data in good.items():
            (directory / old).write_bytes(data)


@pytest.mark.parametrize("whose", ["victim", "foreign"])
@pytest.mark.parametrize("kind", OTHER_VALUES)
def test_a_record_that_holds_something_else_is_refused_by_name(
    request: pytest.FixtureRequest, whose: str, kind: str
) -> None:
    directory: Path = request.getfixturevalue(whose)
    file = _plant(directory, STATE, _saved_bytes(OTHER_VALUES[kind]))
    error = _refusal(directory, verify=whose == "victim")
    assert isinstance(error, CheckpointDamagedError) and file in str(error), repr(error)


def test_a_bomb_in_extra_or_in_the_generators_is_refused_by_name(victim: Path, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    good = (victim / MANIFEST_NAME).read_bytes()
    for name in ("extra", "rng.0"):
        for bomb in (_saved_bytes(Bomb(os.system, f"touch {marker}")), *_bombs(marker).values()):
            data = torch.frombuffer(bytearray(bomb), dtype=torch.uint8)
            _plant(victim, name, _saved_bytes(data))
            was = _manifest(victim).tensors[name]
            chunk = dataclasses.replace(was.chunks[0], sizes=tuple(data.shape))
            tensors = {**_manifest(victim).tensors, name: StoredTensor(tuple(data.shape), was.dtype, (chunk,))}
            _rewrite(victim, tensors=tensors, world_size=1)
            job = _job(1)
            with pytest.raises(CheckpointError, match=name) as caught:
                load(victim, job.module, job.optimizer, restore_rng=True)
            assert not marker.exists() and str(victim) in str(caught.value), caught.value
            (victim / MANIFEST_NAME).write_bytes(good)


def test_a_bomb_as_the_manifest_is_refused_by_name(victim: Path, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    for name, bomb in {**_bombs(marker), "deep": b"[" * 100_000, "number": b"7", "list": b"[]"}.items():
        (victim / MANIFEST_NAME).write_bytes(bomb)
        for verify in (True, False):
            _refused_without_a_bang(victim, verify, marker, str(victim / MANIFEST_NAME), name)


def test_a_manifest_with_a_right_digest_and_nonsense_in_it_is_refused_by_name(victim: Path) -> None:
    path = victim / MANIFEST_NAME
    good = json.loads(path.read_bytes())
    good.pop("digest")
    for key in good:
        for nonsense in (None, 3, "x", ["x"], {"x": 3}, {"x": {"y": "z"}}):
            body = {**good, key: nonsense}
            path.write_bytes(manifest._canonical({**body, "digest": manifest._digest(body)}))
            if key in {"run_id", "save_id", "created", "torch_version", "layout_digest"} and nonsense == "x":
                continue  # is not nonsense there
            if key in {"step", "metric", "world_size", "version"} and nonsense == 3:
                continue
            if key in {"step", "metric", "layout_digest"} and nonsense is None:
                continue
            _must_name(_refusal(victim), MANIFEST_NAME, f"{key}: {nonsense}")


OUTSIDE = ["../../x", "../outside", "/etc/passwd", "..", ".", "", "sub/file", "a\0b", "x" * 300]


@pytest.mark.parametrize("whose", ["victim", "foreign"])
@pytest.mark.parametrize("outside", OUTSIDE, ids=lambda name: name[:12].replace("\0", "0"))
def test_a_file_name_that_leads_out_of_the_directory_is_refused_by_name(
    request: pytest.FixtureRequest, whose: str, outside: str
) -> None:
    directory: Path = request.getfixturevalue(whose)
    (directory.parent / "outside").write_bytes((next(directory.glob("*.distcp"))).read_bytes())
    if whose == "foreign":
        _redirect(directory, outside)
        error = _refusal(directory, verify=False)
    else:
        was = _manifest(directory)
        tensor = was.tensors[STATE]
        chunks = tuple(
            dataclasses.replace(chunk, record=dataclasses.replace(chunk.record, file=outside))
            for chunk in tensor.chunks
        )
        _rewrite(
            directory,
            tensors={**was.tensors, STATE: dataclasses.replace(tensor, chunks=chunks)},
            files={**was.files, outside: StoredFile(3, "0")},
        )
        error = _refusal(directory)
    assert isinstance(error, CheckpointDamagedError), repr(error)
    assert repr(outside) in str(error) and str(directory) in str(error), error


def _redirect(directory: Path, file: Any, offset: Any = 0, length: Any = 100) -> None:
    found = _read_pickle(directory)
    for index in found.storage_data:
        if index.fqn == STATE:
            found.storage_data[index] = filesystem._StorageInfo(file, offset, length)
    (directory / METADATA_NAME).write_bytes(pickle.dumps(found))


FILE = "__0_0.distcp"
PLACES: list[tuple[Any, Any, Any]] = [
    *((file, 0, 9) for file in (5, None, b"x")),
    *((FILE, offset, 9) for offset in (-5, 1 << 40, 1 << 70, "a", 0.5)),
    *((FILE, 0, length) for length in (-1, 1 << 60, 1 << 70, None, 1.5)),
]


@pytest.mark.parametrize("place", PLACES, ids=str)
def test_a_place_that_no_file_has_is_refused_by_name(foreign: Path, place: tuple[Any, Any, Any]) -> None:
    _redirect(foreign, *place)
    error = _refusal(foreign, verify=False)
    assert isinstance(error, CheckpointDamagedError) and str(foreign) in str(error), repr(error)


def _refuse_bombs(paths: list[str]) -> list[str]:
    return [str(_refusal(Path(path), verify="foreign" not in path)) for path in paths]


def test_a_bomb_is_refused_on_every_rank(ranks: Pool, victim: Path, foreign: Path, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    bomb = _saved_bytes(Bomb(os.system, f"touch {marker}"))
    files = [_plant(victim, STATE, bomb), _plant(foreign, STATE, bomb)]
    for messages in ranks.run(2, _refuse_bombs, [str(victim), str(foreign)]):
        assert all(file in message for file, message in zip(files, messages, strict=True)), messages
    assert not marker.exists()
