"""How long a step takes, from bytes, rates and the time of the computation: what should be, beside what is measured.

    python -m tests.benchmarks.model_of_step        # the table of predictions in docs/performance.md

[Note: pieces]  A model is cut into k equal buckets. Each goes through two stages, the computation and the link, which
work at the same time on one bucket each. If a bucket takes a in the first and b in the second, all of them take

    a + k b   or   k a + b,   whichever is longer.

With k = 4, a = 2 and b = 3:   aa.aa.aa.aa.        the first stage, never waiting for the second in the end
                                 bbbbbbbbbbbb      2 + 4 * 3 = 14

A step with `overlap_forward` is two such pairs: forward with the all-gathers that come before it, and backward with the
reduce-scatters that come after it; between them the vote and the update.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

MIB = 1 << 20
UPDATE_BYTES = 28  # read and written per element in one pass, float32
HOP_SECONDS = 50e-6  # of the vote, a small all-reduce between hosts over TCP


@dataclass(frozen=True)
class Link:
    """What one rank sends at, while it receives at the same rate."""

    name: str
    bytes_per_second: float
    message_seconds: float  # from one rank to the next in a ring, before the first byte arrives


@dataclass(frozen=True)
class Job:
    """A model on a number of ranks."""

    num_params: float
    ranks: int
    forward_seconds: float
    backward_seconds: float
    update_bytes_per_second: float  # of memory, in the update
    wire_bytes_per_param: float = 4  # of gradients, and of parameters
    bucket_bytes: float = 25 * MIB

    @property
    def num_buckets(self) -> int:
        return max(1, math.ceil(self.num_params * self.wire_bytes_per_param / self.bucket_bytes))

    @property
    def compute_seconds(self) -> float:
        return self.forward_seconds + self.backward_seconds

    @property
    def update_seconds(self) -> float:
        """Of this rank's shard."""
        return self.num_params / self.ranks * UPDATE_BYTES / self.update_bytes_per_second

    def wire_seconds(self, link: Link) -> float:
        """Return what the bytes of a step take: reduce-scatter and all-gather, without latency."""
        wire_bytes = 2 * (self.ranks - 1) / self.ranks * self.num_params * self.wire_bytes_per_param
        return wire_bytes / link.bytes_per_second

    def _collective_seconds(self, link: Link) -> float:
        """Return the time of one reduce-scatter, or one all-gather, of one bucket."""
        return self.wire_seconds(link) / 2 / self.num_buckets + (self.ranks - 1) * link.message_seconds

    def _vote_seconds(self) -> float:
        return 2 * math.ceil(math.log2(self.ranks)) * HOP_SECONDS if self.ranks > 1 else 0.0


def overlapped(first: float, second: float, num_pieces: int) -> float:
    """Return the time of pieces that each take ``first``, then ``second`` in another stage. See [Note: pieces]."""
    return max(first + num_pieces * second, num_pieces * first + second)


def _backward_seconds(job: Job, collective_seconds: float) -> float:
    return overlapped(job.backward_seconds / job.num_buckets, collective_seconds, job.num_buckets)


def overlapping_step(job: Job, link: Link) -> float:
    """Return the seconds of a step with `overlap_forward`."""
    collective = job._collective_seconds(link)
    forward = overlapped(collective, job.forward_seconds / job.num_buckets, job.num_buckets)
    return forward + _backward_seconds(job, collective) + job._vote_seconds() + job.update_seconds


def waiting_step(job: Job, link: Link) -> float:
    """Return the seconds of a step that waits for the parameters: only the update runs beside the all-gathers."""
    collective = job._collective_seconds(link)
    out = overlapped(job.update_seconds / job.num_buckets, collective, job.num_buckets)
    return job.forward_seconds + _backward_seconds(job, collective) + job._vote_seconds() + out


def ddp_step(job: Job, link: Link) -> float:
    """Return the seconds of a step with DistributedDataParallel: all-reduces under backward, and the whole update."""
    all_reduce = 2 * job._collective_seconds(link)
    return job.forward_seconds + _backward_seconds(job, all_reduce) + job.update_seconds * job.ranks


NVLINK = Link("NVLink", 450e9, 2e-6)
LINKS = (
    NVLINK,
    Link("InfiniBand 400 Gbit/s", 50e9, 5e-6),
    Link("Ethernet 100 Gbit/s", 12.5e9, 20e-6),
    Link("Ethernet 25 Gbit/s", 3.125e9, 30e-6),
    Link("Ethernet 10 Gbit/s", 1.25e9, 30e-6),
)
NVLINK_RANKS = 8
TOKENS_PER_RANK = 16_384
FLOP_PER_SECOND = 400e12
MEMORY_BYTES_PER_SECOND = 2.5e12
BUCKETS_MIB = (25, 100, 400, 1600)


def on_gpus(num_params: float, ranks: int) -> Job:
    """Return a transformer in 16 bits with a float32 master, under the assumptions of docs/performance.md."""
    forward_seconds = 2 * num_params * TOKENS_PER_RANK / FLOP_PER_SECOND
    return Job(num_params, ranks, forward_seconds, 2 * forward_seconds, MEMORY_BYTES_PER_SECOND, wire_bytes_per_param=2)


def best_bucket(job: Job, link: Link) -> tuple[int, float]:
    """Return the size in MiB out of BUCKETS_MIB that makes the step shortest, and the seconds of that step."""
    seconds = {mib: overlapping_step(replace(job, bucket_bytes=mib * MIB), link) for mib in BUCKETS_MIB}
    mib = min(seconds, key=seconds.__getitem__)
    return mib, seconds[mib]


def table() -> str:
    """Return the predictions as a table in Markdown."""
    lines = [
        "| parameters | ranks | compute alone | " + " | ".join(link.name for link in LINKS) + " |",
        "|---" * (3 + len(LINKS)) + "|",
    ]
    for num_params in (1e9, 7e9, 70e9):
        for ranks in (8, 64, 512, 4096):
            job = on_gpus(num_params, ranks)
            cells = [f"{num_params / 1e9:.0f} B", f"{ranks:,}", f"{job.compute_seconds:.2f} s"]
            for link in LINKS:
                if link is NVLINK and ranks > NVLINK_RANKS:
                    cells.append("")
                    continue
                mib, seconds = best_bucket(job, link)
                ddp = ddp_step(replace(job, bucket_bytes=mib * MIB), link)
                cells.append(f"{seconds / job.compute_seconds:.2f} ({mib} MiB; DDP {ddp / job.compute_seconds:.2f})")
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
