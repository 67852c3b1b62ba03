from collections.abc import Iterator

import pytest
from torch.optim import adamax, optimizer

from tests.crash.nursery import Nursery


@pytest.fixture(scope="session")
def nursery() -> Iterator[Nursery]:
    with Nursery() as started:
        yield started


@pytest.fixture
def capturable_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let ``capturable=True`` step on the CPU, where torch has the arithmetic of it but no graphs."""
    for module in (adamax, optimizer):  # torch asks the one, this package the other
        monkeypatch.setattr(module, "_get_capturable_supported_devices", lambda supports_xla=True: ["cpu"])
