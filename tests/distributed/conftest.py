"""Which ranks the tests run on.

A test asks for `ranks` and runs over gloo; those of OVER_MPI_TOO run over MPI as well. All of them over MPI:

    pytest tests/distributed --over=mpi
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.distributed.mpi_pool import MpiPool
from tests.distributed.pool import Pool

OVER_MPI_TOO = {
    "test_disagreement.py",
    "test_guards.py",
    "test_same_numbers.py",
    "test_traffic.py",
}
NOT_OVER_MPI = {
    "test_a_step_is_one_reduce_scatter_and_one_all_gather_per_bucket_and_one_vote": (
        "counts what the kernel sends over TCP; MPI sends through shared memory here"
    ),
    "test_peak_bytes_per_rank_are_those_of_the_formula": (
        "the formula holds a bucket's arriving rows, as gloo's messages do; over MPI they arrive in small pieces"
    ),
    "test_predicted_bytes_are_those_counted": "device='cpu' plans gloo's messages",
    "test_so_they_are_in_every_precision_and_beside_ddp": "device='cpu' plans gloo's messages",
    "test_another_order_than_that_of_registration_is_what_the_prediction_lacks": "device='cpu' plans gloo's messages",
    "test_messages_travel_while_nobody_waits": "is about gloo's messages",
    "test_a_compiled_ddp_is_as_with_adamax": (
        "torch 2.13 tries to compile a process group that is written in Python, and fails (InternalTorchDynamoError)"
    ),
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--over", choices=["gloo", "mpi"], help="run the ranks over this only; default: gloo, some over MPI too"
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "ranks" not in metafunc.fixturenames:
        return
    over = metafunc.config.getoption("over", default=None)
    reason = NOT_OVER_MPI.get(metafunc.function.__name__)
    pools = [over] if over else ["gloo"]
    if not over and metafunc.module.__file__.rpartition("/")[2] in OVER_MPI_TOO and reason is None:
        pools.append("mpi")
    marks = [pytest.mark.skip(reason=f"not over MPI: {reason}")] if over == "mpi" and reason else []
    params = [pytest.param(pool, marks=marks) for pool in pools]
    metafunc.parametrize("ranks", params, indirect=True, scope="session")


@pytest.fixture(scope="session")
def ranks(request: pytest.FixtureRequest) -> Iterator[Pool]:
    over = getattr(request, "param", None) or request.config.getoption("over", default=None)
    pool = MpiPool() if over == "mpi" else Pool()
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def mpi_ranks() -> Iterator[Pool]:
    """For the tests of the MPI backend itself."""
    pool = MpiPool()
    yield pool
    pool.close()
