"""``python -m sharded_adamax``: plan a job; look into checkpoints, check them, convert them.

Tables need rich and progress bars tqdm (``pip install sharded-adamax[cli]``); without them there is plain text, and no
bar. Results go to standard output, everything else to standard error.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

import torch

from sharded_adamax.checkpoint import conversion, inspection
from sharded_adamax.checkpoint.errors import CheckpointDamagedError, CheckpointError
from sharded_adamax.checkpoint.inspection import Report, Summary
from sharded_adamax.planning import Plan, picture, plan, report, sources

WHOLE, DAMAGED, USAGE = 0, 1, 2
_INTERRUPTED = 130
_PRECISIONS: dict[str, tuple[torch.dtype | None, torch.dtype | None]] = {  # of parameters, of masters
    "model": (None, None),
    "fp32": (torch.float32, None),
    "bf16": (torch.bfloat16, None),
    "fp16": (torch.float16, None),
    "bf16+master": (torch.bfloat16, torch.float32),
    "fp16+master": (torch.float16, torch.float32),
}
_REDUCE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_EXIT_CODES = "exit codes: 0 done, whole; 1 damaged, or the disk refused; 2 bad arguments, or not a checkpoint"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code."""
    options = _parser().parse_args(arguments)
    try:
        code: int = options.run(options)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return _INTERRUPTED
    except BrokenPipeError:  # the reader, for example `head`, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return WHOLE
    except (CheckpointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        asked_wrongly = isinstance(error, (FileNotFoundError, FileExistsError, NotADirectoryError))
        refused = isinstance(error, (CheckpointDamagedError, OSError)) or isinstance(error.__cause__, OSError)
        return DAMAGED if refused and not asked_wrongly else USAGE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m sharded_adamax", description="Plan a job; work with checkpoints.", epilog=_EXIT_CODES
    )
    commands = parser.add_subparsers(required=True, metavar="command")
    _add_plan(commands.add_parser("plan", help="what each rank will hold and send, before any training"))

    inspect = commands.add_parser("inspect", help="what is in a checkpoint", epilog=_EXIT_CODES)
    inspect.add_argument("path", type=Path, help="a checkpoint directory, also of torch.distributed.checkpoint")
    inspect.add_argument("--json", action="store_true", help="print JSON")
    inspect.set_defaults(run=_inspect)

    verify = commands.add_parser("verify", help="is it whole: every byte is read", epilog=_EXIT_CODES)
    verify.add_argument("path", type=Path, help="a checkpoint, or a directory of checkpoints")
    verify.set_defaults(run=_verify)

    convert = commands.add_parser("convert", help="write it in another format", epilog=_EXIT_CODES)
    convert.add_argument("source", type=Path, help="a checkpoint directory, a torch file or a safetensors file")
    convert.add_argument("target", type=Path, help="must not exist")
    convert.add_argument("--to", required=True, choices=["torch", "safetensors", "sharded"])
    convert.add_argument(
        "--without-manifest",
        action="store_true",
        help="also read a directory of another program, which nothing says is whole",
    )
    convert.set_defaults(run=_convert)
    return parser


def _add_plan(parser: argparse.ArgumentParser) -> None:
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("factory", nargs="?", metavar="module:factory", help="makes the model, on the meta device")
    model.add_argument("--params", metavar="NUMBER", help="the number of parameters: 7e9, 7B")
    model.add_argument("--hf-config", type=Path, metavar="PATH", help="config.json of Transformers, or its directory")
    parser.add_argument("--world-sizes", type=_integers, default=[1, 2, 4, 8], metavar="N,N,...", help="1,2,4,8")
    parser.add_argument(
        "--precision", default="model", metavar="NAME,...", help=f"model: as it is built; {', '.join(_PRECISIONS)}"
    )
    parser.add_argument("--reduce-dtype", choices=_REDUCE_DTYPES, help="of gradients on the wire and in the sum")
    parser.add_argument("--ddp-reduces", action="store_true", help="reduce_gradients=False: keep DDP")
    parser.add_argument("--bucket-mib", type=float, default=25)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="NCCL and foreach, or gloo")
    parser.add_argument(
        "--gpu-gib", type=float, help="from how many ranks on does it fit? Without what activations need"
    )
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw it: .png, .pdf or .svg")
    parser.add_argument("--json", action="store_true", help="print JSON, in bytes")
    parser.set_defaults(run=_plan)


