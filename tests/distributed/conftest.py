"""Which ranks the tests run on.

A test asks for `ranks` and runs over gloo, where ranks of one host read each other's memory; those of BY_MESSAGES_TOO
run a second time without that, those of OVER_MPI_TOO over MPI as well. All of them over MPI, or by messages:

    pytest tests/distributed --over=mpi
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import pytest

from sharded_adamax.collectives.lines import SWITCH
from tests.distributed.mpi_pool import MpiPool
from tests.distributed.pool import Pool

BY_MESSAGES_TOO = {"test_collectives.py", "test_overlap.py"}
NOT_BY_READING = {
    "test_a_step_is_one_reduce_scatter_and_one_all_gather_per_bucket_and_one_vote": "counts what is sent over TCP",
    "test_messages_travel_while_nobody_waits": "is about gloo's messages",
    "test_the_thread_that_posts_holds_no_memory_after_the_wait": "is about gloo's messages",
}
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


POOLS: dict[str, Callable[[], Pool]] = {
    "gloo": Pool,
    "messages": functools.partial(Pool, {SWITCH: "0"}),
    "mpi": MpiPool,
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--over", choices=list(POOLS), help="run the ranks over this only; default: gloo, some over others"
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "ranks" not in metafunc.fixturenames:
        return
    test, module = metafunc.function.__name__, metafunc.module.__file__.rpartition("/")[2]
    reasons = {"gloo": NOT_BY_READING.get(test), "mpi": NOT_OVER_MPI.get(test)}
    over = metafunc.config.getoption("over", default=None)
    pools = [over] if over else ["gloo"]
    if not over and (module in BY_MESSAGES_TOO or reasons["gloo"]):
        pools.append("messages")
    if not over and module in OVER_MPI_TOO:
        pools.append("mpi")
    params = []
    for pool in pools:
        reason = reasons.get(pool)
        if reason is None or over:  # not even a skip where the test runs in another way
            marks = [pytest.mark.skip(reason=f"not over {pool}: {reason}")] if reason else []
            params.append(pytest.param(pool, marks=marks))
    metafunc.parametrize("ranks", params, indirect=True, scope="session")


@pytest.fixture(scope="session")
def _pools() -> Iterator[dict[str, Pool]]:
    """All of them to the end: pytest would close and start one wherever the parameter of `ranks` changes."""
    pools = {over: make() for over, make in POOLS.items()}
    yield pools
    for pool in pools.values():
        pool.close()


@pytest.fixture(scope="session")
def ranks(request: pytest.FixtureRequest, _pools: dict[str, Pool]) -> Pool:
    over = getattr(request, "param", None) or request.config.getoption("over", default=None)
    return _pools[over or "gloo"]


@pytest.fixture(scope="session")
def mpi_ranks(_pools: dict[str, Pool]) -> Pool:
    """For the tests of the MPI backend itself."""
    return _pools["mpi"]
