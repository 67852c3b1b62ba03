"""What autograd can do between forward and step: checkpointing, compiled models, parameters used twice, torch.func."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.func import functional_call, grad
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from tests.distributed.models import (
    NUM_HIDDEN,
    NUM_INPUTS,
    NUM_OUTPUTS,
    Backward,
    Batch,
    Net,
    Twins,
    dtype_of,
    fill_,
    loss_of,
    straight_backward,
)
from tests.distributed.pool import Pool


def _parts(model: nn.Module) -> Net:
    net = getattr(model, "_orig_mod", model)
    assert isinstance(net, Net)
    return net


def _checkpointed(use_reentrant: bool) -> Backward:
    def backward(model: nn.Module, step: int, rank: int) -> None:
        net, batch = _parts(model), Batch(step, rank, dtype_of(model))
        hidden = checkpoint(net.first, batch.x.requires_grad_(), use_reentrant=use_reentrant)
        hidden = checkpoint(net.middle, hidden, use_reentrant=use_reentrant)
        F.mse_loss(net.last(hidden) * net.scale, batch.y).backward()

    return backward


def _checkpointed_in_sequence(model: nn.Module, step: int, rank: int) -> None:
    net, batch = _parts(model), Batch(step, rank)
    whole = nn.Sequential(*net.first, *net.middle, net.last)
    F.mse_loss(checkpoint_sequential(whole, 3, batch.x, use_reentrant=False) * net.scale, batch.y).backward()


def _inside_and_outside(use_reentrant: bool) -> Backward:
    """`middle` runs inside a checkpoint and outside, `last` inside two of them."""

    def backward(model: nn.Module, step: int, rank: int) -> None:
        net, batch = _parts(model), Batch(step, rank, dtype_of(model))
        hidden = net.middle(checkpoint(net.middle, net.first(batch.x), use_reentrant=use_reentrant))
        out = checkpoint(net.last, hidden, use_reentrant=use_reentrant)
        out = out + checkpoint(net.last, hidden.tanh(), use_reentrant=use_reentrant)
        F.mse_loss(out * net.scale, batch.y).backward()

    return backward


def _used_twice(model: nn.Module, step: int, rank: int) -> None:
    net, batch = _parts(model), Batch(step, rank)
    hidden = net.middle(net.middle(net.first(batch.x)))
    F.mse_loss(net.last(hidden) * net.scale + net.last(hidden.tanh()), batch.y).backward()


def _gradient_penalty(model: nn.Module, step: int, rank: int) -> None:
    """autograd.grad runs through the parameters first, and backward through what it built."""
    batch = Batch(step, rank)
    x = batch.x.requires_grad_()
    loss = F.mse_loss(model(x), batch.y)
    of_input, of_weight = torch.autograd.grad(loss, [x, _parts(model).last.weight], create_graph=True)
    (loss + of_input.square().sum() + of_weight.square().sum()).backward()


def _unused_autograd_grad(model: nn.Module, step: int, rank: int) -> None:
    """A look at the gradients of all parameters that leaves none behind."""
    loss = loss_of(model, step, rank)
    looked = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    assert all(gradient.isfinite().all() for gradient in looked)
    loss.backward()


def _create_graph(model: nn.Module, step: int, rank: int) -> None:
    """The gradients carry a graph of their own."""
    loss_of(model, step, rank).backward(create_graph=True)


def _into_some_inputs(model: nn.Module, step: int, rank: int) -> None:
    """backward(inputs=...) leaves the other parameters without gradients; on rank 1 it is other inputs."""
    net = _parts(model)
    inputs = [net.last.weight, net.scale] if rank == 1 else [net.last.weight, *net.first.parameters()]
    loss_of(model, step, rank).backward(inputs=inputs)


def _functional(model: nn.Module, step: int, rank: int) -> None:
    """torch.func's gradients are values, put into .grad by hand."""
    batch = Batch(step, rank)

    def loss(params: dict[str, Tensor]) -> Tensor:
        return F.mse_loss(functional_call(model, params, (batch.x,)), batch.y)

    gradients = grad(loss)({name: param.detach() for name, param in model.named_parameters()})
    for name, param in model.named_parameters():
        param.grad = gradients[name]


