"""Jobs under launch/torchrun.sh whose ranks die, whose hosts come and go, and whose code fails on one rank."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from tests.crash.nursery import Nursery
from tests.elastic import soak
from tests.elastic.reference import References
from tests.elastic.torchrun import TINY, Agent, Job, read_lives

NUM_KILLS = 3
LOSS_AT_ANOTHER_WORLD_SIZE = 1e-4  # relative: the same batch, summed in another order


@pytest.mark.timeout(240)
def test_a_killed_rank_costs_the_steps_since_the_last_checkpoint(nursery: Nursery, tmp_path: Path) -> None:
    tally = soak.run(NUM_KILLS, seed=1, directory=tmp_path, nursery=nursery)
    print(soak.table(tally))
    assert tally.kills_by_rank.total() == NUM_KILLS


class Hosts:
    """A job whose hosts are torchrun agents with one rank each, all on this machine."""

    def __init__(self, job: Job, out: Path, arguments: list[str]) -> None:
        self.job = job
        self.out = out
        self._arguments = [*arguments, f"--out={out}"]
        self._num_started = 0
        with socket.create_server(("127.0.0.1", 0)) as server:
            self._endpoint = f"127.0.0.1:{server.getsockname()[1]}"

    def start_one(self) -> Agent:
        """Start another host. The first one carries the rendezvous, and not rank 0."""
        is_host = int(not self._num_started)
        self._num_started += 1
        return self.job.start(
            *self._arguments,
            PET_NNODES="2:3",
            PET_NPROC_PER_NODE="1",
            PET_MAX_RESTARTS="20",
            PET_RDZV_ENDPOINT=self._endpoint,
            PET_RDZV_ID="test",
            # How long to wait for a third host, and when one that went without a word counts as lost; 30 and 15 s else.
            PET_RDZV_CONF=f"is_host={is_host},last_call_timeout=2,keep_alive_interval=1,keep_alive_max_attempt=4",
            PET_LOCAL_ADDR="127.0.0.9" if is_host else "127.0.0.1",  # torchrun numbers hosts by their addresses
        )

    def wait_for_life(self, world_size: int, num_steps: int) -> None:
        """Wait until a life of that size is the newest and has trained for a while."""

        def is_there() -> bool:
            lives = read_lives(self.out)
            return bool(lives) and lives[-1].world_size == world_size and len(lives[-1].losses) >= num_steps

        self.job.wait_until(is_there, f"{num_steps} steps on {world_size} ranks", timeout_s=90)


@pytest.mark.timeout(240)
def test_a_job_goes_on_with_fewer_hosts_and_with_more_again(nursery: Nursery, tmp_path: Path) -> None:
    # More steps than anybody waits for: the job must not end while a host is on its way.
    # And a batch that neither number of ranks divides.
    arguments = [*TINY, "--batch=13", "--steps=1000", "--checkpoint-every=10", "--keep-checkpoints=1000"]
    out = tmp_path / "run"
    with Job(tmp_path / "job") as job:
        hosts = Hosts(job, out, arguments)
        agents = [hosts.start_one() for _ in range(3)]
        hosts.wait_for_life(world_size=3, num_steps=15)
        (host_of_rank_0,) = [agent for agent in agents if 0 in agent.workers()]
        assert host_of_rank_0 is not agents[0]
        host_of_rank_0.kill_host()
        hosts.wait_for_life(world_size=2, num_steps=15)
        hosts.start_one()
        hosts.wait_for_life(world_size=3, num_steps=15)

    lives = read_lives(out)
    print([(life.world_size, life.start_step, life.last_step) for life in lives])
    references = References(nursery, tmp_path, arguments)
    uninterrupted = references.life(1, until=lives[-1].last_step)
    for number, life in enumerate(lives):
        assert (life.start_step > 0) == (number > 0), "a later life began anew"
        checkpoint = out / "checkpoints" / f"{life.start_step:08d}" if number else None
        same_size = references.life(life.world_size, checkpoint=checkpoint, until=life.last_step)
        for step, loss in life.losses.items():
            assert loss == same_size.losses[step], f"life {number}, step {step}"
            assert loss == pytest.approx(uninterrupted.losses[step], rel=LOSS_AT_ANOTHER_WORLD_SIZE)
