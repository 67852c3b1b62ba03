"""Bad input, in a world of one: torch's own errors word for word, and ours, which name the argument and the remedy."""

from __future__ import annotations

import copy
import inspect
import math
import pickle
import types
import warnings
from collections.abc import Callable
from functools import partial
from inspect import Parameter as Argument
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms.join import Join

from sharded_adamax import ShardedAdamax, arguments
from tests.distributed.problems import assert_same_bits

Outcome = tuple[str, str]
NOTHING_RAISED: Outcome = ("nothing raised", "")


def _param(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.ones(shape))


def _outcome(action: Callable[[], object]) -> Outcome:
    """Return type and text of what ``action`` raises."""
    try:
        action()
    except Exception as error:
        return type(error).__name__, str(error)
    return NOTHING_RAISED


def _tied_across_groups(adamax: Any) -> Any:
    shared = _param(3)
    return adamax([{"params": [shared]}, {"params": [_param(2), shared]}])


# Each takes the class, torch's or ours, and builds its own parameters.
REFUSED_BY_TORCH: dict[str, Callable[[Any], Any]] = {
    "empty list": lambda adamax: adamax([]),
    "empty generator": lambda adamax: adamax(iter([])),
    "no iterable": lambda adamax: adamax(3),
    "bare tensor": lambda adamax: adamax(torch.ones(3)),
    "bare parameter": lambda adamax: adamax(_param(3)),
    "non-leaf": lambda adamax: adamax([_param(3) * 2]),
    "non-leaf in a group": lambda adamax: adamax([{"params": [_param(3), _param(3) * 2]}]),
    "not a tensor": lambda adamax: adamax([_param(3), 1.0]),
    "dict of tensors": lambda adamax: adamax({"weight": _param(3)}),
    "tied across groups": _tied_across_groups,
    "set in a group": lambda adamax: adamax([{"params": {_param(3), _param(2)}}]),
    "second group not a dict": lambda adamax: adamax([{"params": [_param(3)]}, [_param(2)]]),
    "group without params": lambda adamax: adamax([{"lr": 1.0}]),
    "lr negative": lambda adamax: adamax([_param(3)], lr=-1.0),
    "lr nan": lambda adamax: adamax([_param(3)], lr=math.nan),
    "lr text": lambda adamax: adamax([_param(3)], lr="1e-3"),
    "lr tensor of two": lambda adamax: adamax([_param(3)], lr=torch.tensor([1e-3, 1e-2])),
    "lr tensor of none": lambda adamax: adamax([_param(3)], lr=torch.tensor([])),
    "lr tensor negative": lambda adamax: adamax([_param(3)], lr=torch.tensor(-1e-3)),
    "eps negative": lambda adamax: adamax([_param(3)], eps=-1e-8),
    "eps nan": lambda adamax: adamax([_param(3)], eps=math.nan),
    "beta1 one": lambda adamax: adamax([_param(3)], betas=(1.0, 0.999)),
    "beta1 negative": lambda adamax: adamax([_param(3)], betas=(-0.1, 0.999)),
    "beta2 one": lambda adamax: adamax([_param(3)], betas=(0.9, 1.0)),
    "beta2 negative": lambda adamax: adamax([_param(3)], betas=(0.9, -0.1)),
    "one beta": lambda adamax: adamax([_param(3)], betas=(0.9,)),
    "betas a number": lambda adamax: adamax([_param(3)], betas=0.9),
    "weight_decay negative": lambda adamax: adamax([_param(3)], weight_decay=-0.1),
    "weight_decay nan": lambda adamax: adamax([_param(3)], weight_decay=math.nan),
    "half-named": lambda adamax: adamax([("weight", _param(3)), _param(2)]),
    "named and unnamed groups": lambda adamax: adamax([{"params": [("w", _param(3))]}, {"params": [_param(2)]}]),
    "unknown argument": lambda adamax: adamax([_param(3)], momentum=0.9),
    "too many in order": lambda adamax: adamax([_param(3)], 1e-3, (0.9, 0.99), 1e-8, 0, None, True),
}


