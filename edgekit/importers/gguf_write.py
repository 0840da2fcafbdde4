"""Write GGUF files, the format of llama.cpp, version 3: metadata, the list of tensors, then their content."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from edgekit.bundle.files import replacing
from edgekit.errors import EdgekitError
from edgekit.importers.gguf import ARRAY, MAGIC, SCALARS, STRING, Tensor, read_gguf
from edgekit.importers.gguf_formats import NUMBERS

ALIGNMENT = 32  # bytes; each tensor begins at a multiple of it
CODES = {code: number for number, code in SCALARS.items()}
UINT32, FLOAT32, BOOL = CODES["I"], CODES["f"], CODES["?"]


def write_gguf(path: Path, metadata: Mapping[str, Any], tensors: Sequence[Tensor], *, mode: int = 0o666) -> None:
    """Write a file that exists whole or not at all, and read it back before it gets its name. metadata: plain values,
    or `bytes` as `GgufFile.raw` has them; mode: the file's permissions."""
    raw = {key: stored(key, value) for key, value in metadata.items() if key != "general.alignment"}
    with replacing(path, mode=mode) as stream:
        _write(stream, raw, tensors)
        stream.flush()
        _check(Path(stream.name), raw, tensors)


def size(metadata: Mapping[str, Any], tensors: Iterable[tuple[str, tuple[int, ...], int]]) -> int:
    """Return the bytes of a file. tensors: the name, the shape, and the bytes of each."""
    found = list(tensors)
    header = 24 + sum(len(_text(key)) + len(stored(key, value)) for key, value in metadata.items())
    header += sum(len(_text(name)) + 4 + 8 * len(shape) + 4 + 8 for name, shape, _ in found)
    return _aligned(header) + sum(_aligned(content) for _, _, content in found)


def stored(key: str, value: Any) -> bytes | memoryview:
    """Return a value of the metadata as the file has it, its type number first."""
    match value:
        case bytes() | memoryview():
            return value
        case bool():
            return struct.pack("<I?", BOOL, value)
        case int() if 0 <= value < 1 << 32:
            return struct.pack("<II", UINT32, value)
        case float():
            return struct.pack("<If", FLOAT32, value)
        case str():
            return struct.pack("<I", STRING) + _text(value)
        case list() if all(isinstance(item, str) for item in value):
            return struct.pack("<IIQ", ARRAY, STRING, len(value)) + b"".join(map(_text, value))
        case np.ndarray() if value.ndim == 1 and value.dtype.char in CODES:
            head = struct.pack("<IIQ", ARRAY, CODES[value.dtype.char], len(value))
            return head + value.astype(value.dtype.newbyteorder("<")).tobytes()
        case _:
            raise EdgekitError(f"metadata {key!r} is {value!r:.60}; GGUF stores numbers, texts, and arrays of them")


def _write(stream: BinaryIO, raw: Mapping[str, bytes | memoryview], tensors: Sequence[Tensor]) -> None:
    stream.write(MAGIC + struct.pack("<IQQ", 3, len(tensors), len(raw)))
    for key, value in raw.items():
        stream.write(_text(key))
        stream.write(value)
    offset = 0
    for tensor in tensors:
        axes = struct.pack(f"<I{len(tensor.shape)}Q", len(tensor.shape), *tensor.shape[::-1])  # the innermost first
        stream.write(_text(tensor.name) + axes + struct.pack("<IQ", NUMBERS[tensor.format.name], offset))
        offset += _aligned(tensor.content.size)
    stream.write(bytes(-stream.tell() % ALIGNMENT))
    for tensor in tensors:
        stream.write(np.ascontiguousarray(tensor.content).data)
        stream.write(bytes(-tensor.content.size % ALIGNMENT))


def _check(path: Path, raw: Mapping[str, bytes | memoryview], tensors: Sequence[Tensor]) -> None:
    """Raise unless the file holds what was to be written, bit for bit: a disk may lose what it took."""
    found = read_gguf(path)
    if found.raw != raw or list(found.tensors) != [tensor.name for tensor in tensors]:
        raise EdgekitError(f"{path}: the metadata reads back otherwise than it was written; check the disk")
    for tensor in tensors:
        other = found.tensors[tensor.name]
        same = (other.format, other.shape) == (tensor.format, tensor.shape)
        if not same or not np.array_equal(other.content, tensor.content.reshape(-1)):
            raise EdgekitError(f"{path}: {tensor.name!r} reads back otherwise than it was written; check the disk")


def _aligned(number: int) -> int:
    return math.ceil(number / ALIGNMENT) * ALIGNMENT


def _text(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw
