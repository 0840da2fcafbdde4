"""What a decoder-only transformer looks like, as data: its sizes, its rotary embeddings, its weights by role.

An engine reads a model from here and nothing else from a file. This module also makes the description from a GGUF file;
`hugging_face` makes it from a folder that transformers saved.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from edgekit.errors import EdgekitError, printed, unknown
from edgekit.importers.gguf import GgufFile, Tensor
from runtimes.llm.families import (
    COMMON,
    FAMILIES,
    GGUF_NAMES,
    GGUF_STACKS,
    LOGIT_CAP,
    SCORE_CAP,
    WINDOW,
    Activation,
    Family,
)
from runtimes.llm.rope import ORIGINAL, Rope, rope_of

SCALINGS = ("none", "linear", "yarn", "longrope")
BETAS = {"beta_fast": "rope.scaling.yarn_beta_fast", "beta_slow": "rope.scaling.yarn_beta_slow"}
# the keys of a family's metadata that are read here, and those that change no result
READ = frozenset(
    (
        *("block_count", "context_length", "embedding_length", "feed_forward_length", SCORE_CAP, LOGIT_CAP),
        *("attention.head_count", "attention.head_count_kv", "attention.key_length"),
        *("attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon"),
        *("rope.dimension_count", "rope.freq_base", "rope.freq_base_swa", *BETAS.values()),
        *("rope.scaling.type", "rope.scaling.factor", "rope.scale_linear", "rope.scaling.attn_factor"),
    )
)
WITHOUT_EFFECT = frozenset(
    (
        *("vocab_size", "tensor_data_layout", "attention.value_length"),
        *("rope.scaling.original_context_length", "rope.scaling.finetuned"),
    )
)
# keys that change a result unless they have this value
NEUTRAL = {"attention.causal": True, "use_parallel_residual": False, "expert_count": 0, "expert_used_count": 0}


@dataclass(frozen=True, slots=True)
class Architecture:
    """width: of the residual stream; hidden: of the feed-forward; context: the longest sequence that the model was made
    for; epsilon: of the norms; query_scale: by which queries are multiplied; score_cap, logit_cap: c, where scores of
    attention or logits x become c tanh(x / c), 0 for none; embedding_scale: by which the embeddings of tokens are
    multiplied, but not those that are given as such; parallel: whether the feed-forward reads what attention reads.

    windows: how many tokens each layer sees, the own one among them, 0 for all; () if all layers see all. Those with a
    window have `local_rope` instead of `rope`, if there is one.
    """

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
    query_scale: float
    local_rope: Rope | None = None
    windows: tuple[int, ...] = ()
    score_cap: float = 0.0
    logit_cap: float = 0.0
    embedding_scale: float = 1.0
    activation: Activation = "silu"
    parallel: bool = False

    @property
    def queries_per_key(self) -> int:
        return self.heads // self.kv_heads

    def window(self, layer: int) -> int:
        """Return how many tokens a layer sees; 0 for all."""
        return self.windows[layer] if self.windows else 0

    @property
    def ropes(self) -> tuple[Rope, ...]:
        """The rotary embedding of layers that see all tokens, then that of the others if it differs."""
        return (self.rope,) if self.local_rope is None else (self.rope, self.local_rope)

    def rope_number(self, layer: int) -> int:
        """Return the index in `ropes` of a layer's rotary embedding."""
        return int(self.local_rope is not None and self.window(layer) > 0)


@dataclass(frozen=True, slots=True)
class Layer:
    """The weights of a layer. Matrices have shape (outputs, inputs). None: this family has no such weight. A norm with
    a bias is a LayerNorm, and one without is a root-mean-square norm. Without a gate the feed-forward is not gated."""

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
    mlp_norm: Tensor | None
    gate: Tensor | None
    up: Tensor
    down: Tensor
    attention_norm_bias: Tensor | None = None
    attention_output_bias: Tensor | None = None
    post_attention_norm: Tensor | None = None
    up_bias: Tensor | None = None
    down_bias: Tensor | None = None
    post_mlp_norm: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Model:
    """A model in a file: its architecture and its weights. head: the embedding, if the two are tied; path: of the file
    or folder."""

    architecture: Architecture
    embedding: Tensor
    layers: Sequence[Layer]
    norm: Tensor
    head: Tensor
    norm_bias: Tensor | None = None
    head_bias: Tensor | None = None
    path: Path | None = None


