"""A training step of ShardedAdamax beside its peers: time, bytes on the wire and memory, over links of several rates.

    python -m tests.benchmarks.step --json step.json --picture docs/images/step.png

Each contender (contenders.py) has rank processes of its own and takes its turn in every round: some steps, without a
barrier between them. A link in Mbit/s is between hosts that are network namespaces of this machine, one for each rank
(needs root, see links.py). Then comes what many tiny parameters cost (tiny.py).

"compute alone" is forward and backward on all ranks at once. A step can be no faster than that, nor than its bytes at
the rate of the link: the larger of the two is the limit.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import statistics
from dataclasses import asdict
from pathlib import Path

from tests.benchmarks import tiny
from tests.benchmarks.contenders import BY_NAME, COMPUTE, make_model, sizes_of
from tests.benchmarks.links import joined
from tests.benchmarks.report import Report, ratios
from tests.benchmarks.scene import Scene, Schedule, measure
from tests.benchmarks.step_picture import draw
from tests.benchmarks.teams import Work

MIB = 1 << 20


def tell(report: Report, scene: Scene, num_params: int) -> None:
    """Report a scene in two tables: time, and the rest."""
    seconds = {name: scene.seconds(name) for name in scene.blocks}
    columns = {}
    if scene.ours in seconds:
        columns["ours / this"] = {name: ratios(seconds[scene.ours], its) for name, its in seconds.items()}
    wire_seconds = scene.wire_seconds(num_params)
    if COMPUTE in seconds:
        limit = [max(compute, wire_seconds) for compute in seconds[COMPUTE]]
        columns["this / limit"] = {name: ratios(mine, limit) for name, mine in seconds.items()}
    report.table(
        f"step: {scene.title}",
        seconds,
        columns,
        ours=scene.ours,
        bytes_of_a_step_on_the_wire=f"{1e3 * wire_seconds:.0f} ms",
        load_before_and_after=scene.load,
        left_out=scene.left_out or "none",
    )
    report.figures(
        f"bytes: {scene.title}",
        {
            name: {
                "CPU ms": 1e3 * statistics.median(max(block.cpu_seconds for block in ranks) for ranks in rounds),
                "MiB sent": max(block.sent_bytes for ranks in rounds for block in ranks) / MIB,
                "MiB held": scene.held_bytes(name) / MIB,
                "RSS MiB": max(memory.peak_bytes for memory in scene.resident[name]) / MIB,
                "loss": scene.outcomes[name].loss,
                "norm": scene.outcomes[name].norm,
            }
            for name, rounds in scene.blocks.items()
        },
    )


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _link(text: str) -> float | None:
    return None if text == "loopback" else float(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="*", default=[2, 4], help="none: only the tiny parameters")
    parser.add_argument(
        "--links", type=_link, nargs="+", default=[None, 5000.0, 1000.0, 200.0], help="Mbit/s, or the word loopback"
    )
    parser.add_argument(
        "--contenders", nargs="+", choices=list(BY_NAME), default=list(BY_NAME), metavar="NAME", help="default: all"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=5, help="timed in each round")
    parser.add_argument("--warm-up", type=int, default=2, help="steps before them in each round")
    parser.add_argument("--bucket-mib", type=float, default=4)
    parser.add_argument("--batch", type=int, default=4, help="sequences per rank and step")
    for name, value in {"context": 64, "width": 256, "layers": 9, "heads": 4, "table-rows": 384}.items():
        parser.add_argument(f"--{name}", type=int, default=value, help="of the model, see launch/byte_model.py")
    parser.add_argument("--tiny", type=int, default=1000, help="number of tiny parameters; 0 leaves them out")
    parser.add_argument("--json", type=Path, help="where to write all figures")
    parser.add_argument("--picture", type=Path, help="where to draw the steps")
    return parser


def main() -> None:
    options = _parser().parse_args()
    work = Work(sizes_of(options), options.batch, options.bucket_mib)
    schedule = Schedule(options.rounds, options.warm_up, options.steps)
    num_params = sum(param.numel() for param in make_model(work.sizes).parameters())
    report = Report(options.json)
    report.facts(
        deepspeed=_version("deepspeed"),
        parameters=f"{num_params / 1e6:.2f} M, float32",
        work=asdict(work),
        schedule=schedule._asdict(),
        **{name: BY_NAME[name].settings for name in options.contenders},
    )
    scenes = []
    for ranks in options.ranks:
        for rate_mbit in options.links:
            scene = Scene(ranks, rate_mbit)
            with contextlib.ExitStack() as stack:
                try:
                    hosts = stack.enter_context(joined(ranks, rate_mbit))
                except OSError as error:
                    print(f"\n{scene.title}: not measured: {error}")
                    continue
                measure(scene, hosts, work, options.contenders, schedule)
            if not scene.blocks:
                print(f"\n{scene.title}: not measured: {scene.left_out}")
                continue
            tell(report, scene, num_params)
            scenes.append(scene)
    if options.tiny:
        tiny.measure_and_tell(report, options.tiny, 3 * options.rounds)
    report.close()
    if options.picture is not None:
        draw(scenes, num_params, options.picture)


if __name__ == "__main__":
    main()