@pytest.mark.parametrize("case", REFUSED_BY_TORCH)
def test_what_torch_refuses_is_refused_in_torchs_words(case: str) -> None:
    build = REFUSED_BY_TORCH[case]
    expected = _outcome(lambda: build(torch.optim.Adamax))
    assert expected != NOTHING_RAISED, "the case is none"
    # Python names the function in its own complaint about arguments.
    got = tuple(text.replace("ShardedAdamax", "Adamax") for text in _outcome(lambda: build(ShardedAdamax)))
    if case == "too many in order":  # Python counts self and the defaults, nothing else differs
        assert got[0] == expected[0] == "TypeError"
        assert "takes from 2 to 7 positional arguments" in got[1]
        assert "takes from 2 to 7 positional arguments" in expected[1]
    else:
        assert got == expected


ADDED_GROUPS: dict[str, Callable[[nn.Parameter], Any]] = {
    "not a dict": lambda owned: [_param(2)],
    "no params": lambda owned: {},
    "set": lambda owned: {"params": {_param(2)}},
    "owned already": lambda owned: {"params": [_param(2), owned]},
    "not a tensor": lambda owned: {"params": [_param(2), "bias"]},
    "non-leaf": lambda owned: {"params": [_param(2) + 1]},
    "named beside unnamed": lambda owned: {"params": [("bias", _param(2))]},
}


@pytest.mark.parametrize("case", ADDED_GROUPS)
def test_a_group_that_torch_refuses_is_refused_in_its_words_and_not_added(case: str) -> None:
    outcomes = []
    for adamax in (torch.optim.Adamax, ShardedAdamax):
        param = _param(3)
        optimizer = adamax([param])
        bad = ADDED_GROUPS[case](param)
        outcomes.append(_outcome(partial(optimizer.add_param_group, bad)))
        assert len(optimizer.param_groups) == 1
        param.grad = torch.ones(3)
        optimizer.step()
    assert outcomes[0] == outcomes[1] != NOTHING_RAISED


@pytest.mark.parametrize("bad", [{"differentiable": True}, {"capturable": True}], ids=str)
def test_a_group_that_only_we_refuse_is_not_added_either(bad: dict[str, Any]) -> None:
    optimizer = ShardedAdamax([_param(3)])
    added = _param(2)
    address = added.data_ptr()
    with pytest.raises(NotImplementedError, match=next(iter(bad))):
        optimizer.add_param_group({"params": [added], **bad})
    assert len(optimizer.param_groups) == 1 and added not in optimizer.state
    assert added.data_ptr() == address


def test_duplicates_in_a_group_warn_in_torchs_words() -> None:
    texts = []
    for adamax in (torch.optim.Adamax, ShardedAdamax):
        param = _param(3)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            adamax([param, _param(2), param])
        texts.append([(warning.category, str(warning.message)) for warning in caught])
    assert texts[0] == texts[1]
    assert len(texts[0]) == 1 and "duplicate parameters" in texts[0][0][1]


def test_a_refused_construction_leaves_the_parameters_alone() -> None:
    model = nn.Linear(3, 2)
    addresses = [param.data_ptr() for param in model.parameters()]
    refused: list[dict[str, Any]] = [{"lr": -1.0}, {"differentiable": True}, {"state_format": "x"}, {"bucket_mib": 0}]
    for bad in refused:
        assert _outcome(partial(ShardedAdamax, model.parameters(), **bad)) != NOTHING_RAISED
    assert [param.data_ptr() for param in model.parameters()] == addresses
    model(torch.ones(1, 3)).sum().backward()
    assert all(param.grad is not None for param in model.parameters()), "no hook may be left behind"


def test_differentiable_is_refused_with_the_reason() -> None:
    with pytest.raises(
        NotImplementedError, match=r"differentiable=True is not supported: autograd cannot follow .*reduce-"
    ):
        ShardedAdamax([_param(3)], differentiable=True)
    with pytest.raises(NotImplementedError, match="differentiable=True"):
        ShardedAdamax([{"params": [_param(3)], "differentiable": True}])


def test_fused_and_foreach_together_are_refused_in_torchs_words() -> None:
    with pytest.raises(RuntimeError) as of_torch:
        torch.optim.Adam([_param(3)], fused=True, foreach=True)
    with pytest.raises(RuntimeError) as ours:
        ShardedAdamax([_param(3)], fused=True, foreach=True)
    assert str(ours.value) == str(of_torch.value)
    optimizer = ShardedAdamax([_param(3)], fused=True)
    with pytest.raises(RuntimeError, match="cannot be `True` together"):
        optimizer.add_param_group({"params": [_param(3)], "foreach": True})
    assert len(optimizer.param_groups) == 1


