"""Conversion between directories, torch files and safetensors files: equal in every bit, or refused by name."""

from __future__ import annotations

import copy
import fcntl
import io
import json
import os
import pickle
import pty
import random
import resource
import shutil
import struct
import subprocess
import sys
import termios
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_optimizer_state_dict
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from sharded_adamax import CheckpointDamagedError, CheckpointError, ShardedAdamax, cli, load, save
from sharded_adamax.checkpoint import inspection, manifest
from sharded_adamax.checkpoint.conversion import convert
from tests.distributed.pool import Pool
from tests.distributed.problems import SHAPES, gradient

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_SECONDS = 60
DTYPES = [torch.float32, torch.float64, torch.bfloat16]
EXTRA = {"epoch": 3, "betas": (0.5, 0.25), "generator": torch.arange(5, dtype=torch.uint8), "none": None}
Target = Literal["torch", "safetensors", "sharded"]


def targets() -> list[Target]:
    return ["torch", "safetensors", "sharded"]


@pytest.fixture(scope="module")
def ranks() -> Iterator[Pool]:
    pool = Pool()
    yield pool
    pool.close()


def run(*arguments: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "sharded_adamax", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        check=False,
        **options,
    )


class Zoo(nn.Module):
    """Parameters of all shapes in three dtypes, 0-d and without elements too; a buffer."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        for dtype in DTYPES:
            for index, shape in enumerate(SHAPES):
                values = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
                self.register_parameter(f"p{index}_{str(dtype)[6:]}", nn.Parameter(values))
        self.register_buffer("seen", torch.tensor(5 + seed))


def groups_of(model: nn.Module) -> list[dict[str, Any]]:
    """Several groups, in another order than the model's."""
    named = list(model.named_parameters())
    return [
        {"params": named[2::3]},
        {"params": named[1::3], "lr": 5e-3, "weight_decay": 0.1},
        {"params": named[0::3], "betas": (0.8, 0.99)},
    ]


def step_(optimizer: torch.optim.Optimizer, step: int) -> None:
    params = [param for group in optimizer.param_groups for param in group["params"]]
    for index, param in enumerate(params):
        param.grad = gradient(step, 0, index, param)
    optimizer.step()
    optimizer.zero_grad()


def make_job(optimizer_type: type[torch.optim.Adamax], **options: Any) -> tuple[Zoo, torch.optim.Adamax]:
    model = Zoo()
    optimizer = optimizer_type(groups_of(model), lr=1e-2, **options)
    for step in range(3):
        step_(optimizer, step)
    return model, optimizer


def save_zoo(path: str) -> None:
    model, optimizer = make_job(ShardedAdamax, bucket_mib=0.01)
    save(path, model, optimizer, extra=EXTRA, step=3)


@pytest.fixture(scope="module")
def reference() -> tuple[Zoo, torch.optim.Adamax]:
    """What is expected of every file: every rank of `save_zoo` had the same gradients."""
    return make_job(torch.optim.Adamax)


