"""Read files whose author nobody knows, without taking more memory than they justify.

A few kilobytes can declare gigabytes: a compressed stream of zeros, an array whose header names a huge shape, a scale
that would be broadcast. Therefore all code that reads model and data files calls this module, and this module compares
the declared size with a limit before it takes memory.

The limit of a file is 32 times its size, but at least 256 MiB and at most 8 GiB. A user who trusts a file sets another
limit, for all files: `edgekit --read-limit 20GB COMMAND`, or the same text in $EDGEKIT_READ_LIMIT.
"""

from __future__ import annotations

import math
import os
import re
import tokenize
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load as load_safetensors

from edgekit.errors import EdgekitError

VARIABLE = "EDGEKIT_READ_LIMIT"
LEAST, RATIO, LARGEST = 256 << 20, 32, 8 << 30  # bytes, times the file's size, bytes
LARGEST_TEXT = 32 << 20  # bytes of JSON or TOML, whose objects take some twenty times the memory of the text
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}
PLAIN = "biufcSU"  # numpy's codes for bool, integers, floats, complex numbers and text
Array = npt.NDArray[Any]
Arrays = dict[str, Array]

# the exceptions of numpy, zipfile and zlib for a damaged archive
UNREADABLE = (
    ValueError, OSError, EOFError, LookupError, NotImplementedError, RuntimeError, SyntaxError, TypeError, MemoryError,
    zipfile.BadZipFile, zlib.error, tokenize.TokenError,
)  # fmt: skip


def parse_size(text: str, name: str = "read limit") -> int:
    """Return the bytes of a size such as '20GB' or '512 MiB'. name: what the size is of, for the error."""
    found = re.fullmatch(r"([0-9]{1,18}) ?([KMG]I?B)?", text.strip().upper(), re.ASCII)
    if found is None or not int(found[1]):
        raise EdgekitError(f"{name} {text!r}: expected a size such as 20GB or 512MiB")
    return int(found[1]) * UNITS[found[2] or ""]


def limit(size: int) -> int:
    """Return how many bytes of memory a file of `size` bytes may take."""
    given = os.environ.get(VARIABLE)
    return parse_size(given) if given else min(max(LEAST, RATIO * size), LARGEST)


def claim(needed: int, size: int, source: str) -> None:
    """Raise if a file of `size` bytes declares that it needs more memory than it may take."""
    allowed = limit(size)
    if needed > allowed:
        raise EdgekitError(
            f"{source}: {size:,} bytes declare {needed:,} bytes in memory, and edgekit takes up to {allowed:,} for "
            "this file; if you trust the file, raise the limit with: edgekit --read-limit SIZE COMMAND"
        )


