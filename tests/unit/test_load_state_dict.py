"""State dicts in and out, in a world of one: torch.optim.Adamax's load here, ours load there, and training goes on."""

from __future__ import annotations

import copy
import io
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LRScheduler, OneCycleLR, StepLR
from torch.optim.optimizer import Optimizer

from sharded_adamax import ShardedAdamax
from sharded_adamax.state import STATE_KEYS, FlatShard
from tests.distributed.problems import assert_same_bits, assert_same_state, gradient, make_params

StateDict = dict[str, Any]
SAVED_STEPS = 4


def _groups(params: list[nn.Parameter], named: bool = False) -> list[dict[str, Any]]:
    owned = [(f"p{i}", param) for i, param in enumerate(params)] if named else params
    return [{"params": owned[::2]}, {"params": owned[1::2], "weight_decay": 0.3, "lr": 5e-3}]


def _ours(params: list[nn.Parameter], **options: Any) -> ShardedAdamax:
    return ShardedAdamax(_groups(params), bucket_mib=0.005, **options)


def _torchs(params: list[nn.Parameter], **options: Any) -> torch.optim.Adamax:
    return torch.optim.Adamax(_groups(params), **options)


def _train(optimizer: Optimizer, params: list[nn.Parameter], steps: range) -> None:
    for step in steps:
        for index, param in enumerate(params):
            param.grad = gradient(step, 0, index, param)
        optimizer.step()
        optimizer.zero_grad()


def _trained(
    make: Callable[..., Optimizer], dtype: torch.dtype = torch.float32, **options: Any
) -> tuple[list[nn.Parameter], Any]:
    params = make_params(dtype)
    optimizer = make(params, **options)
    _train(optimizer, params, range(SAVED_STEPS))
    return params, optimizer


def _copies(params: list[nn.Parameter]) -> list[nn.Parameter]:
    return [nn.Parameter(param.detach().clone()) for param in params]


def _through_a_file(state_dict: StateDict) -> StateDict:
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    loaded: StateDict = torch.load(file, weights_only=True)
    return loaded


def _full(optimizer: ShardedAdamax) -> StateDict:
    full = optimizer.full_state_dict()
    assert full is not None
    return full


def _state_bits(optimizer: ShardedAdamax) -> list[Tensor]:
    return [state[key].clone() for state in _full(optimizer)["state"].values() for key in ("step", *STATE_KEYS)]


# --- There and back


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_torchs_state_dict_loads_here_and_training_goes_on_to_the_same_bits(dtype: torch.dtype) -> None:
    expected, reference = _trained(_torchs, dtype)
    params = _copies(expected)
    optimizer = _ours(params, lr=0.7, eps=0.1)
    optimizer.load_state_dict(_through_a_file(reference.state_dict()))
    assert_same_state(_full(optimizer), reference)
    for group, of_torch in zip(optimizer.param_groups, reference.param_groups, strict=True):
        assert {k: v for k, v in group.items() if k != "params"} == {k: v for k, v in of_torch.items() if k != "params"}
    for either, owned in ((optimizer, params), (reference, expected)):
        _train(either, owned, range(SAVED_STEPS, SAVED_STEPS + 4))
    for index, (param, other) in enumerate(zip(params, expected, strict=True)):
        assert_same_bits(param, other, f"parameter {index}")
    assert_same_state(_full(optimizer), reference)


@pytest.mark.parametrize("taken", ["state_dict", "full_state_dict", "consolidate_state_dict"])
def test_our_state_dict_loads_into_torch_and_training_goes_on_to_the_same_bits(taken: str) -> None:
    params, optimizer = _trained(_ours)
    if taken == "consolidate_state_dict":
        optimizer.consolidate_state_dict()
    saved = _full(optimizer) if taken == "full_state_dict" else optimizer.state_dict()
    expected = _copies(params)
    reference = _torchs(expected, lr=0.7, eps=0.1)
    reference.load_state_dict(_through_a_file(saved))
    assert_same_state(_full(optimizer), reference)
    for either, owned in ((optimizer, params), (reference, expected)):
        _train(either, owned, range(SAVED_STEPS, SAVED_STEPS + 4))
    for index, (param, other) in enumerate(zip(params, expected, strict=True)):
        assert_same_bits(param, other, f"parameter {index}")


