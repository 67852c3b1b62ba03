from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.distributed.pool import Pool


@pytest.fixture(scope="session")
def ranks() -> Iterator[Pool]:
    """Processes that import each framework once."""
    pool = Pool()
    yield pool
    pool.close()
