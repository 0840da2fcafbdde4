"""Networks of other people's making, as far as passes can tell: built by a Python function, trained on toy problems."""

import functools

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from edgekit.bundle.family import build
from edgekit.bundle.format import Manifest, assemble
from edgekit.bundle.tensors import TensorSpec
from edgekit.data.dataset import Dataset
from edgekit.nn.module import trust
from edgekit.nn.training import Schedule, fit, probabilities

STEPS, CHANNELS, CLASSES, SIDE = 16, 3, 8, 12


class Attention(nn.Module):
    """With the parts' names of timm's."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.num_heads, self.head_dim = heads, dim // heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x):
        batch, tokens, _ = x.shape
        parts = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(*parts.unbind(0))
        return self.proj(mixed.transpose(1, 2).reshape(batch, tokens, -1))


class Block(nn.Module):
    def __init__(self, dim: int, heads: int, hidden: int):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(dim), Attention(dim, heads)
        self.norm2, self.fc1, self.fc2 = nn.LayerNorm(dim), nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class Transformer(nn.Module):
    def __init__(self, dim: int, depth: int, heads: int, hidden: int):
        super().__init__()
        self.embed = nn.Linear(CHANNELS, dim)
        self.position = nn.Parameter(0.1 * torch.randn(1, STEPS, dim))
        self.blocks = nn.ModuleList(Block(dim, heads, hidden) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, CLASSES)

    def forward(self, x):
        x = self.embed(x) + self.position
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(dim=1))


def transformer(dim: int = 32, depth: int = 2, heads: int = 4, hidden: int = 64) -> nn.Module:
    return Transformer(dim, depth, heads, hidden)


class Residual(nn.Module):
    """Two convolutions beside a skip; a depthwise one between them."""

    def __init__(self, width: int):
        super().__init__()
        self.first, self.norm = nn.Conv2d(width, 2 * width, 1, bias=False), nn.BatchNorm2d(2 * width)
        self.depthwise = nn.Conv2d(2 * width, 2 * width, 3, padding=1, groups=2 * width)
        self.grouped, self.last = nn.GroupNorm(4, 2 * width), nn.Conv2d(2 * width, width, 1)

    def forward(self, x):
        return x + self.last(F.silu(self.grouped(self.depthwise(F.relu(self.norm(self.first(x)))))))


class ConvNet(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, padding=1, stride=2)
        self.blocks = nn.Sequential(*(Residual(width) for _ in range(2)))
        self.gate, self.head = nn.Linear(width * (SIDE // 2) ** 2, 64), nn.Linear(32, CLASSES)

    def forward(self, x):
        one, other = self.gate(self.blocks(F.relu(self.stem(x))).flatten(1)).chunk(2, dim=-1)
        return self.head(F.silu(one) * other)  # a gated unit: two rows of the layer are one unit


def convnet(width: int = 16) -> nn.Module:
    return ConvNet(width)


def sequences(samples: int, seed: int) -> Dataset:
    """(samples, STEPS, CHANNELS): eight smooth curves, shifted in time, under noise."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES, samples)
    time = np.arange(STEPS)[None, :, None] / STEPS + rng.uniform(0, 0.3, (samples, 1, 1))
    phase = np.arange(CHANNELS)[None, None, :]
    curves = np.sin(2 * np.pi * time * (1 + labels % 4)[:, None, None] + phase * (1 + labels // 4)[:, None, None])
    curves = curves + rng.normal(0, 0.25, curves.shape)
    return Dataset({"curve": curves.astype(np.float32)}, labels.astype(np.int64))


def images(samples: int, seed: int) -> Dataset:
    """(samples, 1, SIDE, SIDE): gratings of eight directions, any phase, under noise."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES, samples)
    y, x = np.mgrid[:SIDE, :SIDE] / SIDE
    angle = (np.pi * labels / CLASSES)[:, None, None]
    waves = np.sin(4 * np.pi * (x * np.cos(angle) + y * np.sin(angle)) + rng.uniform(0, 2 * np.pi, (samples, 1, 1)))
    pictures = (waves + rng.normal(0, 1.0, waves.shape))[:, None]
    return Dataset({"image": pictures.astype(np.float32)}, labels.astype(np.int64))


PROBLEMS = {
    "transformer": (transformer, sequences, TensorSpec("curve", ("batch", STEPS, CHANNELS))),
    "convnet": (convnet, images, TensorSpec("image", ("batch", 1, SIDE, SIDE))),
}


def arguments_of(kind: str) -> dict:
    """What a bundle's manifest says of the network."""
    _, _, spec = PROBLEMS[kind]
    trust(f"{__name__}:{kind}")
    described = f"{spec.dtype}:{','.join(map(str, spec.shape))}"
    return {"factory": f"{__name__}:{kind}", "arguments": {}, "inputs": {spec.name: described}}


@functools.cache
def trained(kind: str, epochs: int) -> tuple[nn.Module, Dataset, Dataset]:
    """The network after training, with its training and test rows."""
    train, test = (PROBLEMS[kind][1](samples, seed) for samples, seed in ((1536, 1), (512, 2)))
    torch.manual_seed(0)
    model = build("module", arguments_of(kind))
    return fit(model, train, Schedule(epochs=epochs, learning_rate=8e-3, averaging=0.9), seed=0), train, test


def accuracy(model: nn.Module, data: Dataset) -> float:
    return float((probabilities(model, data).argmax(axis=1) == data.labels).mean())


def bundled(kind: str, arguments: dict, model: nn.Module, data: Dataset):
    """The network as a bundle."""
    _, _, spec = PROBLEMS[kind]
    golden = data.take(np.arange(8))
    manifest = Manifest(kind, "module", arguments, (spec,), (TensorSpec("probabilities", ("batch", CLASSES)),))
    state = {name: value.detach().numpy() for name, value in model.state_dict().items()}
    return assemble(manifest, state, {}, (dict(golden.inputs), {"probabilities": probabilities(model, golden)}))
