"""Hierarchical image classifiers of convolutional stages and of stages with mask-unit attention, in PyTorch.

Source: Ryali et al. 2023, "Hiera: A Hierarchical Vision Transformer without the Bells-and-Whistles" (arXiv 2306.00989,
section 4). The authors compute attention on tensors of five axes, which torch's exporter refuses. Here tokens are
ordered by mask unit, (batch, units, tokens of a unit, width), so that attention has the usual four axes and every pool
is one maximum over an axis.

Convolutional stages may come before those with attention: inverted bottlenecks (Sandler et al. 2018, arXiv 1801.04381),
depthwise-separable convolutions (Howard et al. 2017, arXiv 1704.04861), and branches that become one convolution for
inference (Ding et al. 2021, "RepVGG", arXiv 2101.03697).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from edgekit.errors import EdgekitError

# name -> kernel, stride and padding of each convolution from the image to the first tokens
STEMS = {"conv7": ((7, 4, 3),), "patch4": ((4, 4, 0),), "conv3x2": ((3, 2, 1), (3, 2, 1))}
CONVOLUTIONS = ("inverted", "separable", "rep")
ATTENTIONS = ("window", "global")
MOST_BLOCKS, MOST_WIDTH, MOST_SIDE = 200, 8192, 2048
MOST_NUMBERS = 1 << 28  # of weights; Hiera-L has 214 million
EPS = 1e-6  # of layer normalization


@dataclass(frozen=True, slots=True)
class Entry:
    """What enters a block and leaves it. channels, out: widths; units, tokens: mask units, and tokens in each of them,
    at the entry; a convolution has one unit; pool: whether a quarter of the tokens leaves."""

    channels: int
    out: int
    units: int
    tokens: int
    pool: bool

    def pooled(self, x: Tensor) -> Tensor:
        """(batch, units, tokens, channels) to a quarter of the tokens: the largest of four neighbours."""
        return x.reshape(-1, self.units, 4, self.tokens // 4, self.out).amax(dim=2)


@dataclass(frozen=True, slots=True)
class HieraConfig:
    """Constructor arguments, as a bundle stores them. Tuples have one item for each stage, `pools` one fewer.

    width: of the first stage; it doubles with every further stage. kinds: window (mask-unit attention), global
    (attention between all tokens), inverted, separable, rep. ratios: width of the inner layer of a block in widths of
    the block; unused in separable and rep. pools: whether the next stage begins with half the side. mask_unit: tokens
    along a side of a mask unit, where attention begins.
    """

    depths: tuple[int, ...]
    kinds: tuple[str, ...]
    ratios: tuple[int, ...]
    pools: tuple[bool, ...]
    width: int
    head_dim: int
    mask_unit: int = 8
    stem: str = "conv7"
    image: int = 224
    channels: int = 3
    classes: int = 1000

    def __post_init__(self) -> None:
        for name in ("depths", "kinds", "ratios", "pools"):  # a bundle stores lists
            value = getattr(self, name)
            if not isinstance(value, (list, tuple)):
                raise EdgekitError(f"hiera: {name} = {value!r}; expected one value for each stage")
            object.__setattr__(self, name, tuple(value))
        if problem := self.problem():
            raise EdgekitError(f"hiera: {problem}")

    @property
    def widths(self) -> tuple[int, ...]:
        return tuple(self.width << stage for stage in range(len(self.depths)))

    @property
    def sides(self) -> tuple[int, ...]:
        """Tokens along a side at the end of each stage."""
        side, sides = self.image // 4, []
        for stage in range(len(self.depths)):
            side //= 2 if stage and self.pools[stage - 1] else 1
            sides.append(side)
        return tuple(sides)

    @property
    def first_attention(self) -> int:
        """The first stage with attention, or the number of stages."""
        return next((n for n, kind in enumerate(self.kinds) if kind in ATTENTIONS), len(self.kinds))

    @property
    def units(self) -> int:
        """Mask units of an image."""
        return (self.sides[self.first_attention] // self.mask_unit) ** 2

    @property
    def most_numbers(self) -> int:
        """An upper bound of the weights, known before anything is built."""
        blocks = sum(
            depth * max(6 + 2 * ratio, 11) * width * (width + 9)
            for depth, ratio, width in zip(self.depths, self.ratios, self.widths, strict=True)
        )
        tokens = (self.image // 4) ** 2
        return blocks + (49 * self.channels + 9 * self.width + tokens) * self.width + self.widths[-1] * self.classes

    def entry(self, stage: int, number: int) -> Entry:
        """Return what enters and leaves a block. The first block of a stage changes the width and pools; where
        attention begins, a convolution before it has changed both."""
        first, out = self.first_attention, self.widths[stage]
        changes = number == 0 and stage > 0 and stage != first
        channels, pool = (self.widths[stage - 1], self.pools[stage - 1]) if changes else (out, False)
        if stage < first:
            side = self.sides[stage - 1] if changes else self.sides[stage]
            return Entry(channels, out, 1, side * side, pool)
        pooled = sum(self.pools[first:stage]) - pool
        return Entry(channels, out, self.units, self.mask_unit**2 >> 2 * pooled, pool)

    def attention(self, stage: int, number: int) -> str:
        """Return the kind of attention of a block: the first block of a stage attends as the stage before it does."""
        return self.kinds[stage - 1 if number == 0 and stage > self.first_attention else stage]

    def problem(self) -> str:
        """Say what is wrong with the arguments; "" if nothing is."""
        stages = len(self.depths)
        if not 1 <= stages <= 8 or not (len(self.kinds) == len(self.ratios) == stages == len(self.pools) + 1):
            return "depths, kinds and ratios need one value for each of 1 to 8 stages, and pools one fewer"
        for name, most in (
            ("width", MOST_WIDTH), ("head_dim", MOST_WIDTH), ("mask_unit", MOST_SIDE), ("image", MOST_SIDE),
            ("channels", MOST_WIDTH), ("classes", 1 << 20),
        ):  # fmt: skip
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value <= most:
                return f"{name} = {value!r}; expected a whole number from 1 to {most:,}"
        if any(type(n) is not int or not 1 <= n <= MOST_BLOCKS for n in (*self.depths, *self.ratios)):
            return f"depths = {self.depths}, ratios = {self.ratios}; expected whole numbers from 1 to {MOST_BLOCKS}"
        if any(type(pool) is not bool for pool in self.pools):
            return f"pools = {self.pools}; expected true or false for each stage but the first"
        if self.stem not in STEMS:
            return f"stem = {self.stem!r}; allowed: {', '.join(STEMS)}"
        for kind in self.kinds:
            if kind not in (*CONVOLUTIONS, *ATTENTIONS):
                return f"kind {kind!r}; allowed: {', '.join((*ATTENTIONS, *CONVOLUTIONS))}"
        if any(kind in CONVOLUTIONS for kind in self.kinds[self.first_attention :]):
            return f"kinds = {self.kinds}; convolutional stages come before those with attention"
        if (numbers := self.most_numbers) > MOST_NUMBERS:
            return f"these sizes are a network of up to {numbers:,} numbers; edgekit builds up to {MOST_NUMBERS:,}"
        if self.image % (4 << sum(self.pools)):
            return f"image = {self.image}; expected a multiple of {4 << sum(self.pools)}, for these pools"
        return self._problem_of_attention()

    def _problem_of_attention(self) -> str:
        first = self.first_attention
        if first == len(self.kinds):
            return ""
        if self.sides[first] % self.mask_unit:
            return f"mask_unit = {self.mask_unit}; it must divide the {self.sides[first]} tokens of a side"
        if self.mask_unit % (1 << sum(self.pools[first:])):
            return (
                f"mask_unit = {self.mask_unit}; expected a multiple of {1 << sum(self.pools[first:])}, for these pools"
            )
        if self.widths[first] % self.head_dim:
            return f"head_dim = {self.head_dim}; it must divide the width {self.widths[first]}"
        return ""


class ConvNorm(nn.Module):
    """A convolution and its batch normalization, over (batch, channels, height, width)."""

    def __init__(self, channels: int, out: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(channels, out, kernel, stride, kernel // 2, groups=groups, bias=False)
        self.norm = nn.BatchNorm2d(out)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.norm(self.convolution(x))
        return found

    def fused(self) -> nn.Conv2d:
        """Return one convolution with the same result in evaluation mode."""
        return fuse_conv_bn_eval(self.convolution.eval(), self.norm.eval())


class Inverted(nn.Module):
    """1x1 to `ratio` times the width, depthwise 3x3, 1x1 back; added to the input if the shape is the same."""

    def __init__(self, channels: int, out: int, stride: int, ratio: int) -> None:
        super().__init__()
        inner = channels * ratio
        self.expand = ConvNorm(channels, inner, 1)
        self.depthwise = ConvNorm(inner, inner, 3, stride, groups=inner)
        self.project = ConvNorm(inner, out, 1)
        self.adds = channels == out and stride == 1

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.project(F.relu(self.depthwise(F.relu(self.expand(x)))))
        return x + y if self.adds else y


class Separable(nn.Module):
    """Depthwise 3x3, then 1x1; added to the input if the shape is the same."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.depthwise = ConvNorm(channels, channels, 3, stride, groups=channels)
        self.pointwise = ConvNorm(channels, out, 1)
        self.adds = channels == out and stride == 1

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.pointwise(F.relu(self.depthwise(x))))
        return x + y if self.adds else y


