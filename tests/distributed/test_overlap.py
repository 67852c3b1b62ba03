"""All-gathers that go on after `step`: the same numbers, and never a value that is partly old.

`Veiled` makes lateness visible: until somebody waits, what comes from other ranks is NaN.
"""

from __future__ import annotations

import copy
import ctypes
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from sharded_adamax import ShardedAdamax, load, save
from sharded_adamax.engine import Engine
from sharded_adamax.late import _Late
from sharded_adamax.pending import Pending
from tests.distributed.models import SMALL_BUCKET_MIB, Net, Twins, fill_, straight_backward
from tests.distributed.pool import Pool
from tests.distributed.problems import assert_same_bits, assert_same_params, feed_mean, local_gradients, make_params
from tests.distributed.problems import backward as deliver


class Veiled:
    """An all-gather whose result is NaN until it is waited for."""

    def __init__(self, pending: Pending[None], bucket: Tensor, rank: int, size: int) -> None:
        pending.wait("the all-gather under the veil")
        self._bucket, self._arrived = bucket, bucket.clone()
        own = bucket.view(size, -1)[rank].clone()
        bucket.fill_(torch.nan)
        bucket.view(size, -1)[rank] = own

    @property
    def held_bytes(self) -> int:
        return 0

    def wait(self, doing: str) -> None:
        self._bucket.copy_(self._arrived)

    def missing(self) -> list[int]:
        return []


def engine_of(optimizer: ShardedAdamax) -> Engine:
    assert optimizer._engine is not None
    return optimizer._engine


def veil(optimizer: ShardedAdamax) -> list[int]:
    """Veil all gathers to come; returns the list to which they add the number of their bucket when they start."""
    engine = engine_of(optimizer)
    group = engine.group
    launched: list[int] = []
    all_gather = group.all_gather

    def veiled(bucket: Tensor) -> Veiled:
        launched.append([each.flat_param.data_ptr() for each in engine.buckets].index(bucket.data_ptr()))
        return Veiled(all_gather(bucket), bucket, group.rank, group.size)

    group.all_gather = veiled  # type: ignore[method-assign]
    return launched


def num_late(module: nn.Module) -> int:
    return sum(isinstance(param, _Late) for param in module.parameters())


def _late_twins(make: Callable[[int], nn.Module] = Net) -> Twins:
    """Twins after one step, all parameters of the model late and the twin where the model should be."""
    twins = Twins(make)
    twins.optimizer.overlap_forward(twins.model)
    veil(twins.optimizer)
    twins.feed_twin(0, straight_backward)
    straight_backward(twins.model, 0, dist.get_rank())
    twins.optimizer.step()
    twins.reference.step()
    assert num_late(twins.model) == len(list(twins.model.parameters()))
    return twins


def _train() -> None:
    twins = Twins()
    launched = veil(twins.optimizer)
    twins.optimizer.overlap_forward(twins.model)
    for step in range(4):
        twins.feed_twin(step, straight_backward)
        straight_backward(twins.model, step, dist.get_rank())
        twins.optimizer.step()
        assert num_late(twins.model) == len(list(twins.model.parameters())), "step must not wait"
        twins.optimizer.zero_grad()
        twins.model.zero_grad()
        assert num_late(twins.model) == len(list(twins.model.parameters())), "zero_grad must not wait"
        twins.reference.step()
    assert len(launched) == 4 * len(twins.optimizer.layout.buckets) > 8
    twins.compare("at the end")
    twins.compare_state()


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_step_and_zero_grad_do_not_wait_and_training_has_the_bits_of_torch(ranks: Pool, world_size: int) -> None:
    ranks.run(world_size, _train)


