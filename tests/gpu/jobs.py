"""What the tests train, on one rank or on several; written so that it runs on the CPU, too.

    python -m tests.gpu.jobs

runs everything here that needs no GPU, on the CPU and over gloo: the program is then known to be right, not the GPU's
part in it.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor, nn

from sharded_adamax import ShardedAdamax
from sharded_adamax.reduction import MAX_IN_FLIGHT
from tests.distributed.problems import assert_same_bits, mean_over_ranks, rank_or_zero

T = TypeVar("T")

NUM_LAYERS = 16


def layers(width: int, device: torch.device) -> nn.Sequential:
    """Return equal layers without bias, the same on every rank and every device."""
    torch.manual_seed(0)
    return nn.Sequential(*[nn.Linear(width, width, bias=False) for _ in range(NUM_LAYERS)]).to(device)


def batch(width: int, step: int, rank: int, device: torch.device, rows: int = 8) -> Tensor:
    generator = torch.Generator().manual_seed(1_009 * step + rank)
    return torch.randn(rows, width, generator=generator).to(device)


def layer_mib(width: int) -> float:
    """Return the size of a bucket that holds one layer."""
    return width * width * 4 / 2**20


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def train_beside_torch(
    device: torch.device, width: int, options: dict[str, Any], overlap: bool = False, num_steps: int = 5
) -> None:
    """Compare each step with torch.optim.Adamax, which is fed with the mean over the ranks: bit for bit.

    Two ranks at most: a sum of three depends on the order, which is NCCL's choice.
    """
    assert world_size() <= 2
    model, twin = layers(width, device), layers(width, device)
    optimizer = ShardedAdamax(model.named_parameters(), bucket_mib=layer_mib(width), **options)
    if overlap:
        optimizer.overlap_forward(model)
    reference = torch.optim.Adamax(twin.parameters(), **options)
    for step in range(num_steps):
        of_ranks: list[list[Tensor | None]] = []
        for rank in range(world_size()):
            twin.zero_grad()
            twin(batch(width, step, rank, device)).square().mean().backward()
            of_ranks.append([param.grad for param in twin.parameters()])
        for param, mean in zip(twin.parameters(), mean_over_ranks(of_ranks), strict=True):
            param.grad = mean
        reference.step()
        model(batch(width, step, rank_or_zero(), device)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        for (name, param), other in zip(model.named_parameters(), twin.parameters(), strict=True):
            assert_same_bits(param, other, f"{name} after step {step}")


def train_with_scaler_beside_torch(device: torch.device) -> None:
    """A GradScaler that meets an overflow in step 2 skips it in both, and its scale is the same. One rank."""
    models = [layers(64, device), layers(64, device)]
    optimizers = [ShardedAdamax(models[0].parameters()), torch.optim.Adamax(models[1].parameters())]
    scalers = [torch.amp.GradScaler(device.type, init_scale=2.0**10, growth_interval=2) for _ in models]
    for step in range(5):
        for model, optimizer, scaler in zip(models, optimizers, scalers, strict=True):
            inputs = batch(64, step, 0, device)
            if step == 2:
                inputs[0, 0] = float("inf")
            scaler.scale(model(inputs).square().mean()).backward()
            scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        assert scalers[0].get_scale() == scalers[1].get_scale(), f"step {step}"
        for param, other in zip(*(model.parameters() for model in models), strict=True):
            assert_same_bits(param, other, f"a parameter after step {step}")


@dataclass
class Loop:
    """A training loop whose parts can be taken one by one."""

    model: nn.Module
    optimizer: ShardedAdamax
    inputs: Tensor

    @classmethod
    def of(cls, device: torch.device, width: int, *, rows: int = 8, overlap: bool = False) -> Loop:
        model = layers(width, device)
        optimizer = ShardedAdamax(model.named_parameters(), bucket_mib=layer_mib(width))
        if overlap:
            optimizer.overlap_forward(model)
        return cls(model, optimizer, batch(width, 0, rank_or_zero(), device, rows))

    def step(self, *, clip: bool = False) -> None:
        self.model(self.inputs).square().mean().backward()
        if clip:
            self.optimizer.clip_grad_norm_(1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


class Kernel(NamedTuple):
    """What ran on the device, and when."""

    name: str
    start: float
    stop: float

    @property
    def is_communication(self) -> bool:
        return "nccl" in self.name.lower()

    def overlaps(self, other: Kernel) -> bool:
        return self.start < other.stop and other.start < self.stop


def profile_kernels(device: torch.device, width: int, overlap: bool) -> list[Kernel]:
    """Return the kernels of two steps."""
    loop = Loop.of(device, width, rows=width, overlap=overlap)
    for _ in range(3):
        loop.step()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        loop.step()
        loop.step()
        torch.cuda.synchronize()
    return [
        Kernel(event.name, event.time_range.start, event.time_range.end)
        for event in profile.events()
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation
    ]


def step_without_waiting(device: torch.device, width: int, overlap: bool) -> None:
    """Train so that torch raises where the host would wait for the device."""
    loop = Loop.of(device, width, overlap=overlap)
    loop.step(clip=True)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loop.step()
        loop.step(clip=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")


class Memory(NamedTuple):
    """Bytes that torch's allocator handed out."""

    peak: int
    expected: int
    layer: int