NOT_YET: dict[str, Any] = {
    "state_format": "compact",
}


@pytest.mark.parametrize("name", NOT_YET)
def test_an_argument_that_comes_later_is_named(name: str) -> None:
    with pytest.raises(NotImplementedError, match=rf"^{name}={NOT_YET[name]!r} is not implemented yet: expected "):
        ShardedAdamax([_param(3)], **{name: NOT_YET[name]})


def test_the_value_without_effect_of_an_argument_that_comes_later_is_accepted() -> None:
    nothing: dict[str, Any] = {"fused": False, "capturable": False, "reduce_dtype": None, "state_format": "full"}
    ShardedAdamax([_param(3)], master_dtype=None, differentiable=False, **nothing)


def test_a_mesh_of_two_dimensions_comes_later_and_a_mesh_beside_a_group_never() -> None:
    # A DeviceMesh needs a process group, which a unit test does not have; only its dimensions are looked at.
    mesh = cast(Any, types.SimpleNamespace(ndim=2))
    with pytest.raises(NotImplementedError, match="mesh with 2 dimensions is not implemented yet: expected a 1-D mesh"):
        ShardedAdamax([_param(3)], mesh=mesh)
    with pytest.raises(ValueError, match="process_group or mesh, got both"):
        ShardedAdamax([_param(3)], mesh=mesh, process_group=cast(Any, object()))


def test_a_process_group_without_torch_distributed_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"process_group was given, but torch\.distributed is not initialised.*init_distributed"
    ):
        ShardedAdamax([_param(3)], process_group=cast(Any, object()))


@pytest.mark.parametrize("bucket_mib", [0, -1, -0.5, math.nan])
def test_a_bucket_of_no_size_is_refused(bucket_mib: float) -> None:
    with pytest.raises(ValueError, match=f"expected bucket_mib > 0, got {bucket_mib}"):
        ShardedAdamax([_param(3)], bucket_mib=bucket_mib)


@pytest.mark.parametrize("bucket_mib", [math.inf, 1e-9])
def test_a_bucket_of_no_sensible_size_is_refused_by_name(bucket_mib: float) -> None:
    with pytest.raises(ValueError, match="bucket_mib"):
        ShardedAdamax([_param(3)], bucket_mib=bucket_mib)


def test_groups_without_parameters_are_accepted_as_torch_accepts_them() -> None:
    torch.optim.Adamax([{"params": []}]).step()
    optimizer = ShardedAdamax([{"params": []}])
    optimizer.step()
    param = _param(3)
    optimizer.add_param_group({"params": [param]})
    param.grad = torch.ones(3)
    optimizer.step()
    assert optimizer.state[param]["step"] == 1


def test_reduce_dtype_cannot_carry_a_complex_parameter() -> None:
    params = [("weight", _param(3)), ("spectrum", nn.Parameter(torch.ones(2, dtype=torch.complex64)))]
    with pytest.raises(ValueError, match=r"spectrum is complex \(torch\.complex64\): reduce_dtype=torch\.float32"):
        ShardedAdamax(params, reduce_dtype=torch.float32)
    optimizer = ShardedAdamax(params[:1], reduce_dtype=torch.float32)
    with pytest.raises(ValueError, match="spectrum is complex"):
        optimizer.add_param_group({"params": params[1:]})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.complex64, torch.float8_e4m3fn, "float32"], ids=str)
def test_a_reduce_dtype_that_gradients_cannot_be_summed_in_is_refused(dtype: Any) -> None:
    with pytest.raises(ValueError, match=rf"expected reduce_dtype to be .* or float64, got {dtype}"):
        ShardedAdamax([_param(3)], reduce_dtype=dtype)


def test_a_reduce_dtype_without_a_reduction_is_refused() -> None:
    with pytest.raises(ValueError, match=r"reduce_dtype=torch\.float32 has no effect with reduce_gradients=False"):
        ShardedAdamax([_param(3)], reduce_dtype=torch.float32, reduce_gradients=False)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_a_master_of_another_dtype_than_float32_is_refused(dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=rf"expected master_dtype to be None or torch\.float32, got {dtype}"):
        ShardedAdamax([_param(3)], master_dtype=dtype)


