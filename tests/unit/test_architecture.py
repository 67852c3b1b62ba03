"""Imports go down the page only: the table of docs/design/house.md, held against the code."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "sharded_adamax"

# Room -> rooms it may import from. What is not in the table is not in the house.
MAY_IMPORT: dict[str, set[str]] = {
    "__main__": {"cli"},
    "cli": {"checkpoint", "planning"},
    "__init__": {"bootstrap", "checkpoint", "optimizer", "planning"},
    "integrations": {"optimizer", "wrappers"},
    "checkpoint": {"agreement", "collectives", "layout", "ranges", "state", "wrappers"},
    "optimizer": {
        "agreement", "arguments", "collectives", "consolidation", "engine", "loading", "logs", "members", "observing",
        "reduction", "scaling",
    },
    "planning": {"arguments", "buckets", "engine", "layout", "reduction"},
    "observing": {"engine", "layout", "metrics", "summary"},
    "metrics": {"engine"},
    "summary": {"buckets", "layout", "ranges"},
    "scaling": set(),
    "arguments": {"buckets", "engine", "kernels", "layout", "members"},
    "loading": {"kernels", "state"},
    "consolidation": {"engine", "state"},
    "engine": {
        "buckets", "clipping", "collectives", "gathering", "gradients", "guards", "kernels", "late", "layout", "logs",
        "members", "pending", "reduction", "state", "voting",
    },
    "voting": {"agreement", "collectives", "gradients", "members", "pending"},
    "guards": {"agreement", "collectives"},
    "clipping": {"buckets", "collectives"},
    "state": {"collectives", "layout", "ranges"},
    "reduction": {"buckets", "collectives", "gradients", "pending", "streams"},
    "gradients": {"buckets", "collectives"},
    "gathering": {"buckets", "collectives", "late", "pending", "streams"},
    "late": set(),
    "logs": set(),
    "agreement": {"collectives", "pending"},
    "members": set(),
    "wrappers": set(),
    "buckets": {"layout", "ranges", "streams"},
    "collectives": {"pending", "streams"},
    "pending": {"streams"},
    "streams": set(),
    "kernels": set(),
    "layout": {"ranges"},
    "ranges": set(),
    "bootstrap": {"launchers", "mpi"},
    "mpi": {"launchers"},
    "launchers": set(),
}  # fmt: skip


def _room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def _imports(source: str, package: list[str]) -> set[str]:
    """Return the rooms of sharded_adamax that a source imports; ``package`` is where its relative imports start."""
    rooms: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        modules: list[list[str]] = []
        if isinstance(node, ast.Import):
            modules = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            start = base + (node.module.split(".") if node.module else [])
            modules = [[*start, alias.name] for alias in node.names]
        rooms |= {parts[1] for parts in modules if parts[0] == "sharded_adamax" and len(parts) > 1}
    return rooms


def _violations(sources: dict[Path, str]) -> list[str]:
    found = []
    for path, source in sources.items():
        room = _room(path)
        package = ["sharded_adamax", *path.relative_to(PACKAGE).parts[:-1]]
        allowed = MAY_IMPORT.get(room)
        if allowed is None:
            found.append(f"{room} is not in the table")
            continue
        for imported in sorted(_imports(source, package) - allowed - {room}):
            found.append(f"{path.relative_to(PACKAGE)} imports {imported}")
    return found


def _sources() -> dict[Path, str]:
    return {path: path.read_text() for path in sorted(PACKAGE.rglob("*.py"))}


def test_imports_go_down_the_page_only() -> None:
    sources = _sources()
    assert len(sources) > 10
    assert _violations(sources) == []


@pytest.mark.parametrize(
    "line",
    [
        "from sharded_adamax.optimizer import ShardedAdamax",
        "from sharded_adamax import engine",
        "import sharded_adamax.engine",
        "from . import engine",
        "from .reduction import MAX_IN_FLIGHT",
        "def late():\n    from sharded_adamax.state import FlatShard",
    ],
)
def test_an_import_upward_is_found(line: str) -> None:
    sources = _sources()
    path = PACKAGE / "layout.py"
    sources[path] += f"\n{line}\n"
    assert _violations(sources) != []


def test_the_table_goes_down_the_page() -> None:
    seen: set[str] = set()
    for room in reversed(MAY_IMPORT):
        assert MAY_IMPORT[room] <= seen, f"{room} imports from a room above it"
        seen.add(room)


def test_files_stay_readable() -> None:
    lengths = {str(path): len(source.splitlines()) for path, source in _sources().items()}
    assert {name: length for name, length in lengths.items() if length > 400} == {}
