"""braai, the network that tells real sources from artefacts in ZTF's images, in PyTorch, and its published weights.

Source: Duev et al. 2019, "Real-bogus classification for the Zwicky Transient Facility using deep learning" (arXiv
1907.11259, section 3): four 3x3 convolutions without padding, max-pooling by 2 after the second and by 4 after the
fourth, and two dense layers. The published network ends in one sigmoid; this one gives the logits of two classes whose
softmax is that sigmoid and its complement, so that edgekit measures it as any other classifier.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from edgekit.errors import EdgekitError

CLASSES = ("bogus", "real")
IMAGES = 3  # science, template, difference
KERNEL, POOLS = 3, (2, 4)  # pixels; the pools follow the second and the fourth convolution
MOST_STRIDE = 4
MOST_UNITS = 1 << 14  # filters of a layer, or units: the published network has up to 256
MOST_NUMBERS = 1 << 28  # of weights: the published network has 312,000
CONVOLUTIONS = ("conv1", "conv2", "conv3", "conv4")


@dataclass(frozen=True, slots=True)
class BraaiConfig:
    """Constructor arguments, as a bundle stores them. The defaults are those of the published networks d6_m7 and
    d6_m9. size: pixels along a side of the square images; filters and strides: of the four convolutions; hidden: units
    of the first dense layer. A stride of 2 in the first convolution leaves a fourth of the work: for students of
    `distill`."""

    size: int = 63
    filters: tuple[int, int, int, int] = (16, 16, 32, 32)
    strides: tuple[int, int, int, int] = (1, 1, 1, 1)
    hidden: int = 256
    dropout: tuple[float, float, float] = (0.25, 0.25, 0.5)  # after each pool and after the hidden units; in training

    def __post_init__(self) -> None:
        _check_whole("size", self.size, 1, 1024)
        for name, most in (("filters", MOST_UNITS), ("strides", MOST_STRIDE)):
            value = getattr(self, name)
            if not _is_row(value, len(CONVOLUTIONS)):
                raise EdgekitError(f"braai: {name} = {repr(value)[:60]}; expected a list of four whole numbers")
            for number in value:
                _check_whole(name, number, 1, most)
        if self.side < 1:
            raise EdgekitError(
                f"braai: images of {self.size} pixels with strides {self.strides} leave nothing after the second pool; "
                "expected larger images or smaller strides"
            )
        _check_whole("hidden", self.hidden, 1, MOST_UNITS)
        if not _is_row(self.dropout, 3) or not all(type(x) in (int, float) and 0 <= x < 1 for x in self.dropout):
            raise EdgekitError(f"braai: dropout = {repr(self.dropout)[:60]}; expected three numbers, 0 <= dropout < 1")
        if self.numbers > MOST_NUMBERS:
            raise EdgekitError(
                f"braai: these sizes are a network of {self.numbers:,} numbers; edgekit builds up to {MOST_NUMBERS:,}"
            )

    @property
    def numbers(self) -> int:
        """The number of weights without biases."""
        inputs = (IMAGES, *self.filters[:-1])
        kernels = sum(KERNEL**2 * before * after for before, after in zip(inputs, self.filters, strict=True))
        return kernels + (self.side**2 * self.filters[-1] + len(CLASSES)) * self.hidden

    @property
    def side(self) -> int:
        """Pixels along a side after the last pool."""
        side = self.size
        for number, stride in enumerate(self.strides):
            side = (side - KERNEL) // stride + 1
            if number % 2:
                side //= POOLS[number // 2]
        return side


def _is_row(value: object, length: int) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == length


def _check_whole(name: str, value: object, low: int, high: int) -> None:
    if type(value) is not int or not low <= value <= high:
        raise EdgekitError(f"braai: {name} = {repr(value)[:40]}; expected a whole number from {low} to {high}")


class Braai(nn.Module):
    """Cutouts (batch, size, size, 3), the last axis science, template, difference, to logits (batch, 2) of CLASSES."""

    def __init__(self, config: BraaiConfig) -> None:
        super().__init__()
        self.config = config
        inputs = (IMAGES, *config.filters[:-1])
        self.conv1, self.conv2, self.conv3, self.conv4 = (
            nn.Conv2d(before, after, KERNEL, stride)
            for before, after, stride in zip(inputs, config.filters, config.strides, strict=True)
        )
        self.fc_1 = nn.Linear(config.filters[-1] * config.side**2, config.hidden)
        self.fc_out = nn.Linear(config.hidden, len(CLASSES))
        self.pool1, self.pool2 = (nn.MaxPool2d(step) for step in POOLS)
        self.drop1, self.drop2, self.drop3 = (nn.Dropout(share) for share in config.dropout)

    def forward(self, cutouts: Tensor) -> Tensor:
        x = cutouts.permute(0, 3, 1, 2)
        x = self.drop1(self.pool1(torch.relu(self.conv2(torch.relu(self.conv1(x))))))
        x = self.drop2(self.pool2(torch.relu(self.conv4(torch.relu(self.conv3(x))))))
        x = self.drop3(torch.relu(self.fc_1(x.flatten(1))))
        logits: Tensor = self.fc_out(x)
        return logits


def build(**arguments: object) -> Braai:
    """Build a braai with new random weights from the constructor arguments of a bundle."""
    known = BraaiConfig.__dataclass_fields__
    if unknown := sorted(set(arguments) - set(known)):
        raise EdgekitError(f"braai: unknown argument {unknown[0]!r}; allowed arguments: {', '.join(known)}")
    rows = {name: tuple(value) if isinstance(value, list) else value for name, value in arguments.items()}
    return Braai(BraaiConfig(**rows))  # type: ignore[arg-type]


def arguments(config: BraaiConfig) -> dict[str, object]:
    """Return the constructor arguments in the form in which JSON gives them back."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(config).items()}