@pytest.mark.parametrize("limit", [0, -1.0, math.nan])
def test_a_norm_limit_that_no_norm_is_below_is_refused(limit: float) -> None:
    optimizer = ShardedAdamax([_param(3)])
    with pytest.raises(ValueError, match=f"expected skip_grad_norm_above to be None or > 0, got {limit}"):
        optimizer.skip_grad_norm_above = limit
    assert optimizer.skip_grad_norm_above is None


def test_pickling_and_copying_are_refused_with_what_to_do_instead() -> None:
    optimizer = ShardedAdamax([_param(3)])
    for attempt in (pickle.dumps, copy.deepcopy, copy.copy):
        with pytest.raises(TypeError, match=r"cannot be pickled or deep-copied: .* full_state_dict\(\)"):
            attempt(optimizer)


def test_join_is_refused_with_what_to_do_instead() -> None:
    with pytest.raises(NotImplementedError, match=r"Join is not supported: .*step\(\) and zero_grad\(\)"):
        Join([cast(Any, ShardedAdamax([_param(3)]))])


@pytest.mark.parametrize(
    ("bad", "told"),
    [
        (torch.ones(2, 2, device="meta"), "layout torch.strided on meta"),
        (torch.ones(2, 2).to_sparse(), "layout torch.sparse_coo on cpu"),
    ],
    ids=["meta", "sparse"],
)
def test_a_parameter_without_dense_storage_is_named(bad: Tensor, told: str) -> None:
    with pytest.raises(ValueError, match=f"weight: expected a dense tensor with storage, got {told}"):
        ShardedAdamax([("bias", _param(3)), ("weight", nn.Parameter(bad))])


class _Sharded(Tensor):
    """Stands for a DTensor."""


def test_a_parameter_that_is_no_plain_tensor_is_named() -> None:
    sharded = nn.Parameter(torch.ones(3).as_subclass(_Sharded))
    with pytest.raises(NotImplementedError, match=r"weight is a _Sharded: expected a plain tensor.*FSDP2"):
        ShardedAdamax([("weight", sharded)])


def test_parameters_on_two_devices_are_named() -> None:
    groups = [{"params": [_param(3)]}, {"params": [nn.Parameter(torch.ones(3, device="meta"))]}]
    with pytest.raises(ValueError, match="parameter 0 of group 0 on cpu and parameter 0 of group 1 on meta"):
        arguments.common_device(groups)
    assert arguments.common_device(groups[:1]) == torch.device("cpu")


def _halves(storage: Tensor) -> list[nn.Parameter]:
    return [nn.Parameter(storage[:6]), nn.Parameter(storage[5:])]


def _the_same(storage: Tensor) -> list[nn.Parameter]:
    return [nn.Parameter(storage.view(2, 5)), nn.Parameter(storage)]


def _one_inside(storage: Tensor) -> list[nn.Parameter]:
    return [nn.Parameter(storage), nn.Parameter(storage[4])]


@pytest.mark.parametrize("make", [_halves, _the_same, _one_inside])
@pytest.mark.parametrize("turned", [False, True])
def test_parameters_that_share_memory_are_named(make: Callable[[Tensor], list[nn.Parameter]], turned: bool) -> None:
    named = [("other", _param(7)), *zip(("one", "two"), make(torch.ones(10)), strict=True)]
    with pytest.raises(
        ValueError, match=r"(one and two|two and one) share memory .*one Parameter object in both places"
    ):
        ShardedAdamax(named[::-1] if turned else named)


def test_an_added_parameter_that_shares_memory_with_an_owned_one_is_named_and_not_added() -> None:
    model = nn.Linear(3, 2)
    optimizer = ShardedAdamax(model.named_parameters())
    with pytest.raises(ValueError, match="weight and row share memory"):
        optimizer.add_param_group({"params": [("row", nn.Parameter(model.weight.data[1]))]})
    assert len(optimizer.param_groups) == 1
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()


def test_neighbours_in_one_storage_share_nothing() -> None:
    storage = torch.arange(10.0)
    params = [nn.Parameter(storage[:5]), nn.Parameter(storage[5:]), nn.Parameter(storage[5:5])]
    ShardedAdamax(params)
    assert torch.equal(torch.cat([param.detach() for param in params]), torch.arange(10.0))


