"""What the pages tell a reader to type does what they say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.crash.nursery import Nursery, failed
from tests.docs.pages import LANGUAGES_THAT_RUN, PAGES, ROOT, blocks_of, run_page

PAGE_TIMEOUT_SECONDS = 300  # the tutorial starts eight processes that import torch
# Blocks that do not run, by page. A page that gets one more has to say so here, and why in the page.
NOT_RUN = {"README.md": 1, "docs/performance.md": 1, "docs/plan.md": 1, "docs/tutorial.md": 1}

# Pages whose blocks another test runs, on several ranks.
RUN_ELSEWHERE = {"docs/frameworks.md": "tests/integration/frameworks/test_page.py"}

# What a page takes for granted that its reader has.
READERS_OWN = {
    "README.md": """
import torch
from sharded_adamax import ShardedAdamax, init_distributed, save

class Net(torch.nn.Linear):
    def __init__(self):
        super().__init__(4, 2)

loss_fn = torch.nn.MSELoss()
loader = [(torch.randn(3, 4), torch.randn(3, 2)) for _ in range(2)]
""",
    "docs/checkpoints.md": """
import torch
from sharded_adamax import ShardedAdamax

model = torch.nn.Linear(4, 2)
optimizer = ShardedAdamax(model.named_parameters())
scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
""",
}


def _name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def _pages_with_code() -> list[Path]:
    pages = [page for page in PAGES if _name(page) not in RUN_ELSEWHERE]
    return [page for page in pages if any(b.language in LANGUAGES_THAT_RUN for b in blocks_of(page.read_text()))]


@pytest.mark.timeout(PAGE_TIMEOUT_SECONDS)
@pytest.mark.parametrize("page", _pages_with_code(), ids=_name)
def test_every_block_of_a_page_runs_and_prints_what_the_page_says(page: Path, nursery: Nursery, tmp_path: Path) -> None:
    name = _name(page)
    rank = nursery.start(1, run_page, page.read_text(), name, str(tmp_path), READERS_OWN.get(name, ""))
    (outcome,) = rank.join(PAGE_TIMEOUT_SECONDS - 10)
    assert not failed(outcome), outcome.error or outcome.traceback
    blocks = [block for block in blocks_of(page.read_text()) if block.language in LANGUAGES_THAT_RUN]
    files = [block for block in blocks if block.language == "python" and block.title and block.reason is None]
    assert outcome.value == len(blocks) - len(files) - NOT_RUN.get(name, 0)


def test_blocks_that_do_not_run_are_few_and_say_why() -> None:
    reasons = {_name(page): [b.reason for b in blocks_of(page.read_text()) if b.reason is not None] for page in PAGES}
    assert {name: len(found) for name, found in reasons.items() if found} == NOT_RUN
    assert all(reason for found in reasons.values() for reason in found)


def test_what_is_run_elsewhere_is_run_there() -> None:
    for page, test in RUN_ELSEWHERE.items():
        assert f'"{Path(page).name}"' in (ROOT / test).read_text()


def test_no_fence_escapes_the_search_for_blocks() -> None:
    for page in PAGES:
        fences = [line for line in page.read_text().splitlines() if line.lstrip().startswith(("```", "~~~"))]
        assert len(fences) == 2 * len(blocks_of(page.read_text())), _name(page)
        untagged = [block.line for block in blocks_of(page.read_text()) if block.language in ("py", "sh", "console")]
        assert not untagged, f"{_name(page)}: write python or bash, which run"


def test_a_file_that_is_never_used_is_not_taken_for_code_that_ran() -> None:
    for page in PAGES:
        blocks = blocks_of(page.read_text())
        commands = "".join(block.body for block in blocks if block.language == "bash" and block.reason is None)
        for block in blocks:
            if block.language == "python" and block.title and block.reason is None:
                assert block.title in commands, f"{_name(page)}:{block.line}: nothing runs {block.title}"


def test_the_marked_lines_of_the_tutorial_are_those_that_are_new() -> None:
    text = (ROOT / "docs" / "tutorial.md").read_text()
    before, train = [block.body.splitlines() for block in blocks_of(text) if block.title in ("before.py", "train.py")]
    numbers: set[int] = set()
    for part in re.findall(r"[-\d]+", re.findall(r'hl_lines="([^"]*)"', text)[0]):
        first, _, last = part.partition("-")
        numbers |= set(range(int(first), int(last or first) + 1))
    assert numbers == {number for number, line in enumerate(train, start=1) if line not in before}


@pytest.mark.parametrize(
    ("page", "complaint"),
    [
        ("```python\n1 / 0\n```\n", "ZeroDivisionError"),
        ("```python\nx = 1\n```\n\n```python\nassert x == 2\n```\n", "AssertionError"),
        ("```bash\npython -m sharded_adamax verify nowhere\n```\n", "exit status 2 of python"),
        ("```bash\nfalse\ntrue\n```\n", "exit status 1"),
        ("```diff\n-x = 1\n+x = 2\n assert x == 1\n```\n", "AssertionError"),
        ('```python\nprint("loss 0.5")\n```\n\n```text title="prints"\nloss 0.4\n```\n', "but this was printed"),
        ('```bash\necho one; echo two\n```\n\n```text title="prints"\none\n```\n', "but this was printed"),
    ],
)
def test_a_page_that_is_wrong_is_found(page: str, complaint: str, nursery: Nursery, tmp_path: Path) -> None:
    (outcome,) = nursery.start(1, run_page, page, "page.md", str(tmp_path)).join()
    assert outcome.error_type == "BlockFailed"
    assert "page.md:" in outcome.error and complaint in outcome.error
