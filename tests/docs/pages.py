"""The code blocks of a page, and running them in order as a reader would.

    ```python                    runs; all blocks of a page share one namespace
    ```python title="train.py"   is written to that file
    ```bash                      runs in the page's folder; nothing but calls of our command, in this process
    ```diff                      what it leads to runs as Python
    ```text title="prints"       what the block before it prints; ... stands for what differs from run to run

A page runs in a folder of its own, as the one rank that ``torchrun --nproc-per-node=1`` would start. A block under
``<!-- not run: REASON -->`` does not run.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import socket
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

from sharded_adamax import cli

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*(ROOT / "docs").rglob("*.md"), ROOT / "README.md", ROOT / "launch" / "README.md"])
LANGUAGES_THAT_RUN = ("python", "bash", "diff")
BLOCK = re.compile(
    r"(?:<!--\s*not run:(?P<reason>.*?)-->\s*\n+)?"
    r"^(?P<indent>[ ]*)```(?P<language>[a-z]*)(?P<options>[^\n]*)\n(?P<body>.*?)^(?P=indent)```[ ]*$",
    re.MULTILINE | re.DOTALL,
)
BASH_TIMEOUT_SECONDS = 90
COMMAND = "python -m sharded_adamax "


class BlockFailed(AssertionError):
    """A block of a page does not do what the page says."""


@dataclass(frozen=True)
class Block:
    """One fenced block."""

    line: int  # of the page, where the block begins
    language: str
    title: str | None
    body: str
    reason: str | None  # why it does not run


def blocks_of(text: str) -> list[Block]:
    """Find the fenced blocks of a page, in order."""
    found = []
    for match in BLOCK.finditer(text):
        title = re.search(r'title="([^"]*)"', match["options"])
        found.append(
            Block(
                line=text.count("\n", 0, match.start("language")) + 1,
                language=match["language"],
                title=title[1] if title else None,
                body=textwrap.dedent(match["body"]),
                reason=match["reason"].strip() if match["reason"] is not None else None,
            )
        )
    return found


def run_page(text: str, name: str, folder: str, readers_own: str = "") -> int:
    """Run the blocks of a page in ``folder``, and compare what they print; returns how many ran.

    To be called in a process of its own, which it changes. ``readers_own`` is Python that runs before.

    Raises:
        BlockFailed: Says which block of the page, and why.
    """
    os.chdir(folder)
    sys.path.insert(0, folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= place
    # A command of the page starts a job of its own.
    outside = {name: value for name, value in os.environ.items() if name not in place}
    outside["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{outside['PATH']}"
    namespace: dict[str, object] = {"__name__": "__main__"}
    exec(readers_own, namespace)
    printed = ""
    num_run = 0
    for block in blocks_of(text):
        where = f"{name}:{block.line}"
        if block.reason is not None:
            continue
        if block.language == "text" and block.title == "prints":
            compare(printed, block.body, where)
        elif block.language == "python" and block.title:
            Path(block.title).write_text(block.body)
        elif block.language in LANGUAGES_THAT_RUN:
            printed = run_block(block, where, namespace, outside)
            num_run += 1
    return num_run


def run_block(block: Block, where: str, namespace: dict[str, object], environment: dict[str, str]) -> str:
    """Run one block; returns what it printed."""
    lines = block.body.splitlines()
    if block.language == "bash" and all(line.startswith(COMMAND) for line in lines):
        return run_commands(lines, where)
    if block.language == "bash":
        command = ["bash", "-euo", "pipefail", "-c", block.body]
        result = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=BASH_TIMEOUT_SECONDS, check=False
        )
        if result.returncode != 0:
            raise BlockFailed(f"{where}: exit status {result.returncode}\n{result.stdout}\n{result.stderr}")
        return result.stdout
    source = after(block.body) if block.language == "diff" else block.body
    output = io.StringIO()
    try:
        with contextlib.redirect_stdout(output):
            exec(compile("\n" * block.line + source, where, "exec"), namespace)
    except Exception as error:
        raise BlockFailed(f"{where}: {type(error).__name__}: {error}\n{source}") from error
    return output.getvalue()


def run_commands(lines: list[str], where: str) -> str:
    """Run lines that call the package's own command, without the seconds in which each would import torch."""
    output = io.StringIO()
    for line in lines:
        arguments = shlex.split(line, comments=True)[len(COMMAND.split()) :]
        with contextlib.redirect_stdout(output):
            status = cli.main(arguments)
        if status != 0:
            raise BlockFailed(f"{where}: exit status {status} of {line}\n{output.getvalue()}")
    return output.getvalue()


def after(diff: str) -> str:
    """Return what a diff without headers leads to."""
    return "".join(line[1:] for line in diff.splitlines(keepends=True) if not line.startswith("-"))


def compare(printed: str, promised: str, where: str) -> None:
    """Hold what was printed against what the page says.

    Raises:
        BlockFailed: They differ.
    """
    got, expected = ([line.rstrip() for line in text.strip().splitlines()] for text in (printed, promised))
    pattern = "\n".join(re.escape(line).replace(r"\.\.\.", ".*") for line in expected)
    if not re.fullmatch(pattern, "\n".join(got)):
        raise BlockFailed(f"{where}: the page says\n{promised}\nbut this was printed:\n{printed}")