def _integers(text: str) -> list[int]:
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected numbers such as 8,16,64, got {text!r}") from None


def _plan(options: argparse.Namespace) -> int:
    try:
        gpu_bytes = _gpu_bytes(options.gpu_gib)
        if options.picture:
            picture.check_picture(options.picture)
        plans = _plans(options)
    except (TypeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return USAGE
    if options.picture:
        picture.draw(plans, options.picture, gpu_bytes)
        print(f"drawn: {options.picture}", file=sys.stderr)
    if options.json:
        print(json.dumps(report.as_json(plans, gpu_bytes), indent=2))
    else:
        _print_plans(plans, gpu_bytes)
    return WHOLE


def _gpu_bytes(gpu_gib: float | None) -> float | None:
    if gpu_gib is not None and not 0 < gpu_gib < math.inf:
        raise ValueError(f"expected --gpu-gib to be greater than 0, got {gpu_gib}")
    return gpu_gib and gpu_gib * report.GIB


def _plans(options: argparse.Namespace) -> dict[str, Plan]:
    precisions = options.precision.split(",")
    for name in precisions:
        if name not in _PRECISIONS:
            raise ValueError(f"expected --precision from {', '.join(_PRECISIONS)}, got {name!r}")
    if options.factory:
        model: float | torch.nn.Module = sources.from_factory(options.factory)
    elif options.hf_config:
        model = sources.from_hf_config(options.hf_config)
    else:
        model = sources.number(options.params)
    return {
        name: plan(
            model,
            world_sizes=options.world_sizes,
            param_dtype=_PRECISIONS[name][0],
            master_dtype=_PRECISIONS[name][1],
            reduce_dtype=_REDUCE_DTYPES.get(options.reduce_dtype),
            reduce_gradients=not options.ddp_reduces,
            bucket_mib=options.bucket_mib,
            device=options.device,
        )
        for name in precisions
    }


def _print_plans(plans: dict[str, Plan], gpu_bytes: float | None) -> None:
    planned = list(plans.values())
    print(f"{planned[0].model.num_params:,} parameters in {len(planned[0].model.parameters):,} tensors; GiB per rank")
    for precision, one in plans.items():
        print(f"\nprecision {precision}: held, when most is held")
        _print_table(*report.held(one))
        print(f"most is held in {report.peaks(one)}")
        if gpu_bytes:
            print(f"fits {gpu_bytes / report.GIB:g} GiB from: {report.fits(one, gpu_bytes)}")
        print(f"\nprecision {precision}: sent in each step")
        _print_table(*report.sent(one))
    print()
    for note in report.notes(planned):
        print(textwrap.fill(note, 80, initial_indent="- ", subsequent_indent="  "))


def _inspect(options: argparse.Namespace) -> int:
    _require_directory(options.path)
    if not inspection.is_checkpoint(options.path):
        raise CheckpointError(_no_checkpoint(options.path))
    summary = inspection.summarise(options.path)
    if options.json:
        print(json.dumps(asdict(summary), indent=2))
        return WHOLE
    for label, value in _facts(summary):
        print(f"{label:<14}{value}")
    print()
    _print_table(
        ["tensor", "shape", "dtype", "bytes", "pieces"],
        [
            [tensor.name, "x".join(map(str, tensor.shape)) or "scalar", tensor.dtype, tensor.bytes, tensor.num_pieces]
            for tensor in summary.tensors
        ],
    )
    print()
    _print_table(
        ["file", "bytes"],
        [[file.name, "missing" if file.bytes is None else file.bytes] for file in summary.files],
    )
    return WHOLE


def _facts(summary: Summary) -> list[tuple[str, str]]:
    total_bytes = sum(tensor.bytes for tensor in summary.tensors)
    facts: list[tuple[str, object]] = [
        ("checkpoint", summary.directory),
        ("written by", summary.written_by),
        ("step", summary.step),
        ("when", summary.created),
        ("ranks", summary.world_size),
        ("metric", summary.metric),
        ("torch", summary.torch_version),
        ("layout", summary.layout_digest),
        ("run", summary.run_id),
        ("save", summary.save_id),
        ("tensors", f"{len(summary.tensors)}, {_size(total_bytes)}"),
        ("values", summary.num_values),
    ]
    return [(label, _printable(str(value))) for label, value in facts if value is not None]


def _verify(options: argparse.Namespace) -> int:
    root: Path = options.path
    _require_directory(root)
    if inspection.is_checkpoint(root):
        return _print_report(_verified(root))
    directories = inspection.checkpoints_in(root)
    if not directories:
        raise CheckpointError(_no_checkpoint(root))
    reports = [_verified(directory) for directory in directories]
    codes = [_print_report(report) for report in reports]
    whole = [report for report in reports if report.is_whole]
    newest = max(whole, key=lambda report: -1 if report.step is None else report.step, default=None)
    print(f"newest whole checkpoint: {'none' if newest is None else newest.directory}")
    return max(codes)


def _verified(directory: Path) -> Report:
    with _progress_bar(f"verifying {directory.name}") as progress:
        return inspection.verify(directory, progress)


def _print_report(report: Report) -> int:
    for warning in report.warnings:
        print(f"warning: {_printable(warning)}", file=sys.stderr)
    if report.is_whole:
        print(f"{report.directory}: whole ({report.num_files} files, {_size(report.stored_bytes)})")
        return WHOLE
    print(f"{report.directory}: DAMAGED")
    for problem in report.problems:
        print(f"  {_printable(problem)}")
    return DAMAGED


def _convert(options: argparse.Namespace) -> int:
    with _progress_bar(f"converting {options.source.name}") as progress:
        left_out = conversion.convert(
            options.source,
            options.target,
            options.to,
            without_manifest=options.without_manifest,
            progress=progress,
        )
    if left_out:
        print(f"left out: {_printable(', '.join(left_out))}", file=sys.stderr)
    print(options.target)
    return WHOLE


def _require_directory(path: Path) -> None:
    if not path.exists():
        raise FileNotFoundError(f"there is nothing at {path}")
    if not path.is_dir():
        raise NotADirectoryError(f"{path} is a file: expected a checkpoint directory")


def _no_checkpoint(path: Path) -> str:
    inside = inspection.checkpoints_in(path)
    hint = f": give one of those in it, for example {inside[-1]}" if inside else ""
    return f"{path} is not a checkpoint{hint}"


@contextmanager
def _progress_bar(title: str) -> Iterator[Callable[[int, int], None] | None]:
    if not sys.stderr.isatty() or find_spec("tqdm") is None:
        yield None
        return
    from tqdm import tqdm

    with tqdm(desc=title, unit="B", unit_scale=True, unit_divisor=1024, leave=False) as bar:

        def progress(done_bytes: int, total_bytes: int) -> None:
            bar.total = max(done_bytes, total_bytes)
            bar.update(done_bytes - bar.n)

        yield progress


def _print_table(headings: list[str], rows: list[list[object]]) -> None:
    """Print a table: by rich on a terminal, else as columns that other programs can read."""
    cells = [[_printable(str(cell)) for cell in row] for row in rows]
    is_number = [all(isinstance(row[column], (int, float)) for row in rows) for column in range(len(headings))]
    if sys.stdout.isatty() and find_spec("rich") is not None:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table()
        for heading, right in zip(headings, is_number, strict=True):
            table.add_column(heading, justify="right" if right else "left", overflow="fold")
        for row in cells:
            table.add_row(*map(Text, row))  # not markup: names come from the file
        Console().print(table)
        return
    widths = [max(map(len, column)) for column in zip(headings, *cells, strict=True)]
    for row in [headings, *cells]:
        padded = [
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, is_number, strict=True)
        ]
        print("  ".join(padded).rstrip())


def _printable(text: str) -> str:
    """Names come from files: control characters must not reach the terminal."""
    return text if text.isprintable() else ascii(text)[1:-1]


def _size(num_bytes: int) -> str:
    if num_bytes < 1024:
        return f"{num_bytes} B"
    power = min(4, int(math.log2(num_bytes)) // 10)
    return f"{num_bytes / 1024**power:.1f} {' KMGT'[power]}iB"