def _functional_call(model: nn.Module, step: int, rank: int) -> None:
    """functional_call on the parameters themselves, changed on the way."""
    batch = Batch(step, rank)
    changed = {name: param * 0.9 for name, param in model.named_parameters() if name.startswith("middle")}
    F.mse_loss(functional_call(model, changed, (batch.x,)), batch.y).backward()


def _saved_elsewhere(model: nn.Module, step: int, rank: int) -> None:
    with save_on_cpu():
        loss = loss_of(model, step, rank)
    loss.backward()


def _into_each_output(model: nn.Module, step: int, rank: int) -> None:
    batch = Batch(step, rank)
    out = model(batch.x)
    torch.autograd.backward([out[:, 0].sum(), out[:, 1:]], [None, batch.y[:, 1:]])


ROADS: dict[str, Backward] = {
    "checkpoint": _checkpointed(False),
    "reentrant checkpoint": _checkpointed(True),
    "checkpoints in sequence": _checkpointed_in_sequence,
    "inside and outside a checkpoint": _inside_and_outside(False),
    "used twice": _used_twice,
    "gradient penalty": _gradient_penalty,
    "a look with autograd.grad": _unused_autograd_grad,
    "create_graph": _create_graph,
    "backward into some inputs": _into_some_inputs,
    "torch.func.grad": _functional,
    "functional_call": _functional_call,
    "saved tensors elsewhere": _saved_elsewhere,
    "several outputs": _into_each_output,
}


def _train(road: str) -> None:
    twins = Twins()
    twins.train(4, ROADS[road])
    twins.train(2, straight_backward, first_step=4)
    twins.compare_state()


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("road", ROADS)
def test_whatever_road_backward_takes_the_numbers_are_those_of_adamax(ranks: Pool, road: str, world_size: int) -> None:
    ranks.run(world_size, _train, road)


def _net64(seed: int) -> Net:
    return Net(seed, torch.float64)


def _reentrant_inside_and_outside() -> None:
    twins = Twins(_net64)
    road = _inside_and_outside(True)
    for step in range(6):
        twins.feed_twin(step, road)
        road(twins.model, step, dist.get_rank())
        twins.optimizer.step()
        twins.reference.step()
        twins.optimizer.zero_grad()
        # A reentrant checkpoint accumulates into a parameter once per region. A bucket may be on its way by then, so
        # what is added up is the mean of one part and the mean of another: a few ulp of the gradient. A world of one
        # has no such mean.
        rtol, atol = (0.0, 0.0) if dist.get_world_size() == 1 else (1e-11, 1e-13)
        for (name, param), other in zip(twins.model.named_parameters(), twins.twin.parameters(), strict=True):
            torch.testing.assert_close(param, other, rtol=rtol, atol=atol, msg=f"{name} after step {step}")


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_parameter_inside_and_outside_a_reentrant_checkpoint_gets_both_gradients(
    ranks: Pool, world_size: int
) -> None:
    ranks.run(world_size, _reentrant_inside_and_outside)


