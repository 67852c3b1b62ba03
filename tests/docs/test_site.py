"""The documentation site is built without a warning, and asks nobody else for anything."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]


def _build(config: Path, out: Path) -> str:
    """Build the site; returns what mkdocs complains about."""
    result = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--config-file", str(config), "--site-dir", str(out)],
        cwd=config.parent,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},  # a notice about the future of the tool, not about these pages
        capture_output=True,
        text=True,
        check=False,
    )
    complaints = [line for line in result.stderr.splitlines() if not line.startswith("INFO")]
    return "\n".join(complaints) if complaints or result.returncode == 0 else result.stderr


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("site")
    assert _build(ROOT / ".mkdocs.yml", out) == ""
    return out


@pytest.mark.parametrize(
    ("page", "complaint"),
    [("# Lost\n", 'not included in the "nav"'), ("[nowhere](nowhere.md)\n", "nowhere.md")],
)
def test_a_page_that_nobody_finds_and_a_link_that_leads_nowhere_are_errors(
    page: str, complaint: str, tmp_path: Path
) -> None:
    config = yaml.safe_load((ROOT / ".mkdocs.yml").read_text())
    config |= {"nav": ["index.md"], "plugins": []}
    (tmp_path / "mkdocs.yml").write_text(yaml.safe_dump(config))
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text(page if "nowhere" in page else "# Home\n")
    (tmp_path / "docs" / ("index.md" if "nowhere" in page else "lost.md")).write_text(page)
    assert complaint in _build(tmp_path / "mkdocs.yml", tmp_path / "site")


def test_no_page_loads_anything_from_another_host(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 15
    for page in pages:
        text = page.read_text()
        loaded = re.findall(r'<(?:script|img|iframe)[^>]+src="(http[^"]+)', text)
        loaded += re.findall(r'<link[^>]+rel="(?:stylesheet|preconnect|preload)"[^>]+href="(http[^"]+)', text)
        assert not loaded, f"{page.relative_to(site)} loads {loaded}"


def test_the_reference_shows_every_public_name(site: Path) -> None:
    source = (ROOT / "sharded_adamax" / "__init__.py").read_text()
    public = set(ast.literal_eval(source.split("__all__ = ")[1]))
    shown = set(re.findall(r'id="sharded_adamax\.(\w+)"', (site / "reference" / "index.html").read_text()))
    assert public and public <= shown