class _Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 3)
        self.head = nn.Linear(3, 7)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return cast(Tensor, self.head(self.embedding(tokens)))


def test_a_parameter_in_two_places_of_a_model_is_one_parameter() -> None:
    model, expected = _Tied(), _Tied()
    expected.load_state_dict(model.state_dict())
    optimizer, reference = ShardedAdamax(model.parameters()), torch.optim.Adamax(expected.parameters())
    for _ in range(3):
        for net, either in ((model, optimizer), (expected, reference)):
            net(torch.arange(7)).square().sum().backward()
            either.step()
            either.zero_grad()
    assert model.head.weight is model.embedding.weight
    for (name, param), other in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert_same_bits(param, other, name)


def _cast_model(model: nn.Linear) -> None:
    model.double()


def _replace_data(model: nn.Linear) -> None:
    model.weight.data = model.weight.data.clone()


def _transpose_data(model: nn.Linear) -> None:
    model.weight.data = model.weight.data.t()


MOVES = {"model.double()": _cast_model, "data = clone": _replace_data, "data = t()": _transpose_data}


@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize("reduce_gradients", [True, False])
@pytest.mark.parametrize("moved", ["before backward", "after backward"])
def test_a_moved_parameter_is_named_at_the_next_step_and_nothing_changes(
    move: str, reduce_gradients: bool, moved: str
) -> None:
    model = nn.Linear(4, 4)  # square: transposed, only the strides tell
    optimizer = ShardedAdamax(model.named_parameters(), reduce_gradients=reduce_gradients, lr=0.1)
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    original = [param.data for param in model.parameters()]

    def run_backward() -> None:
        model(torch.ones(1, 4, dtype=model.weight.dtype)).sum().backward()

    if moved == "after backward":
        run_backward()
    MOVES[move](model)
    if moved == "before backward":
        run_backward()
    before = [param.detach().clone() for param in model.parameters()]
    state = [{key: value.clone() for key, value in optimizer.state[p].items()} for p in model.parameters()]
    with pytest.raises(
        RuntimeError, match=r"rank 0: (weight|bias) is no longer the tensor that ShardedAdamax manages.*copy_"
    ):
        optimizer.step()
    for param, old, old_state in zip(model.parameters(), before, state, strict=True):
        assert_same_bits(param, old, "a parameter")
        for key, value in old_state.items():
            assert torch.equal(optimizer.state[param][key], value), key

    # Given its view back, it goes on as if nothing had been tried.
    for param, view in zip(model.parameters(), original, strict=True):
        param.grad = None
        param.data = view
    expected = nn.Linear(4, 4)
    expected.load_state_dict(model.state_dict())
    reference = torch.optim.Adamax(expected.parameters(), lr=0.1)
    plain = optimizer.full_state_dict()
    assert plain is not None
    reference.load_state_dict(plain)
    for net, either in ((model, optimizer), (expected, reference)):
        net(torch.ones(1, 4)).sum().backward()
        either.step()
    for param, other in zip(model.parameters(), expected.parameters(), strict=True):
        assert_same_bits(param, other, "a parameter")


def test_a_moved_parameter_is_named_also_where_it_has_no_gradient() -> None:
    model = nn.Linear(3, 2)
    optimizer = ShardedAdamax(model.named_parameters())
    model.bias.data = model.bias.data.clone()
    with pytest.raises(RuntimeError, match="rank 0: bias is no longer the tensor"):
        optimizer.step()


@pytest.mark.parametrize(
    "reduce_gradients",
    [True, False],
)
def test_a_parameter_that_lost_its_end_is_named_where_only_the_shape_tells(reduce_gradients: bool) -> None:
    param = _param(6, 3)
    optimizer = ShardedAdamax([("table", param)], reduce_gradients=reduce_gradients)
    param.data = param.data[:2]  # the same address and strides
    torch.autograd.backward(param.sum())
    with pytest.raises(RuntimeError, match="rank 0: table is no longer the tensor"):
        optimizer.step()


def test_a_gradient_of_another_shape_is_no_error_before_the_step_where_all_ranks_can_raise_together() -> None:
    param = _param(6, 3)
    optimizer = ShardedAdamax([param])
    param.data = param.data[:2]
    torch.autograd.backward(param.sum())
    with pytest.raises(RuntimeError):
        optimizer.step()


