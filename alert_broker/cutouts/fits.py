"""Read the image in a FITS file that is in memory: the one plain image that a cutout holds, and nothing else.

Source: Definition of the Flexible Image Transport System, version 4.0 (sections 3.3, 4.2, 4.4 and 5). The image is the
primary one, or the first extension if the primary array is empty. Tables and compressed images are refused.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

BLOCK, CARD = 2880, 80  # bytes
END = b"END" + b" " * 77
MOST_HEADER = 16 * BLOCK  # bytes; Rubin's headers have one block, and astropy's WCS headers up to three
LARGEST_SIDE = 1024  # pixels
DTYPES = {8: ">u1", 16: ">i2", 32: ">i4", 64: ">i8", -32: ">f4", -64: ">f8"}  # by BITPIX
KEYS = ("SIMPLE", "XTENSION", "BITPIX", "NAXIS", "NAXIS1", "NAXIS2", "PCOUNT", "GCOUNT", "BSCALE", "BZERO", "BLANK")
MOST_KNOWN = 4  # headers that are remembered
NO_FITS = "an image is not FITS"
CUT_SHORT = "an image ends early"
NO_IMAGE = "an image is a FITS file without a plain image"
TOO_LARGE = "an image is larger than the model's"


class ImageError(Exception):
    """An image that cannot be used. The message is one of a few reasons, which are counted."""


@dataclass(frozen=True, slots=True)
class Layout:
    """What a header says about the array after it. shape: (height, width); scale, zero: value = zero + scale * stored;
    blank: the stored integer that means no value."""

    dtype: str
    shape: tuple[int, int]
    scale: float
    zero: float
    blank: int | None

    @property
    def bytes(self) -> int:
        return self.shape[0] * self.shape[1] * np.dtype(self.dtype).itemsize


# The last headers, with all blocks up to the array, and their layouts: ZTF's are all the same bytes.
_known: list[tuple[bytes, Layout]] = []


def read_image(data: bytes | memoryview) -> npt.NDArray[np.generic]:
    """Return the image as (height, width): big-endian float32 as stored, a view of the data, or float64 if its values
    are scaled integers or doubles. Values without a pixel are NaN. Raises ImageError."""
    content = bytes(data)  # the same object if it is bytes
    layout, start = _found(content)
    if len(content) - start < layout.bytes:
        raise ImageError(CUT_SHORT)
    height, width = layout.shape
    stored = np.frombuffer(content, layout.dtype, height * width, start).reshape(layout.shape)
    if layout.dtype == DTYPES[-32] and (layout.scale, layout.zero) == (1.0, 0.0):
        return stored
    values = stored.astype(np.float64) * layout.scale + layout.zero
    if layout.blank is not None and stored.dtype.kind in "iu":
        values[stored == layout.blank] = np.nan
    return values


def _found(content: bytes) -> tuple[Layout, int]:
    """Return the layout of a file's image, and the byte at which the array begins."""
    for header, known in _known:  # to look for the end of a header, and for its cards, takes longer than all the rest
        if content.startswith(header):
            return known, len(header)
    start = _header_end(content, 0)
    layout = _layout(content[:start], True)
    if layout is None:
        second = _header_end(content, start)
        layout = _layout(content[start:second], False)
        start = second
    if layout is None:
        raise ImageError(NO_IMAGE)
    if len(content) >= start:
        _known[:] = [(content[:start], layout), *_known[: MOST_KNOWN - 1]]
    return layout, start


def _header_end(content: bytes, start: int) -> int:
    """Return the byte after the header that begins at `start`."""
    stop = min(len(content), start + MOST_HEADER)
    at = content.find(END, start, stop)
    while at >= 0 and (at - start) % CARD:
        at = content.find(END, at + 1, stop)
    if at < 0:
        if content[start : start + 8] not in (b"SIMPLE  ", b"XTENSION"):
            raise ImageError(NO_IMAGE if start else NO_FITS)
        raise ImageError(CUT_SHORT)
    return start + -(-(at + CARD - start) // BLOCK) * BLOCK


@functools.lru_cache(maxsize=64)
def _layout(header: bytes, primary: bool) -> Layout | None:
    """Return what a header says; None for a primary header without an array."""
    cards = _cards(header)
    if cards.get("SIMPLE" if primary else "XTENSION") != ("T" if primary else "'IMAGE   '"):
        raise ImageError(NO_FITS if primary else NO_IMAGE)
    axes = _whole(cards, "NAXIS")
    if primary and axes == 0:
        return None
    dtype = DTYPES.get(_whole(cards, "BITPIX"))
    if axes != 2 or dtype is None or _whole(cards, "PCOUNT", 0) != 0 or _whole(cards, "GCOUNT", 1) != 1:
        raise ImageError(NO_IMAGE)
    shape = (_whole(cards, "NAXIS2"), _whole(cards, "NAXIS1"))
    if min(shape) < 1:
        raise ImageError(NO_IMAGE)
    if max(shape) > LARGEST_SIDE:
        raise ImageError(TOO_LARGE)
    scale, zero = _number(cards, "BSCALE", 1.0), _number(cards, "BZERO", 0.0)
    return Layout(dtype, shape, scale, zero, _whole(cards, "BLANK") if "BLANK" in cards else None)


def _cards(header: bytes) -> dict[str, str]:
    """Return the values of KEYS as text. The first card of a name counts."""
    found: dict[str, str] = {}
    for at in range(0, len(header), CARD):
        card = header[at : at + CARD]
        name = card[:8].rstrip().decode("latin-1")
        if name in KEYS and card[8:10] == b"= ":
            text = card[10:].decode("latin-1").strip()
            value = text if name == "XTENSION" else text.partition("/")[0].strip()
            found.setdefault(name, value[:10] if name == "XTENSION" else value)
    return found


def _whole(cards: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = cards.get(name)
    if text is None and default is not None:
        return default
    try:
        value = int(text or "")
    except ValueError:
        raise ImageError(NO_IMAGE) from None
    if abs(value) >= 2**63:
        raise ImageError(NO_IMAGE)
    return value


def _number(cards: Mapping[str, str], name: str, default: float) -> float:
    if name not in cards:
        return default
    try:
        value = float(cards[name].replace("D", "E").replace("d", "e"))  # FITS writes exponents of doubles with D
    except ValueError:
        raise ImageError(NO_IMAGE) from None
    if not np.isfinite(value):
        raise ImageError(NO_IMAGE)
    return value
