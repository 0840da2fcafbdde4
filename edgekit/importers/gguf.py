"""Read GGUF files, the format of llama.cpp: metadata, and tensors in blocks of quantised weights.

The file is mapped, not read: a tensor is a view of the mapping, and the machine loads the pages that are used. Nothing
in the file is trusted: every length is compared with the bytes that are left before memory is taken, and every tensor
must lie within the file. The layout is GGUF version 2 or 3, little endian.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgekit.bundle.bounded import claim
from edgekit.errors import EdgekitError
from edgekit.importers.gguf_formats import FORMATS, BlockFormat

MAGIC = b"GGUF"
VERSIONS = (2, 3)
# the values of metadata by their type number: the struct code of one value
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
OBJECT_BYTES = 80  # what a string of Python takes beside its characters, about
HEADER_BYTES = 800  # what a key with its value, or a tensor, takes in Python, about
LEAST_STRING = 8  # bytes of an empty string in the file: its length
MOST_AXES = 4
Header = tuple[str, tuple[int, ...], int, int]  # of a tensor: name, shape, format number, offset in the data


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor of the file. shape: outermost axis first, as numpy has it; the innermost axis is stored in blocks.
    content: (bytes,) a view of the mapped file."""

    name: str
    format: BlockFormat
    shape: tuple[int, ...]
    content: npt.NDArray[np.uint8]

    def rows(self) -> npt.NDArray[np.uint8]:
        """Return (rows, bytes of a row): the blocks of each row of the innermost axis."""
        return self.content.reshape(math.prod(self.shape[:-1]), -1)

    def part(self, first: int, end: int) -> Tensor:
        """Return the part of the outermost axis from `first` to before `end`, a view."""
        size = self.content.size // self.shape[0]
        return Tensor(self.name, self.format, (end - first, *self.shape[1:]), self.content[first * size : end * size])

    def values(self) -> npt.NDArray[np.float32]:
        """Return the tensor's values in float32, of its shape."""
        return self.format.decode(self.rows()).reshape(self.shape)


