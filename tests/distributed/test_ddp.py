"""Under DistributedDataParallel, reduce_gradients=False: DDP with ShardedAdamax is DDP with torch.optim.Adamax."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook, fp16_compress_hook
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils.checkpoint import checkpoint

from sharded_adamax import ShardedAdamax
from tests.distributed.models import SMALL_BUCKET_MIB, Batch, Net, compare_models, fill_, loss_of
from tests.distributed.pool import Pool
from tests.distributed.problems import assert_same_bits, assert_same_state

SMALL: dict[str, Any] = {"bucket_cap_mb": SMALL_BUCKET_MIB}  # several buckets of DDP's, too
OPTIONS: dict[str, Any] = {"lr": 0.01, "weight_decay": 0.05}
Backward = Callable[[nn.Module, int], object]


def _backward(model: nn.Module, step: int) -> None:
    loss_of(model, step, dist.get_rank()).backward()


class Pair:
    """The same model in two DDPs."""

    def __init__(
        self, make: Callable[[int], nn.Module] = Net, *, optimizer_first: bool = False, **ddp_options: Any
    ) -> None:
        net, other_net = make(dist.get_rank()), make(dist.get_rank())
        if optimizer_first:
            self.optimizer = self._ours(net)
        self.model = DistributedDataParallel(net, **{**SMALL, **ddp_options})
        self.expected = DistributedDataParallel(other_net, **{**SMALL, **ddp_options})
        if not optimizer_first:
            self.optimizer = self._ours(net)
        self.reference = torch.optim.Adamax(other_net.named_parameters(), **OPTIONS)

    def _ours(self, net: nn.Module) -> ShardedAdamax:
        return ShardedAdamax(net.named_parameters(), bucket_mib=SMALL_BUCKET_MIB, reduce_gradients=False, **OPTIONS)

    def both(self) -> list[tuple[DistributedDataParallel, Optimizer]]:
        return [(self.model, self.optimizer), (self.expected, self.reference)]

    def train(self, num_steps: int, backward: Backward = _backward, set_to_none: bool = True) -> None:
        for step in range(num_steps):
            for model, optimizer in self.both():
                backward(model, step)
                self.compare_presence(model)
                optimizer.step()
                optimizer.zero_grad(set_to_none=set_to_none)
            compare_models(self.model, self.expected, f"after step {step}")
        full = self.optimizer.full_state_dict()
        if full is not None:
            assert_same_state(full, self.reference, step_zero_may_miss=True)

    def compare_presence(self, model: nn.Module) -> None:
        """What the optimizer is given is what DDP leaves: the same gradient on every rank, in p.grad."""
        for name, param in model.named_parameters():
            if param.grad is not None:
                first = param.grad.clone()
                dist.broadcast(first, src=0)
                assert_same_bits(param.grad, first, f"the gradient of {name}")


def _plain(options: dict[str, Any], set_to_none: bool, optimizer_first: bool) -> None:
    Pair(optimizer_first=optimizer_first, **options).train(5, set_to_none=set_to_none)


KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "static graph": {"static_graph": True},
    "gradients as views": {"gradient_as_bucket_view": True},
    "views of a static graph": {"gradient_as_bucket_view": True, "static_graph": True},
    "find unused": {"find_unused_parameters": True},
    "one bucket": {"bucket_cap_mb": 25},
}


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("set_to_none", [True, False], ids=["to None", "to zeros"])
@pytest.mark.parametrize("kind", KINDS)
def test_each_way_of_ddp_gives_the_bits_of_ddp_with_adamax(
    ranks: Pool, kind: str, set_to_none: bool, world_size: int
) -> None:
    ranks.run(world_size, _plain, KINDS[kind], set_to_none, False)


@pytest.mark.parametrize("kind", KINDS)
def test_the_optimizer_may_be_built_before_ddp(ranks: Pool, kind: str) -> None:
    ranks.run(2, _plain, KINDS[kind], True, True)


class Branching(Net):
    """Net with a layer per use: on no rank, on one rank, at some steps."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.never = nn.Linear(3, 3)
        self.on_rank_1 = nn.Linear(3, 3)
        self.at_times = nn.Linear(3, 3)
        fill_(self, seed)
        self.step = 0

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = super().forward(x)
        if dist.get_rank() == 1:
            out = self.on_rank_1(out)
        if self.step % 3 != 1:
            out = self.at_times(out)
        return out


