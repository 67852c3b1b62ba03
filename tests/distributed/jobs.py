"""Four kinds of training job in the same state: ours, DDP, FSDP2 and one process, to write checkpoints for each other.

Every job sets the same gradients on every rank, so what it holds after some steps is, to the last bit, what
torch.optim.Adamax holds in one process, whatever the kind and the number of ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from sharded_adamax import ShardedAdamax, load, save
from sharded_adamax.state import FlatShard
from tests.distributed.problems import assert_same_bits, gradient

OPTIONS = StateDictOptions(flatten_optimizer_state_dict=True)
NUM_STEPS = 3
# Two groups that differ in every hyper-parameter that can differ.
GROUPS: list[dict[str, Any]] = [
    {"lr": 1e-2},
    {"lr": 3e-3, "betas": (0.8, 0.99), "eps": 1e-6, "weight_decay": 0.1, "maximize": True},
]


class Net(nn.Module):
    """Nested names; shapes with 0 dimensions, 0 elements, odd sizes; a buffer."""

    def __init__(self, dtype: torch.dtype, seed: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.zeros((), dtype=dtype))
        self.nothing = nn.Parameter(torch.zeros(3, 0, dtype=dtype))
        self.seven = nn.Parameter(torch.zeros(7, dtype=dtype))
        self.body = nn.Sequential(nn.Linear(13, 5, dtype=dtype), nn.Conv1d(2, 3, 5, dtype=dtype))
        self.table = nn.Embedding(129, 33, dtype=dtype)
        self.one = nn.Parameter(torch.zeros(1, dtype=dtype))
        self.register_buffer("seen", torch.full((2,), float(seed)))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for param in self.parameters():
                param.copy_(torch.randn(param.shape, generator=generator, dtype=torch.float64))


class Job(NamedTuple):
    module: nn.Module
    optimizer: torch.optim.Optimizer


def groups_of(module: nn.Module) -> list[dict[str, Any]]:
    """Every second parameter in the one group, the rest in the other."""
    params = list(module.parameters())
    return [{"params": params[::2], **GROUPS[0]}, {"params": params[1::2], **GROUPS[1]}]


def build(kind: str, dtype: torch.dtype, seed: int) -> Job:
    """Kinds: "ours", "ddp", "fsdp", "plain"."""
    net: nn.Module = Net(dtype, seed)
    if kind == "ours":
        return Job(net, ShardedAdamax(groups_of(net), reduce_gradients=False, bucket_mib=0.01))
    if kind == "ddp":
        net = DistributedDataParallel(net)
    elif kind == "fsdp":
        assert isinstance(net, Net)
        fully_shard(net.body)
        fully_shard(net, ignored_params={net.scale, net.nothing})  # FSDP2 cannot shard 0-d or empty parameters
    return Job(net, torch.optim.Adamax(groups_of(net)))


def advance(job: Job, steps: range = range(NUM_STEPS)) -> None:
    for step in steps:
        for index, param in enumerate(job.module.parameters()):
            if param.requires_grad:
                param.grad = _like(gradient(step, 0, index, torch.empty(param.shape, dtype=param.dtype)), param)
        job.optimizer.step()
        job.optimizer.zero_grad()


def _like(whole: Tensor, param: Tensor) -> Tensor:
    return distribute_tensor(whole, param.device_mesh, param.placements) if isinstance(param, DTensor) else whole


class Expected(NamedTuple):
    model: dict[str, Tensor]
    state: dict[str, dict[str, Tensor]]
    groups: list[dict[str, Any]]


@lru_cache
def expected(dtype: torch.dtype, num_steps: int = NUM_STEPS) -> Expected:
    """What one process with torch.optim.Adamax holds."""
    job = build("plain", dtype, seed=0)
    advance(job, range(num_steps))
    state = {name: dict(job.optimizer.state[param]) for name, param in job.module.named_parameters()}
    return Expected(dict(job.module.state_dict()), state, hypers(job.optimizer))


def hypers(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    return [
        {key: group[key] for key in group if key not in ("params", "param_names")} for group in optimizer.param_groups
    ]


def save_as(kind: str, path: str, job: Job) -> None:
    """Save as users of each kind do."""
    if kind == "ours":
        save(path, job.module, job.optimizer)
        return
    optim = get_optimizer_state_dict(job.module, job.optimizer, options=OPTIONS)
    dcp_save({"model": get_model_state_dict(job.module), "optim": optim}, checkpoint_id=path)


def load_as(kind: str, path: str, job: Job, *, verify: bool) -> None:
    """Load as users of each kind do."""
    if kind == "ours":
        load(path, job.module, job.optimizer, verify=verify)
    else:
        load_with_torch(path, job)


def load_with_torch(path: str, job: Job, planner: DefaultLoadPlanner | None = None) -> None:
    model = get_model_state_dict(job.module)
    optim = get_optimizer_state_dict(job.module, job.optimizer, options=OPTIONS)
    dcp_load({"model": model, "optim": optim}, checkpoint_id=path, planner=planner)
    set_model_state_dict(job.module, model)
    set_optimizer_state_dict(job.module, job.optimizer, optim, options=OPTIONS)


def check(job: Job, want: Expected, what: str) -> None:
    """Every element of parameters, buffers and state, and every hyper-parameter."""
    for name, value in _named(job.module.state_dict()):
        assert_same_bits(
            value.full_tensor() if isinstance(value, DTensor) else value, want.model[name], f"{what} {name}"
        )
    num_checked = 0
    for name, param in _named(dict(job.module.named_parameters())):
        state = job.optimizer.state[param]
        assert set(state) == {"step", "exp_avg", "exp_inf"}, (what, name, set(state))
        for key, value in state.items():
            whole = want.state[name][key]
            if isinstance(value, FlatShard):
                whole = whole.reshape(-1)[value.owned.as_slice()]
                value = value.local
            elif isinstance(value, DTensor):
                value = value.full_tensor()
            assert_same_bits(value, whole, f"{what} {key} of {name}")
            num_checked += 1
    assert num_checked == 3 * len(want.state), what
    assert hypers(job.optimizer) == want.groups, (what, hypers(job.optimizer), want.groups)
    if isinstance(job.optimizer, ShardedAdamax):  # and together the shards are the whole
        full = job.optimizer.full_state_dict(to=0)
        if full is not None:
            names = {id(param): name for name, param in _named(dict(job.module.named_parameters()))}
            params = [param for group in job.optimizer.param_groups for param in group["params"]]
            for index, param in enumerate(params):
                for key, value in full["state"][index].items():
                    assert_same_bits(value, want.state[names[id(param)]][key], f"{what} gathered {key} of {index}")


def _named(tensors: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, tensor in tensors.items():
        for wrapper in ("_checkpoint_wrapped_module.", "_orig_mod.", "module."):
            name = name.replace(wrapper, "")
        yield name, tensor


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1
