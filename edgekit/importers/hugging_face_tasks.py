"""The task of a folder of transformers: the tokenizer's inputs, the output's name, pooling, tokenizer files.

Text and token classification, masked language models, image classification and feature extraction are imported. A
folder of sentence-transformers (modules.json) also has pooling and normalization, and its output is the embedding of
the whole text.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgekit.bundle.bounded import read_file
from edgekit.bundle.files import is_plain
from edgekit.bundle.format import TOKENIZER_FILES
from edgekit.bundle.tensors import SPEC_HELP, TensorSpec
from edgekit.errors import EdgekitError
from edgekit.importers.base import json_value, read_json

LOGITS = ("ForSequenceClassification", "ForTokenClassification", "ForMaskedLM", "ForImageClassification")
TEXT_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "position_ids")
POOLINGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len",
}
LARGEST_TOKENIZER = 64 << 20  # bytes of one file; the largest vocabularies in use take 35 MB


@dataclass(frozen=True, slots=True)
class Pooling:
    """How a sentence's embedding is made of its tokens'."""

    mode: str
    normalize: bool


def output_of(class_name: str, folder: Path) -> str:
    """Return the name of the first output of a class. Raises for a class whose task is not imported."""
    if class_name.endswith(LOGITS):
        return "logits"
    if class_name.endswith("Model") and not class_name.endswith(("LMHeadModel", "DoubleHeadsModel")):
        return "last_hidden_state"
    hint = "; language models run with: edgekit llm" if class_name.endswith(("ForCausalLM", "LMHeadModel")) else ""
    raise EdgekitError(
        f"{folder}: edgekit does not import the task of {class_name}; expected a class whose name ends in "
        f"{', '.join(LOGITS)} or Model{hint}; other models can be imported as ONNX files"
    )


def inputs_of(config: Mapping[str, Any], model: Any, folder: Path) -> tuple[TensorSpec, ...]:
    """Return the inputs of a model class: pixels of the configured size, or what the folder's tokenizer gives."""
    name = model.main_input_name
    size = config.get("image_size")
    if name == "pixel_values" and size:
        lengths = [config.get("num_channels", 3), *(size if isinstance(size, list) else (size, size))]
        if len(lengths) != 3 or not all(type(length) is int and 0 < length < 2**31 for length in lengths):
            raise EdgekitError(
                f"{folder}/config.json: num_channels = {repr(lengths[0])[:30]}, image_size = {repr(size)[:30]}; "
                "expected whole numbers"
            )
        return (TensorSpec(name, ("batch", *lengths)),)
    if name == "input_ids":
        return tuple(TensorSpec(item, ("batch", "tokens"), "int64") for item in _text_inputs(config, model, folder))
    raise EdgekitError(f"{folder}: the shape of its input {name!r} is not known; pass --input {SPEC_HELP}")


def _text_inputs(config: Mapping[str, Any], model: Any, folder: Path) -> list[str]:
    """Return the names of the text inputs: those that tokenizer_config.json lists, or else tokens, mask, and token
    types if the model has several. A model computes its positions itself unless the tokenizer gives them."""
    taken = inspect.signature(model.forward).parameters
    path = folder / "tokenizer_config.json"
    listed = read_json(path).get("model_input_names") if path.is_file() else None
    types = config.get("type_vocab_size")
    wanted = ["input_ids", "attention_mask", *(["token_type_ids"] if isinstance(types, int) and types > 1 else [])]
    if isinstance(listed, list):
        if strange := [item for item in listed if item not in TEXT_INPUTS]:
            raise EdgekitError(
                f"{path}: model_input_names lists {str(strange[0])[:60]!r}; expected {', '.join(TEXT_INPUTS)}"
            )
        wanted = [item for item in TEXT_INPUTS if item in listed]
    return [item for item in wanted if item in taken]


def pooling_of(folder: Path) -> Pooling | None:
    """Return the pooling that modules.json describes; None for a folder that is no sentence model."""
    path = folder / "modules.json"
    if not path.is_file():
        return None
    modules = json_value(path)
    if not isinstance(modules, list) or not all(isinstance(item, dict) for item in modules):
        raise EdgekitError(f"{path}: expected a list of modules")
    kinds = [str(item.get("type")).rpartition(".")[2] for item in modules]
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise EdgekitError(
            f"{path}: modules {', '.join(kinds)[:100]}; "
            "edgekit imports Transformer, Pooling and then Normalize or nothing"
        )
    place = str(modules[1].get("path"))
    if not is_plain(place):
        raise EdgekitError(f"{path}: the path {place[:60]!r} leaves the folder; do not trust it")
    settings = read_json(folder / place / "config.json")
    modes = [mode for key, mode in POOLINGS.items() if settings.get(key) is True]
    other = [key for key, value in settings.items() if key.startswith("pooling_mode") and value and key not in POOLINGS]
    if other or len(modes) != 1 or settings.get("include_prompt") is False:
        raise EdgekitError(
            f"{folder}/{place}/config.json: pooling {', '.join([*modes, *other]) or 'none'}; "
            f"expected one of {', '.join(POOLINGS)}, with prompts included"
        )
    return Pooling(modes[0], kinds[-1] == "Normalize")


def tokenizer_files(folder: Path) -> dict[str, bytes]:
    """Return the files that a tokenizer needs, by name; the bundle carries them."""
    return {
        name: read_file(folder / name, largest=LARGEST_TOKENIZER)
        for name in TOKENIZER_FILES
        if (folder / name).is_file()
    }
