"""t2, the time-series transformer for light curves, in PyTorch.

Source: Allam Jr & McEwen, "Paying attention to astronomical transients" (arXiv 2105.06178, section 3). The defaults are
those of the published models, whose weights `edgekit.nn.t2_weights` loads.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from edgekit.bundle.family import PrunableGroup
from edgekit.errors import EdgekitError
from edgekit.nn.attention import TinyHeadAttention

MOST_LAYERS, MOST_NUMBERS = 1_000, 1 << 28  # the published models have 1 layer and some ten thousand numbers


@dataclass(frozen=True, slots=True)
class T2Config:
    """Constructor arguments, as a bundle stores them."""

    bands: int
    classes: int = 14  # as in the published models
    # numbers per object in addition to the light curve; 2 = photometric redshift and its error, as in the published
    # models
    context: int = 0
    sequence: int = 100  # grid points of the interpolated light curve
    embed_dim: int = 32
    heads: int = 16
    head_dim: int = 2  # embed_dim / heads in the paper; separate here, because head pruning changes the heads only
    ff_dim: int = 128
    layers: int = 1
    dropout: float = 0.1

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            least = 0 if name in ("context", "dropout") else 1
            whole = name != "dropout"
            if type(value) not in ((int,) if whole else (int, float)) or not value >= least:
                number = "whole number" if whole else "number"
                raise EdgekitError(f"t2: {name} = {repr(value)[:40]}; expected a {number} of at least {least}")
        if self.dropout >= 1:
            raise EdgekitError(f"t2: dropout = {self.dropout}; expected 0 <= dropout < 1")
        if self.layers > MOST_LAYERS or self.numbers > MOST_NUMBERS:
            raise EdgekitError(
                f"t2: {self.layers} layers and {self.numbers:,} numbers; edgekit builds up to {MOST_LAYERS:,} layers "
                f"and {MOST_NUMBERS:,} numbers"
            )

    @property
    def numbers(self) -> int:
        """The number of weights in the largest parts of the network, and of numbers in its positional encoding."""
        attention, feed_forward = 4 * self.embed_dim * self.heads * self.head_dim, 2 * self.embed_dim * self.ff_dim
        rows = self.bands + self.classes + self.sequence + self.context
        return self.layers * (attention + feed_forward) + rows * self.embed_dim


class SelfAttention(nn.Module):
    """Multi-head self-attention over (batch, tokens, embed_dim)."""

    def __init__(self, embed_dim: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, head_dim
        self.query = nn.Linear(embed_dim, heads * head_dim)
        self.key = nn.Linear(embed_dim, heads * head_dim)
        self.value = nn.Linear(embed_dim, heads * head_dim)
        self.combine = nn.Linear(heads * head_dim, embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        split = (batch, tokens, self.heads, self.head_dim)
        q, k, v = (layer(x).reshape(split).permute(0, 2, 3, 1) for layer in (self.query, self.key, self.value))
        if _compiled_attention_fits(x):
            flat = (batch * self.heads, self.head_dim, tokens)
            mixed = TinyHeadAttention.apply(  # type: ignore[no-untyped-call]
                *(part.reshape(flat).contiguous() for part in (q, k, v))
            )
            mixed = mixed.reshape(batch, self.heads * self.head_dim, tokens).transpose(1, 2)
        else:
            scores = (q.transpose(2, 3) @ k) / math.sqrt(self.head_dim)
            mixed = torch.softmax(scores, dim=-1) @ v.transpose(2, 3)
            mixed = mixed.transpose(1, 2).reshape(batch, tokens, self.heads * self.head_dim)
        return self.combine(mixed)


def _compiled_attention_fits(x: Tensor) -> bool:
    """Return whether the input is plain float32 on the CPU and no export is in progress: an exported graph must consist
    of the framework's own operators."""
    exporting = torch.onnx.is_in_onnx_export() or torch.compiler.is_compiling()
    return x.device.type == "cpu" and x.dtype == torch.float32 and not exporting


class Block(nn.Module):
    """Post-norm transformer block: attention and feed-forward, each added and then normalized."""

    def __init__(self, config: T2Config) -> None:
        super().__init__()
        self.attention = SelfAttention(config.embed_dim, config.heads, config.head_dim)
        self.norm1 = nn.LayerNorm(config.embed_dim, eps=1e-6)
        self.expand = nn.Linear(config.embed_dim, config.ff_dim)
        self.contract = nn.Linear(config.ff_dim, config.embed_dim)
        self.norm2 = nn.LayerNorm(config.embed_dim, eps=1e-6)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(x + self.dropout(self.attention(x)))
        return self.norm2(x + self.dropout(self.contract(torch.relu(self.expand(x)))))


class T2(nn.Module):
    """Light curve (batch, sequence, bands) and optional context (batch, context) to logits (batch, classes).

    The context numbers, repeated once per band, are appended as `context` more time steps. So redshift z and its error
    e become two steps that both read (z, e, z, e, z, e): the published models tile before they reshape.
    """

    positions: Tensor

    def __init__(self, config: T2Config) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Linear(config.bands, config.embed_dim)  # the paper's Conv1D with kernel size 1
        tokens = config.sequence + config.context
        self.register_buffer("positions", positional_encoding(tokens, config.embed_dim), persistent=False)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.dropout = nn.Dropout(config.dropout)
        self.classifier = nn.Linear(config.embed_dim, config.classes)

    def forward(self, light_curve: Tensor, context: Tensor | None = None) -> Tensor:
        if context is not None:
            steps = context.repeat(1, self.config.bands).reshape(-1, self.config.context, self.config.bands)
            light_curve = torch.cat([light_curve, steps], dim=1)
        x = torch.relu(self.embed(light_curve)) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.classifier(self.dropout(x.mean(dim=1)))


def positional_encoding(tokens: int, embed_dim: int) -> Tensor:
    """(tokens, embed_dim) sines in even and cosines in odd columns (Vaswani et al. 2017, section 3.5)."""
    position = torch.arange(tokens, dtype=torch.float64).unsqueeze(1)
    column = torch.arange(embed_dim, dtype=torch.float64)
    angle = position / 10000.0 ** (2 * (column // 2) / embed_dim)
    return torch.where(column % 2 == 0, torch.sin(angle), torch.cos(angle)).to(torch.float32)


def build(**arguments: Any) -> T2:
    """Build a t2 with new random weights from the constructor arguments of a bundle."""
    try:
        return T2(T2Config(**arguments))
    except TypeError as error:
        raise EdgekitError(f"t2: {error}; allowed arguments: {', '.join(T2Config.__dataclass_fields__)}") from None


def prunable_groups(model: T2) -> list[PrunableGroup]:
    """Return the heads and feed-forward units of every block; all blocks keep the same number."""
    groups = []
    for number in range(model.config.layers):
        block = f"blocks.{number}."
        attention = [f"{block}attention.{part}" for part in ("query", "key", "value")]
        heads = tuple(f"{part}.{name}" for part in attention for name in ("weight", "bias"))
        combine, contract = f"{block}attention.combine", f"{block}contract"
        config = model.config
        groups += [
            PrunableGroup("heads", config.heads, config.head_dim, heads, (f"{combine}.weight",), combine),
            PrunableGroup(
                "ff_dim",
                config.ff_dim,
                1,
                (f"{block}expand.weight", f"{block}expand.bias"),
                (f"{contract}.weight",),
                contract,
            ),
        ]
    return groups
