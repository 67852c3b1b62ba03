"""`plan` as a function: what it takes, what it refuses, and arithmetic that needs no rank."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import nn

from sharded_adamax import plan
from sharded_adamax.layout import ParamSpec
from sharded_adamax.planning.model import Parameter, with_biases
from sharded_adamax.planning.peers import partition
from tests.benchmarks.memory import allocated

MIB = 2**20


class Llama70B(nn.Module):
    """The parameters of a 70-billion-parameter model, without a forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(128_256, 8192)
        attention = [(8192, 8192), (1024, 8192), (1024, 8192), (8192, 8192)]
        shapes = [*attention, (28_672, 8192), (28_672, 8192), (8192, 28_672), (8192,), (8192,)]
        self.layers = nn.ModuleList(
            nn.ParameterList([nn.Parameter(torch.empty(shape)) for shape in shapes]) for _ in range(80)
        )
        self.norm = nn.RMSNorm(8192)
        self.head = nn.Linear(8192, 128_256, bias=False)


def test_70_billion_parameters_are_planned_without_allocating_them() -> None:
    def planned() -> object:
        with torch.device("meta"):
            model = Llama70B()
        found = plan(model, world_sizes=[8, 64, 512], param_dtype=torch.bfloat16, master_dtype=torch.float32)
        assert found.model.num_params == 70_553_706_496
        assert found.rows[1].sharded_adamax.parameters == 2 * found.model.num_params
        return found

    peak, _ = allocated(planned)
    assert peak < 4096


def test_the_arithmetic_of_a_model_of_whole_buckets() -> None:
    row = plan([(MIB,)] * 8, world_sizes=[4], bucket_mib=4, device="cuda").rows[0]
    mine, bucket = row.sharded_adamax, 4 * MIB
    assert (mine.parameters, mine.state, mine.masters) == (8 * bucket, 2 * 8 * bucket // 4, 0)
    # When the last gradient is there: five shards, and two buckets in flight, each with room for its result.
    assert mine.peak_at == "backward, gradients of bucket 8"
    assert mine.gradients == bucket
    assert (mine.gradient_shards, mine.buckets, mine.temporaries) == (5 * bucket // 4, 2 * (bucket + bucket // 4), 0)
    assert mine.sent_per_step == 3 * 2 * 8 * bucket // 4
    assert mine.peak == mine.steady + mine.gradients + mine.gradient_shards + mine.buckets + mine.temporaries
    assert row.ddp.peak == 5 * 8 * bucket, "parameters, gradients, two of state, and |gradients| of foreach"


def test_a_master_costs_four_bytes_per_element_of_the_shard() -> None:
    row = plan([(MIB,)], world_sizes=[2], param_dtype=torch.bfloat16, master_dtype=torch.float32).rows[0]
    assert (row.sharded_adamax.parameters, row.sharded_adamax.masters) == (2 * MIB, 4 * MIB // 2)
    assert row.ddp.parameters == 4 * MIB, "torch's Adamax has no master: the parameters are of 32 bits"


def test_frozen_parameters_and_buffers_are_held_and_nothing_more() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64))
    model[0].weight.requires_grad_(False)
    row = plan(model, world_sizes=[1]).rows[0]
    assert row.sharded_adamax.frozen == row.ddp.frozen == 64 * 64 * 4 + (2 * 64 * 4 + 8)
    assert row.sharded_adamax.state == 3 * 64 * 8


def test_a_weight_and_its_bias_are_one_use() -> None:
    names = ["a.weight", "a.bias", "b.weight", "c.bias", "in_proj_weight", "in_proj_bias"]
    assert with_biases([(name, index) for index, name in enumerate(names)]) == ((0, 1), (2,), (3,), (4, 5))


def test_the_largest_parameter_goes_to_the_rank_with_the_fewest_elements() -> None:
    def spec(numel: int) -> ParamSpec:
        return ParamSpec(str(numel), (numel,), torch.float32)

    parts = partition([Parameter(spec(numel), numel != 30) for numel in (5, 40, 30, 20, 10)], 2)
    assert [[part.numel for part in of_rank] for of_rank in parts] == [[40, 10, 5], [20]]


# ------------------------------------------------------------------------------------------------------ what fits


@pytest.mark.parametrize("scheme", ["sharded_adamax", "zero"])
@pytest.mark.parametrize("gpu_gib", [40, 60, 100])
def test_the_smallest_world_size_fits_and_one_rank_less_does_not(scheme: str, gpu_gib: int) -> None:
    planned = plan(7e9)
    size = planned.smallest_world_size(gpu_gib * 2**30, scheme)  # type: ignore[arg-type]
    if size is None:
        assert scheme == "zero" and planned.footprint("zero", 4096).peak > gpu_gib * 2**30  # type: ignore[union-attr]
        return
    assert size > 1
    assert planned.footprint(scheme, size).peak <= gpu_gib * 2**30  # type: ignore[arg-type, union-attr]
    assert planned.footprint(scheme, size - 1).peak > gpu_gib * 2**30  # type: ignore[arg-type, union-attr]


def test_what_never_fits_is_said_so() -> None:
    planned = plan(7e9)
    assert planned.smallest_world_size(26 * 2**30) is None, "the parameters alone are more"
    assert planned.smallest_world_size(100 * 2**30, "ddp") is None
    assert planned.smallest_world_size(140 * 2**30, "ddp") == 1


def test_zero_redundancy_optimizer_is_left_out_where_it_would_refuse() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8).to(torch.bfloat16))
    planned = plan(model)
    assert all(row.zero is None for row in planned.rows)
    assert planned.smallest_world_size(2**30, "zero") is None