def test_a_loaded_state_is_a_copy_and_stays_in_the_buckets() -> None:
    expected, reference = _trained(_torchs)
    params = _copies(expected)
    optimizer = _ours(params)
    memory = {p: {key: optimizer.state[p][key].local.data_ptr() for key in STATE_KEYS} for p in params}
    steps = {param: optimizer.state[param]["step"] for param in params}
    loaded = copy.deepcopy(reference.state_dict())
    optimizer.load_state_dict(loaded)
    engine = optimizer._engine
    assert engine is not None
    for param in params:
        assert optimizer.state[param]["step"] is steps[param]
        for key in STATE_KEYS:
            shard = optimizer.state[param][key]
            assert isinstance(shard, FlatShard) and shard.local.data_ptr() == memory[param][key]
    assert all(torch.equal(bucket.steps, torch.full_like(bucket.steps, SAVED_STEPS)) for bucket in engine.buckets)
    for state in loaded["state"].values():  # what was given is no longer needed, and may change
        for value in state.values():
            value.fill_(99)
    loaded["param_groups"][0]["lr"] = 99
    assert_same_state(_full(optimizer), reference)
    assert optimizer.param_groups[0]["lr"] == 2e-3


def test_a_learning_rate_in_a_tensor_is_copied_too() -> None:
    saved = ShardedAdamax(make_params(torch.float32), lr=torch.tensor(0.5)).state_dict()
    optimizer = ShardedAdamax(make_params(torch.float32), lr=torch.tensor(0.25))
    optimizer.load_state_dict(saved)
    saved["param_groups"][0]["lr"].fill_(99)
    assert optimizer.param_groups[0]["lr"] == 0.5


def test_loading_leaves_what_it_was_given_as_it_was() -> None:
    _, reference = _trained(_torchs)
    given = reference.state_dict()
    del given["param_groups"][0]["maximize"]
    before = copy.deepcopy(given)
    _ours(make_params(torch.float32)).load_state_dict(given)
    assert given["param_groups"] == before["param_groups"]
    assert list(given) == list(before) and list(given["state"]) == list(before["state"])


def test_its_own_state_dict_loads_and_changes_nothing() -> None:
    _, optimizer = _trained(_ours)
    before = _state_bits(optimizer)
    optimizer.load_state_dict(optimizer.state_dict())  # source and target are the same memory
    for got, expected in zip(_state_bits(optimizer), before, strict=True):
        assert_same_bits(got, expected, "the state")


def test_a_state_of_another_dtype_is_cast_as_torch_casts_it() -> None:
    _, of_double = _trained(_torchs, torch.float64)
    params, expected = make_params(torch.float32), make_params(torch.float32)
    optimizer, reference = _ours(params), _torchs(expected)
    optimizer.load_state_dict(of_double.state_dict())
    reference.load_state_dict(of_double.state_dict())
    assert_same_state(_full(optimizer), reference)


def test_a_step_that_is_a_number_as_in_old_files_loads() -> None:
    _, reference = _trained(_torchs)
    old = copy.deepcopy(reference.state_dict())
    for state in old["state"].values():
        state["step"] = int(state["step"])
    optimizer = _ours(make_params(torch.float32))
    optimizer.load_state_dict(old)
    assert_same_state(_full(optimizer), reference)


def test_a_step_beyond_what_fp32_counts_is_kept_as_torch_keeps_it() -> None:
    _, reference = _trained(_torchs)
    saved = copy.deepcopy(reference.state_dict())
    for state in saved["state"].values():
        state["step"] = torch.tensor(2.0**24 - 2)
    expected, params = make_params(torch.float32), make_params(torch.float32)
    optimizer, reference = _ours(params), _torchs(expected)
    for either, owned in ((optimizer, params), (reference, expected)):
        either.load_state_dict(copy.deepcopy(saved))
        _train(either, owned, range(4))
    assert_same_state(_full(optimizer), reference)
    assert optimizer.state[params[0]]["step"] == 2.0**24