# What may come right after a step. Each looks at parameters and returns what it saw.
LOOKS: dict[str, Callable[[nn.Module], Any]] = {
    "p.data": lambda model: [p.data.clone() for p in model.parameters()],
    "p.detach()": lambda model: [p.detach().clone() for p in model.parameters()],
    "an operation": lambda model: [p + 0 for p in model.parameters()],
    "foreach": lambda model: torch._foreach_add(list(model.parameters()), 0),
    "state_dict": lambda model: [v.clone() for v in model.state_dict().values()],
    "state_dict, keep_vars": lambda model: [v + 0 for v in model.state_dict(keep_vars=True).values()],
    "a copy of the model": lambda model: list(copy.deepcopy(model).parameters()),
    "parameters_to_vector": lambda model: [nn.utils.parameters_to_vector(model.parameters())],
    "as a list": lambda model: [torch.tensor(p.tolist()) for p in model.parameters()],
    "numpy": lambda model: [torch.tensor(p.detach().numpy()) for p in model.parameters()],
    "by its address": lambda model: [
        torch.frombuffer((ctypes.c_float * p.numel()).from_address(p.data_ptr()), dtype=torch.float32)
        for p in model.parameters()
    ],
    "an average": lambda model: list(torch.optim.swa_utils.AveragedModel(model).module.parameters()),
    "evaluation": lambda model: [model.eval()(torch.ones(2, 6))],
    "part of the model": lambda model: [model.last(torch.ones(2, 16))],  # type: ignore[operator]
    "functional_call": lambda model: [
        torch.func.functional_call(model, dict(model.named_parameters()), torch.ones(2, 6))
    ],
    "pickled": lambda model: list(_pickled(model).parameters()),
    "a function of one's own": lambda model: [_Twice.apply(p) for p in model.parameters()],
    "printed": lambda model: [torch.tensor([len(repr(p)) for p in model.parameters()])],
}


class _Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0]


