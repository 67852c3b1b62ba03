"""`python -m sharded_adamax plan`: what it prints and draws, and how it refuses."""

from __future__ import annotations

import json
import sys
from importlib import import_module
from pathlib import Path

import pytest

from sharded_adamax import cli
from sharded_adamax.planning import picture, sources

FACTORIES = """
import torch
from torch import nn

made = []

def make():
    made.append(torch.empty(0).device.type)
    return nn.Sequential(nn.Embedding(1000, 256), nn.Linear(256, 1000))

class Net(nn.Linear):
    def __init__(self):
        super().__init__(3, 3)

def fails():
    raise RuntimeError("no such file: weights.pt")

def wrong():
    return {"weight": 3}

def mixed():
    return nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 256).to(torch.bfloat16))

def needs(width):
    return nn.Linear(width, width)

number = 3
"""

TABLES = """\
7,000,000,000 parameters in 1,069 tensors; GiB per rank

precision fp32: held, when most is held
ranks  params  state  grads  buckets   peak     DDP   ZeRO
    2   26.08  26.08  13.03    0.073  65.25  130.39  91.27
    8   26.08   6.52   3.27    0.055  35.93  130.39  61.97
most is held in backward, gradients of bucket 1069 (ranks: 2, 8)
fits 80 GiB from: ShardedAdamax: 2 ranks, DDP: never, DDP + ZeRO: 3 ranks

precision fp32: sent in each step
ranks   sent    DDP   ZeRO
    2  26.08  26.08  39.12
    8  45.63  45.63  68.45

precision bf16+master: held, when most is held
ranks  params  state  master  grads  buckets   peak     DDP   ZeRO
    2   13.04  26.08   13.04  12.99    0.140  65.28  130.39  91.27
    8   13.04   6.52    3.26   3.27    0.052  26.14  130.39  61.97
most is held in step, update of bucket 2 (ranks: 2); backward, launch of bucket 535 (ranks: 8)
fits 80 GiB from: ShardedAdamax: 2 ranks, DDP: never, DDP + ZeRO: 3 ranks

precision bf16+master: sent in each step
ranks   sent    DDP   ZeRO
    2  13.04  26.08  39.12
    8  22.82  45.63  68.45

- not included: activations"""


@pytest.fixture
def factories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "my_models.py").write_text(FACTORIES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "my_models", raising=False)
    return "my_models"