def measure_memory(device: torch.device, width: int) -> Memory:
    """Return the peak of building and three steps beside that of docs/design/step.md."""
    # First everything that libraries keep for themselves.
    layers(width, device)(batch(width, 0, 0, device)).square().mean().backward()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    loop = Loop.of(device, width)
    for _ in range(3):
        loop.step()
    torch.cuda.synchronize()
    layer = width * width * 4
    params = NUM_LAYERS * layer
    # Parameters, m and u, gradient shard; in flight are shards alone where there is nobody to send to.
    in_flight = MAX_IN_FLIGHT * layer if world_size() > 1 else 0
    expected = params + 3 * params // world_size() + in_flight
    return Memory(torch.cuda.max_memory_allocated() - before, expected, layer)


class Half(nn.Module):
    """Operations by element: the bits depend on nothing but the inputs."""

    def __init__(self, seed: int, device: torch.device) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        weights = (torch.randn(50_000 + i, generator=generator) for i in range(4))
        self.weights = nn.ParameterList(nn.Parameter(weight.to(device)) for weight in weights)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([(weight * x).sin().square().sum() for weight in self.weights]).sum()


@dataclass(frozen=True)
class Places:
    """On which stream what runs. None on the CPU: everything in order."""

    model: Any = None
    branch: Any = None
    step: Any = None

    @staticmethod
    def on(stream: Any) -> AbstractContextManager[Any]:
        return nullcontext() if stream is None else torch.cuda.stream(stream)

    @staticmethod
    def after(earlier: Any, later: Any) -> None:
        if earlier is not None and earlier != later:
            later.wait_stream(earlier)


def train_on_streams(
    device: torch.device, places: Places, delay: Callable[[], object], overlap: bool, num_steps: int = 4
) -> list[Tensor]:
    """Train on streams that wait for each other as torch.optim asks for, and return the parameters, on the CPU.

    Args:
        delay: Called on a stream before the package or the model uses it, to keep it busy: what does not wait for it
            then comes too early.
    """
    model = nn.ModuleList([Half(0, device), Half(1, device)])
    # In turns, so that buckets hold parameters of both.
    params = list(chain.from_iterable(zip(*(half.parameters() for half in model), strict=True)))
    optimizer = ShardedAdamax(params, bucket_mib=0.4)
    if overlap:
        optimizer.overlap_forward(model)
    x = torch.tensor(0.5 + rank_or_zero(), device=device)
    if places.model is not None:
        places.after(torch.cuda.current_stream(), places.model)  # type: ignore[no-untyped-call]
    for step in range(num_steps):
        with places.on(places.model):
            places.after(places.step, places.model)
            places.after(places.model, places.branch)
            with places.on(places.branch):
                delay()
                right = model[1](x)
            delay()
            loss = model[0](x)
            places.after(places.branch, places.model)
            if places.model is not None:
                right.record_stream(places.model)
            (loss + right).backward()
        places.after(places.model, places.step)
        with places.on(places.step):
            delay()
            if step % 2:
                optimizer.clip_grad_norm_(1.0)
            optimizer.step()
            optimizer.zero_grad()
        with places.on(places.model):
            # Whatever memory of this stream is free is written over at once, while `step` may still be running.
            garbage = [torch.full((n,), float("nan"), device=device) for n in (20_000, 50_000, 100_000, 200_000) * 8]
            del garbage
    places.after(places.step, places.model)
    if places.model is not None:
        places.model.synchronize()
        torch.cuda.current_stream().wait_stream(places.model)
    return [param.detach().cpu() for param in params]


def on_ranks(num_ranks: int, job: Callable[..., T], *arguments: Any, device_type: str = "cuda") -> list[T]:
    """Return what ``job(device, *arguments)`` returns on each rank of a new process group: NCCL, or gloo on the CPU."""
    with tempfile.TemporaryDirectory() as directory:
        torch.multiprocessing.spawn(  # type: ignore[no-untyped-call]
            _rank, (num_ranks, directory, device_type, job, arguments), nprocs=num_ranks
        )
        return [torch.load(f"{directory}/{rank}.pt", weights_only=False) for rank in range(num_ranks)]


def _rank(
    rank: int, num_ranks: int, directory: str, device_type: str, job: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    device = torch.device(device_type, rank) if device_type == "cuda" else torch.device(device_type)
    if device_type == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if device_type == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{directory}/store", rank=rank, world_size=num_ranks)
    torch.save(job(device, *arguments), f"{directory}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def same_on_other_streams(device: torch.device, overlap: bool) -> None:
    """Compare training on three streams that are kept busy with training on one."""
    expected = train_on_streams(device, Places(), lambda: None, overlap)
    places = Places(*(torch.cuda.Stream() for _ in range(3)))  # type: ignore[no-untyped-call]
    busy = 20_000_000  # cycles, some 10 ms
    got = train_on_streams(device, places, lambda: torch.cuda._sleep(busy), overlap)
    for index, (param, other) in enumerate(zip(got, expected, strict=True)):
        assert_same_bits(param, other, f"parameter {index}")


def _streams_on_cpu(device: torch.device, overlap: bool) -> list[Tensor]:
    return train_on_streams(device, Places(), lambda: None, overlap)


def main() -> None:
    cpu = torch.device("cpu")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    train_beside_torch(cpu, 64, {"weight_decay": 0.1})
    train_with_scaler_beside_torch(cpu)
    Loop.of(cpu, 64).step(clip=True)
    alone = _streams_on_cpu(cpu, False)
    for overlap in (False, True):
        on_ranks(2, train_beside_torch, 64, {}, overlap, device_type="cpu")
        first, second = on_ranks(2, _streams_on_cpu, overlap, device_type="cpu")
        assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))
        assert not torch.equal(first[0], alone[0])
    print("what needs no GPU runs")


if __name__ == "__main__":
    main()