# --- What is missing


NEW_FLAGS = ("foreach", "maximize", "differentiable", "capturable")


def test_a_dict_of_an_older_torch_lacks_flags_and_gets_the_defaults() -> None:
    _, of_torch = _trained(_torchs)
    old = copy.deepcopy(of_torch.state_dict())
    for group in old["param_groups"]:
        for flag in NEW_FLAGS:
            del group[flag]
    params, expected = make_params(torch.float32), make_params(torch.float32)
    optimizer, reference = _ours(params), _torchs(expected)
    for either, owned in ((optimizer, params), (reference, expected)):
        either.load_state_dict(copy.deepcopy(old))
        _train(either, owned, range(2))
    for group, of_reference in zip(optimizer.param_groups, reference.param_groups, strict=True):
        assert {flag: group[flag] for flag in NEW_FLAGS} == {flag: of_reference[flag] for flag in NEW_FLAGS}
    for index, (param, other) in enumerate(zip(params, expected, strict=True)):
        assert_same_bits(param, other, f"parameter {index}")


def test_a_flag_that_an_older_dict_lacks_was_off_whatever_the_optimizer_was_built_with() -> None:
    _, of_torch = _trained(_torchs)
    old = copy.deepcopy(of_torch.state_dict())
    for group in old["param_groups"]:
        for flag in NEW_FLAGS:
            del group[flag]
    optimizer = _ours(make_params(torch.float32), maximize=True, foreach=True)
    reference = _torchs(make_params(torch.float32), maximize=True, foreach=True)
    for either in (optimizer, reference):
        either.load_state_dict(copy.deepcopy(old))
    for group, of_reference in zip(optimizer.param_groups, reference.param_groups, strict=True):
        assert {flag: group[flag] for flag in NEW_FLAGS} == {flag: of_reference[flag] for flag in NEW_FLAGS}


@pytest.mark.parametrize("flag", ["differentiable", "capturable"])
def test_a_flag_that_the_constructor_refuses_is_not_loaded_in_silence(flag: str) -> None:
    of_torch = torch.optim.Adamax([{"params": make_params(torch.float32), flag: True}])
    optimizer = ShardedAdamax(make_params(torch.float32))
    try:
        optimizer.load_state_dict(of_torch.state_dict())
    except NotImplementedError:
        return
    assert not optimizer.param_groups[0][flag]


def test_a_parameter_without_a_state_starts_again_at_zero() -> None:
    """Torch makes its state at the next step, from nothing: zeros."""
    _, of_torch = _trained(_torchs)
    saved = copy.deepcopy(of_torch.state_dict())
    del saved["state"][3], saved["state"][6]
    (params, optimizer), (expected, reference) = _trained(_ours), _trained(_torchs)
    optimizer.load_state_dict(saved)
    reference.load_state_dict(copy.deepcopy(saved))
    without = [param for param in params if optimizer.state[param]["step"] == 0]
    ordered = [param for group in optimizer.param_groups for param in group["params"]]
    assert {id(param) for param in without} == {id(ordered[3]), id(ordered[6])}
    assert all(not optimizer.state[param][key].any() for param in without for key in STATE_KEYS)
    for either, owned in ((optimizer, params), (reference, expected)):
        _train(either, owned, range(SAVED_STEPS, SAVED_STEPS + 3))
    for index, (param, other) in enumerate(zip(params, expected, strict=True)):
        assert_same_bits(param, other, f"parameter {index}")
    assert_same_state(_full(optimizer), reference)


def test_the_dict_of_an_adamax_that_never_stepped_resets_everything() -> None:
    _, optimizer = _trained(_ours)
    optimizer.load_state_dict(_torchs(make_params(torch.float32), lr=0.25).state_dict())
    assert not any(value.any() for value in _state_bits(optimizer))
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 5e-3]


# --- What is refused, with nothing changed


def _one_group(saved: StateDict) -> None:
    saved["param_groups"] = saved["param_groups"][:1]


def _three_groups(saved: StateDict) -> None:
    saved["param_groups"].append({**saved["param_groups"][0], "params": []})