@pytest.fixture(scope="module")
def saved(ranks: Pool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two ranks' checkpoint of the zoo."""
    path = tmp_path_factory.mktemp("saved") / "checkpoint"
    ranks.run(2, save_zoo, str(path))
    return path


@pytest.fixture(scope="module")
def files(saved: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same checkpoint in all formats, by the command."""
    root = tmp_path_factory.mktemp("files")
    paths = {"directory": saved, "torch": root / "zoo.pt", "safetensors": root / "zoo.safetensors"}
    for to in ("torch", "safetensors"):
        result = run("convert", saved, paths[to], "--to", to)
        assert result.returncode == 0, result.stderr
        assert result.stdout == f"{paths[to]}\n"
        assert "left out: rng.0, rng.1" in result.stderr
    return paths


def assert_same(got: Any, expected: Any, what: str = "") -> None:
    assert type(got) is type(expected), (what, got, expected)
    if isinstance(expected, Tensor):
        assert (got.dtype, got.shape) == (expected.dtype, expected.shape), what
        assert torch.equal(got.detach().reshape(-1).view(torch.uint8), expected.detach().reshape(-1).view(torch.uint8))
    elif isinstance(expected, dict):
        assert got.keys() == expected.keys(), what
        for key, value in expected.items():
            assert_same(got[key], value, f"{what}.{key}")
    else:
        assert got == expected, what


def assert_loads(path: Path) -> None:
    """Load into a fresh job, compare with the reference, and train on."""
    expected_model, expected = make_job(torch.optim.Adamax)
    model = Zoo(seed=9)
    optimizer = ShardedAdamax(groups_of(model), lr=0.5, bucket_mib=0.01)
    assert_same(load(path, model, optimizer), EXTRA, "extra")
    for step in (3, 4):
        assert_same(dict(model.state_dict()), {k: v.detach() for k, v in expected_model.state_dict().items()}, "model")
        full = optimizer.full_state_dict(to=0)
        if full is not None:
            assert_same(full["state"], expected.state_dict()["state"], "state")
        for group, expected_group in zip(optimizer.param_groups, expected.param_groups, strict=True):
            for key in ("lr", "betas", "weight_decay", "eps"):
                assert group[key] == expected_group[key]
        if dist.get_world_size() == 3:
            return  # the mean of three equal gradients is not always that gradient
        step_(optimizer, step)
        step_(expected, step)


# ----------------------------------------------------------------------------------------------------- round trips


@pytest.mark.parametrize(
    "route",
    [
        ["sharded"],
        ["torch", "sharded"],
        ["safetensors", "sharded"],
        ["torch", "safetensors", "sharded", "torch", "sharded"],
    ],
    ids="-".join,
)
def test_converted_and_back_is_equal_in_every_bit_at_any_world_size(
    saved: Path, ranks: Pool, tmp_path: Path, route: list[Target]
) -> None:
    source = saved
    for index, to in enumerate(route):
        target = tmp_path / f"{index}.{to}"
        convert(source, target, to)
        source = target
    assert inspection.verify(source).is_whole
    summary = inspection.summarise(source)
    assert (summary.step, summary.world_size) == (3, 1)
    for world_size in (1, 2, 3):
        ranks.run(world_size, assert_loads, source)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(f"{i}.{to}" for i, to in enumerate(route))


def test_the_torch_file_is_that_of_a_plain_adamax(
    files: dict[str, Path], reference: tuple[Zoo, torch.optim.Adamax]
) -> None:
    loaded = torch.load(files["torch"], weights_only=True)
    mapped = torch.load(files["torch"], weights_only=True, mmap=True)
    model, optimizer = reference
    assert loaded.keys() == {"model", "optimizer", "extra", "step"} and loaded["step"] == 3
    assert_same(loaded["extra"], EXTRA, "extra")
    assert_same(dict(sorted(loaded["model"].items())), dict(sorted(model.state_dict().items())), "model")
    expected = optimizer.state_dict()
    assert_same(loaded["optimizer"]["state"], expected["state"], "state")
    assert_same(mapped["optimizer"]["state"], expected["state"], "mapped state")
    assert_same(loaded["optimizer"]["param_groups"], expected["param_groups"], "groups")

    fresh = Zoo(seed=4)
    fresh.load_state_dict(loaded["model"])
    resumed = torch.optim.Adamax(groups_of(fresh), lr=0.5)
    resumed.load_state_dict(loaded["optimizer"])
    continued_model = copy.deepcopy(model)
    continued = torch.optim.Adamax(groups_of(continued_model), lr=0.5)
    continued.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for each in (resumed, continued):
        step_(each, 7)
    assert_same(dict(fresh.state_dict()), dict(continued_model.state_dict()), "after a step")


def test_the_torch_file_is_a_sound_archive(files: dict[str, Path]) -> None:
    with zipfile.ZipFile(files["torch"]) as archive:
        assert archive.testzip() is None
    # Tensors can be memory-mapped at the alignment that torch gives them.
    mapped = torch.load(files["torch"], weights_only=True, mmap=True)
    states = mapped["optimizer"]["state"].values()
    addresses = [tensor.data_ptr() for state in states for tensor in state.values() if tensor.numel()]
    assert len({address % 64 for address in addresses}) == 1


def test_the_safetensors_library_reads_the_file(
    files: dict[str, Path], reference: tuple[Zoo, torch.optim.Adamax]
) -> None:
    model, optimizer = reference
    names = [name for group in optimizer.param_groups for name in group["param_names"]]
    with safe_open(files["safetensors"], framework="pt") as file:
        metadata = file.metadata()
        got = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 # not a dict
    expected = {f"model.{name}": value for name, value in model.state_dict().items()}
    for index, state in optimizer.state_dict()["state"].items():
        expected |= {f"optim.state.{names[index]}.{key}": value for key, value in state.items()}
    assert_same(dict(sorted((n, t) for n, t in got.items() if n != "extra")), dict(sorted(expected.items())), "file")
    data = files["safetensors"].read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    for name, tensor in got.items():
        assert header[name]["data_offsets"][0] % tensor.itemsize == 0  # aligned, as the library writes them
    ours = json.loads(metadata["sharded_adamax"])
    assert metadata["format"] == "pt" and ours["step"] == 3
    assert [group["param_names"] for group in ours["param_groups"]] == [
        group["param_names"] for group in optimizer.param_groups
    ]
    assert ours["param_groups"][1]["lr"] == 5e-3


def small_job(**options: Any) -> tuple[nn.Module, torch.optim.Adamax]:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    optimizer = torch.optim.Adamax(model.parameters(), **options)
    model(torch.randn(5, 3)).square().sum().backward()
    optimizer.step()
    return model, optimizer


def loads_into_small(path: Path) -> tuple[nn.Module, ShardedAdamax, Any]:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    optimizer = ShardedAdamax(model.named_parameters(), lr=9.0)
    return model, optimizer, load(path, model, optimizer)


def test_a_plain_torch_file_without_names_becomes_a_checkpoint(tmp_path: Path) -> None:
    model, optimizer = small_job(lr=3e-3)
    contents = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 4, "scheduler": {"a": 1}}
    torch.save(contents, tmp_path / "plain.pt")
    result = run("convert", tmp_path / "plain.pt", tmp_path / "checkpoint", "--to", "sharded")
    assert result.returncode == 0, result.stderr
    loaded_model, loaded, extra = loads_into_small(tmp_path / "checkpoint")
    assert_same(dict(loaded_model.state_dict()), dict(model.state_dict()))
    full = loaded.full_state_dict()
    assert full is not None
    assert_same(full["state"], optimizer.state_dict()["state"])
    assert loaded.param_groups[0]["lr"] == 3e-3
    assert extra == {"epoch": 4, "scheduler": {"a": 1}}  # what a program stores beside them is not lost


def test_a_file_of_an_old_torch_becomes_a_checkpoint(tmp_path: Path) -> None:
    """Steps were numbers, and groups had fewer keys."""
    model, optimizer = small_job()
    plain = copy.deepcopy(optimizer.state_dict())
    for state in plain["state"].values():
        state["step"] = int(state["step"])
    for key in ("capturable", "differentiable", "maximize", "foreach"):
        del plain["param_groups"][0][key]
    torch.save({"model": model.state_dict(), "optimizer": plain}, tmp_path / "old.pt")
    convert(tmp_path / "old.pt", tmp_path / "checkpoint", "sharded")
    _, loaded, extra = loads_into_small(tmp_path / "checkpoint")
    full = loaded.full_state_dict()
    assert full is not None and extra is None
    assert_same(full["state"], optimizer.state_dict()["state"])


def test_a_parameter_without_state_starts_at_zero(tmp_path: Path) -> None:
    model, optimizer = small_job()
    del optimizer.state[model[1].bias]  # type: ignore[index]
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "plain.pt")
    convert(tmp_path / "plain.pt", tmp_path / "checkpoint", "sharded")
    _, loaded, _ = loads_into_small(tmp_path / "checkpoint")
    full = loaded.full_state_dict()
    assert full is not None
    assert_same(full["state"][3], {"step": torch.zeros(()), "exp_avg": torch.zeros(2), "exp_inf": torch.zeros(2)})


def test_a_frozen_parameter_has_no_state_in_a_torch_file(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    model.bias.requires_grad_(False)
    optimizer = ShardedAdamax(model.named_parameters())
    save(tmp_path / "checkpoint", model, optimizer)
    convert(tmp_path / "checkpoint", tmp_path / "file.pt", "torch")
    loaded = torch.load(tmp_path / "file.pt", weights_only=True)
    assert list(loaded["optimizer"]["state"]) == [0] and "step" not in loaded
    assert loaded["optimizer"]["param_groups"][0]["param_names"] == ["weight", "bias"]
    convert(tmp_path / "file.pt", tmp_path / "back", "sharded")
    load(tmp_path / "back", model, optimizer)


def test_a_tensor_as_learning_rate_is_kept(tmp_path: Path) -> None:
    model, optimizer = small_job(lr=torch.tensor(1e-3), capturable=False, foreach=False)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "plain.pt")
    source = tmp_path / "plain.pt"
    for index, to in enumerate(("safetensors", "sharded", "torch")):
        convert(source, tmp_path / f"{index}", to)  # type: ignore[arg-type]
        source = tmp_path / f"{index}"
    group = torch.load(source, weights_only=True)["optimizer"]["param_groups"][0]
    assert_same(group["lr"], torch.tensor(1e-3))
    assert len(group["params"]) == 4


def test_a_checkpoint_of_another_program_is_converted_when_asked(tmp_path: Path) -> None:
    model, optimizer = small_job()
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    optim = get_optimizer_state_dict(model, optimizer, options=options)
    dcp_save({"model": get_model_state_dict(model), "optim": optim, "lr_scheduler": {"last_epoch": 2}},
             checkpoint_id=tmp_path / "foreign")  # fmt: skip
    assert "manifest.json is missing" in refuse(tmp_path / "foreign", tmp_path / "file.pt", "torch")
    result = run("convert", tmp_path / "foreign", tmp_path / "file.pt", "--to", "torch", "--without-manifest")
    assert result.returncode == 0 and "left out: lr_scheduler.last_epoch" in result.stderr
    loaded = torch.load(tmp_path / "file.pt", weights_only=True)
    assert_same(loaded["optimizer"]["state"], optimizer.state_dict()["state"])
    assert_same(dict(sorted(loaded["model"].items())), dict(sorted(model.state_dict().items())))


@pytest.mark.parametrize("extra", [None, {"a": (1, [2.5])}, {1: "one"}, torch.ones(2)], ids=str)
def test_extra_comes_back_as_it_was(tmp_path: Path, extra: Any) -> None:
    model, optimizer = small_job()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "extra": extra}, tmp_path / "0")
    for index, to in enumerate(("safetensors", "sharded", "torch")):
        convert(tmp_path / f"{index}", tmp_path / f"{index + 1}", to)  # type: ignore[arg-type]
    assert_same(torch.load(tmp_path / "3", weights_only=True)["extra"], extra)
    with safe_open(tmp_path / "1", framework="pt") as file:
        is_json = "extra" in json.loads(file.metadata()["sharded_adamax"])
    assert is_json == (type(extra) is not Tensor and extra != {1: "one"})


# ---------------------------------------------------------------------------------------------- refused, and why


def refuse(source: Path, target: Path, to: Target = "sharded") -> str:
    """Convert what must not be converted; return the message."""
    before = sorted(target.parent.rglob("*"))
    with pytest.raises(CheckpointError) as refused:
        convert(source, target, to)
    assert sorted(target.parent.rglob("*")) == before
    return str(refused.value)


def test_states_whose_parameters_are_not_certain_are_refused(tmp_path: Path) -> None:
    """Buffers have the shapes of parameters: a guess could give a parameter another one's state."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.BatchNorm1d(4))
    contents = {}
    for name, params in (("plain", model.parameters()), ("named", model.named_parameters())):
        optimizer = torch.optim.Adamax(params)
        model(torch.randn(5, 3)).square().sum().backward()
        optimizer.step()
        contents[name] = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save(contents[name], tmp_path / f"{name}.pt")
    message = refuse(tmp_path / "plain.pt", tmp_path / "checkpoint")
    assert "more than one way" in message and "named_parameters()" in message
    convert(tmp_path / "named.pt", tmp_path / "checkpoint", "sharded")

    two = {**contents["plain"]["optimizer"], "param_groups": []}
    group = contents["plain"]["optimizer"]["param_groups"][0]
    two["param_groups"] = [{**group, "params": group["params"][:2]}, {**group, "params": group["params"][2:]}]
    torch.save({**contents["plain"], "optimizer": two}, tmp_path / "two.pt")
    assert "2 groups and no param_names" in refuse(tmp_path / "two.pt", tmp_path / "other")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda file: file.pop("optimizer"), 'expected a dict with "model" and "optimizer", got model'),
        (lambda file: file.update(optimizer={}), "expected \"optimizer\" to be the state dict of torch.optim.Adamax"),
        (lambda file: file["optimizer"]["state"][0].pop("exp_inf"), "the state of 0.weight lacks exp_inf"),
        (lambda file: file["optimizer"]["state"].update({9: {}}), "a state of parameter 9, which is in no group"),
        (lambda file: file["optimizer"].update(param_groups=[]), "a state of parameter 0, which is in no group"),
        (lambda file: file["optimizer"].update(param_groups=[], state={}), "has no optimizer"),
        (
            lambda file: file["optimizer"]["state"][0].update(exp_inf=torch.ones(3, 4)),
            "exp_inf of 0.weight has shape (3, 4), the parameter (4, 3)",
        ),
        (
            lambda file: file["optimizer"]["param_groups"][0].update(param_names=["a", "b", "c", "d"]),
            "the optimizer has a, the model has not",
        ),
        (lambda file: file["optimizer"]["param_groups"][0].update(param_names=["0.weight"]), "4 parameters and 1"),
        (
            lambda file: file["optimizer"]["param_groups"][0].update(param_names=["0.weight"] * 4),
            "parameter 0.weight is in two places",
        ),
        (lambda file: file["model"].update(s=torch.ones(2, 2).to_sparse()), "expected plain tensors"),
    ],
)  # fmt: skip
def test_a_torch_file_of_something_else_is_refused(tmp_path: Path, change: Any, expected: str) -> None:
    model, optimizer = small_job()
    file = {"model": dict(model.state_dict()), "optimizer": optimizer.state_dict()}
    change(file)
    torch.save(file, tmp_path / "file.pt")
    message = refuse(tmp_path / "file.pt", tmp_path / "checkpoint")
    assert expected in message and (str(tmp_path / "file.pt") in message or "plain tensors" in message)


