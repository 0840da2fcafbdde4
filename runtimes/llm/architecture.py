"""What a decoder-only transformer looks like, as data: its sizes, its rotary embedding, its weights by role.

The families differ in few things: which halves of a head the rotary embedding rotates together, whether the projections
have biases, whether queries and keys are normalised. An engine reads these from here and nothing else from the file.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from edgekit.errors import EdgekitError, unknown
from edgekit.importers.gguf import GgufFile, Tensor

Pairs = Literal["adjacent", "halves"]
# how the file of each family stores the dimensions that the rotary embedding rotates together
PAIRS: dict[str, Pairs] = {"llama": "adjacent", "qwen2": "halves", "qwen3": "halves"}
SCALINGS = ("none", "linear")
# the keys of a family's metadata that are read here, and those that change no result
READ = frozenset(
    (
        *("block_count", "context_length", "embedding_length", "feed_forward_length"),
        *("attention.head_count", "attention.head_count_kv", "attention.key_length"),
        *("attention.layer_norm_rms_epsilon", "rope.dimension_count", "rope.freq_base"),
        *("rope.scaling.type", "rope.scaling.factor", "rope.scale_linear"),
    )
)
WITHOUT_EFFECT = frozenset(
    (
        *("vocab_size", "tensor_data_layout", "attention.value_length"),
        *("rope.scaling.original_context_length", "rope.scaling.finetuned"),
    )
)
WINDOW = "attention.sliding_window"  # changes no result if it is as long as the context
# keys that change a result unless they have this value
NEUTRAL = {"attention.causal": True, "use_parallel_residual": False, "expert_count": 0, "expert_used_count": 0}


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary position embedding (Su et al., RoFormer, arXiv 2104.09864, section 3.2).

    size: the dimensions of a head that are rotated, the first ones; base: of the frequencies; pairs: whether dimensions
    2i and 2i + 1, or i and i + size / 2 are rotated together; factors: (size / 2,) by which frequencies are divided.
    """

    size: int
    base: float
    pairs: Pairs
    factors: npt.NDArray[np.float64]
    divisors: npt.NDArray[np.float64] = field(init=False, repr=False)  # of a position; computed once, not in each step

    def __post_init__(self) -> None:
        exponents = np.arange(0, self.size, 2) / self.size
        object.__setattr__(self, "divisors", self.base**exponents * self.factors)

    def angles(self, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        """Return (positions, size / 2) the angle of each pair of dimensions."""
        return positions[:, None] / self.divisors


@dataclass(frozen=True, slots=True)
class Architecture:
    """width: of the residual stream; hidden: of the gated feed-forward; context: the longest sequence that the model
    was made for; epsilon: of the root-mean-square norms."""

    family: str
    layers: int
    width: int
    heads: int
    kv_heads: int
    head_size: int
    hidden: int
    vocabulary: int
    context: int
    epsilon: float
    rope: Rope

    @property
    def queries_per_key(self) -> int:
        return self.heads // self.kv_heads


@dataclass(frozen=True, slots=True)
class Layer:
    """The weights of a layer. Matrices have shape (outputs, inputs). None: this family has no such weight."""

    attention_norm: Tensor
    query: Tensor
    key: Tensor
    value: Tensor
    query_bias: Tensor | None
    key_bias: Tensor | None
    value_bias: Tensor | None
    query_norm: Tensor | None
    key_norm: Tensor | None
    attention_output: Tensor
    mlp_norm: Tensor
    gate: Tensor
    up: Tensor
    down: Tensor


@dataclass(frozen=True, slots=True)
class Model:
    """A model in a file: its architecture and its weights. head: the embedding, if the two are tied; path: of the
    file."""

    architecture: Architecture
    embedding: Tensor
    layers: Sequence[Layer]
    norm: Tensor
    head: Tensor
    path: Path | None = None


def from_gguf(file: GgufFile) -> Model:
    """Return the model in a GGUF file. Raises EdgekitError if its family is unknown or its weights do not fit."""
    architecture = _architecture(file)
    found = _Weights(file, architecture.family)
    sizes = _shapes(architecture)
    layers = [
        Layer(**{role: found.layer(number, role, shape) for role, shape in sizes.items()})  # type: ignore[arg-type]
        for number in range(architecture.layers)
    ]
    embedding = found.take("token_embd.weight", (architecture.vocabulary, architecture.width))
    head = found.take("output.weight", (architecture.vocabulary, architecture.width), default=embedding)
    norm = found.take("output_norm.weight", (architecture.width,))
    model = Model(architecture, embedding, layers, norm, head, file.path)
    if found.left:
        raise EdgekitError(
            f"{file.path}: {len(found.left)} tensors belong to no known role of {architecture.family}, such as "
            f"{min(found.left)!r}; edgekit does not run this variant of the family"
        )
    return model


def _architecture(file: GgufFile) -> Architecture:
    family = file.get("general.architecture", str)
    if family not in PAIRS:
        raise unknown("family of language models", family, PAIRS, where=str(file.path))

    def size(key: str, default: int | None = None) -> int:
        value: int = file.get(f"{family}.{key}", int, default)
        if not 1 <= value < 1 << 31:
            raise EdgekitError(f"{file.path}: {family}.{key} = {value}; expected 1 or more")
        return value

    def number(key: str, default: float | None = None) -> float:
        value = float(file.get(f"{family}.{key}", (int, float), default))
        if not (math.isfinite(value) and value > 0):
            raise EdgekitError(f"{file.path}: {family}.{key} = {value}; expected a positive number")
        return value

    width, heads = size("embedding_length"), size("attention.head_count")
    kv_heads = size("attention.head_count_kv", heads)
    head_size = size("attention.key_length", width // heads)
    if heads % kv_heads or head_size % 2:
        text = f"{heads} heads, {kv_heads} heads of keys and {head_size} dimensions to a head do not fit together"
        raise EdgekitError(f"{file.path}: {text}; convert the model again")
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise EdgekitError(f"{file.path}: holds no tensor 'token_embd.weight', so it is no language model")
    context = size("context_length")
    _check_variant(file, family, context)
    layers = size("block_count")
    if layers > len(file.tensors):
        raise EdgekitError(f"{file.path}: declares {layers} layers and holds {len(file.tensors)} tensors")
    return Architecture(
        family=family,
        layers=layers,
        width=width,
        heads=heads,
        kv_heads=kv_heads,
        head_size=head_size,
        hidden=size("feed_forward_length"),
        vocabulary=embedding.shape[0],
        context=context,
        epsilon=number("attention.layer_norm_rms_epsilon"),
        rope=_rope(file, family, head_size),
    )


def _check_variant(file: GgufFile, family: str, context: int) -> None:
    """Raise if the metadata has a key that edgekit does not read, because that key may change what the model computes:
    an attention scale, say, or a sliding window shorter than the context."""
    for key, value in file.metadata.items():
        name = key.removeprefix(f"{family}.")
        if name == key or name in READ or name in WITHOUT_EFFECT:
            continue
        if isinstance(value, int) and (value == NEUTRAL.get(name) or (name == WINDOW and value >= context)):
            continue
        shown = " ".join(repr(value).split())[:60]
        raise EdgekitError(f"{file.path}: {key} = {shown}; edgekit does not run this variant of the family")


def _rope(file: GgufFile, family: str, head_size: int) -> Rope:
    size = file.get(f"{family}.rope.dimension_count", int, head_size)
    if size % 2 or not 2 <= size <= head_size:
        raise EdgekitError(
            f"{file.path}: {family}.rope.dimension_count = {size}; expected an even number up to {head_size}, the size "
            "of a head"
        )
    base = float(file.get(f"{family}.rope.freq_base", (int, float), 10_000.0))
    old = file.get(f"{family}.rope.scale_linear", (int, float), 0.0)  # the factor's name in old files
    factor = float(file.get(f"{family}.rope.scaling.factor", (int, float), old))
    # a file with a factor and no type means linear scaling, and a factor of 0 none
    scaling = file.get(f"{family}.rope.scaling.type", str, "linear" if factor else "none")
    if scaling not in SCALINGS:
        raise unknown("scaling of the rotary embedding", scaling, SCALINGS, where=str(file.path))
    factors = np.ones(size // 2)
    if scaling == "linear":
        factors *= factor
    if (given := file.tensors.get("rope_freqs.weight")) is not None:  # Llama 3 divides each frequency by its own factor
        if given.shape != factors.shape:
            raise EdgekitError(f"{file.path}: 'rope_freqs.weight' has shape {given.shape}; expected {factors.shape}")
        factors *= given.values().astype(np.float64)
    if not (np.isfinite([base, *factors]).all() and min(base, *factors) > 0):
        raise EdgekitError(f"{file.path}: the rotary embedding has a base or factors that are not positive numbers")
    return Rope(size, base, PAIRS[family], factors)


def _shapes(of: Architecture) -> dict[str, tuple[int, ...]]:
    """Return the shape of each weight of a layer."""
    queries, keys = of.heads * of.head_size, of.kv_heads * of.head_size
    return {
        "attention_norm": (of.width,),
        "query": (queries, of.width),
        "key": (keys, of.width),
        "value": (keys, of.width),
        "query_bias": (queries,),
        "key_bias": (keys,),
        "value_bias": (keys,),
        "query_norm": (of.head_size,),
        "key_norm": (of.head_size,),
        "attention_output": (of.width, queries),
        "mlp_norm": (of.width,),
        "gate": (of.hidden, of.width),
        "up": (of.hidden, of.width),
        "down": (of.width, of.hidden),
    }


# the name of each weight in the file, behind "blk.N."
NAMES = {
    "attention_norm": "attn_norm.weight",
    "query": "attn_q.weight",
    "key": "attn_k.weight",
    "value": "attn_v.weight",
    "query_bias": "attn_q.bias",
    "key_bias": "attn_k.bias",
    "value_bias": "attn_v.bias",
    "query_norm": "attn_q_norm.weight",
    "key_norm": "attn_k_norm.weight",
    "attention_output": "attn_output.weight",
    "mlp_norm": "ffn_norm.weight",
    "gate": "ffn_gate.weight",
    "up": "ffn_up.weight",
    "down": "ffn_down.weight",
}
BIASES, NORMS = ("query_bias", "key_bias", "value_bias"), ("query_norm", "key_norm")
# the weights that a family always has, and those that some of its models have, beside what all families have
ALWAYS: dict[str, tuple[str, ...]] = {"llama": (), "qwen2": BIASES, "qwen3": NORMS}
SOMETIMES: dict[str, tuple[str, ...]] = {"llama": BIASES, "qwen2": (), "qwen3": BIASES}


class _Weights:
    """The tensors of a file, each taken at most once; what is left belongs to no role."""

    def __init__(self, file: GgufFile, family: str) -> None:
        self._file, self._family = file, family
        self.left = set(file.tensors) - {"rope_freqs.weight"}

    def layer(self, number: int, role: str, shape: tuple[int, ...]) -> Tensor | None:
        name = f"blk.{number}.{NAMES[role]}"
        expected = role not in (*BIASES, *NORMS) or role in ALWAYS[self._family]
        if expected or (role in SOMETIMES[self._family] and name in self._file.tensors):
            return self.take(name, shape)
        return None  # a weight that the family never has is left over, and refused

    def take(self, name: str, shape: tuple[int, ...], default: Tensor | None = None) -> Tensor:
        tensor = self._file.tensors.get(name, default)
        if tensor is None:
            raise EdgekitError(f"{self._file.path}: holds no tensor {name!r}; the file is incomplete")
        if tensor.shape != shape:
            raise EdgekitError(f"{self._file.path}: {name!r} has shape {tensor.shape}; expected {shape}")
        self.left.discard(name)
        return tensor
