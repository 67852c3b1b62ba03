"""The command line: what it prints, what it finds, how it exits."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from sharded_adamax import ShardedAdamax, cli, save
from sharded_adamax.checkpoint import inspection, manifest
from sharded_adamax.checkpoint.conversion import bundle, directories, safetensors_file
from sharded_adamax.checkpoint.conversion.torch_file import _match
from sharded_adamax.checkpoint.manifest import Chunk, Record, StoredTensor
from sharded_adamax.ranges import Box, Range

Files = dict[str, Path]


def make_checkpoint(path: Path, step: int | None = 7) -> Path:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    optimizer = ShardedAdamax(model.named_parameters())
    model(torch.ones(5, 3)).sum().backward()
    optimizer.step()
    save(path, model, optimizer, extra={"epoch": 1}, step=step)
    return path


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("saved") / "checkpoint")


@pytest.fixture
def checkpoint(saved: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved, tmp_path / "checkpoint")


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0x10
    path.write_bytes(data)


def foreign_checkpoint(path: Path) -> Path:
    dcp_save({"model": {"weight": torch.ones(3, 4)}, "epoch": 3}, checkpoint_id=path)
    return path


# ---------------------------------------------------------------------------------------------------------- inspect


def test_inspect_prints_tensors_files_and_origin(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", str(checkpoint)]) == cli.WHOLE
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["optim.state.0.weight.exp_avg", "4x3", "float32", "48", "1"] in lines
    assert ["optim.state.0.weight.step", "scalar", "float32", "4", "1"] in lines
    assert ["step", "7"] in lines and ["ranks", "1"] in lines and ["torch", torch.__version__] in lines
    assert ["__0_0.distcp", str((checkpoint / "__0_0.distcp").stat().st_size)] in lines
    assert any(line[:1] == ["layout"] and len(line[1]) == 64 for line in lines)


def test_inspect_json_says_the_same(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", "--json", str(checkpoint)]) == cli.WHOLE
    summary = json.loads(capsys.readouterr().out)
    assert summary["step"] == 7 and summary["world_size"] == 1 and summary["written_by"] == "sharded_adamax"
    weight = next(tensor for tensor in summary["tensors"] if tensor["name"] == "model.0.weight")
    assert weight == {"name": "model.0.weight", "shape": [4, 3], "dtype": "float32", "bytes": 48, "num_pieces": 1}


def test_inspect_of_another_program_says_that_there_is_no_manifest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["inspect", str(foreign_checkpoint(tmp_path / "foreign"))]) == cli.WHOLE
    out = capsys.readouterr().out
    assert "torch.distributed.checkpoint (no manifest)" in out and "model.weight" in out and "3x4" in out


def test_inspect_says_which_file_is_missing(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (checkpoint / "__0_0.distcp").unlink()
    assert cli.main(["inspect", str(checkpoint)]) == cli.WHOLE
    assert ["__0_0.distcp", "missing"] in [line.split() for line in capsys.readouterr().out.splitlines()]


def test_a_terminal_gets_a_table_with_whole_names(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    cli.main(["inspect", str(checkpoint)])
    out = capsys.readouterr().out
    assert "│" in out and "optim.state.0.weight.exp_avg" in out
    monkeypatch.setattr(cli, "find_spec", lambda name: None)  # rich is not installed
    cli.main(["inspect", str(checkpoint)])
    assert "│" not in capsys.readouterr().out


def test_names_from_a_file_do_not_command_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dcp_save({"\x1b[31mred": torch.ones(1)}, checkpoint_id=tmp_path / "foreign")
    cli.main(["inspect", str(tmp_path / "foreign")])
    out = capsys.readouterr().out
    assert "\x1b" not in out and "red" in out


# ----------------------------------------------------------------------------------------------------------- verify


def test_a_whole_checkpoint_is_whole(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["verify", str(checkpoint)]) == cli.WHOLE
    assert f"{checkpoint}: whole (2 files" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "manifest.json"])
@pytest.mark.parametrize("damage", ["first", "middle", "last", "cut", "empty", "missing"])
def test_damage_is_found_in_every_file(
    checkpoint: Path, name: str, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = checkpoint / name
    size = path.stat().st_size
    if damage == "missing":
        path.unlink()
    elif damage in ("cut", "empty"):
        os.truncate(path, size - 1 if damage == "cut" else 0)
    else:
        flip(path, {"first": 0, "middle": size // 2, "last": size - 1}[damage])
    assert cli.main(["verify", str(checkpoint)]) == cli.DAMAGED
    out = capsys.readouterr().out
    assert "DAMAGED" in out and str(path) in out
    if damage == "cut" and name != "manifest.json":
        assert f"{path} has {size - 1} bytes, expected {size}" in out


def test_all_damage_is_told(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flip(checkpoint / "__0_0.distcp", 100)
    (checkpoint / ".metadata").unlink()
    assert cli.main(["verify", str(checkpoint)]) == cli.DAMAGED
    out = capsys.readouterr().out
    assert f"{checkpoint / '__0_0.distcp'} is damaged: its SHA-256" in out
    assert f"{checkpoint / '.metadata'} is missing" in out


def test_a_file_that_does_not_belong_is_a_warning(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (checkpoint / "notes.txt").touch()
    assert cli.main(["verify", str(checkpoint)]) == cli.WHOLE
    captured = capsys.readouterr()
    assert "notes.txt is not a file of this checkpoint" in captured.err and "whole" in captured.out


def test_a_file_of_another_save_is_found(checkpoint: Path, tmp_path: Path) -> None:
    other = make_checkpoint(tmp_path / "other")
    shutil.copy(other / "__0_0.distcp", checkpoint / "__0_0.distcp")
    assert cli.main(["verify", str(checkpoint)]) == cli.DAMAGED


def rewrite_manifest(checkpoint: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a manifest and make its digest fit: what a wrong writer, not a disk, would leave."""
    path = checkpoint / manifest.MANIFEST_NAME
    body = json.loads(path.read_bytes())
    del body["digest"]
    change(body)
    path.write_bytes(manifest._canonical({**body, "digest": manifest._digest(body)}))


