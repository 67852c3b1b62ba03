"""The same operations, on pieces that stay in the cache from the first operation to the last.

[Note: chunk]  Adamax as separate operations reads and writes memory 64 bytes per element. Done chunk by chunk, all
operations but the first of a chunk find it in the cache, and memory sees 28 bytes: p, m and u in and out, g in. No
compiler is needed. A chunk costs about ten calls into torch, so it must not be small; where lists hold many small
tensors, they go on together.

Cutting a tensor changes no bit in float32 and float64, where torch's vector loop and its loop over the rest round
alike. In 16 bits and in complex numbers they do not, so there nothing is cut.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from sharded_adamax.kernels.contract import Hyper, Kernel, is_cuttable

# Per operand and thread; there are four. 256 KiB and 512 KiB differ by a few percent where it was measured (1 MiB of L2
# per core): smaller chunks cost more calls and more barriers between threads, larger ones leave the cache.
CHUNK_BYTES = 512 * 1024


def in_chunks(kernel: Kernel, chunk_bytes: int = CHUNK_BYTES) -> Kernel:
    """Return ``kernel``, applied to one chunk after the other; for CPU tensors. See [Note: chunk].

    Args:
        chunk_bytes: Of one operand, for each of torch's threads; rounded down to a multiple of 64 elements.
    """

    def update_(
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        exp_avgs: Sequence[Tensor],
        exp_infs: Sequence[Tensor],
        steps: Sequence[float],
        hyper: Hyper,
    ) -> None:
        if not is_cuttable(params[0].dtype):
            kernel(params, grads, exp_avgs, exp_infs, steps, hyper)
            return
        numel = chunk_bytes * torch.get_num_threads() // params[0].element_size() // 64 * 64
        for chunk in _chunks((params, grads, exp_avgs, exp_infs), steps, max(numel, 64)):
            kernel(*chunk.operands, chunk.steps, hyper)

    return update_


class _Chunk:
    """Small tensors that go on together."""

    def __init__(self) -> None:
        self.operands: tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]] = ([], [], [], [])
        self.steps: list[float] = []
        self.numel = 0

    def add(self, tensors: Sequence[Tensor], step: float) -> None:
        for operand, tensor in zip(self.operands, tensors, strict=True):
            operand.append(tensor)
        self.steps.append(step)
        self.numel += tensors[0].numel()


def _chunks(operands: Sequence[Sequence[Tensor]], steps: Sequence[float], chunk_numel: int) -> Iterator[_Chunk]:
    """Cut large tensors, put small ones together: chunks of at most ``chunk_numel`` elements.

    Example: tensors of 10, 20 and 250 elements in chunks of 64 are [10, 20], [64], [64], [64], [58].
    """
    chunk = _Chunk()
    for *tensors, step in zip(*operands, steps, strict=True):
        for part in zip(*(tensor.split(chunk_numel) for tensor in tensors), strict=True):
            if chunk.numel and chunk.numel + part[0].numel() > chunk_numel:
                yield chunk
                chunk = _Chunk()
            chunk.add(part, step)
    if chunk.numel:
        yield chunk