# ---------------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("model", "error", "text"),
    [
        ("7B", TypeError, "nn.Module, a list of shapes or a number of parameters, got str"),
        (True, TypeError, "got bool"),
        (None, TypeError, "got NoneType"),
        (0, ValueError, "from 1 to"),
        (-5, ValueError, "from 1 to"),
        (1.5, ValueError, "whole number"),
        (float("nan"), ValueError, "whole number"),
        (float("inf"), ValueError, "whole number"),
        (1e18, ValueError, "from 1 to"),
        ([], ValueError, "parameters to train"),
        ([(3, 0)], ValueError, "parameters to train"),
        ([(3, -1)], ValueError, r"got \(3, -1\) at index 0"),
        ([3], ValueError, "got 3 at index 0"),
        (nn.ReLU(), ValueError, "parameters to train"),
        (nn.Linear(3, 3).requires_grad_(False), ValueError, "one with 12, none of them"),
        (nn.LazyLinear(3), ValueError, "weight has no shape yet"),
    ],
)
def test_what_is_no_model_is_refused(model: float | Sequence[Sequence[int]], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        plan(model)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"world_sizes": []}, "world_sizes"),
        ({"world_sizes": [0]}, r"at least 1, got \[0\]"),
        ({"world_sizes": [1.5]}, "world_sizes"),
        ({"bucket_mib": 0}, "bucket_mib > 0"),
        ({"device": "tpu"}, "device"),
        ({"param_dtype": torch.int8}, "floating-point"),
        ({"master_dtype": torch.bfloat16}, "master_dtype"),
        ({"reduce_dtype": torch.bfloat16, "reduce_gradients": False}, "no effect"),
    ],
)
def test_what_the_optimizer_refuses_the_plan_refuses(settings: dict[str, object], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        plan(100, **settings)  # type: ignore[arg-type]


def test_a_complex_parameter_is_not_cast_and_not_reduced_in_another_dtype() -> None:
    model = nn.ParameterList([nn.Parameter(torch.zeros(64, dtype=torch.complex64))])
    assert plan(model, param_dtype=torch.bfloat16, world_sizes=[1]).rows[0].sharded_adamax.parameters == 64 * 8
    with pytest.raises(ValueError, match=r"0 is complex .*cannot carry it"):
        plan(model, reduce_dtype=torch.float32)


def test_the_plan_of_a_module_does_not_touch_it() -> None:
    model = nn.Linear(8, 8)
    before = [(param.data_ptr(), param.dtype, param.grad) for param in model.parameters()]
    plan(model, param_dtype=torch.bfloat16, world_sizes=[3])
    assert [(param.data_ptr(), param.dtype, param.grad) for param in model.parameters()] == before