class Rep(nn.Module):
    """The sum of a 3x3 and a 1x1 convolution, and of the normalized input if the shape is the same."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.wide, self.narrow = ConvNorm(channels, out, 3, stride), ConvNorm(channels, out, 1, stride)
        self.identity = nn.BatchNorm2d(channels) if channels == out and stride == 1 else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.wide(x) + self.narrow(x)
        return F.relu(y if self.identity is None else y + self.identity(x))

    def fused(self) -> nn.Sequential:
        """Return one 3x3 convolution and its ReLU with the same result in evaluation mode."""
        total, narrow = self.wide.fused(), self.narrow.fused()
        assert total.bias is not None
        assert narrow.bias is not None
        with torch.no_grad():
            total.weight += F.pad(narrow.weight, (1, 1, 1, 1))
            total.bias += narrow.bias
            if self.identity is not None:
                norm = self.identity.eval()
                assert norm.running_var is not None
                assert norm.running_mean is not None
                scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
                channel = torch.arange(len(scale))
                total.weight[channel, channel, 1, 1] += scale
                total.bias += norm.bias - norm.running_mean * scale
        return nn.Sequential(total, nn.ReLU())


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
        query = entry.pooled(query) if entry.pool else query
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
            x = self.entry.pooled(x) if self.entry.pool else x
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


def fuse(model: Hiera) -> Hiera:
    """Replace each normalized convolution, and each sum of convolutions, by one convolution with the same result in
    evaluation mode, in place; return the network."""
    model.eval()
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, (Rep, ConvNorm)):
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


def arguments(config: HieraConfig) -> dict[str, Any]:
    """Return the constructor arguments as JSON has them."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(config).items()}


def published(depths: tuple[int, ...], width: int, heads: int, *, classes: int = 1000, image: int = 224) -> HieraConfig:
    """Return the configuration of one of the authors' networks: Tiny is ((1, 2, 7, 2), 96, 1) (table 7)."""
    return HieraConfig(
        depths, ("window", "window", "global", "global"), (4,) * 4, (True,) * 3, width, width // heads,
        image=image, classes=classes,
    )  # fmt: skip


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


def _attention(config: HieraConfig, stage: int, number: int) -> AttentionBlock:
    kind = config.attention(stage, number)
    return AttentionBlock(
        config.entry(stage, number), config.head_dim, config.ratios[stage], between_units=kind == "global"
    )
