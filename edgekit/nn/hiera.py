"""Hierarchical image classifiers of convolutional stages and of stages with mask-unit attention, in PyTorch.

Source: Ryali et al. 2023, "Hiera: A Hierarchical Vision Transformer without the Bells-and-Whistles" (arXiv 2306.00989,
section 4). The authors compute attention on tensors of five axes, which torch's exporter refuses. Here tokens are
ordered by mask unit, (batch, units, tokens of a unit, width), so that attention has the usual four axes and every pool
is one maximum over an axis.

Stages of convolutions (`edgekit.nn.convolutions`) may come before those with attention, and blocks of attention may be
those of `edgekit.nn.levit`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgekit.errors import EdgekitError
from edgekit.nn.convolutions import ConvNorm, Inverted, Rep, Separable
from edgekit.nn.hiera_config import STEMS, Entry, HieraConfig
from edgekit.nn.levit import LevitBlock, LinearNorm

EPS = 1e-6  # of layer normalization
Network = TypeVar("Network", bound=nn.Module)


class UnitAttention(nn.Module):
    """Multi-head attention within mask units, or between all tokens, over (batch, units, tokens, channels). pool: only
    the largest of every four queries is kept (section 4.2, "Q-pooling")."""

    def __init__(self, entry: Entry, head_dim: int, *, between_units: bool) -> None:
        super().__init__()
        self.entry, self.head_dim = entry, head_dim
        self.groups = entry.units if between_units else 1  # mask units that attend to each other
        self.qkv, self.proj = nn.Linear(entry.channels, 3 * entry.out), nn.Linear(entry.out, entry.out)

    def forward(self, x: Tensor) -> Tensor:
        entry = self.entry
        query, key, value = self.qkv(x).split(entry.out, dim=-1)
        query = pooled(query, entry) if entry.pool else query
        left = self.groups * (entry.tokens // 4 if entry.pool else entry.tokens)
        q, k, v = (
            part.reshape(-1, count, entry.out // self.head_dim, self.head_dim).transpose(1, 2)
            for part, count in (
                (query * self.head_dim**-0.5, left),
                *((p, self.groups * entry.tokens) for p in (key, value)),
            )
        )
        mixed = (q @ k.transpose(2, 3)).softmax(dim=-1) @ v
        found: Tensor = self.proj(mixed.transpose(1, 2).reshape(-1, entry.units, left // self.groups, entry.out))
        return found


class AttentionBlock(nn.Module):
    """Attention and a feed-forward layer, both behind a normalization. A block that changes the width takes its
    shortcut from the normalized input, as the authors' code does."""

    def __init__(self, entry: Entry, head_dim: int, ratio: int, *, between_units: bool) -> None:
        super().__init__()
        channels, out = entry.channels, entry.out
        self.entry = entry
        self.norm1, self.norm2 = nn.LayerNorm(channels, eps=EPS), nn.LayerNorm(out, eps=EPS)
        self.attn = UnitAttention(entry, head_dim, between_units=between_units)
        self.shortcut = nn.Linear(channels, out) if channels != out else None
        self.fc1, self.fc2 = nn.Linear(out, ratio * out), nn.Linear(ratio * out, out)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm1(x)
        if self.shortcut is not None:
            x = self.shortcut(normed)
            x = pooled(x, self.entry) if self.entry.pool else x
        x = x + self.attn(normed)
        inner: Tensor = F.gelu(self.fc1(self.norm2(x)))
        found: Tensor = x + self.fc2(inner)
        return found


class Hiera(nn.Module):
    """Images (batch, channels, side, side) to logits (batch, classes)."""

    def __init__(self, config: HieraConfig) -> None:
        super().__init__()
        self.config = config
        first, widths = config.first_attention, config.widths
        attends = first < len(widths)
        self.stem = _stem(config)
        blocks = [
            _convolution(config, stage, number) for stage in range(first) for number in range(config.depths[stage])
        ]
        self.convolutions = nn.Sequential(*blocks)
        if attends and first:
            self.convolutions.append(ConvNorm(widths[first - 1], widths[first], 3, 2 if config.pools[first - 1] else 1))
        if attends:
            self.positions = nn.Parameter(torch.empty(1, config.sides[first] ** 2, widths[first]))
            nn.init.trunc_normal_(self.positions, std=0.02)
        self.blocks = nn.Sequential(
            *(_attention(config, stage, n) for stage in range(first, len(widths)) for n in range(config.depths[stage]))
        )
        self.norm = nn.LayerNorm(widths[-1], eps=EPS)
        self.head = nn.Linear(widths[-1], config.classes)

    def forward(self, image: Tensor) -> Tensor:
        x = self.convolutions(self.stem(image))
        if len(self.blocks):
            # not x.flatten(2).transpose(1, 2): behind it, torch 2.13's gradient of a batch normalization is wrong for
            # one image
            tokens = x.permute(0, 2, 3, 1).reshape(-1, *self.positions.shape[1:]) + self.positions
            features = self.blocks(by_unit(tokens, self.config)).mean(dim=(1, 2))
        else:
            features = x.mean(dim=(2, 3))
        logits: Tensor = self.head(self.norm(features))
        return logits