def _one_parameter_less(saved: StateDict) -> None:
    saved["param_groups"][1]["params"].pop()


def _one_parameter_more(saved: StateDict) -> None:
    saved["param_groups"][0]["params"].append(99)


IN_TORCHS_WORDS = [_one_group, _three_groups, _one_parameter_less, _one_parameter_more]


def _adam(saved: StateDict) -> None:
    for state in saved["state"].values():
        state["exp_avg_sq"] = state.pop("exp_inf")


def _sgd(saved: StateDict) -> None:
    for state in saved["state"].values():
        state.clear()
        state["momentum_buffer"] = torch.ones(3)


def _no_step(saved: StateDict) -> None:
    del saved["state"][4]["step"]


def _wrong_shape(saved: StateDict) -> None:
    saved["state"][7]["exp_inf"] = torch.ones(7, 9)


def _same_size_other_shape(saved: StateDict) -> None:
    saved["state"][2]["exp_avg"] = saved["state"][2]["exp_avg"].t().contiguous()


# In the order of the groups: parameters 0, 2, 4, 6, 8, then 1, 3, 5, 7, 9 of problems.SHAPES.
IN_OUR_WORDS: dict[Callable[[StateDict], None], str] = {
    _adam: r"^the state of parameter 0 of group 0 lacks exp_inf; it has step, exp_avg, exp_avg_sq\. Expected .*Adamax",
    _sgd: r"^the state of parameter 0 of group 0 lacks step, exp_avg, exp_inf; it has momentum_buffer\. Expected ",
    _no_step: r"^the state of parameter 4 of group 0 lacks step; it has exp_avg, exp_inf\.",
    _wrong_shape: r"^exp_inf of parameter 2 of group 1: expected shape \(64,\), got \(7, 9\)$",
    _same_size_other_shape: r"^exp_avg of parameter 2 of group 0: expected shape \(5, 13\), got \(13, 5\)$",
}


def _assert_refused_and_unchanged(saved: StateDict, optimizer: ShardedAdamax) -> ValueError:
    groups = copy.deepcopy(optimizer.state_dict()["param_groups"])
    state = _state_bits(optimizer)
    objects = [id(group) for group in optimizer.param_groups]
    for group in saved["param_groups"]:
        group["lr"] = 99.0
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the caller looks at the text
        optimizer.load_state_dict(saved)
    assert optimizer.state_dict()["param_groups"] == groups
    assert [id(group) for group in optimizer.param_groups] == objects
    for got, expected in zip(_state_bits(optimizer), state, strict=True):
        assert_same_bits(got, expected, "the state after a refused load")
    return caught.value


@pytest.mark.parametrize("damage", IN_TORCHS_WORDS)
def test_groups_that_do_not_fit_are_refused_in_torchs_words(damage: Callable[[StateDict], None]) -> None:
    _, reference = _trained(_torchs)
    saved = copy.deepcopy(reference.state_dict())
    damage(saved)
    with pytest.raises(ValueError) as of_torch:  # noqa: PT011 - the text is compared below
        _torchs(make_params(torch.float32)).load_state_dict(copy.deepcopy(saved))
    _, optimizer = _trained(_ours)
    _train(optimizer, optimizer.param_groups[0]["params"], range(1))
    assert str(_assert_refused_and_unchanged(saved, optimizer)) == str(of_torch.value)


@pytest.mark.parametrize("damage", IN_OUR_WORDS)
def test_a_state_that_does_not_fit_is_refused_by_name(damage: Callable[[StateDict], None]) -> None:
    _, reference = _trained(_torchs)
    saved = copy.deepcopy(reference.state_dict())
    damage(saved)
    _, optimizer = _trained(_ours)
    _train(optimizer, optimizer.param_groups[0]["params"], range(1))
    assert re.search(IN_OUR_WORDS[damage], str(_assert_refused_and_unchanged(saved, optimizer)))


def test_a_real_adam_state_dict_is_refused_naming_what_is_missing() -> None:
    params = make_params(torch.float32)
    adam = torch.optim.Adam(_groups(params))
    _train(adam, params, range(2))
    _, optimizer = _trained(_ours)
    error = _assert_refused_and_unchanged(copy.deepcopy(adam.state_dict()), optimizer)
    assert "lacks exp_inf" in str(error) and "exp_avg_sq" in str(error)


