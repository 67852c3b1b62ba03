"""The programs on docs/frameworks.md, as they are printed there, under torchrun as the page says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parents[3] / "docs" / "frameworks.md"
SECTIONS = re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", PAGE.read_text(), re.DOTALL | re.MULTILINE)
PROGRAMS = {
    heading: found
    for heading, text in SECTIONS
    if (found := re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE))
}
LAUNCH_TIMEOUT_SECONDS = 110


@pytest.mark.parametrize("framework", PROGRAMS)
def test_the_programs_for_a_framework_run_on_two_ranks(tmp_path: Path, framework: str) -> None:
    path = tmp_path / "program.py"
    # One after another in one process, because the import takes longer than they do.
    path.write_text("\n".join(PROGRAMS[framework]))
    result = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(path)],
        capture_output=True,
        text=True,
        timeout=LAUNCH_TIMEOUT_SECONDS,
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert result.returncode == 0, result.stderr[-6000:]


def test_the_page_has_programs_for_each_framework() -> None:
    numbers = {framework: len(found) for framework, found in PROGRAMS.items()}
    assert numbers == {"Accelerate": 2, "Hugging Face Trainer": 1, "Lightning Fabric": 1, "Lightning Trainer": 1}
