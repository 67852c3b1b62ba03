"""A real Slurm of one node on this machine: Debian's slurmctld, slurmd and slurm-client.

Its configuration is its own; it has no accounts and trusts everybody, so it needs no munge and no running service.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

COMMANDS = ("slurmctld", "slurmd", "sbatch", "srun", "sinfo", "scancel")
CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmdPort={node_port}
AuthType=auth/none
CredType=cred/none
SlurmUser=root
SlurmdUser=root
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd.pid
SlurmctldLogFile={directory}/slurmctld.log
SlurmdLogFile={directory}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
KillWait=2
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


class Slurm:
    """The cluster; ``environment`` lets Slurm's commands find it."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.environment = os.environ | {"SLURM_CONF": str(directory / "slurm.conf")}

    def run(self, *command: str, timeout_s: float = 100) -> subprocess.CompletedProcess[str]:
        """Run a command of Slurm's to its end."""
        return subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=timeout_s, check=False
        )

    def logs(self) -> str:
        return "\n".join(f"--- {path}\n{path.read_text()}" for path in sorted(self._directory.glob("*.log")))


def missing_commands() -> list[str]:
    """Return which commands of Slurm are not installed."""
    return [command for command in COMMANDS if shutil.which(command) is None]


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@contextlib.contextmanager
def single_node(directory: Path) -> Iterator[Slurm]:
    """Start a cluster of this machine alone, and stop it with all that it runs.

    Raises:
        AssertionError: It did not come up.
    """
    for name in ("state", "spool"):
        (directory / name).mkdir(parents=True)
    configuration = CONFIGURATION.format(
        host=socket.gethostname(),
        controller_port=_free_port(),
        node_port=_free_port(),
        directory=directory,
        cpus=max(2, os.cpu_count() or 1),  # a claim: two ranks are to fit
    )
    (directory / "slurm.conf").write_text(configuration)
    slurm = Slurm(directory)
    daemons = []
    try:
        for command in (["slurmctld", "-D", "-c"], ["slurmd", "-D"]):
            with (directory / f"{command[0]}.output.log").open("wb") as output:
                daemons.append(psutil.Popen(command, env=slurm.environment, stdout=output, stderr=subprocess.STDOUT))
        deadline = time.monotonic() + 30
        while slurm.run("sinfo", "--noheader", "--format=%T").stdout.strip() != "idle":
            assert time.monotonic() < deadline, f"Slurm did not come up\n{slurm.logs()}"
            time.sleep(0.2)
        yield slurm
    finally:
        slurm.run("scancel", "--user=root", "--signal=KILL")
        # What a job runs is no child of the daemons, but it has the configuration in its environment, too.
        for process in [*daemons, *_processes_of(slurm)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        for daemon in daemons:
            daemon.wait(10)


def _processes_of(slurm: Slurm) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("SLURM_CONF") == slurm.environment["SLURM_CONF"]:
                found.append(process)
    return found