@dataclass(frozen=True, slots=True)
class GgufFile:
    """The content of a file: its metadata by key, and its tensors by name. raw: each value of the metadata as the file
    stores it, its type number first, so that a copy keeps the type of every number."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    raw: Mapping[str, bytes | memoryview] = field(default_factory=dict)

    def get(self, key: str, of: type | tuple[type, ...], default: Any = None) -> Any:
        """Return a value of the metadata. Raises if it has another type, or if it is missing and has no default."""
        value = self.metadata.get(key, default)
        if value is None:
            raise EdgekitError(f"{self.path}: the metadata has no {key!r}; download or convert the model again")
        if not isinstance(value, of) or (isinstance(value, bool) and of is int):
            names = " or ".join(item.__name__ for item in (of if isinstance(of, tuple) else (of,)))
            raise EdgekitError(f"{self.path}: {key!r} is a {type(value).__name__}; expected {names}")
        return value


def read_gguf(path: Path) -> GgufFile:
    """Map a GGUF file. Raises EdgekitError if it is damaged, or if it declares more than it holds."""
    try:
        with path.open("rb") as stream:
            content = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        raise EdgekitError(f"{path}: not a readable file ({error}); expected a model as .gguf") from None
    return _Reader(path, content).read()


class _Reader:
    """Reads the header of one file from its beginning to its end."""

    def __init__(self, path: Path, content: mmap.mmap) -> None:
        self.path, self.content, self.at = path, content, 0

    def read(self) -> GgufFile:
        if self.content[:4] != MAGIC:
            raise EdgekitError(f"{self.path}: begins with {self.content[:4]!r}, not with {MAGIC!r}; it is no GGUF file")
        self.at = 4
        version = self.number("I")
        if version not in VERSIONS:
            text = f"GGUF version {version}, little endian; edgekit reads versions {VERSIONS[0]} and {VERSIONS[1]}"
            raise EdgekitError(f"{self.path}: {text}; convert the model again")
        tensors, pairs = self.number("Q"), self.number("Q")
        self.declares(pairs, LEAST_STRING + 4, "keys")
        claim(pairs * HEADER_BYTES, len(self.content), f"{self.path}: the metadata")
        metadata: dict[str, Any] = {}
        raw: dict[str, bytes | memoryview] = {}
        for _ in range(pairs):
            key = self.string()
            if key in metadata:
                raise self.damaged(f"holds the key {key!r} twice")
            start = self.at
            metadata[key] = self.value(self.number("I"), key)
            raw[key] = memoryview(self.content)[start : self.at]
        self.declares(tensors, LEAST_STRING + 4 + 4 + 8, "tensors")
        claim(tensors * HEADER_BYTES, len(self.content), f"{self.path}: the list of tensors")
        headers = [self.header() for _ in range(tensors)]
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or not 1 <= alignment <= 1 << 20:
            raise self.damaged(f"has general.alignment {alignment!r}; expected a whole number up to 1048576")
        start = math.ceil(self.at / alignment) * alignment
        found: dict[str, Tensor] = {}
        for name, shape, code, offset in headers:
            if name in found:
                raise self.damaged(f"holds the tensor {name!r} twice")
            found[name] = self.tensor(name, shape, code, start + offset)
        self.check_overlaps(headers, found)
        return GgufFile(self.path, metadata, found, raw)

    def header(self) -> Header:
        """Return a tensor's name, shape, format number and offset in the data."""
        name, axes = self.string(), self.number("I")
        if not 1 <= axes <= MOST_AXES:
            raise self.damaged(f"says that tensor {name!r} has {axes} axes; expected 1 to {MOST_AXES}")
        shape = tuple(self.number("Q") for _ in range(axes))[::-1]  # the file has the innermost axis first
        return name, shape, self.number("I"), self.number("Q")

    def tensor(self, name: str, shape: tuple[int, ...], code: int, start: int) -> Tensor:
        form = FORMATS.get(code)
        if form is None:
            known = ", ".join(item.name for item in FORMATS.values())
            raise EdgekitError(
                f"{self.path}: tensor {name!r} has format number {code}; edgekit reads {known}; "
                "use a file with one of these, such as the model's Q4_0 or Q8_0"
            )
        if 0 in shape or shape[-1] % form.values:
            raise self.damaged(f"has {name!r} of shape {shape}, which {form.name} cannot store")
        size = math.prod(shape) // form.values * form.bytes
        if start + size > len(self.content):
            raise self.damaged(f"ends before tensor {name!r}, which needs bytes {start} to {start + size}")
        return Tensor(name, form, shape, np.frombuffer(self.content, np.uint8, size, start))

    def check_overlaps(self, headers: Sequence[Header], found: Mapping[str, Tensor]) -> None:
        """Raise if two tensors share bytes: a small file could then stand for weights that fill the memory."""
        end, last = 0, ""
        for offset, name in sorted((offset, name) for name, _, _, offset in headers):
            if offset < end:
                raise self.damaged(f"stores tensor {name!r} in the bytes of {last!r}")
            end, last = offset + found[name].content.size, name

    def value(self, code: int, key: str) -> Any:
        if code in SCALARS:
            return self.number(SCALARS[code])
        if code == STRING:
            return self.string()
        if code != ARRAY:
            raise self.damaged(f"has {key!r} of type number {code}")
        of, length = self.number("I"), self.number("Q")
        if of == STRING:
            self.declares(length, LEAST_STRING, f"strings in {key!r}")
            claim(length * OBJECT_BYTES, len(self.content), f"{self.path}: {key!r}")
            return [self.string() for _ in range(length)]
        if of not in SCALARS:
            raise self.damaged(f"has {key!r}, an array of type number {of}")
        size = struct.calcsize(SCALARS[of])
        self.declares(length, size, f"values in {key!r}")
        array = np.frombuffer(self.content, np.dtype(SCALARS[of]).newbyteorder("<"), length, self.at)
        self.at += length * size
        return array

    def number(self, code: str) -> Any:
        size = struct.calcsize(f"<{code}")
        self.declares(1, size, "bytes of a number")
        (value,) = struct.unpack_from(f"<{code}", self.content, self.at)
        self.at += size
        return value

    def string(self) -> str:
        length = self.number("Q")
        self.declares(length, 1, "characters")
        text = self.content[self.at : self.at + length]
        self.at += length
        try:
            return text.decode()
        except UnicodeDecodeError:
            raise self.damaged(f"has a text at byte {self.at - length} that is not UTF-8") from None

    def declares(self, number: int, size: int, noun: str) -> None:
        """Raise unless `number` things of at least `size` bytes can follow."""
        left = len(self.content) - self.at
        if number * size > left:
            raise self.damaged(f"declares {number:,} {noun} at byte {self.at}, where {left:,} bytes are left")

    def damaged(self, problem: str) -> EdgekitError:
        return EdgekitError(f"{self.path}: the file {problem}; it is damaged, so download it again")
