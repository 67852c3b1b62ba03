"""A small hierarchical VAE over 8x8 digits, in the manner of NVAE: several groups of latents, drawn from the top down.

    image --> cell --> cell --> ... --> cell           bottom up: features for each group
                |        |                |
               z_1      z_2      ...     z_L           a prior from the groups above, a posterior relative to it
                |        |                |
    image <-- cell <-- cell <-- ... <-- cell <-- learned start

A pixel counts how many of 16 dots of the scanned digit were set, so it is binomial.

Source: Vahdat and Kautz, NVAE: A Deep Hierarchical Variational Autoencoder, 2020: the order of the groups and the
residual posterior. NVAE is convolutional, with batch norm and spectral regularisation; this has none of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NUM_PIXELS = 64
MAX_COUNT = 16  # a pixel is an integer from 0 to 16


@dataclass(frozen=True)
class VaeSizes:
    """Everything that decides the shapes of the parameters."""

    width: int
    groups: int  # of latents
    latents: int  # in each group


class Terms(NamedTuple):
    """The two terms of the negative ELBO, in nats per image."""

    reconstruction: Tensor  # (batch,)
    divergence: Tensor  # (batch,), summed over the groups


class Cell(nn.Module):
    """A norm and an MLP beside a residual connection."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.widen = nn.Linear(width, 2 * width)
        self.narrow = nn.Linear(2 * width, width)
        nn.init.zeros_(self.narrow.weight)  # a cell begins as the identity, however many there are

    def forward(self, hidden: Tensor) -> Tensor:
        """Map (batch, width) to the same shape."""
        return hidden + self.narrow(F.silu(self.widen(self.norm(hidden))))  # type: ignore[no-any-return]


class Group(nn.Module):
    """One group of latents on the way down."""

    def __init__(self, sizes: VaeSizes) -> None:
        super().__init__()
        self.prior = nn.Linear(sizes.width, 2 * sizes.latents)
        self.posterior = nn.Linear(2 * sizes.width, 2 * sizes.latents)
        self.expand = nn.Linear(sizes.latents, sizes.width)
        self.cell = Cell(sizes.width)
        for layer in (self.prior, self.posterior):  # both begin as a standard normal
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, hidden: Tensor, features: Tensor | None, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Draw the group's latents and go one cell down.

        Args:
            hidden: (batch, width), from above.
            features: (batch, width), from the image; None draws from the prior.
            noise: (batch, latents), standard normal.

        Returns:
            The next hidden state (batch, width), and the divergence of posterior from prior in nats (batch,).
        """
        mean, log_std = self.prior(hidden).chunk(2, dim=-1)
        log_std = soft_clamp(log_std)
        divergence = hidden.new_zeros(len(hidden))
        if features is not None:
            shift, log_scale = self.posterior(torch.cat([hidden, features], dim=-1)).chunk(2, dim=-1)
            log_scale = soft_clamp(log_scale)
            divergence = 0.5 * (shift**2 + torch.exp(2 * log_scale) - 1 - 2 * log_scale).sum(dim=-1)
            mean, log_std = mean + torch.exp(log_std) * shift, log_std + log_scale
        latents = mean + torch.exp(log_std) * noise
        return self.cell(hidden + self.expand(latents)), divergence


class DigitsVae(nn.Module):
    """Model counts of dots; `forward` returns the terms of the loss."""

    def __init__(self, sizes: VaeSizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.embed = nn.Linear(NUM_PIXELS, sizes.width)
        self.bottom_up = nn.ModuleList(Cell(sizes.width) for _ in range(sizes.groups))
        self.start = nn.Parameter(torch.zeros(sizes.width))
        self.top_down = nn.ModuleList(Group(sizes) for _ in range(sizes.groups))
        self.logits = nn.Sequential(nn.LayerNorm(sizes.width), nn.Linear(sizes.width, NUM_PIXELS))

    def forward(self, counts: Tensor, noise: Tensor) -> Terms:
        """Compute the negative ELBO of some images.

        Args:
            counts: (batch, 64), floats from 0 to 16.
            noise: (batch, groups, latents), standard normal; an argument, so that ranks can share out one draw.
        """
        logits, divergence = self.decode(noise, counts)
        return Terms(binomial_nats(logits, counts), divergence)

    def decode(self, noise: Tensor, counts: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return logits (batch, 64) and divergence (batch,): of images, or of samples where there are none."""
        features: list[Tensor | None] = [None] * self.sizes.groups
        if counts is not None:
            features = list(self.encode(counts))
        hidden = self.start.expand(len(noise), -1)
        total = hidden.new_zeros(len(noise))
        for group, group_features, group_noise in zip(self.top_down, features, noise.unbind(dim=1), strict=True):
            hidden, divergence = group(hidden, group_features, group_noise)
            total = total + divergence
        return self.logits(hidden), total

    def encode(self, counts: Tensor) -> list[Tensor]:
        """Return features (batch, width) for each group, the topmost first."""
        hidden = self.embed(counts * (2 / MAX_COUNT) - 1)
        features = []
        for cell in self.bottom_up:
            hidden = cell(hidden)
            features.append(hidden)
        return features[::-1]


def soft_clamp(values: Tensor) -> Tensor:
    """Keep log standard deviations within -5 and 5, smoothly, as NVAE does."""
    return 5 * torch.tanh(values / 5)


def binomial_nats(logits: Tensor, counts: Tensor) -> Tensor:
    """Return the negative log-probability of counts out of `MAX_COUNT`, summed over pixels: (batch,)."""
    choices = (
        torch.lgamma(torch.tensor(MAX_COUNT + 1.0)) - torch.lgamma(counts + 1) - torch.lgamma(MAX_COUNT + 1 - counts)
    )
    cross_entropy = F.binary_cross_entropy_with_logits(logits, counts / MAX_COUNT, reduction="none")
    return (MAX_COUNT * cross_entropy - choices).sum(dim=-1)
