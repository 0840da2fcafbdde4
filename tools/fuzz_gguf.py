"""The harness for GGUF files of `fuzz_readers.py`: metadata and tensors are changed apart from the lengths before them,
which are written again, and the chat template is exchanged for programs that a stranger might send."""

from __future__ import annotations

import json
import random
import struct
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from fuzz_changes import Files, changed

SIZES = {"layers": 1, "width": 32, "heads": 2, "kv_heads": 1, "head_size": 16, "hidden": 32, "vocabulary": 280}
FAMILIES = ("llama", "qwen2", "qwen3")
TEMPLATE = "tokenizer.chat_template"
TEMPLATES = (
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.system('true') }}",
    "{{ messages.append(1) }}",
    "{{ messages | tojson }}",
    "{{ undefined.attribute }}",
    "{% include '/etc/passwd' %}",
    "{% extends '../x' %}",
    "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}",
    "{% for a in range(99999) %}{{ a }}{% endfor %}",
    "{{ range(10 ** 12) | list }}",
    "{{ 'a' * 10 ** 8 }}",
    "{{ 10 ** 10 ** 4 }}",
    "{{ '%99999999d' % 1 }}",
    "{{ '{0.__class__}'.format(1) }}",
    "{{ raise_exception('a\nb\x1b[2J') }}",
    "{{ 1 / 0 }}{{ [][1] }}",
    "{{ '\\ud800' }}",
    "{% set x = " + "(" * 300 + "1" + ")" * 300 + " %}",
    "{{ " + "not " * 3000 + "1 }}",
    "{{ [1, 'a'] | sort }}{{ {} | dictsort(by='x') }}",
    "{% for m in messages %}{{ m.content.encode('utf-16') }}{% endfor %}",
    "{{",
)


def models() -> list[Files]:
    """Small models in parts, one as it is, and the first of them, which is complete."""
    from tests.gguf_files import NUMBER_OF, encoded, toy_metadata, toy_weights

    made: list[Files] = []
    for family in FAMILIES:
        table, data = [], b""
        for name, value in toy_weights(family, **SIZES).items():
            form = "F32" if value.ndim == 1 else "Q4_0"
            table.append([name, NUMBER_OF[form], list(value.shape[::-1]), len(data)])
            content = encoded(value, form)
            data += content + bytes(-len(content) % 32)
        metadata = toy_metadata(family, **SIZES)
        made.append({"metadata": json.dumps(metadata).encode(), "tensors": json.dumps(table).encode(), "data": data})
    with tempfile.TemporaryDirectory() as scratch:
        return [*made, {"file": write_model(made[0], Path(scratch)).read_bytes()}]


def changed_model(files: Files, rng: random.Random) -> Files:
    """A model with another template, or with any other change."""
    metadata = _parsed(files.get("metadata", b""), dict)
    if isinstance(metadata, dict) and rng.random() < 0.3:
        template = rng.choice(TEMPLATES)
        if rng.random() < 0.4:
            template = changed({"": template.encode()}, rng)[""].decode(errors="replace")
        return files | {"metadata": json.dumps(metadata | {TEMPLATE: template}).encode()}
    return changed(files, rng)


def write_model(files: Files, folder: Path) -> Path:
    """The file. Parts that are no JSON any more are written as they are."""
    path = folder / "x.gguf"
    if "file" in files:
        path.write_bytes(files["file"])
        return path
    metadata, tensors = _parsed(files["metadata"], dict), _parsed(files["tensors"], list)
    counts = [len(part) if isinstance(part, (dict, list)) else 1 for part in (tensors, metadata)]
    header = b"GGUF" + struct.pack("<IQQ", 3, *counts)
    header += metadata if isinstance(metadata, bytes) else b"".join(_text(k) + _value(v) for k, v in metadata.items())
    header += tensors if isinstance(tensors, bytes) else b"".join(map(_tensor, tensors))
    path.write_bytes(header + bytes(-len(header) % 32) + files["data"])
    return path


def _parsed(content: bytes, of: type) -> Any:
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        return content
    return value if isinstance(value, of) else content


def _text(value: str) -> bytes:
    raw = value.encode(errors="surrogatepass")
    return struct.pack("<Q", len(raw)) + raw


def _value(value: Any) -> bytes:
    """A value with its type; values that the format does not have get a type that does not exist."""
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    if isinstance(value, int):
        return struct.pack("<II", 4, value) if 0 <= value < 1 << 32 else struct.pack("<IQ", 10, value % (1 << 64))
    if isinstance(value, float):
        return struct.pack("<Id", 12, value)
    if isinstance(value, str):
        return struct.pack("<I", 8) + _text(value)
    if isinstance(value, list) and any(isinstance(item, str) for item in value):
        texts = [item if isinstance(item, str) else json.dumps(item) for item in value]
        return struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(_text, texts))
    if isinstance(value, list) and all(isinstance(item, (int, float)) for item in value):
        return struct.pack("<IIQ", 9, 5, len(value)) + b"".join(_whole(item, 4) for item in value)
    return struct.pack("<I", 99)


def _whole(value: Any, size: int) -> bytes:
    whole = int(value) if isinstance(value, (int, float)) and np.isfinite(float(value)) else 0
    return (whole % (1 << 8 * size)).to_bytes(size, "little")


def _tensor(item: Any) -> bytes:
    if not (isinstance(item, list) and len(item) == 4 and isinstance(item[0], str) and isinstance(item[2], list)):
        return _text(json.dumps(item))
    name, form, shape, offset = item
    axes = b"".join(_whole(size, 8) for size in shape)
    return _text(name) + struct.pack("<I", len(shape)) + axes + _whole(form, 4) + _whole(offset, 8)


def read_model(path: Path) -> None:
    """Load the model and let it answer, as `edgekit llm chat` does, with the engine in C if its compiled form is that
    of the valid files; then read all its tensors."""
    from edgekit.importers.gguf import read_gguf
    from runtimes.llm.model import LanguageModel
    from runtimes.llm.source import of_gguf

    file = read_gguf(path)
    source = of_gguf(file)
    model = source.model
    form = model.architecture.head_size, model.architecture.queries_per_key
    with LanguageModel(source, _engine(model, native=form == (16, 2)), 64) as answering:
        list(answering.chat([{"role": "user", "content": "a night"}], most_tokens=2))
    for tensor in file.tensors.values():
        tensor.values()


def _engine(model: Any, *, native: bool) -> Any:
    """Return an engine with a cache of 64 tokens. The worker may start no compiler, so the C engine is compiled once,
    with the first valid file."""
    from runtimes.llm import native_engine
    from runtimes.llm.torch_engine import TorchEngine

    if not native:
        return TorchEngine(model, blocks=4)
    if not _compiled:
        _compiled.append(native_engine._library(model.architecture, native_engine.Compiler(), ("-march=native",)))
        native_engine._library = lambda *ignored: _compiled[0]
    return native_engine.NativeEngine(model, blocks=4, threads=1, rows=64)


_compiled: list[Any] = []
