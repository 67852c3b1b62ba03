"""What a checkpoint costs, counted: bytes written and read by each rank, and memory while loading and gathering."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import nn

from sharded_adamax import ShardedAdamax, load, save
from sharded_adamax.checkpoint import contents, reading
from sharded_adamax.checkpoint.directory import open_checkpoint
from tests.benchmarks.memory import Growth, growth
from tests.distributed.pool import Pool

MIB = 2**20


class _Net(nn.Module):
    """4.2 million parameters, 16 MiB, with a state of 32 MiB; shapes that no world size divides."""

    def __init__(self, fill: float) -> None:
        super().__init__()
        self.table = nn.Embedding(3001, 257)
        self.layers = nn.Sequential(*[nn.Linear(1021, 1023) for _ in range(3)], nn.Conv2d(129, 131, 3))
        with torch.no_grad():
            for index, param in enumerate(self.parameters()):
                param.copy_(torch.arange(float(param.numel())).view(param.shape).mul_(fill + index).remainder_(1.7))


NUMELS = [param.numel() for param in _Net(1.0).parameters()]


class _Job(NamedTuple):
    net: nn.Module
    optimizer: ShardedAdamax


def _build(fill: float, bucket_mib: float = 25) -> _Job:
    net = _Net(fill)
    optimizer = ShardedAdamax(net.parameters(), reduce_gradients=False, bucket_mib=bucket_mib)
    for param in net.parameters():
        param.grad = param.detach() * fill
    optimizer.step()
    optimizer.zero_grad()
    return _Job(net, optimizer)


def _model_bytes(job: _Job) -> int:
    return sum(param.nbytes for param in job.net.parameters())


def _shard_bytes(job: _Job) -> int:
    """Of exp_avg, exp_inf and step on this rank."""
    states = [job.optimizer.state[param] for param in job.net.parameters()]
    nbytes: list[int] = [state[key].local.nbytes for state in states for key in ("exp_avg", "exp_inf")]
    return sum(nbytes) + 4 * len(states)


class _Traffic:
    """Bytes that this process asked the kernel to read and write while it is on, whatever they came from."""

    def __enter__(self) -> _Traffic:
        self._before = self._now()
        return self

    def __exit__(self, *_: object) -> None:
        now = self._now()
        self.read_bytes, self.written_bytes = (after - before for after, before in zip(now, self._before, strict=True))

    @staticmethod
    def _now() -> tuple[int, int]:
        text = Path("/proc/self/io").read_text()
        found = dict(line.split(": ") for line in text.splitlines())
        return int(found["rchar"]), int(found["wchar"])


def _save(path: str) -> tuple[int, int]:
    job = _build(0.37)
    with _Traffic() as traffic:
        save(path, job.net, job.optimizer)
    return _shard_bytes(job), traffic.written_bytes


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_a_rank_writes_its_shard_and_its_part_of_the_model_and_one_percent_at_most(
    ranks: Pool, tmp_path: Path, world_size: int
) -> None:
    path = tmp_path / "checkpoint"
    results = ranks.run(world_size, _save, str(path))
    manifest = json.loads((path / "manifest.json").read_bytes())
    model = [0] * world_size
    for name, tensor in manifest["tensors"].items():
        for chunk in tensor["chunks"]:
            if name.startswith("model."):
                numel = torch.Size(chunk["sizes"]).numel()
                model[int(chunk["record"]["file"].split("_")[2])] += 4 * numel
    assert sum(model) == _model_bytes(_build(1.0)), "every part of the model is written once"
    for rank, (shard_bytes, written_bytes) in enumerate(results):
        payload = shard_bytes + model[rank]
        file_bytes = (path / f"__{rank}_0.distcp").stat().st_size
        # One rank writes all hyper-parameters: 8 for each parameter, over 1 KiB each as torch.save writes it.
        values = [r["length"] for r in manifest["values"].values() if r["file"] == f"__{rank}_0.distcp"]
        assert sum(values) <= 1280 * len(values) and len(values) in (0, 8 * len(NUMELS))
        print(
            f"{world_size} ranks, rank {rank}: {payload / MIB:.2f} MiB, file {file_bytes / payload:.4f} of that, "
            f"without hyper-parameters {(file_bytes - sum(values)) / payload:.4f}, all {written_bytes / payload:.4f}"
        )
        assert payload < file_bytes - sum(values) <= 1.01 * payload
        assert file_bytes < written_bytes <= file_bytes + MIB / 4  # the manifest, parts, and messages between ranks
    total = sum(file.stat().st_size for file in path.iterdir())
    assert total <= 1.01 * sum(shard + part for (shard, _), part in zip(results, model, strict=True))


def _load_counted(path: str) -> tuple[int, int, int, int]:
    job = _build(0.9)
    with _Traffic() as traffic:
        load(path, job.net, job.optimizer)
    opened = open_checkpoint(Path(path), verify=True)
    counted = reading.read_into(Path(path), opened.metadata, contents.collect(job.net, job.optimizer), verify=True)
    return _shard_bytes(job), _model_bytes(job), counted, traffic.read_bytes


@pytest.mark.parametrize("saved_at", [1, 2, 3, 5])
def test_a_rank_reads_its_new_shard_and_the_model_and_little_more(ranks: Pool, tmp_path: Path, saved_at: int) -> None:
    path = tmp_path / "checkpoint"
    ranks.run(saved_at, _save, str(path))
    descriptions = sum((path / name).stat().st_size for name in ("manifest.json", ".metadata"))
    for loaded_at in (1, 2, 3, 4, 5):
        for rank, (shard, model, counted, from_kernel) in enumerate(ranks.run(loaded_at, _load_counted, str(path))):
            state_ratio = (counted - model) / shard
            print(
                f"{saved_at} -> {loaded_at}, rank {rank}: shard {shard / MIB:.2f} MiB, read {state_ratio:.3f} of it "
                f"beside the model; all {from_kernel / (shard + model):.3f} of shard and model"
            )
            assert counted <= 1.1 * (shard + model)
            assert from_kernel <= 1.1 * (shard + model) + descriptions
            assert counted <= from_kernel  # the kernel saw at least what was counted


PIECE_BYTES = 4 * MIB
NUM_PIECES = 32


def _layers(num: int) -> _Job:
    net = nn.Sequential(*[nn.Linear(1024, 1024, bias=False) for _ in range(num)])
    optimizer = ShardedAdamax(net.parameters(), reduce_gradients=False, bucket_mib=PIECE_BYTES / MIB)
    for param in net.parameters():
        param.grad = param.detach()
    optimizer.step()
    optimizer.zero_grad()
    return _Job(net, optimizer)


def _memory(root: str) -> tuple[Growth, Growth, Growth]:
    small = _layers(2)  # what the first time imports does not count
    save(f"{root}/small", small.net, small.optimizer)
    load(f"{root}/small", small.net, small.optimizer)
    small.optimizer.full_state_dict(to=0)
    job = _layers(NUM_PIECES)
    _, saving = growth(lambda: save(f"{root}/large", job.net, job.optimizer))
    _, loading = growth(lambda: load(f"{root}/large", job.net, job.optimizer))
    full, gathering = growth(lambda: job.optimizer.full_state_dict(to=0))
    del full
    return saving, loading, gathering


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[Pool]:
    """Processes that give freed tensors back to the kernel and have held none before."""
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", str(MIB // 4))
    pool = Pool(method="spawn")
    yield pool
    pool.close()


def test_saving_loading_and_gathering_hold_a_few_pieces_more_than_before_whatever_the_size(
    fresh: Pool, tmp_path: Path
) -> None:
    """128 MiB of parameters and 256 MiB of state in pieces of 4 MiB."""
    for rank, found in enumerate(fresh.run(2, _memory, str(tmp_path))):
        saving, loading, gathering = found
        result_bytes = 2 * NUM_PIECES * PIECE_BYTES if rank == 0 else 0
        print(rank, [(one.peak_bytes / MIB, one.end_bytes / MIB) for one in found])
        # A record as it is serialised, and as it is read and unpickled; 1.5 for the buffer that grows as it is written.
        assert saving.peak_bytes <= 3 * PIECE_BYTES + 4 * MIB
        assert loading.peak_bytes <= 3 * PIECE_BYTES + 4 * MIB
        assert saving.end_bytes <= PIECE_BYTES and loading.end_bytes <= PIECE_BYTES
        # One bucket as it arrives, in our tensor and in gloo's.
        assert gathering.peak_bytes <= result_bytes + 3 * PIECE_BYTES + 4 * MIB
        assert abs(gathering.end_bytes - result_bytes) <= PIECE_BYTES
