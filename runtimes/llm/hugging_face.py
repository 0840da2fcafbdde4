"""Models from folders that transformers saved: config.json and safetensors.

Nothing of the folder runs. config.json is read by the keys that are listed here; a key that is not listed may change
what the model computes, so it is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgekit.errors import EdgekitError, printed, unknown
from edgekit.importers.gguf import Tensor
from edgekit.importers.hugging_face import safe_config
from edgekit.importers.safetensors_files import FLOATS, tensors_of
from runtimes.llm.architecture import Architecture, Model, Weights, assemble
from runtimes.llm.families import BIASES, FAMILIES, Activation
from runtimes.llm.rope import ORIGINAL, Rope, rope_of

LLAMA: dict[str, str] = {
    "embedding": "model.embed_tokens.weight",
    "norm": "model.norm.weight",
    "head": "lm_head.weight",
    "attention_norm": "model.layers.{}.input_layernorm.weight",
    "query": "model.layers.{}.self_attn.q_proj.weight",
    "key": "model.layers.{}.self_attn.k_proj.weight",
    "value": "model.layers.{}.self_attn.v_proj.weight",
    "query_bias": "model.layers.{}.self_attn.q_proj.bias",
    "key_bias": "model.layers.{}.self_attn.k_proj.bias",
    "value_bias": "model.layers.{}.self_attn.v_proj.bias",
    "query_norm": "model.layers.{}.self_attn.q_norm.weight",
    "key_norm": "model.layers.{}.self_attn.k_norm.weight",
    "attention_output": "model.layers.{}.self_attn.o_proj.weight",
    "attention_output_bias": "model.layers.{}.self_attn.o_proj.bias",
    "mlp_norm": "model.layers.{}.post_attention_layernorm.weight",
    "gate": "model.layers.{}.mlp.gate_proj.weight",
    "up": "model.layers.{}.mlp.up_proj.weight",
    "down": "model.layers.{}.mlp.down_proj.weight",
}
LAYER = "model.layers.{}"
GEMMA = LLAMA | {
    "post_attention_norm": f"{LAYER}.post_attention_layernorm.weight",
    "mlp_norm": f"{LAYER}.pre_feedforward_layernorm.weight",
    "post_mlp_norm": f"{LAYER}.post_feedforward_layernorm.weight",
}
PHI = LLAMA | {
    "norm": "model.final_layernorm.weight",
    "norm_bias": "model.final_layernorm.bias",
    "head_bias": "lm_head.bias",
    "attention_norm_bias": f"{LAYER}.input_layernorm.bias",
    "attention_output": f"{LAYER}.self_attn.dense.weight",
    "attention_output_bias": f"{LAYER}.self_attn.dense.bias",
    "up": f"{LAYER}.mlp.fc1.weight",
    "up_bias": f"{LAYER}.mlp.fc1.bias",
    "down": f"{LAYER}.mlp.fc2.weight",
    "down_bias": f"{LAYER}.mlp.fc2.bias",
}
PHI3_STACKS = {
    f"{LAYER}.self_attn.qkv_proj.weight": ("query", "key", "value"),
    f"{LAYER}.mlp.gate_up_proj.weight": ("gate", "up"),
}


@dataclass(frozen=True, slots=True)
class ModelType:
    """A model_type of transformers. family: of `families`; names: of the weights; stacks: the roles in tensors that
    hold several; windows: whether layers see windows if the config gives one; offset: what is added to the weights of
    norms; defaults: what the config means where it lacks a key."""

    family: str
    names: Mapping[str, str]
    stacks: Mapping[str, tuple[str, ...]]
    defaults: Mapping[str, Any]
    offset: float = 0.0


MODEL_TYPES = {
    "llama": ModelType("llama", LLAMA, {}, {}),
    "qwen2": ModelType("qwen2", LLAMA, {}, {"use_sliding_window": False}),
    "qwen3": ModelType("qwen3", LLAMA, {}, {"head_dim": 128, "use_sliding_window": False}),
    "mistral": ModelType("llama", LLAMA, {}, {}),
    "gemma": ModelType("gemma", LLAMA, {}, {"head_dim": 256, "tie_word_embeddings": True}, offset=1.0),
    "gemma2": ModelType(
        "gemma2",
        GEMMA,
        {},
        {
            "head_dim": 256,
            "query_pre_attn_scalar": 256,
            "tie_word_embeddings": True,
            "sliding_window": 4096,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
            "sliding_window_pattern": 2,
        },
        offset=1.0,
    ),
    "gemma3_text": ModelType(
        "gemma3",
        GEMMA,
        {},
        {
            "head_dim": 256,
            "query_pre_attn_scalar": 256,
            "tie_word_embeddings": True,
            "sliding_window": 4096,
            "rope_theta": 1e6,
            "rope_local_base_freq": 10_000.0,
            "sliding_window_pattern": 6,
        },
        offset=1.0,
    ),
    "phi": ModelType("phi2", PHI, {}, {"partial_rotary_factor": 0.5}),
    "phi3": ModelType("phi3", LLAMA, PHI3_STACKS, {}),
}
ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu",
    "gelu_new": "gelu",
}
READ = frozenset(
    (
        *("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
        *("num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "layer_norm_eps", "vocab_size"),
        *("hidden_act", "hidden_activation", "attention_bias", "tie_word_embeddings"),
        *("rope_parameters", "rope_theta", "rope_scaling", "partial_rotary_factor", "rope_local_base_freq", ORIGINAL),
        *("sliding_window", "use_sliding_window", "max_window_layers", "layer_types"),
        *("sliding_window_pattern", "_sliding_window_pattern"),
        *("query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping"),
    )
)
WITHOUT_EFFECT = frozenset(
    (
        *("architectures", "transformers_version", "torch_dtype", "dtype", "_name_or_path", "use_cache"),
        *(
            "bos_token_id",
            "eos_token_id",
            "pad_token_id",
            "initializer_range",
            "id2label",
            "label2id",
            "cache_implementation",
        ),
        *("attention_dropout", "hidden_dropout", "embd_pdrop", "resid_pdrop", "is_llama_config", "rope_interleaved"),
        *("_attn_implementation", "_attn_implementation_autoset", "return_dict", "output_attentions"),
        *("output_hidden_states", "transformers.js_config"),
    )
)
# keys that change a result unless they have one of these values
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "mlp_bias": (False,),
    "pretraining_tp": (1,),
    "qk_layernorm": (False,),
    "use_bidirectional_attention": (False, None),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
}
FULL, LOCAL = "full_attention", "sliding_attention"


def from_folder(folder: Path) -> Model:
    """Return the model in a folder. Raises EdgekitError if its family is unknown or its weights do not fit."""
    config = _Config(folder)
    of, model_type = config.architecture(), config.model_type
    always = {*FAMILIES[model_type.family].weights}
    if config.values.get("attention_bias"):
        always |= {*BIASES, "attention_output_bias"}
    tensors = tensors_of(folder)
    if config.values.get("tie_word_embeddings"):
        tensors.pop("lm_head.weight", None)  # transformers replaces it by the embedding
    elif "lm_head.weight" not in tensors:
        raise EdgekitError(f"{folder}: holds no tensor 'lm_head.weight'; the file is incomplete")
    if model_type.offset:
        tensors = {
            name: _plus(tensor, model_type.offset) if name.endswith("norm.weight") else tensor
            for name, tensor in tensors.items()
        }
    return assemble(of, Weights(folder, tensors, model_type.names, model_type.stacks, always))


def _plus(tensor: Tensor, offset: float) -> Tensor:
    values = np.ascontiguousarray(tensor.values().ravel() + np.float32(offset))
    return Tensor(tensor.name, FLOATS["F32"], tensor.shape, values.view(np.uint8))


class _Config:
    """The sizes of a model in config.json."""

    def __init__(self, folder: Path) -> None:
        self._where = f"{folder}/config.json"
        given = safe_config(folder)
        name = str(given.get("model_type"))[:40]
        if name not in MODEL_TYPES:
            raise unknown("model_type of a language model", name, MODEL_TYPES, where=self._where)
        self.model_type = MODEL_TYPES[name]
        self.values = {**self.model_type.defaults, **given}
        for key, value in given.items():
            if key in READ or key in WITHOUT_EFFECT or value in NEUTRAL.get(key, ()):
                continue
            shown = f"{printed(key)} = {' '.join(repr(value).split())[:60]}"
            raise EdgekitError(f"{self._where}: {shown}; edgekit does not run this variant of {name}")

    def architecture(self) -> Architecture:
        family, values = FAMILIES[self.model_type.family], self.values
        width, heads, layers = (self.size(key) for key in ("hidden_size", "num_attention_heads", "num_hidden_layers"))
        kv_heads = self.size("num_key_value_heads", heads)
        head_size = self.size("head_dim", width // heads)
        if heads % kv_heads or head_size % 2:
            text = f"{heads} heads, {kv_heads} heads of keys and {head_size} dimensions to a head do not fit together"
            raise EdgekitError(f"{self._where}: {text}; save the model again")
        if layers > 10_000:
            raise EdgekitError(f"{self._where}: num_hidden_layers = {layers}; expected at most 10,000")
        windows = self.windows(layers)
        rope, local_rope, longest = self.ropes(head_size, self.size("max_position_embeddings"))
        return Architecture(
            family=self.model_type.family,
            layers=layers,
            width=width,
            heads=heads,
            kv_heads=kv_heads,
            head_size=head_size,
            hidden=self.size("intermediate_size"),
            vocabulary=self.size("vocab_size"),
            context=longest,
            epsilon=self.number("layer_norm_eps" if "norm_bias" in family.weights else "rms_norm_eps"),
            rope=rope,
            query_scale=self.number("query_pre_attn_scalar", head_size) ** -0.5,
            local_rope=local_rope,
            windows=windows,
            score_cap=self.number("attn_logit_softcapping") if values.get("attn_logit_softcapping") else 0.0,
            logit_cap=self.number("final_logit_softcapping") if values.get("final_logit_softcapping") else 0.0,
            embedding_scale=width**0.5 if family.scaled_embedding else 1.0,
            activation=self.activation(family.activation),
            parallel=family.parallel,
        )

    def size(self, key: str, default: int | None = None) -> int:
        value = self.values.get(key)
        value = default if value is None else value
        if type(value) is not int or not 1 <= value < 1 << 31:
            raise EdgekitError(f"{self._where}: {key} = {repr(value)[:40]}; expected a whole number, 1 or more")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.values.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e18:
            raise EdgekitError(f"{self._where}: {key} = {repr(value)[:40]}; expected a positive number")
        return float(value)

    def activation(self, default: str) -> Activation:
        name = str(self.values.get("hidden_activation") or self.values.get("hidden_act") or default)[:40]
        if name not in ACTIVATIONS:
            raise unknown("activation", name, ACTIVATIONS, where=self._where)
        return ACTIVATIONS[name]

    def windows(self, layers: int) -> tuple[int, ...]:
        """Return how many tokens each layer sees, 0 for all."""
        values = self.values
        if values.get("sliding_window") is None or not values.get("use_sliding_window", True):
            return ()
        window, names = self.size("sliding_window"), values.get("layer_types")
        if names is None:
            every = values.get("_sliding_window_pattern", values.get("sliding_window_pattern"))
            start = values.get("max_window_layers", 0)  # Qwen: the layers before this one see all tokens
            if every is not None and (type(every) is not int or every < 1):
                raise EdgekitError(f"{self._where}: sliding_window_pattern = {repr(every)[:40]}; expected 1 or more")
            if type(start) is not int:
                raise EdgekitError(f"{self._where}: max_window_layers = {repr(start)[:40]}; expected a whole number")
            if every is None:
                names = [LOCAL if layer >= start else FULL for layer in range(layers)]
            else:
                names = [FULL if layer % every == every - 1 else LOCAL for layer in range(layers)]
        if not isinstance(names, list) or len(names) != layers or not {*map(str, names)} <= {FULL, LOCAL}:
            raise EdgekitError(
                f"{self._where}: layer_types does not name {FULL} or {LOCAL} for each of {layers} layers"
            )
        return tuple(window if name == LOCAL else 0 for name in names)

    def ropes(self, head_size: int, context: int) -> tuple[Rope, Rope | None, int]:
        """Return the rotary embedding, that of layers with a window if it differs, and the longest context."""
        values, given = self.values, self.values.get("rope_parameters") or {}
        old = values.get("rope_scaling") or {}
        if not isinstance(given, dict) or not isinstance(old, dict):
            raise EdgekitError(f"{self._where}: the parameters of the rotary embedding are no JSON object")
        if FULL in given:
            full, local = given[FULL], given.get(LOCAL)
        else:
            full = {"rope_theta": values.get("rope_theta"), **old, **given}
            base = values.get("rope_local_base_freq")
            local = None if base is None else {"rope_theta": base}
        rope, longest = self.rope(full, head_size, context)
        return rope, None if local is None else self.rope(local, head_size, context)[0], longest

    def rope(self, given: Any, head_size: int, context: int) -> tuple[Rope, int]:
        if not isinstance(given, dict):
            raise EdgekitError(f"{self._where}: the parameters of a rotary embedding are no JSON object")
        parameters = {key: value for key, value in given.items() if value is not None}
        name = parameters.pop("type", "default")
        parameters.setdefault("rope_type", "longrope" if name == "su" else name)  # "su" in Phi-3's first version
        parameters.setdefault("rope_theta", self.values.get("rope_theta", 10_000.0))
        share = parameters.pop("partial_rotary_factor", self.values.get("partial_rotary_factor"))
        share = 1.0 if share is None else share
        if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share <= 1:
            raise EdgekitError(f"{self._where}: partial_rotary_factor = {repr(share)[:40]}; expected a number up to 1")
        size = int(head_size * share)
        if size < 2 or size % 2:
            raise EdgekitError(f"{self._where}: {size} dimensions of a head are rotated; expected an even number")
        if parameters["rope_type"] in ("llama3", "yarn", "longrope"):
            original = self.values.get(ORIGINAL) or parameters.get(ORIGINAL) or context
            parameters[ORIGINAL] = original
            parameters.setdefault("factor", context / original if isinstance(original, int) and original else None)
        else:
            parameters.pop(ORIGINAL, None)
        rope = rope_of(size, "halves", parameters, self._where)
        return rope, min(context, int(parameters[ORIGINAL])) if parameters["rope_type"] == "longrope" else context
