"""A language model on disk: a GGUF file, or a folder that transformers saved."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgekit.errors import EdgekitError
from edgekit.importers.base import read_json
from edgekit.importers.gguf import GgufFile, read_gguf
from runtimes.llm import hugging_face, vocabulary
from runtimes.llm.architecture import Model, from_gguf
from runtimes.llm.tokenizer import Tokenizer

TEMPLATE = "chat_template.jinja"
MOST_TEMPLATE = 1 << 20  # bytes


@dataclass(frozen=True, slots=True)
class Source:
    """name: of the model; template: of conversations, "" if there is none; folder: whether transformers saved it."""

    path: Path
    name: str
    model: Model
    tokenizer: Tokenizer
    template: str
    folder: bool = False

    def __post_init__(self) -> None:
        tokens, rows = len(self.tokenizer), self.model.architecture.vocabulary
        if tokens != rows:
            raise EdgekitError(
                f"{self.path}: the tokenizer has {tokens} tokens and the embedding {rows}; the file is damaged"
            )


def open_source(path: Path) -> Source:
    """Read what a file or folder says about its model, and map its weights. Raises EdgekitError if it is damaged."""
    return _from_folder(path) if path.is_dir() else of_gguf(read_gguf(path))


def of_gguf(file: GgufFile) -> Source:
    name, model = file.metadata.get("general.name"), from_gguf(file)
    template: str = file.get("tokenizer.chat_template", str, "")
    tokenizer = Tokenizer(vocabulary.from_gguf(file))
    return Source(file.path, name if isinstance(name, str) else file.path.stem, model, tokenizer, template)


def _from_folder(folder: Path) -> Source:
    if not (folder / "config.json").is_file():
        raise EdgekitError(f"{folder}: holds no config.json; expected a .gguf file or a folder that transformers saved")
    model = hugging_face.from_folder(folder)
    tokenizer = Tokenizer(vocabulary.from_folder(folder, model.architecture.vocabulary))
    return Source(folder, folder.resolve().name, model, tokenizer, _template(folder), folder=True)


def _template(folder: Path) -> str:
    path = folder / TEMPLATE
    if path.is_file():
        if path.stat().st_size > MOST_TEMPLATE:
            raise EdgekitError(
                f"{path}: {path.stat().st_size:,} bytes; edgekit reads templates up to {MOST_TEMPLATE:,}"
            )
        return path.read_text(errors="replace")
    config = folder / "tokenizer_config.json"
    given: Any = read_json(config).get("chat_template") if config.is_file() else None
    if isinstance(given, list):  # several by name
        named = {item.get("name"): item.get("template") for item in given if isinstance(item, dict)}
        given = named.get("default")
    if given is not None and not isinstance(given, str):
        raise EdgekitError(f"{config}: chat_template is a {type(given).__name__}; expected a text")
    return given or ""