def shapes(of: Architecture) -> dict[str, tuple[int, ...]]:
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
        "attention_norm_bias": (of.width,),
        "attention_output_bias": (of.width,),
        "post_attention_norm": (of.width,),
        "up_bias": (of.hidden,),
        "down_bias": (of.width,),
        "post_mlp_norm": (of.width,),
    }


def assemble(of: Architecture, found: Weights) -> Model:
    """Return the model with these weights. Raises if one is missing, has another shape, or belongs to no role."""
    wanted = shapes(of)
    found.unstack(of.layers, wanted)
    layers = [
        Layer(**{role: found.layer(number, role, shape) for role, shape in wanted.items()})  # type: ignore[arg-type]
        for number in range(of.layers)
    ]
    embedding = found.take("embedding", (of.vocabulary, of.width))
    model = Model(
        of,
        embedding,
        layers,
        found.take("norm", (of.width,)),
        found.take("head", (of.vocabulary, of.width), default=embedding),
        found.take("norm_bias", (of.width,)) if "norm_bias" in found.always else None,
        found.take("head_bias", (of.vocabulary,)) if "head_bias" in found.always else None,
        found.where,
    )
    if found.left:
        raise EdgekitError(
            f"{found.where}: {len(found.left)} tensors belong to no known role of {of.family}, such as "
            f"{min(found.left)!r}; edgekit does not run this variant of the family"
        )
    return model


class Weights:
    """The tensors of a file, each taken at most once; what is left belongs to no role.

    names: of each role; stacks: the roles in tensors that hold several; always, sometimes: the roles that the model
    has, and those that it may have; where: the file.
    """

    def __init__(
        self,
        where: Path,
        tensors: Mapping[str, Tensor],
        names: Mapping[str, str],
        stacks: Mapping[str, Sequence[str]],
        always: Collection[str],
        sometimes: Collection[str] = (),
    ) -> None:
        self.where, self._tensors, self._names, self._stacks = where, dict(tensors), names, stacks
        self.always, self._sometimes = {*COMMON, *always}, sometimes
        self.left = set(tensors)

    def unstack(self, layers: int, wanted: Mapping[str, tuple[int, ...]]) -> None:
        """Replace each tensor that holds several matrices, one above the other, by these."""
        for stacked, roles in self._stacks.items():
            rows = [wanted[role][0] for role in roles]
            for number in range(layers):
                tensor = self._tensors.get(stacked.format(number))
                if tensor is None or tensor.shape[0] != sum(rows) or not self.always.issuperset(roles):
                    continue  # not stacked, or of a wrong shape, which is refused when it is taken
                self.left.discard(stacked.format(number))
                end = 0
                for role, size in zip(roles, rows, strict=True):
                    name = self._names[role].format(number)
                    self._tensors[name] = tensor.part(end, end + size)
                    self.left.add(name)
                    end += size

    def layer(self, number: int, role: str, shape: tuple[int, ...]) -> Tensor | None:
        present = self._names.get(role, "").format(number) in self._tensors
        if role in self.always or (role in self._sometimes and present):
            return self.take(role, shape, number)
        return None  # a weight that the family never has is left over, and refused

    def take(self, role: str, shape: tuple[int, ...], number: int = 0, default: Tensor | None = None) -> Tensor:
        name = self._names[role].format(number)
        tensor = self._tensors.get(name, default)
        if tensor is None:
            raise EdgekitError(f"{self.where}: holds no tensor {name!r}; the file is incomplete")
        if tensor.shape != shape:
            raise EdgekitError(f"{self.where}: {name!r} has shape {tensor.shape}; expected {shape}")
        self.left.discard(name)
        return tensor