def read_file(path: Path, *, largest: int | None = None) -> bytes:
    """Return the content of a file whose size is within the limit. A sparse file has its full size and no blocks."""
    with path.open("rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        if largest is not None and size > largest:
            raise EdgekitError(f"{path}: {size:,} bytes; edgekit reads up to {largest:,} of a file of this type")
        claim(size, size, str(path))
        return stream.read(size)


def inflate(
    content: bytes, source: str, *, expected: int | None = None, largest: int | None = None, wbits: int = zlib.MAX_WBITS
) -> bytes:
    """Decompress one zlib stream. expected: its size, if the file declares it; largest: the most that it may have, by
    default the limit."""
    most = limit(len(content)) if largest is None else largest
    stream = zlib.decompressobj(wbits)
    found = stream.decompress(content, (most if expected is None else expected) + 1)
    if expected is None and len(found) > most:
        raise EdgekitError(
            f"{source}: {len(content):,} compressed bytes give more than {most:,}; do not trust the file"
        )
    if not stream.eof or stream.unused_data or expected not in (None, len(found)):
        raise EdgekitError(f"{source}: a compressed part has another length than the file declares; copy it again")
    return found


def array_bytes(dtype: np.dtype[Any], shape: Sequence[Any]) -> int:
    """Return the bytes of an array of plain numbers or text, as numpy allocates them. Raises ValueError for any other
    dtype, and for lengths that are no whole numbers."""
    if dtype.kind not in PLAIN or dtype.subdtype is not None:
        raise ValueError(f"dtype {dtype}; expected plain numbers or text")
    for length in shape:
        if type(length) is not int or not 0 <= length < 2**63:
            raise ValueError(f"length {length!r}; expected a whole number")
    return int(math.prod(shape) * dtype.itemsize)


def array_from(content: bytes, dtype: np.dtype[Any], shape: Sequence[int], *, fortran: bool = False) -> Array:
    """Return a new array from exactly its bytes."""
    if len(content) != array_bytes(dtype, shape):
        raise ValueError(f"{len(content):,} bytes for {dtype} of shape {tuple(shape)}")
    array: Array = np.frombuffer(bytearray(content), dtype) if content else np.empty(0, dtype)
    return array.reshape(tuple(shape), order="F" if fortran else "C")


def arrays_from_npz(content: bytes, source: str) -> Arrays:
    """Return the named arrays of an .npz file."""
    if content[:4] == b"\x93NUM":
        raise EdgekitError(f"{source}: one array (.npy), not named arrays; write them with numpy.savez")
    if content[:4] not in (b"PK\x03\x04", b"PK\x05\x06"):
        raise EdgekitError(f"{source}: not an .npz archive; write named arrays with numpy.savez")
    arrays: Arrays = {}
    try:
        with zipfile.ZipFile(BytesIO(content)) as archive:
            claim(sum(item.file_size for item in archive.infolist()), len(content), source)
            for item in archive.infolist():
                name = item.filename.removesuffix(".npy")
                if name == item.filename or name in arrays:
                    raise EdgekitError(
                        f"{source}: {name!r} is not an array, or stored twice; write the file with numpy.savez"
                    )
                arrays[name] = _array_in(archive, item)
    except UNREADABLE as error:
        raise EdgekitError(f"{source}: not a readable .npz of plain arrays ({_first_line(error)})") from None
    return arrays


def _array_in(archive: zipfile.ZipFile, item: zipfile.ZipInfo) -> Array:
    """Read one member. Its header must declare the size that the archive's directory declares."""
    if item.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError("compressed by another method than numpy's")
    with archive.open(item) as stream:
        version = np.lib.format.read_magic(stream)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"format version {version}")
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(stream)
        declared, stored = array_bytes(dtype, shape), item.file_size - stream.tell()
        if declared != stored:
            raise ValueError(f"the header declares {declared:,} bytes, and {stored:,} are stored")
        return array_from(stream.read(stored), dtype, shape, fortran=fortran)


def arrays_from_safetensors(content: bytes, source: str) -> Arrays:
    """Return the named arrays of a safetensors file, which stores them uncompressed and checks their sizes itself."""
    try:
        arrays: Mapping[str, Array] = load_safetensors(content)
    except (SafetensorError, LookupError, ValueError, TypeError) as error:
        raise EdgekitError(f"{source}: not a safetensors file of plain numbers ({_first_line(error)})") from None
    return dict(sorted(arrays.items()))  # the library gives them in no fixed order


def zip_members(content: bytes, source: str) -> dict[str, bytes]:
    """Return the files of a zip archive by name."""
    try:
        with zipfile.ZipFile(BytesIO(content)) as archive:
            items = archive.infolist()
            claim(sum(item.file_size for item in items), len(content), source)
            if len({item.filename for item in items}) != len(items):
                raise EdgekitError(f"{source}: holds two files of one name; save it again")
            if any(item.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) for item in items):
                raise EdgekitError(f"{source}: compressed by another method than deflate; save it again")
            return {item.filename: archive.read(item) for item in items}
    except UNREADABLE as error:
        raise EdgekitError(f"{source}: not a readable zip archive ({_first_line(error)}); write it again") from None


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
