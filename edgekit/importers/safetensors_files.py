"""Read safetensors files without copying them: a JSON header with names, formats, shapes and offsets, then the tensors.

The file is mapped, not read, as GGUF files are. Nothing in it is trusted: the header has a bounded length, every tensor
must lie within the file and have the bytes of its shape, and no two tensors share bytes.
"""

from __future__ import annotations

import json
import math
import mmap
from pathlib import Path
from typing import Any

import numpy as np

from edgekit.bundle.bounded import LARGEST_TEXT, claim
from edgekit.bundle.files import is_plain
from edgekit.errors import EdgekitError
from edgekit.importers.base import read_json
from edgekit.importers.gguf import Tensor
from edgekit.importers.gguf_formats import FORMATS

ONE, INDEX = "model.safetensors", "model.safetensors.index.json"
FLOATS = {form.name: form for form in FORMATS.values() if form.values == 1}  # F32, F16 and BF16, as GGUF has them
OBJECT_BYTES = 800  # what a tensor takes in Python, about
MOST_FILES = 10_000


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """Return the tensors by name of a folder that transformers saved, from one file or from those that its index
    names."""
    if (folder / ONE).is_file() or not (folder / INDEX).is_file():
        return read_safetensors(folder / ONE)
    shards = read_json(folder / INDEX).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        raise EdgekitError(f"{folder / INDEX}: weight_map does not name a file for each tensor; save the model again")
    names = sorted(set(shards.values()))
    if len(names) > MOST_FILES:
        raise EdgekitError(f"{folder / INDEX}: names {len(names):,} files; expected at most {MOST_FILES:,}")
    found: dict[str, Tensor] = {}
    for name in names:
        if not name.endswith(".safetensors") or not is_plain(name):
            raise EdgekitError(f"{folder / INDEX}: names {name[:80]!r}, which is no safetensors file of the folder")
        part = read_safetensors(folder / name)
        if twice := found.keys() & part.keys():
            raise EdgekitError(f"{folder}: two of its files hold {min(twice)!r}; save the model again")
        found |= part
    if absent := shards.keys() - found.keys():
        raise EdgekitError(f"{folder}: its files do not hold {min(absent)!r}, which the index names; download it again")
    return found


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Map a safetensors file of floats. Raises EdgekitError if it is damaged, or declares more than it holds."""
    try:
        with path.open("rb") as stream:
            content = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        raise EdgekitError(f"{path}: not a readable file ({error}); expected safetensors") from None
    length = int.from_bytes(content[:8], "little")
    if not 2 <= length <= min(len(content) - 8, LARGEST_TEXT):
        raise _damaged(path, f"declares a header of {length:,} bytes")
    try:
        header = json.loads(content[8 : 8 + length])
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"has a header that is no JSON ({error})") from None
    if not isinstance(header, dict):
        raise _damaged(path, "has a header that is no JSON object")
    header.pop("__metadata__", None)
    claim(len(header) * OBJECT_BYTES, len(content), f"{path}: the header")
    spans = [(*_span(path, name, entry, len(content) - 8 - length), name) for name, entry in header.items()]
    end = 0
    for first, last, name in sorted(spans):
        if first != end:
            raise _damaged(path, f"has other bytes between two tensors, or shares some, at {name[:80]!r}")
        end = last
    return {
        name: Tensor(
            name,
            FLOATS[header[name]["dtype"]],
            tuple(header[name]["shape"]),
            np.frombuffer(content, np.uint8, last - first, 8 + length + first),
        )
        for first, last, name in spans
    }


def _span(path: Path, name: str, entry: Any, size: int) -> tuple[int, int]:
    """Return the first byte of a tensor's data and the one behind its last, of `size` bytes of all tensors."""
    if not isinstance(entry, dict):
        raise _damaged(path, f"describes {name[:80]!r} by no JSON object")
    form, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(form, str) or form not in FLOATS:
        raise EdgekitError(
            f"{path}: {name[:80]!r} has the format {repr(form)[:40]}; edgekit reads {', '.join(FLOATS)}; save the "
            "model in one of these"
        )
    for values in (shape, offsets):
        if not isinstance(values, list) or not all(type(value) is int and 0 <= value < 1 << 62 for value in values):
            raise _damaged(path, f"describes {name[:80]!r} by {repr(values)[:40]} where whole numbers belong")
    assert isinstance(shape, list)
    assert isinstance(offsets, list)
    if not 1 <= len(shape) <= 4 or 0 in shape or len(offsets) != 2 or not offsets[0] <= offsets[1] <= size:
        raise _damaged(path, f"has {name[:80]!r} of shape {shape} at bytes {offsets} of {size:,}")
    if math.prod(shape) * FLOATS[form].bytes != offsets[1] - offsets[0]:
        raise _damaged(path, f"has {offsets[1] - offsets[0]:,} bytes for {name[:80]!r}, which is {form} of {shape}")
    return offsets[0], offsets[1]


def _damaged(path: Path, problem: str) -> EdgekitError:
    return EdgekitError(f"{path}: the file {problem}; it is damaged, so download it again")