def _pickled(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded: nn.Module = torch.load(file, weights_only=False)
    return loaded


def _look(kind: str) -> None:
    twins = _late_twins()
    with torch.no_grad():
        got, expected = LOOKS[kind](twins.model), LOOKS[kind](twins.twin)
    assert len(got) == len(expected) > 0
    for index, (mine, theirs) in enumerate(zip(got, expected, strict=True)):
        assert type(mine) is type(theirs)
        assert_same_bits(mine.detach(), theirs.detach(), f"what {kind} sees, {index}")
    twins.compare(f"after {kind}")
    assert num_late(twins.model) == 0
    assert all(type(param) is nn.Parameter for param in twins.model.parameters())


def _look_all() -> None:
    for kind in LOOKS:
        try:
            _look(kind)
        except Exception as error:
            raise AssertionError(f"{kind}: {error}") from error


def test_whoever_looks_at_a_parameter_right_after_a_step_sees_the_new_value(ranks: Pool) -> None:
    ranks.run(2, _look_all)


def _write() -> None:
    twins = _late_twins()
    values = {name: torch.full_like(p, 0.5) for name, p in twins.twin.named_parameters()}
    twins.model.load_state_dict(values)
    twins.twin.load_state_dict(values)
    engine_of(twins.optimizer).gathering.settle()
    twins.compare("after loading over a gather under way")
    twins.train(2, first_step=1)


def test_what_is_loaded_right_after_a_step_is_not_overwritten_by_what_arrives(ranks: Pool) -> None:
    ranks.run(2, _write)


def _save_and_load(directory: str) -> None:
    twins = _late_twins()
    save(f"{directory}/1", twins.model, twins.optimizer)
    twins.compare("after saving")
    other = _late_twins()
    other.model.load_state_dict({name: torch.zeros_like(p) for name, p in other.twin.named_parameters()})
    straight_backward(other.model, 5, dist.get_rank())
    other.optimizer.step()
    load(f"{directory}/1", other.model, other.optimizer)
    assert_same_params(list(other.model.parameters()), list(twins.twin.parameters()), "after loading")


def test_a_checkpoint_saved_or_loaded_right_after_a_step_is_whole(ranks: Pool, tmp_path: Path) -> None:
    ranks.run(2, _save_and_load, str(tmp_path))


class Branches(nn.Module):
    """Uses its parts in an order that is not that of their registration, and not the same on all ranks."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.parts = nn.ParameterList([torch.randn(200 + i, generator=generator) for i in range(5)])
        self.order = [2, 0, 4, 1, 3]

    def forward(self, x: Tensor) -> Tensor:
        for index in self.order:
            x = x + (self.parts[index] * (index + 1)).sum().tanh()
        return x


def _in_any_order() -> None:
    def step_backward(model: nn.Module, step: int, rank: int) -> None:
        generator = torch.Generator().manual_seed(100 * step + rank)
        model.order = torch.randperm(5, generator=generator).tolist()[: 3 + step % 3]  # type: ignore[assignment]
        model(torch.ones(3)).sum().backward()

    twins = Twins(Branches)
    launched = veil(twins.optimizer)
    twins.optimizer.overlap_forward(twins.model)
    assert len(twins.optimizer.layout.buckets) == 5
    gathering = engine_of(twins.optimizer).gathering
    for step in range(6):
        twins.feed_twin(step, step_backward)
        step_backward(twins.model, step, dist.get_rank())
        gathering.settle()
        wanted = gathering.wanted_order().copy()
        launched.clear()
        twins.optimizer.step()
        under_way: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(under_way, (wanted, launched))
        first_wanted, first_gathers = under_way[0]
        assert all(gathers == first_gathers for _, gathers in under_way), "all ranks gather in one order"
        assert first_gathers == [index for index in first_wanted if index in first_gathers] or step == 0
        assert step == 0 or any(other != first_wanted for other, _ in under_way[1:])
        twins.reference.step()
        twins.optimizer.zero_grad()
        twins.reference.zero_grad()
        assert len(launched) > 2
    twins.compare("at the end")


def test_ranks_that_run_different_modules_gather_in_one_order(ranks: Pool) -> None:
    ranks.run(3, _in_any_order)


def _in_forward_order() -> None:
    model = Branches(0)
    optimizer = ShardedAdamax(model.parameters(), bucket_mib=SMALL_BUCKET_MIB)
    launched = veil(optimizer)
    optimizer.overlap_forward(model)
    sizes = [bucket.numel for bucket in optimizer.layout.buckets]
    assert sizes == [256] * 5
    of_part = list(reversed(range(5)))  # the last parameter is in the first bucket
    seen = []
    for _ in range(3):
        model(torch.ones(3)).sum().backward()
        optimizer.step()
        seen.append([index for index, gather in engine_of(optimizer).gathering._gathers.items() if not gather.streams])
        optimizer.zero_grad()
    assert len(launched) == 15
    assert seen[0] == [4, 3, 2, 1, 0], "a guess before the first forward: as registered"
    assert seen[1] == seen[2] == [of_part[index] for index in model.order]


def test_gathers_go_in_the_order_of_the_last_forward(ranks: Pool) -> None:
    ranks.run(2, _in_forward_order)


def _fails_in_forward() -> None:
    twins = _late_twins()

    def fail(module: nn.Module, arguments: Any) -> None:
        raise ValueError("a bad batch")

    handle = twins.model.middle.register_forward_pre_hook(fail)  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="a bad batch"):
        straight_backward(twins.model, 1, dist.get_rank())
    handle.remove()
    assert 0 < num_late(twins.model) < len(list(twins.model.parameters())), "some were awaited, some not"
    twins.compare("after the exception")
    twins.train(2, first_step=1)


def test_an_exception_in_forward_leaves_no_stale_weight_behind(ranks: Pool) -> None:
    ranks.run(2, _fails_in_forward)


def _changes_of_the_optimizer() -> None:
    """Frozen parameters come alive and a group is added: nobody told the modules of their buckets."""
    params, expected = make_params(torch.float32), make_params(torch.float32)
    for owned in (params, expected):
        owned[2].requires_grad_(False)
    optimizer, reference = ShardedAdamax(params[:6], bucket_mib=0.001), torch.optim.Adamax(expected[:6])
    model = nn.ParameterList(params)
    optimizer.overlap_forward(model)
    veil(optimizer)
    for step in range(6):
        count = 6 if step < 3 else len(params)
        if step == 2:
            params[2].requires_grad_(True)
            expected[2].requires_grad_(True)
        if step == 3:
            optimizer.add_param_group({"params": params[6:]})
            reference.add_param_group({"params": expected[6:]})
        used = [i for i in range(count) if params[i].requires_grad]
        gradients = local_gradients(step, params)
        deliver([params[i] for i in used], [gradients[i] for i in used])
        feed_mean(expected, step)
        for index, param in enumerate(expected):
            param.grad = param.grad if index in used else None
        optimizer.step()
        assert num_late(model) > 0
        reference.step()
        optimizer.zero_grad()
    assert_same_params(params, expected, "at the end")


def test_parameters_that_come_later_are_awaited_too(ranks: Pool) -> None:
    ranks.run(2, _changes_of_the_optimizer)


class Blocks(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Net(0), nn.Linear(3, 6), Net(0)])
        fill_(self, seed)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


COMPILED: dict[str, Callable[[nn.Module, ShardedAdamax], nn.Module]] = {}


def _way(name: str) -> Callable[[Any], Any]:
    def note(function: Any) -> Any:
        COMPILED[name] = function
        return function

    return note


def _compile(model: nn.Module, **options: Any) -> nn.Module:
    compiled: Any = torch.compile(model, backend="eager", **options)
    return compiled  # type: ignore[no-any-return]


@_way("compiled, then overlapped")
def _compiled_first(model: nn.Module, optimizer: ShardedAdamax) -> nn.Module:
    compiled = _compile(model, fullgraph=True)
    optimizer.overlap_forward(compiled)
    return compiled


@_way("overlapped, then compiled")
def _compiled_later(model: nn.Module, optimizer: ShardedAdamax) -> nn.Module:
    optimizer.overlap_forward(model)
    return _compile(model)


@_way("compiled in place")
def _compiled_in_place(model: nn.Module, optimizer: ShardedAdamax) -> nn.Module:
    optimizer.overlap_forward(model)
    model.compile(backend="eager")
    return model


@_way("blocks compiled, then overlapped")
def _blocks_first(model: nn.Module, optimizer: ShardedAdamax) -> nn.Module:
    blocks: Any = model.blocks
    for index, block in enumerate(blocks):
        blocks[index] = _compile(block, fullgraph=True)
    optimizer.overlap_forward(model)
    return model


@_way("blocks compiled in place, then overlapped")
def _blocks_in_place(model: nn.Module, optimizer: ShardedAdamax) -> nn.Module:
    for block in model.blocks:  # type: ignore[union-attr]
        block.compile(backend="eager")
    optimizer.overlap_forward(model)
    return model


@_way("overlapped, then blocks compiled")
def _blocks_later(model: nn.Module, optimizer: ShardedAdamax) -> nn.Module:
    optimizer.overlap_forward(model)
    blocks: Any = model.blocks
    for index, block in enumerate(blocks):
        blocks[index] = _compile(block)
    return model


def _train_compiled(way: str) -> None:
    torch._dynamo.reset()
    model, twin = Blocks(dist.get_rank()), Blocks(0)
    optimizer = ShardedAdamax(model.parameters(), bucket_mib=SMALL_BUCKET_MIB)
    reference = torch.optim.Adamax(twin.parameters())
    veil(optimizer)
    params = list(model.parameters())
    model = COMPILED[way](model, optimizer)
    for step in range(4):
        straight_backward(model, step, 0)  # the same on all ranks: their mean has the same bits
        straight_backward(twin, step, 0)
        optimizer.step()
        reference.step()
        optimizer.zero_grad()
        reference.zero_grad()
        assert all(isinstance(param, _Late) for param in params)
    assert_same_params(params, list(twin.parameters()), f"at the end, {way}")


@pytest.mark.parametrize("way", COMPILED)
def test_compiled_code_never_reads_a_late_parameter(ranks: Pool, way: str) -> None:
    ranks.run(2, _train_compiled, way)


class ByAddress(nn.Module):
    """Reads its parameter as C++ code does that knows nothing of torch functions."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.arange(300.0))
        self.address = 0

    def forward(self) -> Tensor:
        seen = torch.tensor(list((ctypes.c_float * 300).from_address(self.address)))
        return self.weight.sum() + seen.sum()


def _by_address() -> None:
    inner = ByAddress()
    model = nn.ModuleList([inner])
    optimizer = ShardedAdamax(model.parameters())
    inner.address = inner.weight.data_ptr()
    optimizer.overlap_forward(model)
    veil(optimizer)
    for _ in range(3):
        loss = inner()
        assert loss == 2 * inner.weight.sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def test_a_module_waits_for_its_own_parameters_before_it_runs(ranks: Pool) -> None:
    ranks.run(2, _by_address)


def _only_one_rank() -> str:
    model = Net(0)
    optimizer = ShardedAdamax(model.parameters())
    if dist.get_rank() == 1:
        optimizer.overlap_forward(model)
    straight_backward(model, 0, 0)
    with pytest.raises(RuntimeError) as raised:
        optimizer.step()
    return str(raised.value)


def test_overlap_on_some_ranks_only_is_an_error_on_all(ranks: Pool) -> None:
    for message in ranks.run(2, _only_one_rank):
        assert "overlap_forward called" in message and "overlap_forward not called" in message, message


def _refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    optimizer = ShardedAdamax(model.parameters())
    with pytest.raises(ValueError, match="expected a model that uses parameters of this optimizer"):
        optimizer.overlap_forward(nn.Linear(4, 4))
    model[1] = torch.jit.script(model[1])
    with pytest.raises(NotImplementedError, match="1 is a RecursiveScriptModule, and TorchScript reads"):
        optimizer.overlap_forward(model)
    assert not model[0]._forward_pre_hooks, "nothing is half done"


def test_models_that_cannot_wait_are_refused(ranks: Pool) -> None:
    ranks.run(1, _refused)
