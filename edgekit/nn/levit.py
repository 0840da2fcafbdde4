"""Blocks of attention that are cheap on CPUs, after LeViT (Graham et al. 2021, arXiv 2104.01136, section 4): batch
normalizations, which become part of the linear layers for inference, in place of layer normalizations; keys of half the
width; Hardswish; and a block that halves the side computes queries for every second row and column only.

LeViT adds a learned bias to the scores; here, learned positions are added once, where attention begins.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgekit.nn.hiera_config import Entry


def hardswish(x: Tensor) -> Tensor:
    """x times a piecewise linear sigmoid, in operators that every runtime reads."""
    return x * F.hardsigmoid(x)


class LinearNorm(nn.Module):
    """A linear layer and its batch normalization, over (..., channels)."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(channels, out, bias=False), nn.BatchNorm1d(out)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        found: Tensor = self.norm(y.reshape(-1, y.shape[-1])).reshape(y.shape)
        return found

    def fused(self) -> nn.Linear:
        """Return one linear layer with the same result in evaluation mode."""
        norm = self.norm.eval()
        assert norm.running_var is not None
        assert norm.running_mean is not None
        found = nn.Linear(self.linear.in_features, self.linear.out_features)
        with torch.no_grad():
            scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
            found.weight = nn.Parameter(self.linear.weight * scale[:, None])
            found.bias = nn.Parameter(norm.bias - norm.running_mean * scale)
        return found


class LevitBlock(nn.Module):
    """Attention between all tokens and a feed-forward layer, over (batch, units, tokens, channels). A block that
    changes the width adds its input to the feed-forward layer alone."""

    def __init__(self, entry: Entry, head_dim: int, ratio: int) -> None:
        super().__init__()
        channels, out = entry.channels, entry.out
        self.entry, self.heads, self.keys = entry, out // head_dim, head_dim // 2
        self.query, self.key = (LinearNorm(channels, out // 2) for _ in range(2))
        self.value, self.proj = LinearNorm(channels, out), LinearNorm(out, out)
        self.fc1, self.fc2 = LinearNorm(out, ratio * out), LinearNorm(ratio * out, out)

    def forward(self, x: Tensor) -> Tensor:
        entry = self.entry
        left = entry.tokens // 4 if entry.pool else entry.tokens
        asked = x
        if entry.pool:  # of each square of four neighbours, the first
            asked = x.reshape(-1, entry.units, 4, left, entry.channels)[:, :, 0]
        parts = (
            (self.query(asked) * self.keys**-0.5, left),
            (self.key(x), entry.tokens),
            (self.value(x), entry.tokens),
        )
        q, k, v = (
            part.reshape(-1, entry.units * tokens, self.heads, part.shape[-1] // self.heads).transpose(1, 2)
            for part, tokens in parts
        )
        mixed = (q @ k.transpose(2, 3)).softmax(dim=-1) @ v
        y: Tensor = self.proj(hardswish(mixed.transpose(1, 2).reshape(-1, entry.units, left, entry.out)))
        x = x + y if entry.channels == entry.out else y
        found: Tensor = x + self.fc2(hardswish(self.fc1(x)))
        return found