def _branching_backward(model: nn.Module, step: int) -> None:
    assert isinstance(model, DistributedDataParallel)
    model.module.step = step
    _backward(model, step)


def _unused(set_to_none: bool, as_views: bool) -> None:
    pair = Pair(Branching, find_unused_parameters=True, gradient_as_bucket_view=as_views)
    before = pair.model.module.never.weight.detach().clone()
    pair.train(6, _branching_backward, set_to_none)
    assert_same_bits(pair.model.module.never.weight, before, "a weight that no rank uses, although weight decay is on")
    steps = {name: int(pair.optimizer.state[param]["step"]) for name, param in pair.model.module.named_parameters()}
    assert (steps["never.weight"], steps["on_rank_1.weight"]) == (0, 6)
    assert steps["at_times.weight"] == (4 if set_to_none else 6), "cleared to zeros, a gradient is one"


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("set_to_none", [True, False], ids=["to None", "to zeros"])
@pytest.mark.parametrize("as_views", [True, False], ids=["views", "copies"])
def test_parameters_unused_on_all_ranks_are_skipped_and_on_one_rank_are_not(
    ranks: Pool, as_views: bool, set_to_none: bool, world_size: int
) -> None:
    ranks.run(world_size, _unused, set_to_none, as_views)


def _accumulate(as_views: bool) -> None:
    def backward(model: nn.Module, step: int) -> None:
        assert isinstance(model, DistributedDataParallel)
        for micro in range(3):
            with model.no_sync() if micro < 2 else nullcontext():
                _backward(model, 10 * step + micro)

    Pair(gradient_as_bucket_view=as_views).train(4, backward)


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("as_views", [True, False], ids=["views", "copies"])
def test_ddps_no_sync_accumulates_as_with_adamax(ranks: Pool, as_views: bool, world_size: int) -> None:
    ranks.run(world_size, _accumulate, as_views)


HOOKS: dict[str, Callable[[Any, dist.GradBucket], torch.futures.Future[Tensor]]] = {
    "bf16": bf16_compress_hook,
    "fp16": fp16_compress_hook,
}


def _communication_hook(kind: str) -> None:
    pair = Pair()
    for model, _ in pair.both():
        # By its own name torch refuses the bf16 hook on gloo, which can add bf16 all the same.
        model.register_comm_hook(None, lambda state, bucket: HOOKS[kind](state, bucket))
    pair.train(5)


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("kind", HOOKS)
def test_gradients_that_a_communication_hook_has_rounded_are_taken_as_they_are(
    ranks: Pool, kind: str, world_size: int
) -> None:
    ranks.run(world_size, _communication_hook, kind)


def _checkpointed(use_reentrant: bool) -> None:
    def backward(model: nn.Module, step: int) -> None:
        assert isinstance(model, DistributedDataParallel)
        batch = Batch(step, dist.get_rank())
        F.mse_loss(model(batch.x.requires_grad_()), batch.y).backward()

    class Checkpointed(Net):
        def forward(self, x: Tensor) -> Tensor:
            hidden = checkpoint(self.middle, self.first(x), use_reentrant=use_reentrant)
            out: Tensor = self.last(hidden) * self.scale
            return out

    Pair(Checkpointed, static_graph=use_reentrant).train(4, backward)


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_checkpointing_under_ddp_is_as_with_adamax(ranks: Pool, use_reentrant: bool) -> None:
    ranks.run(2, _checkpointed, use_reentrant)


def _compiled() -> None:
    pair = Pair(bucket_cap_mb=25)  # torch's compiler wants buckets larger than the first, which is 1 MiB
    compiled = {model: torch.compile(model, backend="aot_eager") for model, _ in pair.both()}
    pair.train(4, lambda model, step: _backward(compiled[model], step))


def test_a_compiled_ddp_is_as_with_adamax(ranks: Pool) -> None:
    ranks.run(2, _compiled)


def _clipped(norm_type: float) -> None:
    def backward(model: nn.Module, step: int) -> None:
        _backward(model, step)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01, norm_type)

    Pair(gradient_as_bucket_view=True).train(4, backward)


@pytest.mark.parametrize("norm_type", [2.0, float("inf")])
def test_torchs_own_clipping_under_ddp_gives_the_bits_of_adamax(ranks: Pool, norm_type: float) -> None:
    ranks.run(3, _clipped, norm_type)
