"""The models on which predictions of `plan` are held against what is counted. Activations do not count in them."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class LargeEmbedding(nn.Module):
    """Most of it is one embedding, in front of small layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5_003, 256)
        self.layers = nn.Sequential(*[nn.Linear(256, 256) for _ in range(4)])

    def forward(self) -> Tensor:
        return self.layers(self.embedding(torch.tensor([1, 2]))).sum()


class TinyParameters(nn.Module):
    """Hundreds of parameters, most of whose bytes in a bucket are padding."""

    def __init__(self) -> None:
        super().__init__()
        self.scales = nn.ParameterList([nn.Parameter(torch.ones(50)) for _ in range(300)])

    def forward(self) -> Tensor:
        return sum((scale.sum() for scale in self.scales), torch.zeros(()))


class Block(nn.Module):
    """Attention and MLP, registered in the order in which they are used."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(256)
        self.attention = nn.MultiheadAttention(256, 4, batch_first=True)
        self.norm2 = nn.LayerNorm(256)
        self.mlp = nn.Sequential(nn.Linear(256, 1024), nn.GELU(), nn.Linear(1024, 256))

    def forward(self, hidden: Tensor) -> Tensor:
        normed = self.norm1(hidden)
        hidden = hidden + self.attention(normed, normed, normed, need_weights=False)[0]
        return hidden + self.mlp(self.norm2(hidden))


class Transformer(nn.Module):
    """Blocks between an embedding and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(512, 256)
        self.blocks = nn.Sequential(*[self.block() for _ in range(3)])
        self.head = nn.Linear(256, 512, bias=False)

    def block(self) -> nn.Module:
        return Block()

    def forward(self) -> Tensor:
        return self.head(self.blocks(self.embedding(torch.tensor([[3]])))).sum()


class PostNormTransformer(Transformer):
    """Of torch's own layers, which register their norms behind what comes before them in backward."""

    def block(self) -> nn.Module:
        return nn.TransformerEncoderLayer(256, 4, 1024, dropout=0.0, batch_first=True)


class LargeLayer(nn.Module):
    """One weight of several times the size of a bucket, between smaller ones."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(512, 257), nn.Linear(257, 512), nn.Linear(512, 3_001), nn.Linear(3_001, 101), nn.Linear(101, 512)
        )

    def forward(self) -> Tensor:
        return self.layers(self.layers[0].weight.new_ones(1, 512)).sum()


class Mixed(nn.Module):
    """A tied weight, frozen parameters, a buffer, and two dtypes."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(2_049, 256)
        self.frozen = nn.Linear(256, 256).requires_grad_(False)
        self.register_buffer("mean", torch.zeros(99, 256))
        self.low = nn.Sequential(*[nn.Linear(256, 1024), nn.Linear(1024, 256)]).to(torch.bfloat16)
        self.layers = nn.Sequential(*[nn.Linear(256, 256) for _ in range(4)])
        self.head = nn.Linear(256, 2_049, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self) -> Tensor:
        hidden = self.frozen(self.embedding(torch.tensor([1])))
        hidden = self.low(hidden.to(torch.bfloat16)).to(hidden.dtype)
        return self.head(self.layers(hidden)).sum()


MODELS: list[type[nn.Module]] = [LargeEmbedding, TinyParameters, Transformer, LargeLayer, Mixed]
