"""Dtypes on the wire and in the update: masters, reduce_dtype, mixtures, complex numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from sharded_adamax import ShardedAdamax, load, save
from sharded_adamax.checkpoint import contents
from tests.distributed.pool import Pool
from tests.distributed.problems import (
    assert_same_bits,
    assert_same_params,
    assert_same_state,
    backward,
    gradient,
    local_gradients,
    make_params,
)

HYPER: dict[str, Any] = {"lr": 3e-2, "weight_decay": 0.1}
LOW = [torch.bfloat16, torch.float16]


def mean_of_ranks(step: int, index: int, param: Tensor, reduce_dtype: torch.dtype, update_dtype: torch.dtype) -> Tensor:
    """The documented reduction: summed in rank order as on the wire, divided in the wider dtype, rounded once."""
    terms = [gradient(step, rank, index, param).to(reduce_dtype) for rank in range(dist.get_world_size())]
    total = terms[0].clone()
    for term in terms[1:]:
        total += term
    wide = torch.promote_types(reduce_dtype, update_dtype)
    return (total.to(wide) / dist.get_world_size()).to(update_dtype)


def _train(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], step: int) -> None:
    backward(params, local_gradients(step, params))
    optimizer.step()
    optimizer.zero_grad()


# --- master_dtype


class WithMaster:
    """A job in 16 bits with a master, beside torch.optim.Adamax on the master itself."""

    def __init__(self, dtype: torch.dtype, foreach: bool = False, **settings: Any) -> None:
        self.dtype = dtype
        self.wire = settings.get("reduce_dtype") or dtype
        self.params = make_params(dtype)
        self.optimizer = ShardedAdamax(
            self.params, **HYPER, foreach=foreach, bucket_mib=0.01, master_dtype=torch.float32, **settings
        )
        self.expected = [nn.Parameter(param.detach().float()) for param in make_params(dtype)]
        self.reference = torch.optim.Adamax(self.expected, **HYPER, foreach=foreach)

    def advance(self, steps: range) -> None:
        for step in steps:
            _train(self.optimizer, self.params, step)
            for index, param in enumerate(self.expected):
                param.grad = mean_of_ranks(step, index, self.params[index], self.wire, torch.float32)
            self.reference.step()
            self.check(f"after step {step}")

    def check(self, when: str) -> None:
        for index, (param, master) in enumerate(zip(self.params, self.expected, strict=True)):
            assert_same_bits(param.detach(), master.detach().to(self.dtype), f"parameter {index} {when}")
        full = self.optimizer.full_state_dict()
        if full is not None:
            if self.reference.state:
                assert_same_state(full, self.reference)
            for index, state in full["state"].items():
                assert_same_bits(state["master_param"], self.expected[index].detach(), f"master {index} {when}")


def _with_master(dtype: torch.dtype, foreach: bool, reduce_dtype: torch.dtype | None) -> None:
    job = WithMaster(dtype, foreach, reduce_dtype=reduce_dtype)
    state = job.optimizer.state[job.params[2]]
    assert {key: state[key].dtype for key in ("exp_avg", "exp_inf", "master_param")} == dict.fromkeys(
        ("exp_avg", "exp_inf", "master_param"), torch.float32
    )
    job.check("before the first step")
    job.advance(range(6))
    finer = [p for p, m in zip(job.params, job.expected, strict=True) if not torch.equal(p.float(), m)]
    assert finer, "a master that never has more digits than the parameter shows nothing"


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("foreach", [True, False])
def test_parameters_are_the_rounded_master_that_adamax_would_have(
    ranks: Pool, world_size: int, dtype: torch.dtype, foreach: bool
) -> None:
    ranks.run(world_size, _with_master, dtype, foreach, None)


@pytest.mark.parametrize("reduce_dtype", [torch.float32, torch.float64])
def test_a_wide_wire_gives_the_master_gradients_that_were_rounded_once(ranks: Pool, reduce_dtype: torch.dtype) -> None:
    ranks.run(3, _with_master, torch.bfloat16, True, reduce_dtype)


def _loaded_weights(how: str) -> None:
    """Weights that are written to the model go into the master; those that are not keep their digits."""
    job = WithMaster(torch.bfloat16)
    job.advance(range(3))
    with torch.no_grad():
        for index in (4, 7):
            values = torch.linspace(-3, 5, job.params[index].numel()).view(job.params[index].shape).to(torch.bfloat16)
            if how == "copy_":
                job.params[index].copy_(values)
            elif how == "data":
                rounded = job.params[index].clone()
                job.params[index].data.copy_(values)
                # The few that happen to have the value already are not seen to be written.
                values = torch.where(values == rounded, job.expected[index], values)
            else:
                module = nn.Module()
                module.register_parameter("p", job.params[index])
                module.load_state_dict({"p": values})
            job.expected[index].copy_(values)
        job.params[2].data[3] = float("nan")  # not equal to itself, and no reason to take over its neighbours
        job.expected[2][3] = float("nan")
        swapped = job.params[0].clone()
        job.params[0].fill_(7.0)
        job.params[0].copy_(swapped)  # as if nothing had happened: its master keeps its digits
    job.optimizer.state_dict()
    shard = job.optimizer.state[job.params[7]]["master_param"]
    want = job.expected[7].detach().reshape(-1)[shard.owned.as_slice()]
    assert_same_bits(shard.local, want, "the master in state_dict before a step")
    for step in range(3, 6):
        _train(job.optimizer, job.params, step)
        for index, param in enumerate(job.expected):
            param.grad = mean_of_ranks(step, index, job.params[index], torch.bfloat16, torch.float32)
        job.reference.step()
        for index, (param, master) in enumerate(zip(job.params, job.expected, strict=True)):
            torch.testing.assert_close(param.detach(), master.detach().bfloat16(), rtol=0, atol=0, equal_nan=True)
            assert torch.isnan(param).sum() == (1 if index == 2 else 0)


@pytest.mark.parametrize("how", ["copy_", "data", "load_state_dict"])
def test_weights_written_to_the_model_refresh_the_master(ranks: Pool, how: str) -> None:
    ranks.run(2, _loaded_weights, how)


def _master_travels(path: str, road: str) -> None:
    """Resume from a checkpoint or a full state dict of 16-bit training: to the last bit as if nothing had happened."""
    job = WithMaster(torch.bfloat16)
    module = nn.ParameterList(job.params)
    job.advance(range(3))
    weights = [param.detach().clone() for param in job.params]
    if road == "save":
        save(path, module, job.optimizer)
    everything: list[Any] = [job.optimizer.full_state_dict()]
    dist.broadcast_object_list(everything)

    again = WithMaster(torch.bfloat16)
    module = nn.ParameterList(again.params)
    _train(again.optimizer, again.params, 77)  # something else, to be overwritten
    if road == "save":
        load(path, module, again.optimizer)
    else:
        with torch.no_grad():
            for param, saved in zip(again.params, weights, strict=True):
                param.copy_(saved)
        again.optimizer.load_state_dict(everything[0])
    again.expected, again.reference = job.expected, job.reference
    again.check("right after loading")
    again.advance(range(3, 6))


@pytest.mark.parametrize("road", ["save", "full_state_dict"])
def test_a_resume_with_a_master_is_bit_identical(ranks: Pool, tmp_path: Path, road: str) -> None:
    ranks.run(3, _master_travels, str(tmp_path / "checkpoint"), road)


def _without_stored_master() -> None:
    """A checkpoint of float32 training has no master: a job with one takes the weights for it."""
    params = make_params(torch.bfloat16)
    optimizer = ShardedAdamax(params, **HYPER, bucket_mib=0.01)
    _train(optimizer, params, 0)
    everything: list[Any] = [optimizer.full_state_dict()]
    dist.broadcast_object_list(everything)
    job = WithMaster(torch.bfloat16)
    with torch.no_grad():
        for param, saved, master in zip(job.params, params, job.expected, strict=True):
            param.copy_(saved)
            master.copy_(saved)
    job.optimizer.load_state_dict(everything[0])
    job.reference.load_state_dict(everything[0])
    job.advance(range(1, 4))


def test_a_state_without_a_master_takes_the_weights_for_it(ranks: Pool) -> None:
    ranks.run(2, _without_stored_master)


def _checkpoint_without_master(path: str) -> None:
    """The same from files: a job whose checkpoint lost its masters, written by torch.distributed.checkpoint alone."""
    job = WithMaster(torch.bfloat16)
    job.advance(range(2))
    state = contents.collect(nn.ParameterList(job.params), job.optimizer)
    state["optim"] = {key: value for key, value in state["optim"].items() if not key.endswith("master_param")}
    dcp_save(state, checkpoint_id=path)

    again = WithMaster(torch.bfloat16)
    load(path, nn.ParameterList(again.params), again.optimizer, verify=False)
    again.expected, again.reference = job.expected, job.reference
    with torch.no_grad():
        for master, param in zip(again.expected, again.params, strict=True):
            master.copy_(param)
    again.check("right after loading")
    again.advance(range(2, 4))


def test_a_checkpoint_without_a_master_takes_the_weights_for_it(ranks: Pool, tmp_path: Path) -> None:
    ranks.run(2, _checkpoint_without_master, str(tmp_path / "checkpoint"))


def _held(dtype: torch.dtype) -> tuple[int, int, int, int, int]:
    params = [nn.Parameter(torch.zeros(64 * 12, dtype=dtype)) for _ in range(10)]
    optimizer = ShardedAdamax(params, bucket_mib=64 * 12 * 2 / 2**20, master_dtype=torch.float32)
    _train(optimizer, params, 0)
    held = optimizer.held_bytes()
    return sum(p.numel() for p in params), held.parameters, held.masters, held.state, held.gradient_shards_peak


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_a_master_costs_4_bytes_and_the_state_8_over_the_ranks(ranks: Pool, world_size: int) -> None:
    for numel, parameters, masters, state, gradients in ranks.run(world_size, _held, torch.bfloat16):
        assert parameters == 2 * numel
        assert masters == 4 * numel // world_size
        assert state == 8 * numel // world_size
        assert gradients == 4 * numel // world_size
    assert ranks.run(1, _held, torch.float32)[0][2] == 0, "float32 parameters need no master"


# --- reduce_dtype


def _reduce_in(dtype: torch.dtype, reduce_dtype: torch.dtype) -> None:
    params, expected = make_params(dtype), make_params(dtype)
    optimizer = ShardedAdamax(params, **HYPER, bucket_mib=0.01, reduce_dtype=reduce_dtype)
    reference = torch.optim.Adamax(expected, **HYPER)
    for step in range(4):
        _train(optimizer, params, step)
        for index, param in enumerate(expected):
            param.grad = mean_of_ranks(step, index, param, reduce_dtype, dtype)
        reference.step()
        assert_same_params(params, expected, f"after step {step}")
    sent = optimizer._get_engine().group.traffic.sent_bytes
    assert sent["reduce_scatter"] * dtype.itemsize == sent["all_gather"] * reduce_dtype.itemsize


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize(
    ("dtype", "reduce_dtype"),
    [
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float16),
        (torch.float32, torch.float64),
        (torch.float64, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.bfloat16),
    ],
)
def test_gradients_travel_and_are_summed_in_the_reduce_dtype(
    ranks: Pool, world_size: int, dtype: torch.dtype, reduce_dtype: torch.dtype
) -> None:
    ranks.run(world_size, _reduce_in, dtype, reduce_dtype)


# --- mixtures and complex numbers

MIXED = [torch.float32, torch.bfloat16, torch.float64, torch.complex64, torch.float16, torch.complex128]


def _mixed(foreach: bool, hyper: dict[str, Any]) -> None:
    params, expected = (
        [p for dtype in MIXED for p in make_params(dtype, [(5, 13), (), (130,)], seed=MIXED.index(dtype))]
        for _ in range(2)
    )
    optimizer = ShardedAdamax(params, lr=0.02, foreach=foreach, bucket_mib=0.01, **hyper)
    reference = torch.optim.Adamax(expected, lr=0.02, foreach=foreach, **hyper)
    for step in range(5):
        for index, param in enumerate(params):
            param.grad = _complex_gradient(step, dist.get_rank(), index, param)
        for index, param in enumerate(expected):
            terms = [_complex_gradient(step, rank, index, param) for rank in range(dist.get_world_size())]
            total = terms[0].clone()
            for term in terms[1:]:
                total += term
            param.grad = total / dist.get_world_size()
        optimizer.step()
        reference.step()
        for index, (param, other) in enumerate(zip(params, expected, strict=True)):
            assert_same_bits(param, other, f"parameter {index} ({param.dtype}) after step {step}")
    full = optimizer.full_state_dict()
    if full is not None:
        assert_same_state(full, reference)


def _complex_gradient(step: int, rank: int, index: int, param: Tensor) -> Tensor:
    real = gradient(step, rank, index, param)
    if not param.is_complex():
        return real
    return real + 1j * gradient(step + 500, rank, index, param).real


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize("hyper", [{}, {"weight_decay": 0.1}, {"maximize": True, "weight_decay": 0.1}], ids=str)
def test_mixed_dtypes_in_one_group_are_updated_as_in_adamax(
    ranks: Pool, world_size: int, foreach: bool, hyper: dict[str, Any]
) -> None:
    ranks.run(world_size, _mixed, foreach, hyper)


def _complex_checkpoint(path: str) -> None:
    module, other = (nn.ParameterList(make_params(torch.complex64, [(7, 9), ()], seed=seed)) for seed in (0, 1))
    optimizer, target = ShardedAdamax(module.parameters()), ShardedAdamax(other.parameters())
    for index, param in enumerate(module):
        param.grad = _complex_gradient(0, dist.get_rank(), index, param)
    optimizer.step()
    norm = optimizer.clip_grad_norm_(1.0)
    assert norm == 0
    save(path, module, optimizer)
    load(path, other, target)
    for index, (param, loaded) in enumerate(zip(module, other, strict=True)):
        assert_same_bits(loaded, param, f"parameter {index}")
    full, of_target = optimizer.full_state_dict(), target.full_state_dict()
    if full is not None and of_target is not None:
        for index in full["state"]:
            for key, value in full["state"][index].items():
                assert_same_bits(of_target["state"][index][key], value, f"{key} of {index}")


def test_complex_states_are_saved_and_loaded(ranks: Pool, tmp_path: Path) -> None:
    ranks.run(2, _complex_checkpoint, str(tmp_path / "checkpoint"))


def _complex_norm(norm_type: float) -> None:
    params, expected = (make_params(torch.complex128, [(7, 9), (130,)]) for _ in range(2))
    optimizer = ShardedAdamax(params)
    for index, (param, other) in enumerate(zip(params, expected, strict=True)):
        value = _complex_gradient(0, 0, index, param)  # the same on all ranks: the mean has the same bits
        param.grad, other.grad = value.clone(), value.clone()
    got = optimizer.clip_grad_norm_(0.5, norm_type)
    want = torch.nn.utils.clip_grad_norm_(expected, 0.5, norm_type)
    assert got.dtype == want.dtype == torch.float64
    torch.testing.assert_close(got, want, rtol=1e-14, atol=0)


@pytest.mark.parametrize("norm_type", [2.0, 1.0, float("inf")])
def test_the_norm_of_complex_gradients_is_torchs(ranks: Pool, norm_type: float) -> None:
    ranks.run(2, _complex_norm, norm_type)


def _odd_gradients() -> None:
    """Gradients that are transposed, expanded, conjugated or views: what autograd may hand over."""
    params, expected = (make_params(torch.float32, [(6, 10), (8,), (4, 4)]) for _ in range(2))
    optimizer, reference = ShardedAdamax(params), torch.optim.Adamax(expected)
    for step in range(3):
        for owned in (params, expected):
            owned[0].grad = torch.randn(10, 6, generator=torch.Generator().manual_seed(step)).t()
            owned[1].grad = torch.tensor([0.5 + step]).expand(8)
            owned[2].grad = torch.arange(64.0).view(8, 8)[::2, 1::2] - step
        optimizer.step()
        reference.step()
        assert_same_params(params, expected, f"after step {step}")


@pytest.mark.parametrize("world_size", [1, 2])
def test_gradients_that_are_not_contiguous_count_as_they_are(ranks: Pool, world_size: int) -> None:
    ranks.run(world_size, _odd_gradients)
