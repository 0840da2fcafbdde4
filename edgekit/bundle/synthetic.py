"""Synthetic inputs for golden rows if no real ones exist: of a size and a distribution that the model may be for.

    rank 4, 1, 3 or 4 channels    pictures with a gradient, shapes and lines of small glyphs
    float, (batch, free)          a waveform: tones under an envelope
    float, other ranks            smooth sequences with noise, or independent normal numbers
    whole numbers                 tokens over the whole vocabulary, padded with zeros if the model takes a mask
    names with mask, type, position    padding masks, two segments, positions

A file does not say which lengths of its free axes the model is for. So `candidates` returns several proposals, and an
importer takes the first one on which the model runs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from edgekit.bundle.tensors import Arrays, TensorSpec, golden_inputs, multiple, same_rows

Array = npt.NDArray[Any]
CHANNELS = (1, 3, 4)
LARGEST = 8_000_000  # bytes of all inputs together: golden rows travel with every bundle
LEAST_ROWS = 4
# proposals for the free axes: height and width of pictures, tokens, samples of a waveform, steps of a sequence
HEIGHTS, WIDTHS = (224, 48, 64, 32), (224, 320, 64, 32)
TOKENS, SAMPLES, STEPS = (48, 32, 16, 8), (512, 576, 64, 16), (64, 32, 16, 8)


def candidates(specs: Sequence[TensorSpec], rows: int, vocabularies: Mapping[str, int]) -> Iterator[Arrays]:
    """Return proposals for golden inputs, from the largest to the smallest lengths of the free axes. The last one is
    `golden_inputs`, which even the smallest model takes. vocabularies: the number of ids that an input may hold."""
    free = any(isinstance(axis, str) for spec in specs for axis in spec.shape[1:])
    for number in range(len(TOKENS) if free else 1):
        lengths = _lengths(specs, number)
        row = sum(
            math.prod(lengths.get(str(axis), axis) for axis in spec.shape[1:] if lengths.get(str(axis), axis))  # type: ignore[misc]
            * np.dtype(spec.dtype).itemsize
            for spec in specs
        )
        count = max(min(rows, LARGEST // max(int(row), 1)), min(rows, LEAST_ROWS))
        yield synthetic_inputs(specs, count, lengths, vocabularies)
    yield golden_inputs(tuple(specs), rows)


def _lengths(specs: Sequence[TensorSpec], number: int) -> dict[str, int]:
    """Return a length for each free axis except the batch: the proposal of this number, as a multiple that the axis
    allows."""
    found: dict[str, int] = {}
    for spec in specs:
        for index, axis in enumerate(spec.shape):
            if index and isinstance(axis, str):
                step = multiple(axis)
                proposal = _proposals(spec, index)[number]
                found.setdefault(axis, max(proposal // step, 1) * step)
    return found


def _proposals(spec: TensorSpec, index: int) -> tuple[int, ...]:
    height = _height_axis(spec)
    if height is not None and index in (height, height + 1):
        return HEIGHTS if index == height else WIDTHS
    if np.dtype(spec.dtype).kind != "f" or _is_mask(spec):
        return TOKENS
    return SAMPLES if len(spec.shape) == 2 else STEPS


def _height_axis(spec: TensorSpec) -> int | None:
    """Return the axis of the height if the input looks like pictures, (batch, channels, height, width) or (batch,
    height, width, channels)."""
    if len(spec.shape) != 4:
        return None
    if spec.shape[1] in CHANNELS:
        return 2
    return 1 if spec.shape[3] in CHANNELS else None


def _is_mask(spec: TensorSpec) -> bool:
    return "mask" in spec.name.lower()


@dataclass(frozen=True, slots=True)
class _Rows:
    """The rows to make: their number, the lengths of free axes, and of each row the share of tokens that is no
    padding."""

    count: int
    lengths: Mapping[str, int]
    filled: npt.NDArray[np.float64]

    def shape(self, spec: TensorSpec) -> tuple[int, ...]:
        return (self.count, *(axis if isinstance(axis, int) else self.lengths[axis] for axis in spec.shape[1:]))

    def real(self, shape: tuple[int, ...]) -> npt.NDArray[np.bool_]:
        """Return (rows, tokens), true for tokens that are no padding: at least one in each row."""
        tokens = shape[-1] if len(shape) > 1 else 1
        most = np.maximum(1, np.round(self.filled * tokens))
        return np.asarray(np.arange(tokens)[None, :] < most[:, None])


def synthetic_inputs(
    specs: Sequence[TensorSpec], rows: int, lengths: Mapping[str, int], vocabularies: Mapping[str, int]
) -> Arrays:
    """Return inputs of these lengths, the same in every call. The first row has no padding, the last one the most."""
    masked = any(_is_mask(spec) for spec in specs)
    filled = np.linspace(1.0, 0.4, rows) if masked else np.ones(rows)
    made = _Rows(rows, lengths, filled)
    random = np.random.default_rng(0)
    return {
        spec.name: same_rows(spec, _values(spec, made, vocabularies.get(spec.name), random).astype(spec.dtype))
        for spec in specs
    }


def _values(spec: TensorSpec, rows: _Rows, vocabulary: int | None, random: np.random.Generator) -> Array:
    shape, name = rows.shape(spec), spec.name.lower()
    if _is_mask(spec):
        real = np.ones(shape, bool) & rows.real(shape).reshape(shape[0], *(1,) * (len(shape) - 2), -1)
        return np.logical_not(real) if "padding" in name else np.array(real)
    if _height_axis(spec) is not None:
        return _pictures(spec, shape, random)
    if np.dtype(spec.dtype).kind == "f":
        return _numbers(shape, "samples" if len(shape) == 2 and isinstance(spec.shape[1], str) else "steps", random)
    if "position" in name:
        return np.zeros(shape, np.int64) + np.arange(shape[-1])
    if "type" in name or "segment" in name:
        segments = np.zeros(shape, np.int64) + (np.arange(shape[-1]) >= shape[-1] // 2)
        return segments % (vocabulary or 2)
    ids = random.integers(0, vocabulary or 8, shape)
    return np.asarray(np.where(rows.real(shape), ids, 0)) if len(shape) == 2 else ids


def _numbers(shape: tuple[int, ...], what: str, random: np.random.Generator) -> Array:
    """Return a waveform for `samples`; else smooth sequences along axis 1, or normal numbers if there is no such
    axis."""
    noise = random.standard_normal(shape)
    if what == "samples":
        time = np.arange(shape[1])[None, :] / 16_000
        pitch = random.uniform(90, 900, (shape[0], 1))
        tones = np.sin(2 * np.pi * pitch * time) + 0.5 * np.sin(4 * np.pi * pitch * time)
        return np.asarray(random.uniform(0.05, 0.6, (shape[0], 1)) * tones + 0.01 * noise)
    if len(shape) < 3:
        return noise
    time = np.linspace(0, 1, shape[1]).reshape(1, -1, *(1,) * (len(shape) - 2))
    per_feature = (shape[0], 1, *shape[2:])
    waves = sum(
        np.sin(2 * np.pi * (random.uniform(0.5, 6, per_feature) * time + random.uniform(0, 1, per_feature)))
        for _ in range(3)
    )
    return np.asarray(random.uniform(0.4, 1.2, per_feature) * waves + 0.3 * noise)


def _pictures(spec: TensorSpec, shape: tuple[int, ...], random: np.random.Generator) -> Array:
    """Return pictures: floats about zero, as after the usual normalization, or whole numbers from 0 to 255."""
    first = _height_axis(spec) == 2
    height, width, channels = (shape[2], shape[3], shape[1]) if first else (shape[1], shape[2], shape[3])
    pictures = np.stack([_picture(height, width, channels, random) for _ in range(shape[0])])
    scaled = 4 * pictures - 2 if np.dtype(spec.dtype).kind == "f" else np.round(255 * pictures)
    return scaled.transpose(0, 3, 1, 2) if first else scaled


def _picture(height: int, width: int, channels: int, random: np.random.Generator) -> npt.NDArray[np.float64]:
    """Return (height, width, channels) from 0 to 1: a gradient, rectangles and discs, lines of glyphs, noise."""
    down, across = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    slope = random.uniform(-0.3, 0.3, (2, channels))
    image = 0.6 + (down - 0.5)[..., None] * slope[0] + (across - 0.5)[..., None] * slope[1]
    for number in range(6):
        middle, radius = random.uniform(0, 1, 2), random.uniform(0.05, 0.25, 2)
        far = np.abs(down - middle[0]) / radius[0], np.abs(across - middle[1]) / radius[1]
        inside = np.maximum(*far) < 1 if number % 2 else np.hypot(*far) < 1
        image[inside] = random.uniform(0, 1, channels)
    size = max(1, min(height, width) // 48)  # pixels of a glyph's dot
    for top in range(size, height - 7 * size, 14 * size):
        ink = random.uniform(0, 1, channels)
        for left in range(size, width - 5 * size, 6 * size):
            glyph = np.kron(random.random((7, 5)) < 0.5, np.ones((size, size), bool))
            image[top : top + 7 * size, left : left + 5 * size][glyph] = ink
    return np.asarray(np.clip(image + 0.03 * random.standard_normal(image.shape), 0, 1))