# --- from a GGUF file


def from_gguf(file: GgufFile) -> Model:
    """Return the model in a GGUF file. Raises EdgekitError if its family is unknown or its weights do not fit."""
    architecture = _Metadata(file).architecture()
    family = FAMILIES[architecture.family]
    weights = {name: tensor for name, tensor in file.tensors.items() if not name.startswith("rope_f")}
    return assemble(
        architecture, Weights(file.path, weights, GGUF_NAMES, GGUF_STACKS, family.weights, family.sometimes)
    )


class _Metadata:
    """The sizes of a model in the metadata of a GGUF file."""

    def __init__(self, file: GgufFile) -> None:
        self._file = file
        self._name: str = file.get("general.architecture", str)
        if self._name not in FAMILIES:
            raise unknown("family of language models", self._name, FAMILIES, where=str(file.path))
        self._family: Family = FAMILIES[self._name]

    def architecture(self) -> Architecture:
        file, family = self._file, self._family
        width, heads = self.size("embedding_length"), self.size("attention.head_count")
        kv_heads = self.size("attention.head_count_kv", heads)
        head_size = self.size("attention.key_length", width // heads)
        if heads % kv_heads or head_size % 2:
            text = f"{heads} heads, {kv_heads} heads of keys and {head_size} dimensions to a head do not fit together"
            raise EdgekitError(f"{file.path}: {text}; convert the model again")
        embedding = file.tensors.get("token_embd.weight")
        if embedding is None:
            raise EdgekitError(f"{file.path}: holds no tensor 'token_embd.weight', so it is no language model")
        context, layers = self.size("context_length"), self.size("block_count")
        self.check_variant(context)
        if layers > len(file.tensors):
            raise EdgekitError(f"{file.path}: declares {layers} layers and holds {len(file.tensors)} tensors")
        rope, local_rope, longest = self.ropes(head_size, context)
        norm = "layer_norm_epsilon" if "norm_bias" in family.weights else "layer_norm_rms_epsilon"
        return Architecture(
            family=self._name,
            layers=layers,
            width=width,
            heads=heads,
            kv_heads=kv_heads,
            head_size=head_size,
            hidden=self.size("feed_forward_length"),
            vocabulary=embedding.shape[0],
            context=longest,
            epsilon=self.number(f"attention.{norm}"),
            rope=rope,
            query_scale=(width // heads if layers == family.large else head_size) ** -0.5,
            local_rope=local_rope,
            windows=self.windows(layers, context),
            score_cap=self.number(SCORE_CAP) if self.has(SCORE_CAP) else 0.0,
            logit_cap=self.number(LOGIT_CAP) if self.has(LOGIT_CAP) else 0.0,
            embedding_scale=width**0.5 if family.scaled_embedding else 1.0,
            activation=family.activation,
            parallel=family.parallel,
        )

    def has(self, key: str) -> bool:
        return f"{self._name}.{key}" in self._file.metadata

    def size(self, key: str, default: int | None = None) -> int:
        value: int = self._file.get(f"{self._name}.{key}", int, default)
        if not 1 <= value < 1 << 31:
            raise EdgekitError(f"{self._file.path}: {self._name}.{key} = {value}; expected 1 or more")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = float(self._file.get(f"{self._name}.{key}", (int, float), default))
        if not (math.isfinite(value) and value > 0):
            raise EdgekitError(f"{self._file.path}: {self._name}.{key} = {value}; expected a positive number")
        return value

    def check_variant(self, context: int) -> None:
        """Raise if the metadata has a key that edgekit does not read, because that key may change what the model
        computes: an attention scale, say, or a sliding window in a family without one."""
        for key in self._family.keys:
            self._file.get(f"{self._name}.{key}", (int, float))
        for key, value in self._file.metadata.items():
            name = key.removeprefix(f"{self._name}.")
            if name == key or name in READ or name in WITHOUT_EFFECT:
                continue
            if name == WINDOW and (self._family.full_every is not None or (type(value) is int and value >= context)):
                continue
            if isinstance(value, int) and value == NEUTRAL.get(name):
                continue
            shown = f"{printed(key)} = {' '.join(repr(value).split())[:60]}"
            raise EdgekitError(f"{self._file.path}: {shown}; edgekit does not run this variant of the family")

    def windows(self, layers: int, context: int) -> tuple[int, ...]:
        every = self._family.full_every
        window: int = self._file.get(f"{self._name}.{WINDOW}", int, 0)
        if every is None or window == 0:
            return ()
        if not 1 <= window < 1 << 31:
            raise EdgekitError(f"{self._file.path}: {self._name}.{WINDOW} = {window}; expected 0 or more")
        return tuple(0 if every and layer % every == every - 1 else window for layer in range(layers))

    def ropes(self, head_size: int, context: int) -> tuple[Rope, Rope | None, int]:
        """Return the rotary embedding, that of layers with a window if it differs, and the longest context."""
        file, family = self._file, self._family
        size = file.get(f"{self._name}.rope.dimension_count", int, head_size)
        if size % 2 or not 2 <= size <= head_size:
            raise EdgekitError(
                f"{file.path}: {self._name}.rope.dimension_count = {size}; expected an even number up to {head_size}, "
                "the size of a head"
            )
        parameters = self.scaling(context) | {"rope_theta": self.number_or_zero("rope.freq_base", 10_000.0)}
        rope = rope_of(size, family.pairs, parameters, str(file.path))
        if (given := file.tensors.get("rope_freqs.weight")) is not None:
            # Llama 3 divides each frequency by its own factor
            if given.shape != rope.factors.shape:
                raise EdgekitError(
                    f"{file.path}: 'rope_freqs.weight' has shape {given.shape}; expected {rope.factors.shape}"
                )
            rope = replace(rope, factors=rope.factors * given.values().astype(np.float64))
        if not (np.isfinite(rope.factors).all() and min(rope.factors) > 0):
            raise EdgekitError(f"{file.path}: the rotary embedding has factors that are not positive numbers")
        local = self.number_or_zero("rope.freq_base_swa", family.local_base or 0.0)
        longest = parameters[ORIGINAL] if parameters.get("rope_type") == "longrope" else context
        return (
            rope,
            rope_of(size, family.pairs, {"rope_theta": local}, str(file.path)) if local else None,
            min(context, longest),
        )

    def number_or_zero(self, key: str, default: float) -> float:
        return float(self._file.get(f"{self._name}.{key}", (int, float), default))

    def scaling(self, context: int) -> dict[str, Any]:
        """Return the parameters by which the rotary embedding is stretched, by the names that `rope` has for them."""
        # a file with a factor and no type means linear scaling, and a factor of 0 none
        factor = self.number_or_zero("rope.scaling.factor", self.number_or_zero("rope.scale_linear", 0.0))
        name = self._file.get(f"{self._name}.rope.scaling.type", str, "linear" if factor else "none")
        short = self._file.tensors.get("rope_factors_short.weight")
        if short is not None:
            name = "longrope"
        if name not in SCALINGS:
            raise unknown("scaling of the rotary embedding", name, SCALINGS, where=str(self._file.path))
        if name == "none":
            return {}
        found: dict[str, Any] = {"rope_type": name, "factor": factor}
        if name == "linear":
            return found
        found[ORIGINAL] = self.size("rope.scaling.original_context_length")
        attention = self.number("rope.scaling.attn_factor", 1.0)
        if name == "longrope":
            if short is None:
                raise EdgekitError(f"{self._file.path}: holds no tensor 'rope_factors_short.weight'; download it again")
            found |= {"short_factor": short.values().ravel().tolist(), "factor": context / found[ORIGINAL]}
            return found | ({"attention_factor": attention} if self.has("rope.scaling.attn_factor") else {})
        found["attention_factor"] = attention * (0.1 * math.log(factor) + 1 if factor > 1 else 1.0)
        return found | {name: self.number(key) for name, key in BETAS.items() if self.has(key)}