def from_published(arrays: Mapping[str, Any], source: str = "weights") -> Braai:
    """Return a braai with published weights: arrays in Keras layout, named 'conv1/kernel', 'conv1/bias', ... The
    kernels of convolutions are (height, width, in, out), and those of dense layers (in, out), where the first dense
    layer reads (height, width, filter)."""
    layers = (*CONVOLUTIONS, "fc_1", "fc_out")
    needed = [f"{layer}/{part}" for layer in layers for part in ("kernel", "bias")]
    missing, strange = [name for name in needed if name not in arrays], sorted(set(arrays) - set(needed))
    if missing or strange:
        fault = f"no array {missing[0]!r}" if missing else f"an unknown array {strange[0][:60]!r}"
        raise EdgekitError(
            f"{source}: not a published braai weight set, {fault}; expected the arrays {needed[0]!r} to {needed[-1]!r}"
        )
    for name in needed:
        array, axes = arrays[name], 1 if name.endswith("bias") else 4 if name.startswith("conv") else 2
        if array.dtype.kind != "f" or array.ndim != axes:
            raise EdgekitError(
                f"{source}: array {name!r} has shape {array.shape} and dtype {array.dtype}; expected floats in Keras "
                f"layout with {axes} axes"
            )
        if not np.isfinite(array.astype(np.float32)).all():
            raise EdgekitError(f"{source}: array {name!r} holds NaN, or values beyond float32; the file cannot be used")
    filters = tuple(arrays[f"{layer}/bias"].shape[0] for layer in CONVOLUTIONS)
    config = BraaiConfig(filters=filters, hidden=arrays["fc_1/bias"].shape[0])
    ins = (IMAGES, *filters[:-1])
    shapes: dict[str, tuple[int, ...]] = {
        f"{layer}/kernel": (KERNEL, KERNEL, before, after)
        for layer, before, after in zip(CONVOLUTIONS, ins, filters, strict=True)
    }
    shapes |= {"fc_1/kernel": (config.side**2 * filters[-1], config.hidden), "fc_out/kernel": (config.hidden, 1)}
    shapes |= {"fc_out/bias": (1,)}
    for name, shape in shapes.items():
        if arrays[name].shape != shape:
            raise EdgekitError(f"{source}: array {name!r} has shape {arrays[name].shape}; expected {shape}")
    state = {f"{layer}.bias": arrays[f"{layer}/bias"] for layer in layers}
    state |= {f"{layer}.weight": arrays[f"{layer}/kernel"].transpose(3, 2, 0, 1) for layer in CONVOLUTIONS}
    dense = arrays["fc_1/kernel"].reshape(config.side, config.side, filters[-1], config.hidden)
    state["fc_1.weight"] = dense.transpose(3, 2, 0, 1).reshape(config.hidden, -1)
    # softmax((-z/2, z/2)) = (1 - sigmoid(z), sigmoid(z)), and halving is exact
    half = np.array([-0.5, 0.5], np.float32)
    state["fc_out.weight"], state["fc_out.bias"] = (
        half[:, None] * arrays["fc_out/kernel"].T,
        half * state["fc_out.bias"],
    )
    model = Braai(config)
    model.load_state_dict(
        {name: torch.from_numpy(np.ascontiguousarray(value, np.float32)) for name, value in state.items()}
    )
    return model.eval()
