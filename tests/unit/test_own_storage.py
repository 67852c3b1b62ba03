"""Parameters lie side by side in a bucket, and programs that look at storages see separate tensors."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from sharded_adamax import ShardedAdamax
from tests.distributed.models import Net
from tests.distributed.problems import assert_same_params


def test_safetensors_saves_and_loads_every_parameter_of_a_model(tmp_path: Path) -> None:
    path = str(tmp_path / "model.safetensors")
    net, other = Net(seed=0), Net(seed=1)
    ShardedAdamax(net.parameters())
    ShardedAdamax(other.parameters())
    safetensors.torch.save_model(net, path)
    assert set(safetensors.torch.load_file(path)) == set(dict(net.named_parameters()))
    assert safetensors.torch.load_model(other, path) == (set(), [])
    assert_same_params(list(other.parameters()), list(net.parameters()), "loaded by safetensors")


def test_torch_save_writes_one_parameter_and_not_its_bucket() -> None:
    params = [nn.Parameter(torch.ones(64)), nn.Parameter(torch.ones(100_000))]
    ShardedAdamax(params)
    file = io.BytesIO()
    torch.save(params[0], file)
    assert file.tell() < 10_000


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64], ids=str)
def test_a_parameter_of_any_shape_has_a_storage_of_its_size_that_is_part_of_the_bucket(dtype: torch.dtype) -> None:
    shapes = [(), (3, 0), (7,), (2, 3, 4, 5)]
    params = [nn.Parameter(torch.ones(shape, dtype=dtype)) for shape in shapes]
    params.append(nn.Parameter(torch.ones(2, 3, 4, 5, dtype=dtype).to(memory_format=torch.channels_last)))
    strides = [param.stride() for param in params]
    optimizer = ShardedAdamax(params)
    sum(param.abs().sum() for param in params).backward()
    optimizer.step()
    for param, stride in zip(params, strides, strict=True):
        assert (param.untyped_storage().nbytes(), param.storage_offset()) == (param.nbytes, 0)
        assert param.stride() == stride
        assert (param != 1).all(), "the update did not reach the parameter"
