"""A checkpoint of any kind of job, at any number of ranks, is read by any other kind at any other number."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from torch.nn.parallel import DistributedDataParallel

from sharded_adamax import ShardedAdamax, load, save
from tests.distributed import jobs
from tests.distributed.pool import Pool
from tests.distributed.problems import assert_same_bits

WORLD_SIZES = [1, 2, 3, 4, 5]
DTYPES = {"fp32": torch.float32, "fp64": torch.float64}
PEERS = ["ddp", "fsdp"]


class Saved(NamedTuple):
    """A checkpoint and the kind of job that wrote it."""

    kind: str
    world_size: int
    dtype: torch.dtype
    path: str


def _save_all(checkpoints: list[Saved]) -> None:
    for saved in checkpoints:
        job = jobs.build(saved.kind, saved.dtype, seed=0)
        jobs.advance(job)
        jobs.save_as(saved.kind, saved.path, job)


@pytest.fixture(scope="module")
def shelf(ranks: Pool, tmp_path_factory: pytest.TempPathFactory) -> list[Saved]:
    """Checkpoints of every kind, world size and dtype."""
    root = tmp_path_factory.mktemp("shelf")
    everything = []
    for world_size in WORLD_SIZES:
        checkpoints = [
            Saved(kind, world_size, dtype, str(root / f"{kind}{world_size}{name}"))
            for kind in ("ours", *PEERS)
            for name, dtype in DTYPES.items()
        ]
        ranks.run(world_size, _save_all, checkpoints)
        everything += checkpoints
    plain = [Saved("plain", 1, dtype, str(root / f"plain{name}")) for name, dtype in DTYPES.items()]
    _save_all(plain)
    return everything + plain


def _load_all(kind: str, checkpoints: list[Saved]) -> None:
    for saved in checkpoints:
        job = jobs.build(kind, saved.dtype, seed=1)
        for group in job.optimizer.param_groups:
            group.update(lr=7.0, betas=(0.5, 0.5), eps=0.5, weight_decay=0.5, maximize=False)
        what = f"{kind} at {jobs.world_size()} from {saved.kind} at {saved.world_size}, {saved.dtype}:"
        jobs.load_as(kind, saved.path, job, verify=saved.kind == "ours")
        jobs.check(job, jobs.expected(saved.dtype), what)


@pytest.mark.parametrize("loaded_at", WORLD_SIZES)
def test_ours_of_any_world_size_loads_at_any_world_size(ranks: Pool, shelf: list[Saved], loaded_at: int) -> None:
    chosen = [saved for saved in shelf if saved.kind == "ours"]
    assert len(chosen) == 10
    ranks.run(loaded_at, _load_all, "ours", chosen)


@pytest.mark.parametrize("loaded_at", WORLD_SIZES)
@pytest.mark.parametrize("peer", PEERS)
def test_a_peer_reads_ours_of_any_world_size(ranks: Pool, shelf: list[Saved], peer: str, loaded_at: int) -> None:
    ranks.run(loaded_at, _load_all, peer, [saved for saved in shelf if saved.kind == "ours"])


@pytest.mark.parametrize("loaded_at", WORLD_SIZES)
def test_ours_reads_every_peer_of_any_world_size(ranks: Pool, shelf: list[Saved], loaded_at: int) -> None:
    chosen = [saved for saved in shelf if saved.kind != "ours"]
    assert len(chosen) == 22
    ranks.run(loaded_at, _load_all, "ours", chosen)


def test_plain_adamax_without_a_process_group_reads_ours_and_ours_reads_every_peer(shelf: list[Saved]) -> None:
    _load_all("plain", [saved for saved in shelf if saved.kind == "ours"])
    _load_all("ours", shelf)


def _through_state_dicts(path: str) -> None:
    """The user calls torch's own functions on our optimizer, with torch's own planner and storage."""
    job = jobs.build("ours", torch.float32, seed=0)
    jobs.advance(job)
    saved = get_optimizer_state_dict(job.module, job.optimizer, options=jobs.OPTIONS)
    before = jobs.expected(torch.float32)
    jobs.check(job, before, "after get_optimizer_state_dict")  # it ran no hidden step
    dcp_save({"optim": saved}, checkpoint_id=path)

    fresh = jobs.build("ours", torch.float32, seed=1)
    fresh.module.load_state_dict(job.module.state_dict())
    wanted: dict[str, Any] = get_optimizer_state_dict(fresh.module, fresh.optimizer, options=jobs.OPTIONS)
    assert all((value == 0).all() for key, value in wanted.items() if key.endswith(".step"))  # nor here
    dcp_load({"optim": wanted}, checkpoint_id=path)
    set_optimizer_state_dict(fresh.module, fresh.optimizer, wanted, options=jobs.OPTIONS)
    jobs.check(fresh, before, "after set_optimizer_state_dict")
    jobs.advance(fresh, range(jobs.NUM_STEPS, jobs.NUM_STEPS + 2))
    jobs.check(fresh, jobs.expected(torch.float32, jobs.NUM_STEPS + 2), "two steps later")


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_torchs_functions_for_optimizer_states_work_on_ours(ranks: Pool, tmp_path: Path, world_size: int) -> None:
    ranks.run(world_size, _through_state_dicts, str(tmp_path / "checkpoint"))


class _Part:
    """A part of a job as torchtitan gives it to torch.distributed.checkpoint: an object with a state_dict."""

    def __init__(self, job: jobs.Job, part: str) -> None:
        self._job = job
        self._is_model = part == "model"

    def state_dict(self) -> dict[str, Any]:
        if self._is_model:
            return get_model_state_dict(self._job.module)
        return dict(get_optimizer_state_dict(self._job.module, self._job.optimizer, options=jobs.OPTIONS))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self._is_model:
            set_model_state_dict(self._job.module, state)
        else:
            set_optimizer_state_dict(self._job.module, self._job.optimizer, state, options=jobs.OPTIONS)


def _parts(job: jobs.Job) -> dict[str, Any]:
    return {part: _Part(job, part) for part in ("model", "optimizer")}


def _save_parts(path: str) -> None:
    job = jobs.build("ours", torch.float32, seed=0)
    jobs.advance(job)
    dcp_save(_parts(job), checkpoint_id=path)


def _load_parts(path: str) -> None:
    job = jobs.build("ours", torch.float32, seed=1)
    dcp_load(_parts(job), checkpoint_id=path)
    jobs.check(job, jobs.expected(torch.float32), "after torch.distributed.checkpoint.load")
    jobs.advance(job, range(jobs.NUM_STEPS, jobs.NUM_STEPS + 2))
    jobs.check(job, jobs.expected(torch.float32, jobs.NUM_STEPS + 2), "two steps later")


@pytest.mark.parametrize(("saved_at", "loaded_at"), [(2, 3), (3, 1)])
def test_a_job_saved_in_torchtitans_way_goes_on_at_another_number_of_ranks(
    ranks: Pool, tmp_path: Path, saved_at: int, loaded_at: int
) -> None:
    ranks.run(saved_at, _save_parts, str(tmp_path / "checkpoint"))
    ranks.run(loaded_at, _load_parts, str(tmp_path / "checkpoint"))


def _reshard_through_state_dicts(path: str) -> None:
    job = jobs.build("ours", torch.float32, seed=1)
    jobs.load_with_torch(path, job)
    jobs.check(job, jobs.expected(torch.float32), "read by torch.distributed.checkpoint into ours")


def test_torch_itself_reshards_into_ours(ranks: Pool, shelf: list[Saved]) -> None:
    for saved in shelf:
        if saved.dtype == torch.float32 and (saved.kind, saved.world_size) in {("ours", 5), ("ours", 2), ("fsdp", 3)}:
            ranks.run(3, _reshard_through_state_dicts, saved.path)


# --- Names


def _compiled_inside(net: nn.Module) -> nn.Module:
    body = net.get_submodule("body")
    assert isinstance(body, nn.Sequential)
    body[0] = torch.compile(body[0], backend="eager")  # type: ignore[assignment]
    return net


def _checkpointed(net: nn.Module) -> nn.Module:
    apply_activation_checkpointing(net, check_fn=lambda module: isinstance(module, nn.Linear | nn.Conv1d))
    return net


WRAPPERS: dict[str, Callable[[nn.Module], Any]] = {
    "bare": lambda net: net,
    "DDP": DistributedDataParallel,
    "compiled": lambda net: torch.compile(net, backend="eager"),
    "compiled inside": _compiled_inside,
    "compiled DDP": lambda net: torch.compile(DistributedDataParallel(net), backend="eager"),
    "DDP of compiled": lambda net: DistributedDataParallel(torch.compile(net, backend="eager")),
    "checkpoint_wrapper": lambda net: checkpoint_wrapper(net),
    "activation checkpointing": _checkpointed,
    "DDP of activation checkpointing": lambda net: DistributedDataParallel(_checkpointed(net)),
}


def _wrapped(wrapper: str, seed: int) -> jobs.Job:
    module = WRAPPERS[wrapper](jobs.Net(torch.float32, seed))
    return jobs.Job(module, ShardedAdamax(jobs.groups_of(module), reduce_gradients=False, bucket_mib=0.01))


def _save_wrapped(root: str) -> None:
    for wrapper in WRAPPERS:
        job = _wrapped(wrapper, seed=0)
        jobs.advance(job)
        save(f"{root}/{wrapper}", job.module, job.optimizer)


def _load_wrapped(root: str) -> None:
    for index, wrapper in enumerate(WRAPPERS):
        names = list(WRAPPERS)
        for saved_with in ("bare", names[(index + 1) % len(names)], names[(index + 4) % len(names)]):
            job = _wrapped(wrapper, seed=1)
            load(f"{root}/{saved_with}", job.module, job.optimizer)
            jobs.check(job, jobs.expected(torch.float32), f"{wrapper} from {saved_with}:")


def test_names_do_not_depend_on_wrappers(ranks: Pool, tmp_path: Path) -> None:
    ranks.run(2, _save_wrapped, str(tmp_path))
    reference = json.loads((tmp_path / "bare" / "manifest.json").read_bytes())
    for wrapper in WRAPPERS:
        manifest = json.loads((tmp_path / wrapper / "manifest.json").read_bytes())
        for kind in ("tensors", "values"):
            assert sorted(manifest[kind]) == sorted(reference[kind]), wrapper
    ranks.run(3, _load_wrapped, str(tmp_path))


# --- Frozen, left out, named


def _partly_frozen(seed: int, frozen: tuple[str, ...], *, named: bool = False, left_out: str = "") -> jobs.Job:
    net = jobs.Net(torch.float32, seed)
    for name in frozen:
        net.get_parameter(name).requires_grad_(False)
    params: list[Any] = [(name, p) if named else p for name, p in net.named_parameters() if name != left_out]
    return jobs.Job(net, ShardedAdamax(params, reduce_gradients=False, bucket_mib=0.01))


def _everything(job: jobs.Job) -> dict[str, Tensor]:
    """Whole parameters and states by name, on rank 0."""
    full = job.optimizer.full_state_dict(to=0)  # type: ignore[attr-defined]
    found = {name: value.detach().clone() for name, value in job.module.state_dict().items()}
    if full is None:
        return {}
    names = {id(param): name for name, param in job.module.named_parameters()}
    params = [param for group in job.optimizer.param_groups for param in group["params"]]
    for index, state in full["state"].items():
        found |= {f"{key} of {names[id(params[index])]}": value for key, value in state.items()}
    return found


def _same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert set(got) == set(want), set(got) ^ set(want)
    for name, value in want.items():
        assert_same_bits(got[name], value, name)


FROZEN = ("body.0.weight", "seven")


def _save_frozen(path: str) -> dict[str, Tensor]:
    job = _partly_frozen(0, FROZEN, named=True)
    jobs.advance(job)
    save(path, job.module, job.optimizer)
    saved = _everything(job)
    for name in FROZEN:
        job.module.get_parameter(name).requires_grad_(True)
    jobs.advance(job, range(jobs.NUM_STEPS, jobs.NUM_STEPS + 2))
    thawed = _everything(job)
    save(path + "thawed", job.module, job.optimizer)
    return {**saved, **{f"thawed {name}": value for name, value in thawed.items()}}


def _load_frozen(path: str, then: str) -> dict[str, Tensor]:
    job = _partly_frozen(1, FROZEN)
    load(path, job.module, job.optimizer)
    if then == "unfreeze":
        for name in FROZEN:
            job.module.get_parameter(name).requires_grad_(True)
        jobs.advance(job, range(jobs.NUM_STEPS, jobs.NUM_STEPS + 2))
    return _everything(job)


def _thawed(values: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("thawed "): value for name, value in values.items() if name.startswith("thawed ")}


@pytest.mark.parametrize(("saved_at", "loaded_at"), [(1, 1), (2, 3), (3, 2)])
def test_frozen_parameters_are_saved_and_loaded_and_can_be_unfrozen_afterwards(
    ranks: Pool, tmp_path: Path, saved_at: int, loaded_at: int
) -> None:
    path = str(tmp_path / "checkpoint")
    all_values = ranks.run(saved_at, _save_frozen, path)[0]
    thawed = _thawed(all_values)
    saved = {name: value for name, value in all_values.items() if not name.startswith("thawed ")}
    assert "exp_avg of seven" in thawed and "exp_avg of seven" not in saved
    _same(ranks.run(loaded_at, _load_frozen, path, "stay")[0], saved)
    _same(ranks.run(loaded_at, _load_frozen, path, "unfreeze")[0], thawed)


def _load_trained_and_frozen(path: str) -> dict[str, Tensor]:
    """The parameters have a state (they are trained), and are frozen when the checkpoint is loaded."""
    job = _partly_frozen(1, ())
    for name in FROZEN:
        job.module.get_parameter(name).requires_grad_(False)
    load(path, job.module, job.optimizer)
    return _everything(job)


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_state_of_a_parameter_that_is_frozen_after_training_is_loaded(
    ranks: Pool, tmp_path: Path, world_size: int
) -> None:
    path = str(tmp_path / "checkpoint")
    all_values = ranks.run(world_size, _save_frozen, path)[0]
    thawed = _thawed(all_values)
    _same(ranks.run(world_size, _load_trained_and_frozen, path + "thawed")[0], thawed)


def _save_trained_and_frozen(path: str) -> dict[str, Tensor]:
    job = _partly_frozen(0, ())
    jobs.advance(job)
    for name in FROZEN:
        job.module.get_parameter(name).requires_grad_(False)
    save(path, job.module, job.optimizer)
    return _everything(job)


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_state_of_a_parameter_that_was_frozen_before_the_save_is_saved(
    ranks: Pool, tmp_path: Path, world_size: int
) -> None:
    path = str(tmp_path / "checkpoint")
    saved = ranks.run(world_size, _save_trained_and_frozen, path)[0]
    _same(ranks.run(world_size, _load_trained_and_frozen, path)[0], saved)


def _save_some(path: str, named: bool, left_out: str) -> dict[str, Tensor]:
    job = _partly_frozen(0, (), named=named, left_out=left_out)
    jobs.advance(job)
    save(path, job.module, job.optimizer)
    return _everything(job)


def _load_some(path: str, named: bool, left_out: str) -> dict[str, Tensor]:
    job = _partly_frozen(1, (), named=named, left_out=left_out)
    load(path, job.module, job.optimizer)
    names = job.optimizer.param_groups[0].get("param_names")
    assert (names is not None) == named and (names is None or "seven" in names)
    return _everything(job)


@pytest.mark.parametrize("named", [False, True], ids=["saved without names", "saved with names"])
def test_parameters_outside_the_optimizer_and_named_ones_are_saved_and_loaded(
    ranks: Pool, tmp_path: Path, named: bool
) -> None:
    path = str(tmp_path / "checkpoint")
    saved = ranks.run(2, _save_some, path, named, "table.weight")[0]
    assert "table.weight" in saved and "exp_avg of table.weight" not in saved
    _same(ranks.run(3, _load_some, path, not named, "table.weight")[0], saved)


def test_named_plain_adamax_reads_ours_with_a_partial_load_because_the_names_are_not_in_the_file(
    shelf: list[Saved],
) -> None:
    path = next(saved.path for saved in shelf if saved.kind == "ours" and saved.world_size == 3)
    net = jobs.Net(torch.float32, seed=1)
    named = list(net.named_parameters())
    groups = [{"params": named[::2], **jobs.GROUPS[0]}, {"params": named[1::2], **jobs.GROUPS[1]}]
    job = jobs.Job(net, torch.optim.Adamax(groups))
    jobs.load_with_torch(path, job, planner=DefaultLoadPlanner(allow_partial_load=True))
    jobs.check(job, jobs.expected(torch.float32), "named Adamax")
    assert job.optimizer.param_groups[0]["param_names"][0] == "scale"


# --- Tied weights, other groups


class _Tied(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embedding = nn.Embedding(19, 7)
        self.head = nn.Linear(7, 19, bias=False)
        self.head.weight = self.embedding.weight
        self.norm = nn.LayerNorm(7)


def _tied(kind: str, seed: int) -> jobs.Job:
    net = _Tied(seed)
    if kind == "plain":
        return jobs.Job(net, torch.optim.Adamax(jobs.groups_of(net)))
    return jobs.Job(net, ShardedAdamax(jobs.groups_of(net), reduce_gradients=False, bucket_mib=0.01))


def _tied_values(job: jobs.Job) -> dict[str, Tensor]:
    if isinstance(job.optimizer, ShardedAdamax):
        return _everything(job)
    found = dict(job.module.state_dict())
    for name, param in job.module.named_parameters():
        found |= {f"{key} of {name}": value for key, value in job.optimizer.state[param].items()}
    return found


def _save_tied(kind: str, path: str) -> None:
    job = _tied(kind, 0)
    jobs.advance(job)
    jobs.save_as(kind, path, job)


def _load_tied(kind: str, path: str, verify: bool) -> dict[str, Tensor]:
    job = _tied(kind, 1)
    jobs.load_as(kind, path, job, verify=verify)
    return _tied_values(job)


def test_tied_weights_go_both_ways(ranks: Pool, tmp_path: Path) -> None:
    reference = _tied("plain", 0)
    jobs.advance(reference)
    want = _tied_values(reference)
    ranks.run(3, _save_tied, "ours", str(tmp_path / "ours"))
    _save_tied("plain", str(tmp_path / "plain"))
    _same(_load_tied("plain", str(tmp_path / "ours"), False), want)
    _same(ranks.run(2, _load_tied, "ours", str(tmp_path / "ours"), True)[0], want)
    _same(ranks.run(2, _load_tied, "ours", str(tmp_path / "plain"), False)[0], want)