def test_a_manifest_that_leads_out_of_the_directory_is_refused(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def lead_out(body: dict[str, Any]) -> None:
        body["files"]["../../etc/passwd"] = body["files"].pop("__0_0.distcp")

    rewrite_manifest(checkpoint, lead_out)
    assert cli.main(["verify", str(checkpoint)]) == cli.DAMAGED
    assert "outside" in capsys.readouterr().out


def test_a_tensor_that_is_not_covered_is_found_by_verify(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rewrite_manifest(checkpoint, lambda body: body["tensors"]["model.0.weight"].update(shape=[5, 3]))
    assert cli.main(["verify", str(checkpoint)]) == cli.DAMAGED
    assert "__0_0.distcp: model.0.weight is stored only in part: 12 of 15 elements" in capsys.readouterr().out


def test_a_directory_of_another_program_cannot_be_said_to_be_whole(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["verify", str(foreign_checkpoint(tmp_path / "foreign"))]) == cli.DAMAGED
    assert "manifest.json is missing" in capsys.readouterr().out


def test_all_checkpoints_of_a_manager_are_verified(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for step in (90, 100, 200):
        make_checkpoint(tmp_path / f"{step:08d}", step)
    (tmp_path / "00000300").mkdir()  # everything in it was lost
    make_checkpoint(tmp_path / "00000250.damaged")  # set aside by the manager
    flip(tmp_path / "00000250.damaged" / "__0_0.distcp", 5)
    (tmp_path / ".00000400.incomplete").mkdir()
    flip(tmp_path / "00000200" / "__0_0.distcp", 5)
    assert cli.main(["verify", str(tmp_path)]) == cli.DAMAGED
    out = capsys.readouterr().out
    assert out.count("whole (2 files") == 2 and out.count("DAMAGED") == 2
    assert out.splitlines()[-1] == f"newest whole checkpoint: {tmp_path / '00000100'}"
    shutil.rmtree(tmp_path / "00000300")
    shutil.rmtree(tmp_path / "00000200")
    assert cli.main(["verify", str(tmp_path)]) == cli.WHOLE


def test_progress_comes_to_its_end(checkpoint: Path) -> None:
    seen: list[tuple[int, int]] = []
    assert inspection.verify(checkpoint, lambda done, total: seen.append((done, total))).is_whole
    assert seen == sorted(seen) and seen[-1][0] == seen[-1][1] > 0


# ------------------------------------------------------------------------------------------------------- exit codes


@pytest.mark.parametrize(
    "arguments",
    [
        ["verify", "nothing-here"],
        ["inspect", "nothing-here"],
        ["verify", "empty"],
        ["inspect", "empty"],
        ["verify", "file"],
        ["convert", "nothing-here", "target", "--to", "torch"],
        ["convert", "empty", "target", "--to", "torch"],
        ["convert", "file", "target", "--to", "torch"],
        ["convert", "file", "empty", "--to", "torch"],
    ],
)
def test_what_is_no_checkpoint_is_a_usage_error(
    tmp_path: Path, arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("hello")
    assert cli.main(arguments) == cli.USAGE
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and captured.out == ""
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize("arguments", [[], ["explode"], ["convert", "a", "b"], ["convert", "a", "b", "--to", "hdf5"]])
def test_bad_arguments_are_a_usage_error(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main(arguments)
    assert exit_.value.code == cli.USAGE


def test_a_reader_that_has_enough_is_no_error(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        assert cli.main(["inspect", str(checkpoint)]) == cli.WHOLE


# ------------------------------------------------------------------------------------------- the structure of tensors


def chunk(offsets: tuple[int, ...], sizes: tuple[int, ...], file: str = "f", start: int = 0) -> Chunk:
    return Chunk(offsets, sizes, Record(file, start, 10, None))


def problems(shape: tuple[int, ...], *chunks: Chunk) -> list[str]:
    return inspection.structure_problems({"t": StoredTensor(shape, "float32", chunks)}, {"f": 100})


@pytest.mark.parametrize(
    ("shape", "chunks"),
    [
        ((), [chunk((), ())]),
        ((3, 0), [chunk((0, 0), (3, 0))]),
        ((4,), [chunk((0,), (1,)), chunk((1,), (3,))]),
        ((4, 4), [chunk((0, 0), (2, 4)), chunk((2, 0), (2, 1)), chunk((2, 1), (2, 3))]),
        ((2, 2, 2), [chunk((0, 0, 0), (1, 2, 2)), chunk((1, 0, 0), (1, 1, 2)), chunk((1, 1, 0), (1, 1, 2))]),
        ((4,), [chunk((0,), (4,)), chunk((2,), (0,))]),
    ],
)
def test_a_tensor_that_is_covered_exactly_is_in_order(shape: tuple[int, ...], chunks: list[Chunk]) -> None:
    assert problems(shape, *chunks) == []


@pytest.mark.parametrize(
    ("shape", "chunks", "expected"),
    [
        ((4,), [], "stored only in part: 0 of 4"),
        ((3, 0), [], "stored only in part: 0 of 0"),
        ((4,), [chunk((0,), (3,))], "stored only in part: 3 of 4"),
        ((4,), [chunk((0,), (2,)), chunk((1,), (2,))], "overlapping"),
        ((), [chunk((), ()), chunk((), ())], "overlapping"),
        ((4, 4), [chunk((0, 0), (4, 2)), chunk((0, 1), (4, 2))], "overlapping"),
        ((2, 4), [chunk((0, 0), (1, 4)), chunk((1, 0), (1, 2)), chunk((0, 2), (1, 2))], "overlapping"),
        ((4,), [chunk((2,), (3,))], "has a piece at (2,) of shape (3,)"),
        ((4,), [chunk((-1,), (4,))], "has a piece at (-1,)"),
        ((4,), [chunk((0, 0), (4, 1))], "has a piece at (0, 0)"),
        ((4,), [chunk((0,), (4,), file="g")], "which is not a file of this checkpoint"),
        ((4,), [chunk((0,), (4,), start=95)], "has a piece at bytes 95:105 of f, which has 100"),
        ((4,), [chunk((0,), (4,), start=-1)], "has a piece at bytes -1:9"),
    ],
)
def test_a_tensor_that_is_not_is_told(shape: tuple[int, ...], chunks: list[Chunk], expected: str) -> None:
    found = problems(shape, *chunks)
    assert len(found) == 1 and expected in found[0], found


# ------------------------------------------------------------------------------------------------ parts of conversion


@pytest.mark.parametrize("shape", [(), (5,), (1, 7), (3, 4), (2, 3, 4), (2, 1, 3)])
def test_a_box_is_one_range_exactly_if_its_elements_follow_each_other(shape: tuple[int, ...]) -> None:
    numbers = torch.arange(max(1, torch.Size(shape).numel())).view(shape)
    corners = [[(start, stop) for start in range(n) for stop in range(start + 1, n + 1)] for n in shape]
    for corner in itertools.product(*corners):
        box = Box(tuple(start for start, _ in corner), tuple(stop - start for start, stop in corner))
        elements = numbers[tuple(slice(*bounds) for bounds in corner)].flatten().tolist()
        follow = elements == list(range(elements[0], elements[-1] + 1))
        expected = Range(elements[0], elements[-1] + 1) if follow else None
        assert bundle.flat_range(shape, box) == expected, box


def test_pieces_of_inner_dimensions_are_put_together() -> None:
    whole = torch.arange(12.0).view(3, 4)
    boxes = (Box((0, 0), (3, 1)), Box((0, 1), (3, 3)))
    pieces = bundle.StoredPieces((3, 4), whole.dtype, boxes, lambda box: whole[:, box.offsets[1] :][:, : box.sizes[1]])
    assert torch.equal(torch.cat([piece.flatten() for piece in pieces.in_order()]), whole.flatten())


VALUES = [
    None,
    True,
    0.1,
    float("inf"),
    -(2**70),
    "text",
    [1, (2, [3.0])],
    (),
    {},
    {"a": {"b": (1,)}},
    {1: 2},
    {"tuple": 1},
    {"torch.save": "no pickle"},
    b"bytes",
]


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_json_gives_back_what_it_was_given(value: Any) -> None:
    text = json.dumps(safetensors_file.to_json(value, pickles=True))
    back = safetensors_file.from_json(json.loads(text))
    assert back == value and type(back) is type(value)


def test_json_gives_back_a_tensor_inside_of_a_group() -> None:
    group: dict[str, Any] = {"lr": torch.tensor(0.1), "betas": (0.9, 0.999)}
    back = safetensors_file.from_json(json.loads(json.dumps(safetensors_file.to_json(group, pickles=True))))
    assert torch.equal(back["lr"], group["lr"]) and back["betas"] == (0.9, 0.999)
    with pytest.raises(TypeError, match="Tensor"):
        safetensors_file.to_json(group, pickles=False)


def test_neighbours_with_equal_hyper_parameters_become_one_group() -> None:
    hypers: dict[str, dict[str, Any]] = {
        "a": {"lr": 1},
        "b": {"lr": 1},
        "c": {"lr": 2},
        "d": {"lr": 1},
        "e": {"lr": 1.0},
        "f": {"lr": True},
    }
    groups = directories._groups(hypers)
    assert [group["param_names"] for group in groups] == [["a", "b"], ["c"], ["d"], ["e"], ["f"]]
    tensors = {"a": {"lr": torch.tensor(1.0)}, "b": {"lr": torch.tensor(1.0)}, "c": {"lr": torch.tensor(2.0)}}
    assert [group["param_names"] for group in directories._groups(tensors)] == [["a", "b"], ["c"]]


def test_shapes_are_matched_in_order() -> None:
    entries: list[tuple[str, tuple[int, ...]]] = [("a", (2,)), ("buffer", (3,)), ("b", (3,)), ("c", (2,))]
    assert _match(entries, [(2,), (3,), (2,)]) == ["a", "buffer", "c"]
    assert _match(entries[::-1], [(2,), (3,), (2,)]) == ["c", "b", "a"]
    assert _match(entries, [(3,), (2,), (2,)]) is None
    assert _match(entries, [None, (3,)]) == ["a", "buffer"]
