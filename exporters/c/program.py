"""A network as a list of calls of the kernels in kernels.c, over buffers of (features, tokens)."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import cast

import numpy as np
from torch import nn

from edgekit.bundle.encoding import Float
from edgekit.bundle.family import find_family
from edgekit.bundle.format import PROBABILITIES, Bundle
from edgekit.bundle.tensors import TensorSpec
from edgekit.errors import EdgekitError
from edgekit.nn.t2 import T2, Block

LANES = 16  # floats of the widest vector in kernels.c: the row length of a buffer is a multiple of it, on every machine
NAME = re.compile("[a-z]([a-z0-9_]*[a-z0-9])?")  # of an input or output, which becomes a name in C


@dataclass(frozen=True, slots=True)
class Buffer:
    """Activations in the workspace, (features, tokens)."""

    name: str
    features: int


@dataclass(frozen=True, slots=True)
class Tensor:
    """A constant of the network, by its name in `Program.tensors`."""

    name: str


@dataclass(frozen=True, slots=True)
class Port:
    """One row of an input or of the output, as the caller passes it."""

    name: str


Argument = Buffer | Tensor | Port | int | float | None


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a kernel, with the arguments in the kernel's order; the kernel writes the first one."""

    kernel: str
    arguments: tuple[Argument, ...]


@dataclass(slots=True)
class Program:
    """The constants and kernel calls that `model_run` executes for each row."""

    inputs: tuple[TensorSpec, ...]
    output: TensorSpec
    tokens: int
    head_dim: int
    tensors: dict[str, Float]
    calls: list[Call] = field(default_factory=list)

    @property
    def stride(self) -> int:
        """Floats from one feature of a buffer to the next."""
        return -(-self.tokens // LANES) * LANES

    def call(self, kernel: str, *arguments: Argument) -> None:
        self.calls.append(Call(kernel, arguments))

    def linear(
        self,
        out: Buffer,
        x: Buffer,
        layer: nn.Linear,
        name: str,
        *,
        relu: bool = False,
        add: Buffer | Tensor | None = None,
    ) -> None:
        """Add a call: out = layer(x), clipped below at 0 if `relu`, then plus `add`."""
        weight, bias = Tensor(f"{name}.weight"), Tensor(f"{name}.bias")
        self.call("dense", out, x, weight, bias, add, layer.in_features, layer.out_features, int(relu))

    def linear_in_double(self, out: Buffer, x: Buffer, layer: nn.Linear, name: str) -> None:
        """Add a call: out = layer(x), with sums in double precision, for layers after which small differences grow."""
        weight, bias = Tensor(f"{name}.weight"), Tensor(f"{name}.bias")
        self.call("dense_in_double", out, x, weight, bias, layer.in_features, layer.out_features)

    def layer_norm(self, x: Buffer, layer: nn.LayerNorm, name: str) -> None:
        features = layer.normalized_shape[0]
        self.call("layer_norm", x, Tensor(f"{name}.weight"), Tensor(f"{name}.bias"), features, float(layer.eps))


def program(bundle: Bundle) -> Program:
    """Return the bundle's network as kernel calls. Raises if C does not support its family, inputs or outputs."""
    manifest = bundle.manifest
    if not find_family(manifest.family).written_in_c:
        raise EdgekitError(
            f"{manifest.name} is a {manifest.family}, which cannot be written as C yet; the C exporter knows the "
            f"families {', '.join(WRITERS)}; choose another format, such as --to onnx"
        )
    if len(manifest.outputs) != 1:
        raise EdgekitError(f"{manifest.name} has {len(manifest.outputs)} outputs; the C exporter writes one")
    names = [spec.name for spec in (*manifest.inputs, *manifest.outputs)]
    for spec in (*manifest.inputs, *manifest.outputs):
        if spec.dtype != "float32":
            raise EdgekitError(f"{manifest.name}: {spec.name!r} is {spec.dtype}; the C exporter takes float32 only")
        if not NAME.fullmatch(spec.name) or names.count(spec.name) > 1:
            raise EdgekitError(
                f"{manifest.name}: {spec.name!r} cannot be a name in C, or two tensors have it; "
                "use different lower-case words joined by _"
            )
    return WRITERS[manifest.family](bundle)


def t2(bundle: Bundle) -> Program:
    """Write the steps of `edgekit.nn.t2.T2.forward`, layer by layer; dropout does nothing at inference."""
    model = cast(T2, bundle.model())
    config, manifest = model.config, bundle.manifest
    tokens = config.sequence + config.context
    run = Program(manifest.inputs, manifest.outputs[0], tokens, config.head_dim, bundle.weights())
    shapes = [tuple(spec.shape[1:]) for spec in manifest.inputs]
    expected = [(config.sequence, config.bands), *([(config.context,)] if config.context else [])]
    if shapes != expected or manifest.outputs[0].shape[1:] != (config.classes,):
        raise EdgekitError(
            f"{manifest.name}: inputs of shape {shapes} and outputs of shape {manifest.outputs[0].shape_text} are not "
            f"those of its network, {expected} and (batch, {config.classes}); correct the manifest"
        )

    steps = Buffer("steps", config.bands)
    run.call("transpose", steps, Port(manifest.inputs[0].name), 0, config.sequence, config.bands)
    if config.context:
        count = config.context * config.bands
        repeated = Buffer("repeated", -(-count // run.stride))
        run.call("repeat", repeated, Port(manifest.inputs[1].name), config.context, count)
        run.call("transpose", steps, repeated, config.sequence, config.context, config.bands)
    positions = np.zeros((config.embed_dim, run.stride), np.float32)
    positions[:, :tokens] = model.positions.numpy().T
    run.tensors["positions"] = positions
    x = Buffer("embedded", config.embed_dim)
    run.linear(x, steps, model.embed, "embed", relu=True, add=Tensor("positions"))
    for number, block in enumerate(model.blocks):
        x = _block(run, x, cast(Block, block), f"blocks.{number}")
    pooled = Buffer("pooled", -(-config.embed_dim // run.stride))
    run.call("mean_of_tokens", pooled, x, config.embed_dim)
    output = Port(manifest.outputs[0].name)
    classifier = Tensor("classifier.weight"), Tensor("classifier.bias")
    run.call("dense_of_one", output, pooled, *classifier, config.embed_dim, config.classes)
    if output.name == PROBABILITIES:
        run.call("softmax", output, config.classes)
    return run


def _block(run: Program, x: Buffer, block: Block, name: str) -> Buffer:
    attention = block.attention
    width = attention.heads * attention.head_dim
    parts = [Buffer(part, width) for part in ("query", "key", "value")]
    for buffer in parts[:2]:
        run.linear_in_double(buffer, x, getattr(attention, buffer.name), f"{name}.attention.{buffer.name}")
    run.linear(parts[2], x, attention.value, f"{name}.attention.value")
    mixed, attended = Buffer("mixed", width), Buffer("attended", x.features)
    run.call("attention", mixed, *parts, attention.heads)
    run.linear(attended, mixed, attention.combine, f"{name}.attention.combine", add=x)
    run.layer_norm(attended, block.norm1, f"{name}.norm1")
    hidden, out = Buffer("hidden", block.expand.out_features), Buffer("contracted", x.features)
    run.linear(hidden, attended, block.expand, f"{name}.expand", relu=True)
    run.linear(out, hidden, block.contract, f"{name}.contract", add=attended)
    run.layer_norm(out, block.norm2, f"{name}.norm2")
    return out


# The functions that write a family as C, for the families whose `Family` says `written_in_c`.
WRITERS: dict[str, Callable[[Bundle], Program]] = {"t2": t2}
