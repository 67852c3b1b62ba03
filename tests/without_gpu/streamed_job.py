"""A job over pretended CUDA whose forward, backward and step run on streams of the user's choice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from sharded_adamax.buckets import Precision
from sharded_adamax.collectives import ControlPlane, Group, LocalGroup, ProcessGroup
from sharded_adamax.engine import Engine, Settings
from sharded_adamax.members import Member
from sharded_adamax.reduction import BackwardReduction
from tests.without_gpu.pretended_cuda import WORLD_SIZE, Waits
from tests.without_gpu.races import Event
from tests.without_gpu.streams import Recording, Stream, StreamedGroup, timeline


@dataclass(frozen=True)
class Streams:
    """On which stream the user does what; those that are the same object are one stream."""

    model: Stream  # forward and backward
    branch: Stream  # half of the model
    clip: Stream
    step: Stream

    @classmethod
    def one(cls) -> Streams:
        return cls(*[timeline.default] * 4)

    @classmethod
    def step_apart(cls) -> Streams:
        return cls(*[Stream("side")] * 2, *[timeline.default] * 2)

    @classmethod
    def branches(cls) -> Streams:
        return cls(timeline.default, Stream("branch"), *[timeline.default] * 2)

    @classmethod
    def all_apart(cls) -> Streams:
        return cls(*(Stream(name) for name in ("side", "branch", "clip", "step")))


class _TwoBranches(nn.Module):
    """Two halves that run at the same time; their parameters share buckets."""

    def __init__(self, streams: Streams, **where: Any) -> None:
        super().__init__()
        self._streams = streams
        self.left_in, self.right_in = nn.Linear(16, 32, **where), nn.Linear(16, 32, **where)
        self.left_out, self.right_out = nn.Linear(32, 8, **where), nn.Linear(32, 8, **where)

    def forward(self, inputs: Tensor) -> Tensor:
        with timeline.on(self._streams.branch):
            self._streams.branch.wait_stream(self._streams.model)
            right: Tensor = self.right_out(self.right_in(inputs))
        # As MultiheadAttention has it: parameters of a child that is not run.
        left = nn.functional.linear(self.left_in(inputs), self.left_out.weight, self.left_out.bias)
        self._streams.model.wait_stream(self._streams.branch)
        right.record_stream(timeline.current)  # type: ignore[arg-type]
        return left + right

    def stream_of(self, name: str) -> Stream:
        return self._streams.branch if name.startswith("right") else self._streams.model


@dataclass
class StreamedJob:
    """One rank that trains. The user orders the streams as torch.optim asks for, and does no more."""

    streams: Streams
    dtype: torch.dtype = torch.float32
    world_size: int = WORLD_SIZE
    settings: dict[str, Any] = field(default_factory=dict)
    frozen: Sequence[str] = ()  # names of parameters that require no gradient at first
    overlap: bool = False
    between: Callable[[StreamedJob], None] = lambda job: None  # after backward, before step
    backward: Callable[[StreamedJob], None] = lambda job: job.deliver()

    def build(self) -> None:
        self.fake = FakeTensorMode()
        with self.fake:
            self.model = _TwoBranches(self.streams, device="cuda", dtype=self.dtype)
            self.inputs = torch.ones(4, 16, device="cuda", dtype=self.dtype)
        self.group: dict[str, Any] = dict(torch.optim.Adamax([nn.Parameter(torch.ones(1))]).param_groups[0])
        chosen = dict(self.settings)
        precision = Precision(chosen.pop("reduce_dtype", None), chosen.pop("master_dtype", None))
        reduce_gradients = chosen.pop("reduce_gradients", True)
        data: Group = LocalGroup() if self.world_size == 1 else ProcessGroup(StreamedGroup(self.world_size))
        self.engine = Engine(
            ControlPlane(None),
            data,
            Settings(reduce_gradients, 2048, chosen.pop("skip_nonfinite", False), precision, fused=False),
        )
        assert not chosen
        self.state: dict[Tensor, Any] = {}
        members = [Member(p, name, 0) for name, p in self.model.named_parameters()]
        self.engine.frozen = [member for member in members if member.name in self.frozen]
        self.after(timeline.default, self.streams.step)
        with timeline.on(self.streams.step):
            self.engine.extend([member for member in members if member.name not in self.frozen], self.state)
            if self.overlap:
                self.engine.overlap_forward(self.model)
            if not reduce_gradients:
                for _ in range(9):  # calls 1, 2, 4, 8 compare the gradients of the ranks, on the host
                    self.engine.source.view()

    def train(self, num_steps: int = 3) -> tuple[list[Event], dict[str, float]]:
        """Return the trace, and what made the host wait, per step."""
        with timeline.recording() as trace, ExitStack() as modes:
            modes.enter_context(torch.no_grad())
            modes.enter_context(Recording())
            self.build()
            assert len(self.engine.buckets) > 2
            with Waits() as waits:
                for _ in range(num_steps):
                    with timeline.on(self.streams.model):
                        self.after(self.streams.step, self.streams.model)
                        self.backward(self)
                    self.between(self)
                    self.after(self.streams.model, self.streams.step)
                    self.step()
                with timeline.on(self.streams.model):
                    self.after(self.streams.step, self.streams.model)
                    self.model(self.inputs)
        return list(trace), {name: number / num_steps for name, number in waits.counts.items() if number}

    def step(self) -> None:
        with timeline.on(self.streams.step):
            self.engine.step([self.group], self.state)
            self.engine.discard(set_to_none=True)

    def after(self, earlier: Stream, later: Stream | None = None) -> None:
        """Let one stream wait for another, where they are two."""
        later = later or timeline.current
        if earlier is not later:
            later.wait_stream(earlier)

    def deliver(self, *, by_hand: bool = False) -> None:
        """Run forward, and backward as autograd does it: on the streams of forward, which wait for each other.

        Args:
            by_hand: The gradients are put into ``param.grad`` without autograd: no hook is called.
        """
        self.model(self.inputs)
        self.after(self.streams.model, self.streams.branch)
        for name, param in reversed(list(self.model.named_parameters())):
            with timeline.on(self.model.stream_of(name)):
                with timeline.named("backward"):
                    self._accumulate(param, param.detach() * 2)
                hooks: Any = {} if by_hand else param._post_accumulate_grad_hooks or {}  # type: ignore[attr-defined]
                for hook in list(hooks.values()):
                    hook(param)
        self.after(self.streams.branch, self.streams.model)

    @staticmethod
    def _accumulate(param: Tensor, gradient: Tensor) -> None:
        if param.grad is None:
            param.grad = gradient
        else:
            param.grad.add_(gradient)

    def accumulate(self) -> None:
        """Two backward passes, the first under no_sync."""
        source = self.engine.source
        assert isinstance(source, BackwardReduction)
        source.enabled = False
        self.deliver()
        source.enabled = True
        self.deliver()

    def on_clip_stream(self, action: Callable[[], object]) -> None:
        self.after(self.streams.model, self.streams.clip)
        with timeline.on(self.streams.clip):
            action()
        self.after(self.streams.clip, self.streams.step)

    def clip(self) -> None:
        self.on_clip_stream(lambda: self.engine.clip_([self.group], self.state, 1.0, 2.0, error_if_nonfinite=False))

    def unscale(self) -> None:
        def unscale() -> None:
            with self.fake:
                inv_scale, found = torch.ones((), device="cuda"), torch.zeros((), device="cuda")
            self.engine.unscale_([self.group], self.state, inv_scale, found, allow_fp16=False)

        self.on_clip_stream(unscale)

    def zero_grad(self) -> None:
        """Throw a first backward away and run another."""
        with timeline.on(self.streams.step):
            self.after(self.streams.model)
            self.engine.discard(set_to_none=True)
        with timeline.on(self.streams.model):
            self.after(self.streams.step)
            self.deliver()

    def deliver_reduced(self) -> None:
        """What DistributedDataParallel leaves, after model.zero_grad()."""
        self.after(self.streams.step, self.streams.branch)  # before gradients that step has read are freed
        for param in self.model.parameters():
            param.grad = None
        self.deliver()
