"""Folders as transformers saves them: small language models with random weights, and tokenizers of a few tokens."""

import json
from pathlib import Path

from tests.gguf_files import toy_metadata

SIZES = {
    "vocab_size": 307,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": None,
}
CLASSES = {
    "llama": "Llama",
    "mistral": "Mistral",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "gemma": "Gemma",
    "gemma2": "Gemma2",
    "gemma3_text": "Gemma3",
    "phi": "Phi",
    "phi3": "Phi3",
}
# what makes each family more than a Llama; windows are shorter than the tests' texts
SPECIAL = {
    "llama": {"head_dim": 32},
    "mistral": {"head_dim": 32, "sliding_window": 20},
    "qwen2": {},
    "qwen3": {"head_dim": 32},
    "gemma": {"head_dim": 48},
    "gemma2": {
        "head_dim": 32,
        "sliding_window": 20,
        "query_pre_attn_scalar": 24,
        "attn_logit_softcapping": 4.0,
        "final_logit_softcapping": 3.0,
    },
    "gemma3_text": {
        "head_dim": 32,
        "sliding_window": 20,
        "query_pre_attn_scalar": 24,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    },
    "phi": {"num_key_value_heads": 4, "num_attention_heads": 4, "partial_rotary_factor": 0.5},
    "phi3": {"pad_token_id": 0, "sliding_window": 20},
}


def network_of(model_type: str, seed: int = 0, **options):
    """A network of transformers with random weights, norms and biases among them, in float64."""
    import torch
    import transformers

    name = CLASSES[model_type]
    config_class = getattr(transformers, f"{name}TextConfig" if model_type == "gemma3_text" else f"{name}Config")
    config = config_class(**SIZES | SPECIAL[model_type] | options, attn_implementation="eager")
    torch.manual_seed(seed)
    network = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for key, parameter in network.named_parameters():
            if parameter.ndim == 1:  # norms and biases, which would be all ones or zeros
                parameter.uniform_(0.5, 1.5) if "norm" in key and "bias" not in key else parameter.normal_(0, 0.3)
                if model_type.startswith("gemma") and "norm" in key:
                    parameter -= 1  # transformers adds it
            else:
                parameter.normal_(0, parameter.shape[1] ** -0.5)
    return network


def save(network, folder: Path, dtype: str = "float32", **options) -> Path:
    import torch

    network.to(getattr(torch, dtype)).save_pretrained(folder, **options)
    write_tokenizer(folder)
    return folder


def logits_of(network, ids):
    import torch

    exact = type(network)(network.config).eval().double()  # with angles that were not rounded to 16 bits
    exact.load_state_dict(network.state_dict())
    with torch.no_grad():
        return exact(torch.from_numpy(ids)[None]).logits[0].numpy()


SPLITS = {
    "smollm": [
        {"type": "Digits", "individual_digits": True},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
    ],
    "gpt-2": [{"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}],
}


def tokenizer_json(rule: str = "smollm", **sizes: int) -> dict:
    """The tokenizer of the small GGUF files, as the tokenizers library saves it. The first control token is bos."""
    metadata = toy_metadata("llama", **sizes)
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    special = [
        {
            "id": number,
            "content": tokens[number],
            "special": True,
            "normalized": False,
            "lstrip": False,
            "rstrip": False,
            "single_word": False,
        }
        for number, code in enumerate(types)
        if code == 3
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": special,
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": SPLITS[rule]},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": {token: number for number, token in enumerate(tokens)},
            "merges": [merge.split(" ") for merge in metadata["tokenizer.ggml.merges"]],
        },
    }


def write_tokenizer(folder: Path, rule: str = "smollm", **changes) -> None:
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer_json(rule) | changes))
    template = toy_metadata("llama")["tokenizer.chat_template"]
    last = toy_metadata("llama")["tokenizer.ggml.tokens"][-1]
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": last, "chat_template": template}))
