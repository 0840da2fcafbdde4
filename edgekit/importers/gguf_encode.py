"""Encode values in the formats of GGUF files that have one scale for 32 values: Q4_0, Q4_1 and Q8_0.

`nearest` is the rule of ggml's reference code, so a file has the same bytes as one that llama.cpp has quantised.
`Grid` gives the values that a block can hold, for methods that choose codes in another way, and `pack` stores them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from edgekit.errors import EdgekitError
from edgekit.importers.gguf_formats import Bytes, Floats

BLOCK = 32  # values that share a scale
Codes = npt.NDArray[np.int16]
Numbers = npt.NDArray[np.floating]
Float64 = npt.NDArray[np.float64]
# the scales that `Grid.fit` tries, relative to the one by which the largest value of the block is exact
SHARES = np.concatenate([[1.0], np.linspace(0.7, 1.1, 17)])


@dataclass(frozen=True, slots=True)
class Encoding:
    """A value is (code - middle) * scale + least. lowest, highest: the codes; has_least: a block stores `least` too."""

    lowest: int
    highest: int
    middle: int
    has_least: bool


ENCODINGS = {"Q4_0": Encoding(0, 15, 8, False), "Q4_1": Encoding(0, 15, 0, True), "Q8_0": Encoding(-127, 127, 0, False)}


def nearest(form: str, values: Floats) -> Bytes:
    """Return (rows, bytes of a row) from (rows, values of a row), a multiple of 32, as ggml rounds them. Each value
    moves by at most half of its block's step, and by the rounding of the step to float16."""
    blocks = np.ascontiguousarray(values, np.float32).reshape(len(values), -1, BLOCK)
    scale, least = _range(form, blocks)
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.where(scale == 0, np.float32(0), np.float32(1) / scale)
    inverse[~np.isfinite(inverse)] = 0  # float16 stores such a small scale as 0
    of = ENCODINGS[form]
    scaled = (blocks - least if of.has_least else blocks) * inverse
    if of.lowest < 0:  # half away from zero
        codes = np.trunc(scaled + np.copysign(np.float32(0.5), scaled))
    else:
        codes = np.trunc(scaled + np.float32(of.middle + 0.5))
    whole = np.clip(codes, of.lowest, of.highest).astype(np.int16)
    return pack(form, _half(form, scale), _half(form, least), whole)


def pack(form: str, scales: Numbers, least: Numbers, codes: Codes) -> Bytes:
    """Return (rows, bytes of a row) from (rows, blocks, 1) scales and least values, and (rows, blocks, 32) codes."""
    parts = [scales, least] if ENCODINGS[form].has_least else [scales]
    heads = [np.ascontiguousarray(part, "<f2").view(np.uint8) for part in parts]
    if form == "Q8_0":
        body = codes.astype(np.int8).view(np.uint8)
    else:
        body = (codes[..., : BLOCK // 2] | codes[..., BLOCK // 2 :] << 4).astype(np.uint8)
    return np.concatenate([*heads, body], axis=-1).reshape(len(codes), -1)


@dataclass(frozen=True, slots=True)
class Grid:
    """The values that one block of each row can hold. scale, least: (rows, 1), numbers that float16 stores exactly."""

    form: str
    scale: Float64
    least: Float64

    @classmethod
    def fit(cls, form: str, block: Float64, importance: Float64) -> Grid:
        """Return the grid of (rows, 32) values with the least sum of squared errors times (32,) importance, of those
        that `SHARES` describes."""
        scale, least = (np.asarray(part, np.float64) for part in _range(form, block))
        middle = least + scale * 7.5  # of the format with a least value, which a narrower grid keeps
        found, smallest = None, np.full((len(block), 1), np.inf)
        for share in SHARES:
            narrow = _half(form, scale * share).astype(np.float64)
            low = _half(form, middle - narrow * 7.5 if ENCODINGS[form].has_least else least).astype(np.float64)
            grid = cls(form, narrow, low)
            error = ((grid.values(grid.codes(block)) - block) ** 2 @ importance)[:, None]
            better = error < smallest
            smallest = np.where(better, error, smallest)
            found = grid if found is None else cls(
                form, np.where(better, narrow, found.scale), np.where(better, low, found.least)
            )  # fmt: skip
        assert found is not None
        return found

    def codes(self, values: Float64) -> Codes:
        """Return the codes of the nearest values to (rows, n)."""
        of = ENCODINGS[self.form]
        steps = np.divide(values - self.least, self.scale, out=np.zeros_like(values), where=self.scale != 0)
        found: Codes = np.clip(np.rint(steps) + of.middle, of.lowest, of.highest).astype(np.int16)
        return found

    def values(self, codes: Codes) -> Float64:
        """Return (rows, n) the values of codes."""
        return (codes - ENCODINGS[self.form].middle) * self.scale + self.least


def _range(form: str, blocks: npt.NDArray[Any]) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Return (..., 1) the scale and the least value of (..., 32) values, as ggml chooses them."""
    if form == "Q4_1":
        least = blocks.min(axis=-1, keepdims=True)
        return (blocks.max(axis=-1, keepdims=True) - least) / 15, least
    largest = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=-1, keepdims=True), axis=-1)
    scale = largest / -8 if form == "Q4_0" else np.abs(largest) / 127
    return scale, np.zeros_like(scale)


def _half(form: str, numbers: npt.NDArray[Any]) -> npt.NDArray[np.float16]:
    with np.errstate(over="ignore"):
        found = numbers.astype("<f2")
    if not np.isfinite(found).all():
        raise EdgekitError(f"a block needs the scale {np.abs(numbers).max():.3g}, which {form} cannot store in float16")
    return found