def test_values_changed_in_place_are_no_move() -> None:
    model = nn.Linear(3, 2)
    optimizer = ShardedAdamax(model.named_parameters())
    with torch.no_grad():
        model.weight.copy_(torch.ones(2, 3))
    model.load_state_dict({"weight": torch.zeros(2, 3), "bias": torch.ones(2)})
    model.to(torch.float32)
    model.weight.data = model.weight.data[:]  # another tensor, the same view
    optimizer.step()
    assert torch.equal(model.bias, torch.ones(2))


@pytest.mark.parametrize("reduce_gradients", [True, False])
def test_a_sparse_gradient_is_refused_in_torchs_words_and_nothing_changes(reduce_gradients: bool) -> None:
    outcomes = []
    classes: list[Callable[..., torch.optim.Optimizer]] = [
        torch.optim.Adamax,
        partial(ShardedAdamax, reduce_gradients=reduce_gradients),
    ]
    for adamax in classes:
        embedding, linear = nn.Embedding(5, 3, sparse=True), nn.Linear(3, 2)
        params = [*linear.parameters(), *embedding.parameters()]
        optimizer = adamax(params)
        linear(embedding(torch.tensor([1, 2]))).sum().backward()
        before = [param.detach().clone() for param in params]
        outcomes.append(_outcome(optimizer.step))
        for param, old in zip(params, before, strict=True):
            assert_same_bits(param, old, "a parameter")
    assert outcomes[0] == outcomes[1] == ("RuntimeError", "Adamax does not support sparse gradients")


def test_after_a_refused_sparse_gradient_training_goes_on() -> None:
    embedding = nn.Embedding(5, 3, sparse=True)
    optimizer = ShardedAdamax(embedding.parameters(), lr=0.1)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()
    optimizer.zero_grad()
    embedding.sparse = False
    expected = nn.Parameter(embedding.weight.detach().clone())
    reference = torch.optim.Adamax([expected], lr=0.1)
    embedding(torch.tensor([1, 3])).sum().backward()
    torch.autograd.backward(nn.functional.embedding(torch.tensor([1, 3]), expected).sum())
    optimizer.step()
    reference.step()
    assert_same_bits(embedding.weight, expected, "weight")


@pytest.mark.parametrize("reduce_gradients", [True, False])
def test_a_sparse_gradient_of_a_parameter_that_was_frozen_is_refused_too(reduce_gradients: bool) -> None:
    embedding, linear = nn.Embedding(5, 3, sparse=True), nn.Linear(3, 2)
    embedding.weight.requires_grad_(False)
    optimizer = ShardedAdamax([*embedding.parameters(), *linear.parameters()], reduce_gradients=reduce_gradients)
    embedding.weight.requires_grad_(True)
    linear(embedding(torch.tensor([1]))).sum().backward()
    before = linear.weight.detach().clone()
    assert _outcome(optimizer.step) == ("RuntimeError", "Adamax does not support sparse gradients")
    assert_same_bits(linear.weight, before, "weight")


def test_a_skipped_step_forgets_its_gradients_as_a_taken_one_does() -> None:
    param, expected = _param(3), _param(3)
    optimizer, reference = ShardedAdamax([param], skip_nonfinite=True), torch.optim.Adamax([expected])
    for factor in (math.inf, 1.0, math.nan, 2.0):  # no zero_grad in between: there is nothing left to clear
        torch.autograd.backward((param * factor).sum())
        optimizer.step()
        assert param.grad is None
        if math.isfinite(factor):
            expected.grad = torch.full((3,), factor)
            reference.step()
        assert_same_bits(param, expected, f"the parameter after a gradient of {factor}")
    assert optimizer.skipped_steps == 2 and optimizer.state[param]["step"] == 2


def test_no_sync_is_refused_where_gradients_arrive_reduced() -> None:
    optimizer = ShardedAdamax([_param(3)], reduce_gradients=False)
    with pytest.raises(RuntimeError, match=r"reduce_gradients=True.*model\.no_sync\(\)"), optimizer.no_sync():
        pass