def pooled(x: Tensor, entry: Entry) -> Tensor:
    """(batch, units, tokens, channels) to a quarter of the tokens: the largest of four neighbours."""
    return x.reshape(-1, entry.units, 4, entry.tokens // 4, entry.out).amax(dim=2)


def by_unit(x: Tensor, config: HieraConfig) -> Tensor:
    """Order tokens by mask unit: (batch, tokens, channels) in rows of the image to (batch, units, tokens of a unit,
    channels). Within a unit, the positions in a square of four neighbours change slowest, then the positions in a
    square of four such squares, and so on, once for each pool: so every pool takes the maximum over the first axis of
    four."""
    first = config.first_attention
    side, unit, channels = config.sides[first], config.mask_unit, config.widths[first]
    pools = sum(config.pools[first:])
    rest = unit >> pools
    # row = ((unit row, rest row), bit of the last pool, ..., bit of the first pool), and so for columns
    bits = [2] * pools
    x = x.reshape(-1, side // unit, rest, *bits, side // unit, rest, *bits, channels)
    half = 2 + pools
    rows, columns = [1 + n for n in range(half)], [1 + half + n for n in range(half)]
    pairs = [axis for n in reversed(range(2, half)) for axis in (rows[n], columns[n])]
    x = x.permute(0, rows[0], columns[0], *pairs, rows[1], columns[1], 1 + 2 * half)
    return x.reshape(-1, (side // unit) ** 2, unit * unit, channels)


def fuse(model: Network) -> Network:
    """Replace each normalized convolution or linear layer, and each sum of convolutions, by one with the same result in
    evaluation mode, in place; return the network."""
    model.eval()
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, (Rep, ConvNorm, LinearNorm)):
                setattr(module, name, child.fused())
    return model


def build(*, fused: bool = False, **arguments: Any) -> Hiera:
    """Build a network with new random weights from the constructor arguments of a bundle. fused: with one convolution
    in place of each normalized one."""
    if type(fused) is not bool:
        raise EdgekitError(f"hiera: fused = {fused!r}; expected true or false")
    try:
        config = HieraConfig(**arguments)
    except TypeError as error:
        allowed = ", ".join((*HieraConfig.__dataclass_fields__, "fused"))
        raise EdgekitError(f"hiera: {error}; allowed arguments: {allowed}") from None
    return fuse(Hiera(config)) if fused else Hiera(config)


def from_transformers(weights: Mapping[str, Tensor], depths: tuple[int, ...]) -> dict[str, Tensor]:
    """Return the weights of a HieraForImageClassification of transformers under this module's names."""
    names = {
        "hiera.embeddings.position_embeddings": "positions",
        "hiera.embeddings.patch_embeddings.projection": "stem.0",
        "hiera.pooler.layernorm": "norm",
        "classifier": "head",
    }
    parts = {
        "layernorm_before": "norm1", "layernorm_after": "norm2", "attn.qkv": "attn.qkv", "attn.proj": "attn.proj",
        "mlp.fc1": "fc1", "mlp.fc2": "fc2", "proj": "shortcut",
    }  # fmt: skip
    number = 0
    for stage, depth in enumerate(depths):
        for layer in range(depth):
            prefix = f"hiera.encoder.stages.{stage}.layers.{layer}"
            names |= {f"{prefix}.{theirs}": f"blocks.{number}.{ours}" for theirs, ours in parts.items()}
            number += 1
    found = {}
    for name, value in weights.items():
        stem, _, ending = name.rpartition(".")
        if name in names:
            found[names[name]] = value
        elif stem in names:
            found[f"{names[stem]}.{ending}"] = value
        else:
            raise EdgekitError(f"{name!r} is no weight of a Hiera classifier with depths {depths}")
    return found


def _stem(config: HieraConfig) -> nn.Sequential:
    kernels = STEMS[config.stem]
    layers: list[nn.Module] = []
    channels = config.channels
    for number, (kernel, stride, padding) in enumerate(kernels):
        last = number + 1 == len(kernels)
        out = config.width if last else max(8, config.width // 2)
        layers.append(nn.Conv2d(channels, out, kernel, stride, padding))
        if not last:
            layers.append(nn.ReLU())
        channels = out
    return nn.Sequential(*layers)


def _convolution(config: HieraConfig, stage: int, number: int) -> nn.Module:
    entry, kind = config.entry(stage, number), config.kinds[stage]
    stride = 2 if entry.pool else 1
    if kind == "inverted":
        return Inverted(entry.channels, entry.out, stride, config.ratios[stage])
    return (Separable if kind == "separable" else Rep)(entry.channels, entry.out, stride)


def _attention(config: HieraConfig, stage: int, number: int) -> AttentionBlock | LevitBlock:
    if config.kinds[stage] == "levit":
        return LevitBlock(config.entry(stage, number), config.head_dim, config.ratios[stage])
    kind = config.attention(stage, number)
    return AttentionBlock(
        config.entry(stage, number), config.head_dim, config.ratios[stage], between_units=kind != "window"
    )