class Tied(nn.Module):
    """An embedding whose weight is the output layer's, too, and a layer that is registered under two names."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, NUM_HIDDEN)
        self.body = nn.Linear(NUM_HIDDEN, NUM_HIDDEN)
        self.again = self.body
        self.head = nn.Linear(NUM_HIDDEN, 11, bias=False)
        self.head.weight = self.embedding.weight
        fill_(self, seed)

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.head(self.again(self.body(self.embedding(tokens)).tanh()))
        return out


def _tied_backward(model: nn.Module, step: int, rank: int) -> None:
    tokens = torch.randint(0, 11, (9,), generator=torch.Generator().manual_seed(10 * step + rank))
    F.cross_entropy(model(tokens[:-1]), tokens[1:]).backward()


def _tied() -> None:
    twins = Twins(Tied)
    assert len(twins.optimizer.param_groups[0]["params"]) == 3
    twins.train(5, _tied_backward)
    assert isinstance(twins.model, Tied) and twins.model.head.weight is twins.model.embedding.weight
    twins.compare_state()


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_tied_weights_are_trained_as_one(ranks: Pool, world_size: int) -> None:
    ranks.run(world_size, _tied)


def _twice_through_one_graph() -> None:
    """retain_graph: the second pass finds all buckets on their way and is reduced in step, in a round of its own."""
    twins = Twins()
    for step in range(4):
        means = twins.mean_of(step, straight_backward)
        for param, mean in zip(twins.twin.parameters(), means, strict=True):
            assert mean is not None
            param.grad = mean + mean
        loss = loss_of(twins.model, step, dist.get_rank())
        loss.backward(retain_graph=True)
        loss.backward()
        twins.step_both(step)
    twins.compare_state()


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_backward_twice_through_one_graph_counts_twice(ranks: Pool, world_size: int) -> None:
    ranks.run(world_size, _twice_through_one_graph)


def _stale_graph() -> list[str]:
    """A step between forward and backward changes what backward needs; the messages that this gives."""
    twins = Twins()
    messages = []
    for model, optimizer in ((twins.twin, twins.reference), (twins.model, twins.optimizer)):
        old = loss_of(model, 0, 0)
        straight_backward(model, 0, 0)
        optimizer.step()
        optimizer.zero_grad()
        try:
            old.backward()
            messages.append("no error")
        except RuntimeError as error:
            messages.append(str(error).partition(":")[0])
    return messages


@pytest.mark.parametrize("world_size", [1, 2])
def test_backward_through_a_graph_from_before_the_step_is_refused_as_with_adamax(ranks: Pool, world_size: int) -> None:
    for expected, got in ranks.run(world_size, _stale_graph):
        assert "modified by an inplace operation" in expected
        assert got == expected


def _compiled(backend: str, when: str) -> None:
    """The model is compiled first; or after the optimizer was built; or first, and has run before it was built."""

    def make(seed: int) -> nn.Module:
        net: nn.Module = Net(seed)
        if when != "after":
            net = torch.compile(net, backend=backend, fullgraph=True)  # type: ignore[assignment]
        if when == "run before":
            straight_backward(net, 0, 0)
            net.zero_grad()
        return net

    twins = Twins(make)
    if when == "after":
        twins.model.compile(backend=backend, fullgraph=True)
        twins.twin.compile(backend=backend, fullgraph=True)
    twins.train(4)
    twins.compare_state()


@pytest.mark.parametrize("when", ["first", "after", "run before"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_compiled_model_trains_as_with_adamax(ranks: Pool, world_size: int, when: str) -> None:
    ranks.run(world_size, _compiled, "aot_eager", when)


def test_a_model_compiled_by_inductor_trains_as_with_adamax(ranks: Pool) -> None:
    ranks.run(2, _compiled, "inductor", "first", timeout_s=110)


class Wrapped(nn.Module):
    """Compiled layers inside a model that is not, one of them checkpointed."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.first = nn.Linear(NUM_INPUTS, NUM_HIDDEN)
        self.middle = nn.Sequential(nn.Linear(NUM_HIDDEN, NUM_HIDDEN), nn.GELU())
        self.last = nn.Linear(NUM_HIDDEN, NUM_OUTPUTS)
        fill_(self, seed)
        self.middle.compile(backend="aot_eager")
        self.last.compile(backend="aot_eager")

    def forward(self, x: Tensor) -> Tensor:
        hidden = checkpoint(self.middle, self.first(x), use_reentrant=False)
        out: Tensor = self.last(hidden)
        return out


def _compiled_parts() -> None:
    twins = Twins(Wrapped)
    twins.train(3)
    twins.compare_state()


def test_compiled_layers_in_a_checkpoint_train_as_with_adamax(ranks: Pool) -> None:
    ranks.run(2, _compiled_parts)
