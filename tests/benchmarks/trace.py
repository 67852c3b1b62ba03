"""Profile training on 2 ranks and draw one step: what is under way, and what arrives from the other rank meanwhile.

    python -m tests.benchmarks.trace --picture docs/images/trace.png

The ranges are those that `torch.profiler` shows to every user (chrome://tracing, Perfetto); the traces are kept with
``--keep DIR``. What arrives is read from the kernel (TCP_INFO) about once per millisecond: a range between launch and
wait says that a collective may run, this says when it did.
"""

from __future__ import annotations

import argparse
import json
import re
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from sharded_adamax import ShardedAdamax
from tests.distributed.wire import tcp_bytes_received

NUM_LAYERS = 6
WIDTH = 1024
BATCH = 128
RANGE = re.compile(r"sharded_adamax::(reduce_scatter|wait reduce|update|all_gather|wait gather) bucket (\d+)")


@dataclass(frozen=True)
class Range:
    """A named stretch of time, in seconds since the Epoch."""

    name: str
    start: float
    stop: float


@dataclass(frozen=True)
class Trace:
    """What one rank did in the profiled steps."""

    ranges: list[Range]
    arrivals: list[tuple[float, int]]  # time, bytes received so far over all connections


def record(trace_path: str, num_steps: int) -> Trace:
    """Train on the ranks of the default process group and profile the last steps."""
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU()) for _ in range(NUM_LAYERS)])
    optimizer = ShardedAdamax(model.named_parameters(), bucket_mib=WIDTH * (WIDTH + 64) * 4 / 2**20)
    inputs = torch.randn(BATCH, WIDTH)

    def step() -> None:
        with record_function("forward"):
            loss = model(inputs).square().mean()
        with record_function("backward"):
            loss.backward()
        with record_function("step"):
            optimizer.step()
        optimizer.zero_grad()

    for _ in range(3):
        step()
    arrivals: list[tuple[float, int]] = []
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.001):
            arrivals.append((time.time(), sum(tcp_bytes_received().values())))

    watcher = threading.Thread(target=watch)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        watcher.start()
        for _ in range(num_steps):
            dist.barrier()  # so that the picture shows one step, not the wait for the slower rank
            step()
        over.set()
        watcher.join()
    profiler.export_chrome_trace(trace_path)
    return Trace(read_ranges(Path(trace_path)), arrivals)


def read_ranges(path: Path) -> list[Range]:
    """Read forward, backward, step and the optimizer's ranges from a chrome trace, in the order of their starts."""
    trace: dict[str, Any] = json.loads(path.read_text())
    base = trace.get("baseTimeNanoseconds", 0) / 1e9
    found = [
        Range(event["name"], base + event["ts"] / 1e6, base + (event["ts"] + event["dur"]) / 1e6)
        for event in trace["traceEvents"]
        if event.get("ph") == "X"
        and (event["name"] in ("forward", "backward", "step") or RANGE.fullmatch(event["name"]))
    ]
    return sorted(found, key=lambda one: one.start)


def last_step(ranges: list[Range]) -> list[Range]:
    """Return the ranges from the last forward on."""
    start = [one for one in ranges if one.name == "forward"][-1].start
    return [one for one in ranges if one.start >= start]


def under_way(ranges: list[Range], launch: str, wait: str) -> list[tuple[int, float, float]]:
    """Return bucket, launch and end of the wait for each collective of one kind."""
    begun = {
        int(one.name.split()[-1]): one.start for one in ranges if one.name.startswith(f"sharded_adamax::{launch} ")
    }
    ended = {int(one.name.split()[-1]): one.stop for one in ranges if one.name.startswith(f"sharded_adamax::{wait} ")}
    return [(bucket, begun[bucket], ended[bucket]) for bucket in sorted(begun)]


def draw(traces: list[Trace], picture: Path) -> None:
    """Draw the last step of every rank, one below the other."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        2 * len(traces), 1, figsize=(11, 3.4 * len(traces)), sharex=True, height_ratios=[3, 1] * len(traces)
    )
    zero = min(last_step(trace.ranges)[0].start for trace in traces)
    lanes = ["all-gather", "update", "reduce-scatter", "forward, backward, step"]
    colors = {"forward": "#9ecae1", "backward": "#4c72b0", "step": "#c7c7c7"}
    for rank, trace in enumerate(traces):
        lane, wire = axes[2 * rank], axes[2 * rank + 1]
        ranges = last_step(trace.ranges)

        def bar(row: int, start: float, stop: float, color: str, text: str, axis: Any = lane) -> None:
            axis.barh(row, (stop - start) * 1e3, left=(start - zero) * 1e3, height=0.8, color=color, edgecolor="white")
            if len(text) < 3 or stop - start > 0.01:
                axis.text((start - zero) * 1e3 + 0.2, row, text, fontsize=7, va="center", clip_on=True)

        for one in ranges:
            if one.name in colors:
                bar(3, one.start, one.stop, colors[one.name], one.name)
            elif "update" in one.name:
                bar(1, one.start, one.stop, "#55a868", one.name.split()[-1])
        for row, launch, wait, color in (
            (2, "reduce_scatter", "wait reduce", "#dd8452"),
            (0, "all_gather", "wait gather", "#8172b3"),
        ):
            for bucket, start, stop in under_way(ranges, launch, wait):
                offset = (bucket % 3 - 1) * 0.27  # neighbours overlap in time
                lane.barh(row + offset, (stop - start) * 1e3, left=(start - zero) * 1e3, height=0.25, color=color)
                lane.text((start - zero) * 1e3 + 0.3, row + offset, str(bucket), fontsize=6, va="center")
        lane.set_yticks(range(len(lanes)), lanes, fontsize=8)
        lane.set_title(f"rank {rank}", fontsize=9, loc="left")
        times = [(when - zero) * 1e3 for when, _ in trace.arrivals]
        rates = [
            (later - earlier) / 2**20 / max(1e-9, after - before)
            for (before, earlier), (after, later) in zip(trace.arrivals, trace.arrivals[1:], strict=False)
        ]
        wire.fill_between(times[1:], rates, step="pre", color="#937860", alpha=0.7)
        wire.set_ylabel("arriving\nMiB/s", fontsize=8)
        last = max(one.stop for one in ranges)
        wire.set_xlim(-1, (last - zero) * 1e3 + 1)
    axes[-1].set_xlabel(
        "milliseconds; numbers are buckets, bars of collectives go from the launch to the end of the wait"
    )
    figure.tight_layout()
    figure.savefig(picture, dpi=130)


def main() -> None:
    """Record and draw."""
    from tests.distributed.pool import Pool

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--picture", type=Path, default=Path("docs/images/trace.png"))
    parser.add_argument("--keep", type=Path, default=Path("/tmp"), help="where the chrome traces go")
    options = parser.parse_args()
    pool = Pool()
    pattern = str(options.keep / "sharded_adamax_trace_rank")
    traces = pool.run(2, _record_own, pattern, 4)
    pool.close()
    draw(traces, options.picture)
    what = f"{NUM_LAYERS} layers of {WIDTH} x {WIDTH}, 2 gloo ranks with one thread each"
    print(f"torch {torch.__version__}, {what}: {options.picture}")


def _record_own(pattern: str, num_steps: int) -> Trace:
    return record(f"{pattern}{dist.get_rank()}.json", num_steps)


if __name__ == "__main__":
    main()
