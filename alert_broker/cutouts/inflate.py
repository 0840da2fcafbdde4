"""Decompress the gzip file around an image, within a limit.

isal (the extra `cutouts`) decompresses ZTF's images twice as fast as zlib, to the same bytes; `tools/bench_cutouts.py`
measures both. It is used if it is installed.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

from alert_broker.cutouts.fits import ImageError

GZIP_MAGIC = b"\x1f\x8b"
GZIP = 16 + zlib.MAX_WBITS  # zlib's wbits for a gzip header and its checksum
DAMAGED = "an image does not decompress"
BOMB = "an image decompresses to more bytes than an image has"

Inflater = Callable[[], Any]  # returns a new decompressor for one gzip file
Inflaters = dict[str, tuple[Inflater, type[Exception]]]


def inflaters() -> Inflaters:
    """Return the decompressors that are installed, by package, fastest first, each with its exception."""
    found: Inflaters = {}
    try:
        from isal import isal_zlib

        found["isal"] = (lambda: isal_zlib.decompressobj(GZIP), isal_zlib.error)
    except ImportError:
        pass
    found["zlib"] = (lambda: zlib.decompressobj(GZIP), zlib.error)
    return found


class Gunzip:
    """Returns the content of one gzip file; data without gzip's first bytes is returned unchanged. package: one of
    `inflaters()`; most: bytes that the content may have. Raises ImageError for damaged data, for a larger content, and
    for bytes after the file."""

    def __init__(self, most: int, package: str | None = None) -> None:
        available = inflaters()
        self.package, self.most = package or next(iter(available)), most
        self._new, self._error = available[self.package]

    def __call__(self, data: bytes | memoryview) -> bytes | memoryview:
        if data[:2] != GZIP_MAGIC:
            return data
        stream = self._new()
        try:
            content: bytes = stream.decompress(data, self.most + 1)
        except (self._error, EOFError) as error:
            raise ImageError(DAMAGED) from error
        if len(content) > self.most:
            raise ImageError(BOMB)
        if not stream.eof or stream.unused_data:
            raise ImageError(DAMAGED)
        return content
