"""``capturable=True``: torch's formula for it, bit for bit, and what the flag decides.

torch runs it on GPUs alone. Here its list of devices is made to hold the CPU; the arithmetic is the same code. That no
step makes the host wait, or copies anything to the device, is in tests/without_gpu; a real graph in tests/gpu.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sharded_adamax import ShardedAdamax, load, save
from sharded_adamax.buckets import Bucket, Precision
from sharded_adamax.collectives import LocalGroup
from sharded_adamax.gradients import ReducedGradients
from sharded_adamax.kernels import Hyper, captured, choose, cuda
from sharded_adamax.layout import ParamSpec, build
from sharded_adamax.ranges import Range
from tests.distributed.problems import assert_same_bits

FLAGS: list[dict[str, Any]] = [
    {},
    {"weight_decay": 0.1},
    {"maximize": True, "weight_decay": 0.1},
    {"betas": (0.4, 0.99), "eps": 1e-3},
    {"lr": torch.tensor(3e-3), "weight_decay": 0.1},
    {"lr": torch.tensor([3e-3], dtype=torch.float64)},
]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.complex64]
SHAPES = [(30, 20), (7,), (64,), (0,), (5, 3)]


def _gradients(step: int, params: Sequence[Tensor]) -> list[Tensor | None]:
    """One of them is missing from the second step on now and then: not all parameters are at the same step."""
    generator = torch.Generator().manual_seed(step)
    found: list[Tensor | None] = []
    for index, param in enumerate(params):
        gradient = torch.randn(param.shape, generator=generator, dtype=torch.complex128) * 10.0 ** (step % 5 - 2)
        gradient = (gradient if param.is_complex() else gradient.real).to(param.dtype)
        found.append(None if (step, index) in ((2, 0), (3, 1)) else gradient)
    return found


def _params(dtype: torch.dtype, shapes: Sequence[tuple[int, ...]] = SHAPES) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=generator, dtype=torch.complex128) for shape in shapes]
    return [nn.Parameter((value if dtype.is_complex else value.real).to(dtype)) for value in values]


@pytest.mark.usefixtures("capturable_on_cpu")
@pytest.mark.parametrize("use_foreach", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("flags", FLAGS, ids=str)
def test_parameters_and_state_have_the_bits_of_torch(
    flags: dict[str, Any], dtype: torch.dtype, use_foreach: bool
) -> None:
    # 0-d of 16 bits: torch multiplies u by a correction of 32 bits without rounding to 16 then. A piece is never 0-d.
    shapes = SHAPES if dtype == torch.bfloat16 else [*SHAPES, ()]
    ours, expected = _params(dtype, shapes), _params(dtype, shapes)
    flags = {**flags, "capturable": True, "foreach": use_foreach}
    optimizer, reference = ShardedAdamax(ours, **flags), torch.optim.Adamax(expected, **flags)
    for step in range(1, 7):
        for param, other, gradient in zip(ours, expected, _gradients(step, ours), strict=True):
            param.grad, other.grad = gradient, None if gradient is None else gradient.clone()
        optimizer.step()
        reference.step()
    full = optimizer.full_state_dict()
    assert full is not None
    for index, (param, other) in enumerate(zip(ours, expected, strict=True)):
        assert_same_bits(param, other, f"parameter {index}")
        for key, value in reference.state[other].items():
            assert_same_bits(full["state"][index][key], value, f"{key} of parameter {index}")


@pytest.mark.usefixtures("capturable_on_cpu")
def test_the_formula_is_another_than_without_the_flag() -> None:
    """Else the test above could not tell the two apart."""
    results = []
    for capturable in (False, True):
        params = _params(torch.float32)
        optimizer = ShardedAdamax(params, capturable=capturable)
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer.step()
        results.append(params[0])
    assert not torch.equal(*results)
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-6)


@pytest.mark.usefixtures("capturable_on_cpu")
def test_a_tensor_lr_is_taken_as_it_is_at_each_step() -> None:
    lr = torch.tensor(1e-3)
    ours, expected = _params(torch.float32), _params(torch.float32)
    optimizer = ShardedAdamax(ours, lr=lr, capturable=True)
    reference = torch.optim.Adamax(expected, lr=lr, capturable=True)
    of_step = Hyper.of(optimizer.param_groups[0]).lr
    assert isinstance(of_step, Tensor) and of_step.data_ptr() == lr.data_ptr()
    for step in range(1, 4):
        lr.fill_(1e-3 * step)
        for param, other in zip(ours, expected, strict=True):
            param.grad, other.grad = torch.ones_like(param), torch.ones_like(other)
        optimizer.step()
        reference.step()
    assert all(torch.equal(*pair) for pair in zip(ours, expected, strict=True))


def test_each_kernel_of_a_device_has_one_that_can_be_captured() -> None:
    on_cuda = torch.device("cuda")
    assert choose(None, on_cuda, capturable=True) is captured.foreach_
    assert choose(False, on_cuda, capturable=True) is captured.loop_
    assert choose(None, on_cuda, fused=True, capturable=True) is cuda.update_capturable_


# --- Where steps live, and what the host may do with them


def _bucket(*numels: int, capturable: bool) -> Bucket:
    params = [nn.Parameter(torch.ones(numel)) for numel in reversed(numels)]  # the last comes first
    layout = build([ParamSpec.of("p", param) for param in params], world_size=1, bucket_bytes=1 << 20)
    return Bucket(layout.buckets[0], params[::-1], 0, Precision(), capturable=capturable)


def test_neighbours_are_not_merged_and_their_steps_are_read_by_nobody() -> None:
    bucket = _bucket(100, 20, 0, 70, capturable=True)
    bucket.count_update([True] * 4)
    bucket.count_update([True, False, True, True])
    assert bucket.steps.tolist() == [2, 1, 2, 2]
    bucket.steps.fill_(2)
    runs = bucket.runs([0, 1, 2, 3], 63)
    # With their padding, all the same: vector loads of a GPU stay whole.
    assert [run.in_shard for run in runs] == [Range(0, 128), Range(128, 192), Range(192, 320)]
    places = [run.step.data_ptr() for run in runs if isinstance(run.step, Tensor)]
    assert places == [bucket.steps[slot].data_ptr() for slot in (0, 1, 3)]


def test_steps_are_on_the_device_of_the_parameters_with_the_flag_and_on_the_cpu_without() -> None:
    for capturable, device in ((True, "meta"), (False, "cpu")):
        layout = build([ParamSpec("p", (10,), torch.float32)], world_size=1, bucket_bytes=1 << 20)
        param = nn.Parameter(torch.ones(10, device="meta"))
        bucket = Bucket(layout.buckets[0], [param], 0, Precision(), capturable=capturable)
        assert bucket.steps.device.type == device
        assert bucket.steps.dtype == torch.float32


@pytest.mark.parametrize("capturing", [False, True])
def test_reduced_gradients_are_not_read_for_comparison_while_a_graph_is_captured(
    monkeypatch: pytest.MonkeyPatch, capturing: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    bucket = _bucket(10, capturable=True)
    group = LocalGroup()
    group.size = 2
    source = ReducedGradients(group)
    source.add(bucket, ["p"])
    bucket.params[0].grad = torch.ones(10)
    assert source.view().fingerprints.numel() == (0 if capturing else 8)


# --- What the flag decides


def test_on_a_cpu_the_flag_is_accepted_and_a_step_is_refused_in_torchs_words() -> None:
    param, other = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer, reference = ShardedAdamax([param], capturable=True), torch.optim.Adamax([other], capturable=True)
    param.grad, other.grad = torch.ones(3), torch.ones(3)
    with pytest.raises(AssertionError) as of_torch:
        reference.step()
    with pytest.raises(RuntimeError) as ours:
        optimizer.step()
    assert str(ours.value).startswith(str(of_torch.value))
    assert "on cpu: build ShardedAdamax with capturable=False" in str(ours.value)
    assert param.eq(1).all() and optimizer.state[param]["step"] == 0


def test_groups_that_differ_are_refused() -> None:
    first, second = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    with pytest.raises(NotImplementedError, match=r"expected capturable=False in every parameter group.* got True"):
        ShardedAdamax([{"params": [first]}, {"params": [second], "capturable": True}])
    optimizer = ShardedAdamax([first], capturable=True)
    with pytest.raises(NotImplementedError, match=r"expected capturable=True in every parameter group.* got False"):
        optimizer.add_param_group({"params": [second], "capturable": False})
    optimizer.add_param_group({"params": [second]})  # the default is the optimizer's
    assert [group["capturable"] for group in optimizer.param_groups] == [True, True]


@pytest.mark.parametrize("built_with", [False, True])
def test_the_flag_of_a_group_cannot_be_changed_later(built_with: bool) -> None:
    param = nn.Parameter(torch.ones(3))
    optimizer = ShardedAdamax([param], capturable=built_with)
    optimizer.param_groups[0]["capturable"] = not built_with
    param.grad = torch.ones(3)
    with pytest.raises(RuntimeError, match=f"has capturable={not built_with}, expected {built_with}.*`step` lives"):
        optimizer.step()


# --- State dicts and checkpoints


def _trained(build_optimizer: Callable[..., torch.optim.Optimizer], **flags: Any) -> Any:
    params = _params(torch.float32)
    optimizer = build_optimizer(params, **flags)
    for _ in range(3):
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer.step()
    return optimizer


@pytest.mark.usefixtures("capturable_on_cpu")
@pytest.mark.parametrize("saved_with", [False, True])
@pytest.mark.parametrize("of", [torch.optim.Adamax, ShardedAdamax])
def test_a_loaded_dict_brings_its_numbers_and_not_its_flag(of: Any, saved_with: bool) -> None:
    saved = _trained(of, capturable=saved_with).state_dict()
    assert saved["param_groups"][0]["capturable"] == saved_with
    ours, expected = _params(torch.float32), _params(torch.float32)
    optimizer = ShardedAdamax(ours, capturable=not saved_with)
    held = [optimizer.state[param]["step"] for param in ours]
    optimizer.load_state_dict(copy.deepcopy(saved))
    assert optimizer.param_groups[0]["capturable"] == (not saved_with)
    for param, step in zip(ours, held, strict=True):
        assert optimizer.state[param]["step"] is step, "a graph would go on with the old one"
        assert step == 3
    reference = torch.optim.Adamax(expected)
    plain = saved if of is torch.optim.Adamax else _trained(ShardedAdamax, capturable=saved_with).full_state_dict()
    reference.load_state_dict(copy.deepcopy(plain))
    reference.param_groups[0]["capturable"] = not saved_with
    for param, other in zip(ours, expected, strict=True):
        param.grad, other.grad = torch.ones_like(param), torch.ones_like(other)
    optimizer.step()
    reference.step()
    for index, (param, other) in enumerate(zip(ours, expected, strict=True)):
        assert_same_bits(param, other, f"parameter {index}")


@pytest.mark.usefixtures("capturable_on_cpu")
def test_a_checkpoint_is_loaded_into_the_tensors_that_a_graph_knows(tmp_path: Path) -> None:
    optimizers = []
    for num_steps in (3, 1):
        torch.manual_seed(0)
        model = nn.Linear(5, 3)
        optimizer = ShardedAdamax(model.named_parameters(), capturable=True)
        for step in range(num_steps):
            model(torch.full((2, 5), float(step + 1))).sum().backward()
            optimizer.step()
        if not optimizers:
            save(tmp_path / "checkpoint", model, optimizer)
        optimizers.append((model, optimizer))
    (saved_model, saved), (model, optimizer) = optimizers
    held = [optimizer.state[param]["step"] for param in model.parameters()]
    load(tmp_path / "checkpoint", model, optimizer)
    for param, other, step in zip(model.parameters(), saved_model.parameters(), held, strict=True):
        assert optimizer.state[param]["step"] is step
        assert step == saved.state[other]["step"] == 3
