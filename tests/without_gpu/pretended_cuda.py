"""CUDA tensors on a machine that has none: FakeTensors, a guard that does nothing, and counts of waits and launches.

Run in a process of its own: the guard cannot be taken out again.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sharded_adamax.buckets import Precision
from sharded_adamax.collectives import ControlPlane, ProcessGroup
from sharded_adamax.engine import Engine, Settings
from sharded_adamax.members import Member
from tests.without_gpu.streams import pretend_streams

GUARD = Path(__file__).with_name("noop_cuda_guard.cpp")
WORLD_SIZE = 4


def pretend(directory: Path) -> None:
    """Make FakeTensors on "cuda" usable in this process, and be rank 0 of a process group that moves nothing."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    assert compiler, "a C++ compiler is needed, as for torch.compile"
    torch_root = Path(torch.__file__).parent
    library = directory / "noop_cuda_guard.so"
    command = [compiler, "-shared", "-fPIC", "-std=c++20", str(GUARD), "-o", str(library)]
    subprocess.run([*command, f"-I{torch_root / 'include'}", f"-L{torch_root / 'lib'}", "-lc10"], check=True)
    ctypes.CDLL(str(library))
    pretend_streams()
    torch.cuda.get_device_capability = lambda *_: (9, 0)  # torch.distributed asks before a broadcast
    dist.init_process_group("fake", rank=0, world_size=WORLD_SIZE, store=FakeStore())


class Waits(TorchDispatchMode):
    """Counts what makes the host wait for the device: values that it reads, and copies to host memory.

    And copies from there, which wait where the memory is not pinned, and which no CUDA graph can hold.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = [leaf for leaf in tree_leaves((args, kwargs or {})) if isinstance(leaf, Tensor)]
        on_device = any(tensor.device.type == "cuda" for tensor in inputs)
        name = func._schema.name
        if name == "aten::_local_scalar_dense" and isinstance(inputs[0], FakeTensor):
            self.counts["value read"] += int(on_device)
            return torch.ones((), dtype=inputs[0].dtype).item()
        if on_device and name in ("aten::nonzero", "aten::is_nonzero", "aten::equal", "aten::masked_select"):
            self.counts[name] += 1
        outputs = func(*args, **(kwargs or {}))
        written = [inputs[0]] if name == "aten::copy_" else tree_leaves(outputs)
        if on_device and any(isinstance(leaf, Tensor) and leaf.device.type == "cpu" for leaf in written):
            self.counts["copy to the host"] += 1
        from_host = any(tensor.device.type == "cpu" for tensor in inputs)
        if from_host and any(isinstance(leaf, Tensor) and leaf.device.type == "cuda" for leaf in written):
            self.counts["copy to the device"] += 1
        return outputs


class Launches(TorchDispatchMode):
    """Notes each operation that would start a kernel: its name, and on how many tensors at once."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = [leaf for leaf in tree_leaves((args, kwargs or {})) if isinstance(leaf, Tensor)]
        is_view = any(result.alias_info and not result.alias_info.is_write for result in func._schema.returns)
        namespace, name = func._schema.name.split("::")
        if namespace == "aten" and not is_view and any(tensor.device.type == "cuda" for tensor in inputs):
            self.found.append((name, next((len(each) for each in args if isinstance(each, list | tuple)), 1)))
        return func(*args, **(kwargs or {}))


class Job:
    """An engine over a small model whose parameters say that they are on a GPU."""

    def __init__(self, dtype: torch.dtype, *, reduce_gradients: bool = True, **settings: Any) -> None:
        self.fake = FakeTensorMode()
        with self.fake:
            where: dict[str, Any] = {"device": "cuda", "dtype": dtype}
            self.model = nn.Sequential(nn.Linear(64, 128, **where), nn.Tanh(), nn.Linear(128, 8, **where))
            self.inputs = torch.empty(16, 64, device="cuda", dtype=dtype)
        precision = Precision(settings.pop("reduce_dtype", None), settings.pop("master_dtype", None))
        skip_nonfinite, fused = settings.pop("skip_nonfinite", False), settings.pop("fused", False)
        bucket_bytes, num_groups = settings.pop("bucket_bytes", 2048), settings.pop("num_groups", 1)
        self.group: dict[str, Any] = {**torch.optim.Adamax([nn.Parameter(torch.ones(1))]).param_groups[0], **settings}
        self.groups = [self.group] * num_groups
        self.engine = Engine(
            ControlPlane(None),  # the votes are on the host and of this rank alone
            ProcessGroup(dist.group.WORLD),
            Settings(
                reduce_gradients, bucket_bytes, skip_nonfinite, precision, fused, capturable=self.group["capturable"]
            ),
        )
        self.without_gradient: set[str] = set()
        self.state: dict[Tensor, Any] = {}
        named = enumerate(self.model.named_parameters())
        self.engine.extend([Member(p, name, i // (4 // num_groups)) for i, (name, p) in named], self.state)

    def waits_per_step(self, between: Callable[[], object] = lambda: None, num_steps: int = 5) -> dict[str, float]:
        """Train, and return what made the host wait, per step."""
        with Waits() as waits:
            for _ in range(num_steps):
                self._backward()
                between()
                self.engine.step(self.groups, self.state)
                self.engine.discard(set_to_none=True)
        calls = self.engine.group.traffic.calls
        num_buckets = len(self.engine.buckets)
        assert num_buckets > 2
        if self.engine.settings.reduce_gradients:
            assert calls["reduce_scatter"] == num_steps * num_buckets
        return {name: count / num_steps for name, count in waits.counts.items() if count}

    def launches_of_step(self, between: Callable[[], object] = lambda: None) -> list[tuple[str, int]]:
        """Take a step, and return what it would launch after all gradients have arrived."""
        self._backward()
        self.engine.reduce(self.groups, self.state)
        for index in range(len(self.engine.buckets)):
            self.engine.source.shard(index)
        between()
        with Launches() as launches:
            self.engine.step(self.groups, self.state)
        return launches.found

    def _backward(self) -> None:
        """Deliver gradients and call the hooks as autograd does; its threads need a real device."""
        for name, param in reversed(list(self.model.named_parameters())):
            if name in self.without_gradient:
                continue
            with self.fake:
                param.grad = torch.empty_like(param)
            for hook in list((param._post_accumulate_grad_hooks or {}).values()):  # type: ignore[attr-defined]
                hook(param)

    def clip(self, *, error_if_nonfinite: bool = False) -> None:
        self.engine.clip_(self.groups, self.state, 1.0, 2.0, error_if_nonfinite)

    def unscale(self) -> None:
        with self.fake:
            inv_scale, found = torch.empty((), device="cuda"), torch.empty((), device="cuda")
        self.engine.unscale_(self.groups, self.state, inv_scale, found, allow_fp16=False)
