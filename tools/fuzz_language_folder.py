"""The harness for folders of language models of `fuzz_readers.py`: config.json, tokenizer.json and its companion, and
safetensors whose header is changed apart from the length before it, which is written again."""

from __future__ import annotations

import json
import struct
from pathlib import Path

from fuzz_changes import Files

SIZES = {"layers": 1, "width": 32, "heads": 2, "kv_heads": 1, "head_size": 16, "hidden": 32, "vocabulary": 280}
WEIGHTS = "model.safetensors"


def language_folders() -> list[Files]:
    """Small models of two families, one with its safetensors as they are; the first is complete."""
    from safetensors.numpy import save

    from runtimes.llm.families import GGUF_NAMES
    from runtimes.llm.hugging_face import LLAMA
    from tests.gguf_files import toy_weights
    from tests.runtimes.llm.hugging_face_folders import tokenizer_json

    role_of = {name.format(0): role for role, name in GGUF_NAMES.items()}
    template = "{% for m in messages %}<|0|>{{ m.role }}: {{ m.content }}{% endfor %}<|1|>"
    names = {"eos_token": "<|18|>", "chat_template": template}
    tokenizer = tokenizer_json(vocabulary=SIZES["vocabulary"])
    made: list[Files] = []
    for family in ("llama", "qwen3"):
        tensors = {LLAMA[role_of[name]].format(0): value for name, value in toy_weights(family, **SIZES).items()}
        content = save(tensors)
        (size,) = struct.unpack_from("<Q", content)
        texts = {"config.json": config_of(family), "tokenizer.json": tokenizer, "tokenizer_config.json": names}
        files = {name: json.dumps(value).encode() for name, value in texts.items()}
        made.append({**files, "header": content[8 : 8 + size], "numbers": content[8 + size :]})
        made.append({**files, WEIGHTS: content})
    return made[:3]


def config_of(family: str) -> dict[str, object]:
    return {
        "model_type": family,
        "hidden_size": SIZES["width"],
        "intermediate_size": SIZES["hidden"],
        "num_hidden_layers": SIZES["layers"],
        "num_attention_heads": SIZES["heads"],
        "num_key_value_heads": SIZES["kv_heads"],
        "head_dim": SIZES["head_size"],
        "vocab_size": SIZES["vocabulary"],
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "sliding_window": 8,
        "use_sliding_window": True,
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    }


def write_language_folder(files: Files, folder: Path) -> Path:
    path = folder / "model"
    path.mkdir(exist_ok=True)
    for old in path.iterdir():
        old.unlink()
    whole = dict(files)
    if "header" in whole:
        header = whole.pop("header")
        whole[WEIGHTS] = struct.pack("<Q", len(header)) + header + whole.pop("numbers", b"")
    for name, content in whole.items():
        (path / name).write_bytes(content)
    return path


def read_language_folder(path: Path) -> None:
    """Load the model and let it answer, as `edgekit llm chat` does with the torch engine."""
    from runtimes.llm.model import LanguageModel
    from runtimes.llm.source import open_source
    from runtimes.llm.torch_engine import TorchEngine

    source = open_source(path)
    with LanguageModel(source, TorchEngine(source.model, blocks=4), 64) as answering:
        list(answering.chat([{"role": "user", "content": "a night"}], most_tokens=2))