def test_no_sync_ends_with_its_block_also_after_an_error_and_when_nested() -> None:
    param = _param(3)
    optimizer = ShardedAdamax([param])

    def is_taken() -> bool:
        torch.autograd.backward(param.sum())
        taken = param.grad is None
        optimizer.zero_grad()
        return taken

    with optimizer.no_sync():
        with optimizer.no_sync():
            assert not is_taken()
        assert not is_taken(), "the inner block must not end the outer one"
    assert is_taken()

    def fail() -> None:
        with optimizer.no_sync():
            raise KeyError("lost batch")

    with pytest.raises(KeyError, match="lost batch"):
        fail()
    assert is_taken()


@pytest.mark.parametrize("first_reduces", [True, False])
@pytest.mark.parametrize("second_reduces", [True, False])
def test_a_second_optimizer_gets_the_gradients_and_the_first_is_refused(
    first_reduces: bool, second_reduces: bool
) -> None:
    param, expected = _param(3), _param(3)
    first = ShardedAdamax([param], reduce_gradients=first_reduces)
    second, reference = ShardedAdamax([param], reduce_gradients=second_reduces), torch.optim.Adamax([expected])
    for either, owned in ((second, param), (reference, expected)):
        torch.autograd.backward((owned * torch.arange(3.0)).sum())
        either.step()
    assert_same_bits(param, expected, "the parameter")
    assert second.state[param]["step"] == 1 and first.state[param]["step"] == 0
    with pytest.raises(RuntimeError, match="no longer the tensor"):
        first.step()


@pytest.mark.parametrize("reduce_gradients", [True, False])
def test_a_gradient_set_by_hand_on_a_parameter_that_requires_none_counts_as_in_torch(reduce_gradients: bool) -> None:
    params, expected = [_param(3), _param(2)], [_param(3), _param(2)]
    for either in (params, expected):
        either[0].requires_grad_(False)
    optimizer, reference = ShardedAdamax(params, reduce_gradients=reduce_gradients), torch.optim.Adamax(expected)
    for step in range(3):
        for either in (params, expected):
            either[0].grad = torch.arange(3.0) + step
        optimizer.step()
        reference.step()
        for param, other in zip(params, expected, strict=True):
            assert_same_bits(param, other, f"a parameter after step {step}")


@pytest.mark.parametrize("to", [-1, 1, 7])
def test_a_rank_that_does_not_exist_cannot_receive_the_state(to: int) -> None:
    optimizer = ShardedAdamax([_param(3)])
    with pytest.raises(ValueError, match=f"expected a rank from 0 to 0 for to, got {to}"):
        optimizer.full_state_dict(to=to)


EITHER, KEYWORD = Argument.POSITIONAL_OR_KEYWORD, Argument.KEYWORD_ONLY
# The public face as the design fixes it: code outside the repository calls it in this order and with these names.
SIGNATURE: list[tuple[str, Any, Any]] = [
    ("self", EITHER, Argument.empty),
    ("params", EITHER, Argument.empty),
    ("lr", EITHER, 2e-3),
    ("betas", EITHER, (0.9, 0.999)),
    ("eps", EITHER, 1e-8),
    ("weight_decay", EITHER, 0),
    ("foreach", EITHER, None),
    ("maximize", KEYWORD, False),
    ("differentiable", KEYWORD, False),
    ("capturable", KEYWORD, False),
    ("fused", KEYWORD, None),
    ("process_group", KEYWORD, None),
    ("mesh", KEYWORD, None),
    ("reduce_gradients", KEYWORD, True),
    ("reduce_dtype", KEYWORD, None),
    ("master_dtype", KEYWORD, None),
    ("state_format", KEYWORD, "full"),
    ("bucket_mib", KEYWORD, 25),
    ("skip_nonfinite", KEYWORD, False),
]


def _signature(function: Callable[..., Any]) -> list[tuple[str, Any, Any]]:
    return [(a.name, a.kind, a.default) for a in inspect.signature(function).parameters.values()]


def test_the_signature_is_the_designs() -> None:
    assert _signature(ShardedAdamax.__init__) == SIGNATURE


def test_the_signature_begins_like_torchs() -> None:
    of_torch = _signature(torch.optim.Adamax.__init__)
    assert len(of_torch) >= 10
    assert _signature(ShardedAdamax.__init__)[: len(of_torch)] == of_torch