def test_names_are_in_the_message_where_there_are_names() -> None:
    params = make_params(torch.float32)
    optimizer = ShardedAdamax(_groups(params, named=True))
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][8]["exp_avg"] = torch.ones(2)
    with pytest.raises(ValueError, match=r"^exp_avg of p7: expected shape \(129, 33\), got \(2,\)$"):
        optimizer.load_state_dict(saved)


def test_a_state_for_a_frozen_parameter_is_refused_by_name() -> None:
    _, reference = _trained(_torchs)
    params = make_params(torch.float32)
    params[2].requires_grad_(False)
    optimizer = _ours(params)
    error = _assert_refused_and_unchanged(copy.deepcopy(reference.state_dict()), optimizer)
    assert "got a state for parameter 1 of group 0, which is frozen" in str(error)


def test_a_frozen_parameter_without_a_state_loads() -> None:
    params, expected = make_params(torch.float32), make_params(torch.float32)
    for either in (params, expected):
        either[2].requires_grad_(False)
    reference = _torchs(expected)
    for param in expected:
        param.grad = gradient(0, 0, 0, param) if param.requires_grad else None
    reference.step()
    optimizer = _ours(params)
    optimizer.load_state_dict(reference.state_dict())
    assert_same_state(_full(optimizer), reference)


# --- Hooks, names, groups


def test_hooks_fire_once_in_order_and_the_pre_hook_may_replace_the_dict() -> None:
    _, reference = _trained(_torchs)
    optimizer = _ours(make_params(torch.float32))
    fired: list[str] = []
    given: StateDict = {}

    def replace(owner: Optimizer, state_dict: StateDict) -> StateDict:
        assert owner is optimizer
        assert state_dict == given and state_dict is not given, "a shallow copy, as torch hands over"
        assert all(state["step"] == 0 for state in optimizer.state.values())
        fired.append("pre")
        replacement: StateDict = reference.state_dict()
        return replacement

    def change(owner: Optimizer, state_dict: StateDict) -> None:
        state_dict["param_groups"][0]["lr"] = 0.125
        fired.append("second pre")

    def after(owner: Optimizer) -> None:
        assert owner is optimizer
        assert all(state["step"] == SAVED_STEPS for state in optimizer.state.values())
        fired.append("post")

    optimizer.register_load_state_dict_pre_hook(replace)
    optimizer.register_load_state_dict_pre_hook(change)
    optimizer.register_load_state_dict_post_hook(after)
    optimizer.load_state_dict(given)
    assert fired == ["pre", "second pre", "post"]
    assert_same_state(_full(optimizer), reference)
    assert optimizer.param_groups[0]["lr"] == 0.125


@pytest.mark.parametrize("ours_named", [True, False])
@pytest.mark.parametrize("theirs_named", [True, False])
def test_param_names_end_as_in_torch(ours_named: bool, theirs_named: bool) -> None:
    saved = torch.optim.Adamax(_groups(make_params(torch.float32), theirs_named)).state_dict()
    for group in saved["param_groups"]:
        if theirs_named:
            group["param_names"] = [f"other.{name}" for name in group["param_names"]]
    found = []
    for adamax in (torch.optim.Adamax, ShardedAdamax):
        optimizer = adamax(_groups(make_params(torch.float32), ours_named))
        optimizer.load_state_dict(saved)
        found.append([group.get("param_names") for group in optimizer.param_groups])
    assert found[0] == found[1]


def test_entries_that_others_put_into_a_group_are_kept() -> None:
    saved = _torchs(make_params(torch.float32)).state_dict()
    saved["param_groups"][0]["lr_scale"] = 0.1
    optimizer = _ours(make_params(torch.float32))
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["lr_scale"] == 0.1 and "lr_scale" not in optimizer.param_groups[1]


