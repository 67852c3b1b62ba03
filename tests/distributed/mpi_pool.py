"""The same pool over MPI: one mpirun starts all workers, and each run takes a communicator of the first so many."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path

from tests.distributed.pool import MAX_RANKS, Pool, RankFailed, serve

ROOT = Path(__file__).resolve().parents[2]
MPIRUN = Path(sys.executable).parent / "mpirun"  # of the mpich wheel, which the test extra brings
_KEY = "TESTS_MULTIPROCESSING_KEY"


class _Mpirun:
    """What mpirun started, as one process."""

    def __init__(self, command: list[str]) -> None:
        # Started with the tests' own sys.path, and not in the environment of an mpirun that runs the tests.
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("PMI_", "OMPI_"))}
        # Tensors travel between processes of one family, which know each other by this key.
        environment[_KEY] = multiprocessing.current_process().authkey.hex()
        environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
        self._process = subprocess.Popen(command, env=environment, cwd=ROOT)

    @property
    def exitcode(self) -> int | None:
        return self._process.poll()

    def is_alive(self) -> bool:
        return self._process.poll() is None

    def join(self) -> None:
        self._process.wait()

    def kill(self) -> None:
        # Not SIGKILL: mpirun has to end the workers.
        if self.is_alive():
            self._process.terminate()


class MpiPool(Pool):
    """``run`` as in `Pool`; a rank that dies takes the others with it, as under any mpirun."""

    def __init__(self, num_ranks: int = MAX_RANKS) -> None:
        super().__init__()
        self._num_ranks = num_ranks

    def _start_workers(self, world_size: int) -> None:
        if self._workers and not self._workers[0][0].is_alive():
            self.close()  # a test has killed a rank
        if self._workers:
            return
        with Listener(family="AF_UNIX") as listener:
            command = [str(MPIRUN), "-n", str(self._num_ranks), sys.executable, "-m", __name__, str(listener.address)]
            mpirun = _Mpirun(command)
            listener._listener._socket.settimeout(60)  # type: ignore[attr-defined]
            connections: dict[int, Connection] = {}
            try:
                while len(connections) < self._num_ranks:
                    connection = listener.accept()
                    connections[connection.recv()] = connection
            except OSError as error:
                mpirun.kill()
                raise RankFailed(f"mpirun started {len(connections)} of {self._num_ranks} workers: {error}") from error
        self._workers = [(mpirun, connections[rank]) for rank in range(self._num_ranks)]


def main() -> None:
    """Serve as one rank."""
    from mpi4py import MPI

    from sharded_adamax import mpi

    multiprocessing.current_process().authkey = bytes.fromhex(os.environ[_KEY])
    mpi.register()
    connection = Client(sys.argv[1])
    connection.send(MPI.COMM_WORLD.rank)
    serve(connection, mpi.BACKEND, environment={})


if __name__ == "__main__":
    main()
