"""A small causal transformer over bytes, with hashed n-gram embeddings that hold most of its parameters.

    byte   -> byte table ------+
    2-gram -> hash -> table ---+
    ...                        +--> sum --> blocks --> norm --> logits of the next byte
    7-gram -> hash -> table ---+
    position -> table ---------+

Large embeddings are where Adamax is used: a row is touched rarely, and the infinity norm keeps its scale.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NUM_BYTES = 256
NGRAM_ORDERS = (2, 3, 4, 5, 6, 7)
HASH_BITS = 31
HASH_MULTIPLIER = 1_640_531_527  # below 2**31: a product of it and a hash fits into int64


@dataclass(frozen=True)
class ModelSizes:
    """Everything that decides the shapes of the parameters."""

    context: int  # longest input, in bytes
    width: int
    layers: int
    heads: int
    table_rows: int  # rows of each n-gram table, at most 2**31


def hashed_ngrams(tokens: Tensor, table_rows: int) -> list[Tensor]:
    """Give each position the table row of every n-gram that ends there.

    Example: in the bytes `a b c` the 2-gram at `c` has the hash (c * M + b) * M modulo 2**31, where M is the
    multiplier. Before the first byte are zeros.

    Args:
        tokens: (batch, length), int64, each below 256.
        table_rows: the rows are in [0, table_rows).

    Returns:
        One (batch, length) int64 tensor for each of `NGRAM_ORDERS`.
    """
    rows = []
    hashes = torch.zeros_like(tokens)
    for distance in range(max(NGRAM_ORDERS)):
        earlier = F.pad(tokens, (distance, 0))[:, : tokens.size(1)]
        hashes = ((hashes + earlier) * HASH_MULTIPLIER) % 2**HASH_BITS
        if distance + 1 in NGRAM_ORDERS:
            # The low bits of a product depend on low bits only: scale, which keeps the high ones.
            rows.append((hashes * table_rows) >> HASH_BITS)
    return rows


class Block(nn.Module):
    """Causal attention and an MLP, each behind a norm and a residual connection."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width, bias=False)
        self.attention_out = nn.Linear(width, width, bias=False)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp_in = nn.Linear(width, 4 * width)
        self.mlp_out = nn.Linear(4 * width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        """Map (batch, length, width) to the same shape."""
        batch, length, width = hidden.shape
        packed = self.query_key_value(self.attention_norm(hidden))
        query, key, value = packed.view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        hidden = hidden + self.attention_out(attended.transpose(1, 2).reshape(batch, length, width))
        transformed: Tensor = self.mlp_out(F.gelu(self.mlp_in(self.mlp_norm(hidden))))
        return hidden + transformed


class ByteModel(nn.Module):
    """Predict each next byte; `forward` returns the loss."""

    def __init__(self, sizes: ModelSizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.byte_table = nn.Embedding(NUM_BYTES, sizes.width)
        self.position_table = nn.Embedding(sizes.context, sizes.width)
        self.ngram_tables = nn.ModuleList(nn.Embedding(sizes.table_rows, sizes.width) for _ in NGRAM_ORDERS)
        self.blocks = nn.ModuleList(Block(sizes.width, sizes.heads) for _ in range(sizes.layers))
        self.final_norm = nn.LayerNorm(sizes.width)
        self.head = nn.Linear(sizes.width, NUM_BYTES, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Embedding | nn.Linear):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Compute the mean cross-entropy in nats per byte; both arguments are (batch, length), int64."""
        positions = torch.arange(tokens.size(1), device=tokens.device)
        hidden = self.byte_table(tokens) + self.position_table(positions)
        rows_by_table = hashed_ngrams(tokens, self.sizes.table_rows)
        for table, rows in zip(self.ngram_tables, rows_by_table, strict=True):
            hidden = hidden + table(rows)
        for block in self.blocks:
            hidden = block(hidden)
        logits = self.head(self.final_norm(hidden))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())