def test_the_groups_stay_the_same_objects_with_the_same_parameters() -> None:
    params = make_params(torch.float32)
    optimizer = _ours(params)
    groups, first = optimizer.param_groups, optimizer.param_groups[0]
    owned = [list(group["params"]) for group in groups]
    optimizer.load_state_dict(_torchs(make_params(torch.float32), lr=0.5).state_dict())
    assert optimizer.param_groups is groups and optimizer.param_groups[0] is first
    assert first["lr"] == 0.5
    for group, before in zip(groups, owned, strict=True):
        assert all(param is other for param, other in zip(group["params"], before, strict=True))
    first["lr"] = 0.0  # whoever holds the dict still steers the optimizer
    before_step = params[0].detach().clone()
    _train(optimizer, params, range(1))
    assert_same_bits(params[0], before_step, "a parameter whose group has lr 0")


SCHEDULERS: dict[str, Callable[[Optimizer], LRScheduler]] = {
    "cosine": lambda optimizer: CosineAnnealingLR(optimizer, T_max=10),
    "step": lambda optimizer: StepLR(optimizer, step_size=2, gamma=0.5),
    "lambda": lambda optimizer: LambdaLR(optimizer, lambda step: 1 / (1 + step)),
    "one cycle": lambda optimizer: OneCycleLR(optimizer, max_lr=[0.1, 0.05], total_steps=30),
}


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("saved_by", [_ours, _torchs])
@pytest.mark.parametrize("load_first", [True, False])
def test_schedulers_go_on_after_a_load_as_with_adamax(
    name: str, saved_by: Callable[..., Optimizer], load_first: bool
) -> None:
    """The scheduler is made before the load, as most programs do, or after it."""
    params = make_params(torch.float32)
    writer = saved_by(params)
    of_writer = SCHEDULERS[name](writer)
    for step in range(SAVED_STEPS):
        _train(writer, params, range(step, step + 1))
        of_writer.step()
    saved = writer.state_dict(), of_writer.state_dict()

    found: list[list[list[float]]] = []
    ends: list[list[nn.Parameter]] = []
    for make in (_torchs, _ours):
        resumed = _copies(params)
        optimizer = make(resumed, lr=0.3)
        of_optimizer, of_scheduler = copy.deepcopy(saved)  # torch goes on in the very tensors that it loads
        if load_first:
            optimizer.load_state_dict(of_optimizer)
            scheduler = SCHEDULERS[name](optimizer)
        else:
            scheduler = SCHEDULERS[name](optimizer)
            optimizer.load_state_dict(of_optimizer)
        scheduler.load_state_dict(of_scheduler)
        rates = []
        for step in range(SAVED_STEPS, SAVED_STEPS + 6):
            _train(optimizer, resumed, range(step, step + 1))
            scheduler.step()
            rates.append([float(group["lr"]) for group in optimizer.param_groups])
        found.append(rates)
        ends.append(resumed)
    assert found[0] == found[1]
    assert len({tuple(rates) for rates in found[0]}) > 1, "the scheduler must do something"
    for index, (param, expected) in enumerate(zip(ends[1], ends[0], strict=True)):
        assert_same_bits(param, expected, f"parameter {index}")


def test_a_scheduler_that_was_running_keeps_steering_after_a_rewind() -> None:
    """Save, go on, load the save into the same optimizer: the scheduler that holds it must still reach the groups."""
    found = []
    for make in (_torchs, _ours):
        params = make_params(torch.float32)
        optimizer = make(params)
        scheduler = CosineAnnealingLR(optimizer, T_max=10)
        rates: list[list[float]] = []

        def advance(
            steps: int,
            optimizer: Optimizer = optimizer,
            params: list[nn.Parameter] = params,
            scheduler: LRScheduler = scheduler,
            rates: list[list[float]] = rates,
        ) -> None:
            for _ in range(steps):
                _train(optimizer, params, range(1))
                scheduler.step()
                rates.append([float(group["lr"]) for group in optimizer.param_groups])

        advance(3)
        saved = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(scheduler.state_dict())
        advance(3)
        optimizer.load_state_dict(saved[0])
        scheduler.load_state_dict(saved[1])
        advance(4)
        found.append(rates)
    assert found[0] == found[1]
    assert found[1][3:6] == found[1][6:9]