def test_the_tables_of_a_number_of_parameters(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["plan", "--params", "7B", "--world-sizes", "2,8", "--precision", "fp32,bf16+master", "--gpu-gib", "80"]
    assert cli.main(command) == cli.WHOLE
    out = capsys.readouterr().out
    assert out.startswith(TABLES)
    notes = " ".join(out[len(TABLES) :].split())
    for note in ("only the number of parameters is known", "has no master", "never on a GPU"):
        assert note in notes


def test_a_factory_is_called_on_the_meta_device(factories: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", f"{factories}:make", "--world-sizes", "1"]) == cli.WHOLE
    assert capsys.readouterr().out.startswith("513,000 parameters in 3 tensors")
    assert import_module(factories).made == ["meta"]
    assert cli.main(["plan", f"{factories}:Net"]) == cli.WHOLE


def test_json_is_in_bytes(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["plan", "--params", "1024K", "--world-sizes", "4", "--bucket-mib", "1", "--gpu-gib", "1", "--json"]
    assert cli.main(command) == cli.WHOLE
    found = json.loads(capsys.readouterr().out)
    (planned,) = found["plans"]
    (row,) = planned["rows"]
    assert found["num_params"] == 1_024_000 and found["gpu_bytes"] == 2**30 and found["device"] == "cuda"
    assert planned["precision"] == "model"
    assert planned["smallest_world_size"] == {"sharded_adamax": 1, "ddp": 1, "zero": 1}
    assert row["world_size"] == 4 and row["ddp"]["parameters"] == 4_096_000
    assert row["sharded_adamax"]["state"] == 2 * row["sharded_adamax"]["parameters"] // 4
    assert row["sharded_adamax"]["peak"] > row["sharded_adamax"]["steady"]


def test_what_does_not_apply_is_a_dash(factories: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", f"{factories}:mixed", "--world-sizes", "2"]) == cli.WHOLE
    out = capsys.readouterr().out
    assert out.splitlines()[4].split()[-1] == "-" and "refuses a model of several dtypes" in " ".join(out.split())


def test_every_option_reaches_the_plan(factories: str, capsys: pytest.CaptureFixture[str]) -> None:
    def peak(*options: str) -> int:
        command = ["plan", f"{factories}:make", "--world-sizes", "4", "--bucket-mib", "1", "--json", *options]
        assert cli.main(command) == cli.WHOLE
        found: int = json.loads(capsys.readouterr().out)["plans"][0]["rows"][0]["sharded_adamax"]["peak"]
        return found

    plain = peak()
    for options in (
        ["--reduce-dtype", "bf16"],
        ["--ddp-reduces"],
        ["--bucket-mib", "3"],
        ["--device", "cpu"],
        ["--precision", "bf16"],
        ["--precision", "fp16+master"],
    ):
        assert peak(*options) != plain, options


def test_a_terminal_gets_a_table_that_fits_80_columns(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    command = ["plan", "--params", "7B", "--precision", "bf16+master"]
    cli.main(command)
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("┏") for line in lines) and any("│ 130.39 │" in line for line in lines)
    assert all(len(line) <= 80 for line in lines if "│" in line)
    monkeypatch.setattr(cli, "find_spec", lambda name: None)  # rich is not installed
    cli.main(command)
    assert "│" not in capsys.readouterr().out


def test_the_picture_is_drawn(factories: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "plan.png"
    command = ["plan", f"{factories}:mixed", "--precision", "model,bf16+master", "--gpu-gib", "1", "--picture"]
    assert cli.main([*command, str(target)]) == cli.WHOLE
    assert target.read_bytes().startswith(b"\x89PNG") and str(target) in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["my_models:absent"], "my_models has no absent"),
        (["my_models"], "expected module:factory"),
        (["no_such_module:make"], "no module no_such_module is found"),
        (["my_models.part:make"], "no module my_models.part is found"),
        (["my_models:fails"], "raised RuntimeError: no such file: weights.pt"),
        (["my_models:needs"], "raised TypeError: needs() missing 1 required positional argument: 'width'"),
        (["my_models:wrong"], "expected my_models:wrong to return an nn.Module, got dict"),
        (["my_models:number"], "to be a function that returns an nn.Module, got int"),
        (["broken:make"], "the import of broken raised SyntaxError"),
        (["--params", "many"], "such as 7e9, 7B or 350M, got 'many'"),
        (["--params", "0"], "from 1 to"),
        (["--params=-7e9"], "from 1 to"),
        (["--params", "inf"], "from 1 to"),
        (["--params", "1", "--precision", "fp8"], "expected --precision from model, fp32"),
        (["--params", "1", "--world-sizes", "0"], "at least 1, got [0]"),
        (["--params", "1", "--gpu-gib", "-1"], "--gpu-gib to be greater than 0"),
        (["--params", "1", "--bucket-mib", "0"], "bucket_mib > 0"),
        (["--params", "1", "--picture", "plan.gif"], "to end in .png"),
        (["--params", "1", "--picture", "absent/plan.png"], "there is no directory"),
        (["--params", "1", "--reduce-dtype", "bf16", "--ddp-reduces"], "has no effect"),
        (["--hf-config", "absent"], "nothing is downloaded"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    factories: str, arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("broken.py").write_text("def make(:")
    assert cli.main(["plan", *arguments]) == cli.USAGE
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert text in captured.err


@pytest.mark.parametrize("arguments", [[], ["a:b", "--params", "7"], ["--params", "7", "--world-sizes", "two"]])
def test_arguments_that_do_not_go_together_show_the_usage(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_info:
        cli.main(["plan", *arguments])
    assert exit_info.value.code == cli.USAGE and "usage: " in capsys.readouterr().err


def test_what_is_not_installed_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "find_spec", lambda name: None)
    monkeypatch.setattr(picture, "find_spec", lambda name: None)
    assert cli.main(["plan", "--hf-config", str(tmp_path)]) == cli.USAGE
    assert "needs Transformers: pip install sharded-adamax[plan]" in capsys.readouterr().err
    assert cli.main(["plan", "--params", "7", "--picture", str(tmp_path / "plan.png")]) == cli.USAGE
    assert "needs matplotlib: pip install sharded-adamax[plan]" in capsys.readouterr().err
