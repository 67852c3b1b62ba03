"""The log of a run, one JSON object per line: rank 0 of `train.py` writes it, demo and pictures read it.

A *life* is one start of the program: a run that was killed and resumed twice has three. The events of a life:

    start   world size, the step it went on from, and which rank owns what
    held    after its first step: the bytes that each rank holds
    step    one per training step
    end     written by whoever ended it, where somebody did
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from sharded_adamax.layout import Layout


class Step(NamedTuple):
    """One training step; `step` counts finished steps, so the first is 1."""

    step: int
    loss: float  # nats per byte, mean over the global batch
    seconds: float
    tokens_per_second: float


class Held(NamedTuple):
    """The bytes that one rank holds, as `ShardedAdamax.held_bytes` counts them from live tensors."""

    parameters: int
    gradient_shards_peak: int
    state: int
    buckets_peak: int
    masters: int

    @property
    def total(self) -> int:
        """Their sum."""
        return sum(self)


class Slot(NamedTuple):
    """The place of a parameter in a bucket, in elements."""

    name: str
    start: int
    numel: int


class Bucket(NamedTuple):
    """A bucket; rank r owns the elements [r * shard_numel, (r + 1) * shard_numel)."""

    numel: int
    shard_numel: int
    slots: list[Slot]


@dataclass(frozen=True)
class Life:
    """Everything that one start of the program wrote."""

    number: int  # the first life is 1
    world_size: int
    start_step: int  # steps that were already done
    total_steps: int
    num_parameters: int
    buckets: list[Bucket]
    held: list[Held] = field(default_factory=list)  # one per rank
    steps: list[Step] = field(default_factory=list)
    endings: list[str] = field(default_factory=list)

    @property
    def last_step(self) -> int:
        """The last step that was finished."""
        return self.steps[-1].step if self.steps else self.start_step


class RunLog:
    """Appends events to a file; each is one write, so a kill leaves whole lines."""

    def __init__(self, path: Path, *, life: int, world_size: int) -> None:
        self.path = path
        self.life = life
        self.world_size = world_size

    @classmethod
    def next_life(cls, path: Path, *, world_size: int) -> RunLog:
        """Open the log for the life after those that it already tells of."""
        return cls(path, life=len(read_lives(path)) + 1, world_size=world_size)

    def append(self, event: str, **values: object) -> None:
        """Write one line."""
        common = {"event": event, "life": self.life, "world_size": self.world_size}
        line = json.dumps(common | values) + "\n"
        with self.path.open("ab", buffering=0) as file:
            file.write(line.encode())


def layout_as_json(layout: Layout) -> list[dict[str, object]]:
    """Say of each bucket how it is cut and which parameter lies where."""
    return [
        {
            "numel": bucket.numel,
            "shard_numel": bucket.shard_numel,
            "slots": [[layout.specs[slot.param].name, slot.start, slot.numel] for slot in bucket.slots],
        }
        for bucket in layout.buckets
    ]


def read_lives(path: Path) -> list[Life]:
    """Read a log; one that does not exist yet holds no lives."""
    lives: list[Life] = []
    for record in _records(path):
        match record["event"]:
            case "start":
                lives.append(_read_start(record))
            case "held":
                lives[-1].held.extend(Held(**rank) for rank in record["ranks"])
            case "step":
                lives[-1].steps.append(Step(**{name: record[name] for name in Step._fields}))
            case "end":
                lives[-1].endings.append(record["how"])
    return lives


def _records(path: Path) -> Iterator[dict[str, Any]]:
    content = path.read_text() if path.exists() else ""
    for line in content.splitlines(keepends=True):
        if line.endswith("\n"):  # else it is being written right now
            yield json.loads(line)


def _read_start(record: dict[str, Any]) -> Life:
    buckets = [
        Bucket(bucket["numel"], bucket["shard_numel"], [Slot(*slot) for slot in bucket["slots"]])
        for bucket in record["buckets"]
    ]
    return Life(
        number=record["life"],
        world_size=record["world_size"],
        start_step=record["start_step"],
        total_steps=record["total_steps"],
        num_parameters=record["num_parameters"],
        buckets=buckets,
    )