def test_a_directory_of_checkpoints_is_refused_with_a_hint(tmp_path: Path, saved: Path) -> None:
    shutil.copytree(saved, tmp_path / "root" / "00000003")
    assert str(tmp_path / "root" / "00000003") in refuse(tmp_path / "root", tmp_path / "file.pt", "torch")


def test_safetensors_of_another_program_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"weight": torch.ones(2)}, tmp_path / "weights.safetensors")
    assert "no optimizer state" in refuse(tmp_path / "weights.safetensors", tmp_path / "checkpoint")


def test_nothing_is_overwritten(files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "target"
    target.write_text("precious")
    result = run("convert", files["directory"], target, "--to", "torch")
    assert result.returncode == 2 and "exists" in result.stderr
    for to in targets():
        with pytest.raises(FileExistsError):  # before the source is read
            convert(tmp_path, target, to)
        with pytest.raises(FileExistsError):
            convert(files["directory"], target, to)
        assert target.read_text() == "precious"
    target.unlink()
    target.symlink_to(tmp_path / "dangling")
    with pytest.raises(FileExistsError):
        convert(files["directory"], target, "torch")
    target.unlink()
    real_link = os.link

    def late(old: Path, new: Path) -> None:  # somebody else makes the target while we write
        Path(new).write_text("precious")
        real_link(old, new)

    monkeypatch.setattr(os, "link", late)
    with pytest.raises(FileExistsError):
        convert(files["directory"], target, "torch")
    assert target.read_text() == "precious"
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


@pytest.mark.parametrize("to", ["torch", "safetensors", "sharded"])
def test_a_full_disk_leaves_nothing(
    files: dict[str, Path], tmp_path: Path, to: str, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "out" / "target"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        code = cli.main(["convert", str(files["directory"]), str(target), "--to", to])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert code == cli.DAMAGED and str(target) in capsys.readouterr().err
    assert list((tmp_path / "out").iterdir()) == []


def refusal(source: Path, target: Path) -> str | None:
    """Return why a conversion is refused, None if it is not."""
    try:
        convert(source, target, "torch")
    except CheckpointError as error:
        return str(error)
    return None


def flipped(source: Path, at: int, target: Path) -> Path:
    data = bytearray(source.read_bytes())
    data[at] ^= 1 << random.Random(at).randrange(8)
    target.write_bytes(data)
    return target


def sample(path: Path, count: int) -> list[int]:
    size = path.stat().st_size
    edges = [*range(10), *range(size - 10, size)]
    return edges + random.Random(0).sample(range(size), min(size, count))


@pytest.fixture(scope="module")
def small_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("small")
    model, optimizer = small_job()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, root / "0.pt")
    paths = {name: root / name for name in ("directory", "torch", "safetensors")}
    convert(root / "0.pt", paths["directory"], "sharded")
    convert(paths["directory"], paths["torch"], "torch")
    convert(paths["directory"], paths["safetensors"], "safetensors")
    return paths


def test_a_flipped_bit_of_a_safetensors_file_is_always_refused(small_files: dict[str, Path], tmp_path: Path) -> None:
    for at in sample(small_files["safetensors"], 150):
        damaged = flipped(small_files["safetensors"], at, tmp_path / "damaged")
        assert str(damaged) in refuse(damaged, tmp_path / "target", "torch"), at


def test_a_flipped_bit_of_a_torch_file_is_refused_or_without_effect(
    small_files: dict[str, Path], tmp_path: Path
) -> None:
    """Padding and dates of the archive are covered by no checksum, and mean nothing."""
    expected = torch.load(small_files["torch"], weights_only=True)
    num_refused = 0
    places = sample(small_files["torch"], 150)
    for at in places:
        damaged = flipped(small_files["torch"], at, tmp_path / "damaged")
        target = tmp_path / "target"
        message = refusal(damaged, target)
        if message is not None:
            assert str(damaged) in message
            num_refused += 1
            continue
        assert_same(torch.load(target, weights_only=True), expected, f"flip at {at}")
        target.unlink()
    assert num_refused > 20
    # Every bit of a tensor counts.
    with zipfile.ZipFile(small_files["torch"]) as archive:
        info = archive.getinfo("archive/data/0")
    data = small_files["torch"].read_bytes()
    tensor = expected["model"]["0.weight"].numpy().tobytes()
    start = data.index(tensor)
    assert info.file_size == len(tensor) and start % 64 == 0
    for at in range(start, start + len(tensor)):
        assert "CRC-32" in refuse(flipped(small_files["torch"], at, tmp_path / "damaged"), tmp_path / "target")


def test_a_flipped_bit_of_a_record_is_refused_by_the_name_of_its_file(saved: Path, tmp_path: Path) -> None:
    damaged = shutil.copytree(saved, tmp_path / "damaged")
    for name in ("__0_0.distcp", "__1_0.distcp", ".metadata", "manifest.json"):
        for at in sample(saved / name, 20):
            flipped(saved / name, at, damaged / name)
            assert str(damaged / name) in refuse(damaged, tmp_path / "target", "torch"), at
        shutil.copy(saved / name, damaged / name)


@pytest.mark.parametrize("kind", ["torch", "safetensors"])
def test_a_cut_file_is_refused(small_files: dict[str, Path], tmp_path: Path, kind: str) -> None:
    data = small_files[kind].read_bytes()
    for size in [0, 4, 9, len(data) // 3, len(data) - 1]:
        (tmp_path / "cut").write_bytes(data[:size])
        assert str(tmp_path / "cut") in refuse(tmp_path / "cut", tmp_path / "target")
    if kind == "safetensors":
        (tmp_path / "cut").write_bytes(data + b"\0")
        assert f"has {len(data) + 1} bytes, expected {len(data)}" in refuse(tmp_path / "cut", tmp_path / "target")


@pytest.mark.parametrize("name", ["__0_0.distcp", "manifest.json"])
def test_a_lost_file_of_a_checkpoint_is_refused_by_the_command(
    saved: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = shutil.copytree(saved, tmp_path / "damaged")
    (damaged / name).unlink()
    arguments = [str(damaged), str(tmp_path / "target"), "--to", "safetensors"]
    assert cli.main(["convert", *arguments]) == cli.DAMAGED
    assert f"{damaged / name} is missing" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["damaged"]


class Bomb:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> Any:
        return Path.touch, (self.proof,)


def test_a_bomb_in_any_file_is_not_run(small_files: dict[str, Path], tmp_path: Path) -> None:
    proof = tmp_path / "proof"
    pickle.loads(pickle.dumps(Bomb(proof)))
    assert proof.exists()  # the bomb works
    proof.unlink()

    torch.save({"model": {"a": torch.ones(1)}, "optimizer": Bomb(proof)}, tmp_path / "bomb.pt")
    assert "weights_only=True" in refuse(tmp_path / "bomb.pt", tmp_path / "target")

    dcp_save({"model": {"a": torch.ones(1)}}, checkpoint_id=tmp_path / "bombs")
    (tmp_path / "bombs" / ".metadata").write_bytes(pickle.dumps(Bomb(proof)))
    assert cli.main(["inspect", str(tmp_path / "bombs")]) == cli.USAGE
    assert cli.main(["verify", str(tmp_path / "bombs")]) == cli.DAMAGED
    with pytest.raises(CheckpointError, match="it was not run"):
        convert(tmp_path / "bombs", tmp_path / "target", "torch", without_manifest=True)

    shutil.rmtree(tmp_path / "bombs")
    dcp_save({"model": {"a": Bomb(proof)}, "optim": {}}, checkpoint_id=tmp_path / "bombs")
    with pytest.raises(CheckpointDamagedError, match="__0_0"):
        convert(tmp_path / "bombs", tmp_path / "target", "torch", without_manifest=True)

    data = io.BytesIO()
    torch.save(Bomb(proof), data)
    raw = torch.frombuffer(bytearray(data.getvalue()), dtype=torch.uint8)
    model, optimizer = small_job()
    source = tmp_path / "extra"
    save(source, model, optimizer, extra={"x": 1})
    poison_extra(source, raw)
    with pytest.raises(CheckpointDamagedError, match="extra"):
        convert(source, tmp_path / "target", "torch")
    assert not proof.exists() and not (tmp_path / "target").exists()


def rewrite_manifest(checkpoint: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a manifest and make its digest fit: what a wrong writer, not a disk, would leave."""
    path = checkpoint / "manifest.json"
    body = json.loads(path.read_bytes())
    del body["digest"]
    change(body)
    path.write_bytes(manifest._canonical({**body, "digest": manifest._digest(body)}))


def test_a_checkpoint_with_a_gap_is_refused(saved: Path, tmp_path: Path) -> None:
    gap = shutil.copytree(saved, tmp_path / "gap")
    rewrite_manifest(gap, lambda body: body["tensors"]["optim.state.p2_float32.exp_avg"].update(shape=[8]))
    for to in targets():
        message = refuse(gap, tmp_path / "target", to)
        assert "optim.state.p2_float32.exp_avg is stored only in part: 7 of 8 elements" in message


def test_a_record_that_is_not_what_the_manifest_says_is_refused(saved: Path, tmp_path: Path) -> None:
    wrong = shutil.copytree(saved, tmp_path / "wrong")
    rewrite_manifest(wrong, lambda body: body["tensors"]["model.p2_float32"].update(dtype="int32"))
    message = refuse(wrong, tmp_path / "target", "torch")
    assert "expected a piece of model.p2_float32 of shape (7,) and torch.int32" in message and ".distcp" in message


def test_a_state_in_no_group_is_refused(saved: Path, tmp_path: Path) -> None:
    def drop(body: dict[str, Any]) -> None:
        body["values"] = {name: record for name, record in body["values"].items() if ".p2_float32." not in name}

    wrong = shutil.copytree(saved, tmp_path / "wrong")
    rewrite_manifest(wrong, drop)
    assert "a state of p2_float32, which is in no group" in refuse(wrong, tmp_path / "target", "torch")


def test_a_file_of_another_byte_order_is_refused(small_files: dict[str, Path], tmp_path: Path) -> None:
    other = "big" if sys.byteorder == "little" else "little"
    with zipfile.ZipFile(small_files["torch"]) as old, zipfile.ZipFile(tmp_path / "other.pt", "w") as new:
        for info in old.infolist():
            new.writestr(info.filename, other if info.filename.endswith("byteorder") else old.read(info))
    assert "another byte order" in refuse(tmp_path / "other.pt", tmp_path / "target")


def poison_extra(checkpoint: Path, raw: Tensor) -> None:
    """Put other bytes, with fitting checksums, in the place of ``extra``."""
    data = io.BytesIO()
    torch.save(raw, data)
    file = checkpoint / "__0_0.distcp"
    record = {"file": file.name, "offset": file.stat().st_size, "length": len(data.getvalue()), "crc32": None}
    with open(file, "ab") as records:
        records.write(data.getvalue())
    chunks = [{"offsets": [0], "sizes": [len(raw)], "record": record}]

    def change(body: dict[str, Any]) -> None:
        body["tensors"]["extra"].update(shape=[len(raw)], chunks=chunks)
        body["files"][file.name]["bytes"] = file.stat().st_size

    rewrite_manifest(checkpoint, change)


# ------------------------------------------------------------------------------------------- memory and progress bars

# Not resource.getrusage: its maximum is inherited from the process that starts this one, here pytest with the model.
MEASURE = """
import re, sys
from pathlib import Path
from sharded_adamax.checkpoint.conversion import convert
def peak_bytes():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
before = peak_bytes()
convert(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
print(peak_bytes() - before)
"""
MIB = 1 << 20
PIECE_BYTES = 8 * MIB  # one parameter: `save` stores a whole one as a piece, and its state in small pieces
NUM_PARAMS = 6


def growth_bytes(source: Path, target: Path, to: str) -> int:
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, source, target, to],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        check=True,
    )
    return int(result.stdout)


def test_memory_is_bounded_by_a_piece(tmp_path: Path) -> None:
    """144 MiB pass; what a conversion needs of them is a few copies of the largest piece."""
    model = nn.ModuleList(nn.Linear(2048, PIECE_BYTES // 4 // 2048, bias=False) for _ in range(NUM_PARAMS))
    optimizer = ShardedAdamax(model.named_parameters())
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    save(tmp_path / "checkpoint", model, optimizer)
    stored_bytes = 3 * NUM_PARAMS * PIECE_BYTES
    for to in ("torch", "safetensors"):
        # The record and the tensor that it becomes; the rest is what the allocator and Python keep.
        assert growth_bytes(tmp_path / "checkpoint", tmp_path / to, to) < 2 * PIECE_BYTES + 12 * MIB
        assert (tmp_path / to).stat().st_size > stored_bytes
        # Files are read in small pieces.
        assert growth_bytes(tmp_path / to, tmp_path / f"{to}.checkpoint", "sharded") < 24 * MIB
    assert growth_bytes(tmp_path / "torch", tmp_path / "direct", "safetensors") < 24 * MIB


def test_a_terminal_gets_a_progress_bar(files: dict[str, Path], tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    os.set_blocking(ours, False)
    with open(ours, "rb", buffering=0) as terminal:
        result = subprocess.run(
            [sys.executable, "-m", "sharded_adamax", "convert", files["torch"], tmp_path / "target", "--to", "sharded"],
            stdout=subprocess.PIPE,
            stderr=theirs,
            timeout=TIMEOUT_SECONDS,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            check=True,
        )
        shown = terminal.read(65536).decode()
        os.close(theirs)
    assert files["torch"].name in shown and "B/s" in shown
    assert "B/s" not in result.stdout.decode()
