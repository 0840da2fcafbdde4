"""What the families of decoder-only transformers differ in, as data.

Roles are the names of weights in `architecture.Layer` and `architecture.Model`. All families have those of COMMON.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from runtimes.llm.rope import Pairs

Activation = Literal["silu", "gelu"]  # gelu: by tanh (Hendrycks and Gimpel, arXiv 1606.08415, section 2)

COMMON = ("attention_norm", "query", "key", "value", "attention_output", "up", "down")
GATED = ("gate", "mlp_norm")
BIASES = ("query_bias", "key_bias", "value_bias")
NORMS = ("query_norm", "key_norm")
AFTER = ("post_attention_norm", "post_mlp_norm")
PHI = ("attention_norm_bias", *BIASES, "attention_output_bias", "up_bias", "down_bias", "norm_bias", "head_bias")


@dataclass(frozen=True, slots=True)
class Family:
    """weights: roles that it has beside COMMON; sometimes: roles that some of its models have; pairs: how GGUF stores
    the dimensions that the rotary embedding rotates together; activation: of the feed-forward; scaled_embedding:
    whether embeddings are multiplied by the square root of the width; parallel: whether the feed-forward reads what
    attention reads, and not its sum with attention.

    In GGUF alone: keys: those that a file must have beside the usual ones; full_every: of so many layers the last one
    sees all tokens and the others see a window (0: all see a window; None: such files are refused); local_base: of the
    rotary embedding of layers with a window, if it differs; large: layers of the one model of the family whose queries
    are divided by the square root of width / heads.
    """

    weights: tuple[str, ...]
    sometimes: tuple[str, ...] = ()
    pairs: Pairs = "halves"
    activation: Activation = "silu"
    scaled_embedding: bool = False
    parallel: bool = False
    keys: tuple[str, ...] = ()
    full_every: int | None = None
    local_base: float | None = None
    large: int = 0


WINDOW, SCORE_CAP, LOGIT_CAP = "attention.sliding_window", "attn_logit_softcapping", "final_logit_softcapping"
FAMILIES: dict[str, Family] = {
    "llama": Family(GATED, sometimes=(*BIASES, "attention_output_bias"), pairs="adjacent", full_every=0),
    "qwen2": Family((*GATED, *BIASES)),
    "qwen3": Family((*GATED, *NORMS), sometimes=BIASES),
    "gemma": Family(GATED, activation="gelu", scaled_embedding=True),
    "gemma2": Family(
        (*GATED, *AFTER),
        activation="gelu",
        scaled_embedding=True,
        keys=(WINDOW, SCORE_CAP, LOGIT_CAP),
        full_every=2,
        large=46,
    ),
    "gemma3": Family(
        (*GATED, *NORMS, *AFTER),
        activation="gelu",
        scaled_embedding=True,
        keys=(WINDOW,),
        full_every=6,
        local_base=10_000.0,
        large=62,
    ),
    "phi2": Family(PHI, activation="gelu", parallel=True),
    "phi3": Family(GATED, full_every=0),
}

# the name of each weight in GGUF, {}: of the layer; several roles: matrices one above the other in one tensor
GGUF_NAMES: Mapping[str, str] = {
    "embedding": "token_embd.weight",
    "norm": "output_norm.weight",
    "norm_bias": "output_norm.bias",
    "head": "output.weight",
    "head_bias": "output.bias",
    "attention_norm": "blk.{}.attn_norm.weight",
    "attention_norm_bias": "blk.{}.attn_norm.bias",
    "query": "blk.{}.attn_q.weight",
    "key": "blk.{}.attn_k.weight",
    "value": "blk.{}.attn_v.weight",
    "query_bias": "blk.{}.attn_q.bias",
    "key_bias": "blk.{}.attn_k.bias",
    "value_bias": "blk.{}.attn_v.bias",
    "query_norm": "blk.{}.attn_q_norm.weight",
    "key_norm": "blk.{}.attn_k_norm.weight",
    "attention_output": "blk.{}.attn_output.weight",
    "attention_output_bias": "blk.{}.attn_output.bias",
    "post_attention_norm": "blk.{}.post_attention_norm.weight",
    "mlp_norm": "blk.{}.ffn_norm.weight",
    "gate": "blk.{}.ffn_gate.weight",
    "up": "blk.{}.ffn_up.weight",
    "up_bias": "blk.{}.ffn_up.bias",
    "down": "blk.{}.ffn_down.weight",
    "down_bias": "blk.{}.ffn_down.bias",
    "post_mlp_norm": "blk.{}.post_ffw_norm.weight",
}
GGUF_STACKS: Mapping[str, tuple[str, ...]] = {
    "blk.{}.attn_qkv.weight": ("query", "key", "value"),
    "blk.{}.attn_qkv.bias": BIASES,
    "blk.{}.ffn_up.weight": ("gate", "up"),
}
