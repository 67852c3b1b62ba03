"""The norm of all gradients over all shards, and what it scales.

[Note: bound]  Each rank sums the powers of its pieces in float64, one number per parameter; the sums are added over the
ranks, and from there on the arithmetic is torch's: the norm of each parameter in its own dtype, then the norm of these
norms. So the result is that of torch.nn.utils.clip_grad_norm_ on whole gradients up to the rounding of torch's own
sums, which depends on the order in which it adds: a few units in the last place.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from sharded_adamax.buckets import Bucket, part
from sharded_adamax.collectives import Group


def total_norm(
    group: Group, buckets: Sequence[Bucket], shards: Sequence[Tensor], used: Sequence[Sequence[bool]], norm_type: float
) -> Tensor:
    """Return the norm of all gradients that are not None, the same bits on all ranks. Collective.

    Args:
        shards: The mean gradient shard of each bucket, shape (shard_numel,).
        used: For each bucket, which slots have a gradient.
        norm_type: Any that torch.linalg.vector_norm takes; inf is the largest absolute value.

    Returns:
        0-d, on the device of the gradients, in their dtype (the widest, where they are mixed).

    Source: torch/nn/utils/clip_grad.py, ``_get_total_norm``.
    """
    if not any(any(flags) for flags in used):
        return torch.tensor(0.0)
    # What does not change the sum, the maximum or the minimum over the ranks.
    nothing = math.inf if norm_type == -math.inf else 0.0
    powers, dtypes = [], []
    for bucket, shard, flags in zip(buckets, shards, used, strict=True):
        for piece, is_used in zip(bucket.pieces, flags, strict=True):
            if not is_used:
                continue
            dtypes.append(shard.dtype.to_real())
            if piece.in_shard.numel == 0:
                powers.append(shard.new_full((), nothing, dtype=torch.float64))
                continue
            wide = torch.complex128 if shard.is_complex() else torch.float64
            norm = torch.linalg.vector_norm(part(shard, piece.in_shard), norm_type, dtype=wide)
            powers.append(norm if math.isinf(norm_type) or norm_type == 0 else norm**norm_type)
    combined = torch.stack(powers)
    group.all_reduce(combined, "max" if norm_type == math.inf else "min" if norm_type == -math.inf else "sum")
    if not math.isinf(norm_type) and norm_type != 0:
        combined = combined ** (1.0 / norm_type)
    norms = [norm.to(dtype) for norm, dtype in zip(combined, dtypes, strict=True)]
    total: Tensor = torch.linalg.vector_norm(torch.stack(norms), norm_type)
    return total


def clip_coefficient(norm: Tensor, max_norm: float) -> Tensor:
    """Return the factor, at most 1, that brings ``norm`` down to ``max_norm``.

    Source: torch/nn/utils/clip_grad.py, ``_clip_grads_with_norm_``.
    """
    return torch.clamp(max_norm / (norm + 1e-6), max=1.0)
