"""What all benchmarks report in the same way: the machine and its load, times of interleaved rounds, and their ratios.

Everything is run once in each round, so that a machine that is slow for a while is slow for all. A ratio is taken
within a round; its median is reported with the least and the most.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

Action = Callable[[], object]


def seconds_of(action: Action) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def seconds_of_the_slowest_rank(action: Action) -> float:
    """Return the time until the last rank is done, when all begin together. Collective, the same on all ranks."""
    dist.barrier()
    slowest = torch.tensor(seconds_of(action), dtype=torch.float64)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return slowest.item()


def interleaved(
    actions: Mapping[str, Action], rounds: int, clock: Callable[[Action], float] = seconds_of
) -> dict[str, list[float]]:
    """Return the seconds of each action in each round; a round before the first warms everything up."""
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for index in range(rounds + 1):
        for name, action in actions.items():
            elapsed = clock(action)
            if index:
                seconds[name].append(elapsed)
    return seconds


def ratios(numerators: Sequence[float], denominators: Sequence[float]) -> list[float]:
    """Return the ratio of each round."""
    return [numerator / denominator for numerator, denominator in zip(numerators, denominators, strict=True)]


class Report:
    """Print the machine, then a table for each thing measured, and write all of it as JSON after each table."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._result: dict[str, Any] = {"machine": _machine()}
        print(*(f"{key}: {value}" for key, value in self._result["machine"].items()), sep="\n", flush=True)

    def table(
        self,
        title: str,
        seconds: Mapping[str, Sequence[float]],
        columns: Mapping[str, Mapping[str, Sequence[float]]],
        **facts: object,
    ) -> None:
        """Print a row of milliseconds for each name, and columns beside it.

        Args:
            seconds: By name, those of each round.
            columns: By title and name, a ratio for each round. A name may be missing.
            facts: What else there is to know about this table; printed and written.
        """
        print(f"\n{title}", *(f"{key.replace('_', ' ')}: {value}" for key, value in facts.items()), sep="\n")
        print(f"{'':36} {'ms':>8} {'range':>17}" + "".join(f" {column:>16} {'range':>13}" for column in columns))
        rows = {}
        for name, times in seconds.items():
            line = f"{name:36} {_spread([1e3 * each for each in times], 8, 17)}"
            row: dict[str, Any] = {"seconds": list(times)}
            for column, values in columns.items():
                if name in values:
                    line += f" {_spread(values[name], 16, 13)}"
                    row[column] = {"median": statistics.median(values[name]), "rounds": list(values[name])}
                else:
                    line += f" {'':30}"
            print(line.rstrip(), flush=True)
            rows[name] = row
        self._result[title] = {**facts, "rows": rows}
        self._write()

    def facts(self, **facts: object) -> None:
        """Print and write what holds for all tables."""
        print(*(f"{key.replace('_', ' ')}: {value}" for key, value in facts.items()), sep="\n", flush=True)
        self._result |= facts

    def figures(self, title: str, rows: Mapping[str, Mapping[str, float]]) -> None:
        """Print single figures, a row for each name; all rows have the same columns."""
        columns = [*next(iter(rows.values()))]
        print(f"\n{title}\n{'':36}" + "".join(f" {column:>12}" for column in columns))
        for name, row in rows.items():
            print(f"{name:36}" + "".join(f" {row[column]:12.4g}" for column in columns), flush=True)
        self._result[title] = {"rows": {name: dict(row) for name, row in rows.items()}}
        self._write()

    def close(self) -> None:
        """Print the load in the end, and write the file."""
        self._result["machine"]["load_after"] = os.getloadavg()
        print(f"\nload_after: {os.getloadavg()}")
        self._write()

    def _write(self) -> None:
        if self._path is not None:
            self._path.write_text(json.dumps(self._result, indent=1))


def _spread(values: Sequence[float], median_width: int, range_width: int) -> str:
    extent = f"{min(values):.2f}-{max(values):.2f}"
    return f"{statistics.median(values):{median_width}.2f} {extent:>{range_width}}"


def _machine() -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": f"{len(cpu)} x {cpu[0] if cpu else platform.machine()}",
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "load_before": os.getloadavg(),
    }
