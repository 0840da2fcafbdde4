"""How a compressed tensor is stored: dense, on a uniform grid (affine), or on a codebook (palette).

Passes keep the model's weights decoded, so that any framework code can run on them unchanged. The encoding of a weight
says how few bits store it losslessly.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Float = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Affine:
    """Symmetric integers times a scale. codes: int8, the weight's shape; scale: float32, one per output row (axis 0) or
    a single one, shape (rows, 1, ...) or (1, ...)."""

    bits: int
    codes: npt.NDArray[np.int8]
    scale: Float

    def decode(self) -> Float:
        return self.codes.astype(np.float32) * self.scale


@dataclass(frozen=True, slots=True)
class Palette:
    """Indices into a codebook. codes: uint8, the weight's shape; palette: float32 (at most 2**bits,)."""

    bits: int
    codes: npt.NDArray[np.uint8]
    palette: Float

    def decode(self) -> Float:
        return self.palette[self.codes]


Encoding = Affine | Palette


def to_arrays(weights: Mapping[str, Float], encodings: Mapping[str, Encoding]) -> dict[str, npt.NDArray[np.generic]]:
    """Return the arrays to store: an encoded weight as `NAME` (codes) and `NAME#scale` or `NAME#palette`, the rest as
    float32."""
    arrays: dict[str, npt.NDArray[np.generic]] = {}
    for name, weight in weights.items():
        encoding = encodings.get(name)
        if encoding is None:
            arrays[name] = np.ascontiguousarray(weight, dtype=np.float32)
            continue
        assert np.array_equal(encoding.decode(), weight), f"{name} differs from its encoding"
        arrays[name] = encoding.codes
        if isinstance(encoding, Affine):
            arrays[f"{name}#scale"] = encoding.scale
        else:
            arrays[f"{name}#palette"] = encoding.palette
    return arrays


def from_arrays(arrays: Mapping[str, npt.NDArray[np.generic]], bits: Mapping[str, int]) -> dict[str, Float | Encoding]:
    """Return the inverse of `to_arrays`; `bits` holds the code width of each encoded weight. Raises ValueError or
    LookupError if the arrays do not fit one another."""
    stored: dict[str, Float | Encoding] = {}
    for name, array in arrays.items():
        if "#" in name:
            continue
        if f"{name}#scale" in arrays:
            scale = arrays[f"{name}#scale"]
            if not array.ndim or scale.shape not in ((rows, *(1,) * (array.ndim - 1)) for rows in (1, len(array))):
                raise ValueError(f"{name!r}: the scale has shape {scale.shape}, and the codes have {array.shape}")
            stored[name] = Affine(_width(bits, name), array.astype(np.int8), scale.astype(np.float32))
        elif f"{name}#palette" in arrays:
            palette = arrays[f"{name}#palette"]
            if palette.ndim != 1 or palette.size > 256:
                raise ValueError(f"{name!r}: the palette has shape {palette.shape}; expected up to 256 numbers")
            stored[name] = Palette(_width(bits, name), array.astype(np.uint8), palette.astype(np.float32))
        else:
            stored[name] = array.astype(np.float32)
    return stored


def _width(bits: Mapping[str, int], name: str) -> int:
    if not 1 <= bits[name] <= 8:
        raise ValueError(f"{name!r}: its codes have {bits[name]} bits; expected 1 to 8")
    return bits[name]


def stored_bytes(weights: Mapping[str, Float], encodings: Mapping[str, Encoding]) -> int:
    """Return the bytes of the weights at their code widths, with codebooks and scales, before entropy coding."""
    total = 0
    for name, weight in weights.items():
        encoding = encodings.get(name)
        if encoding is None:
            total += 4 * weight.size
        else:
            table = encoding.scale if isinstance(encoding, Affine) else encoding.palette
            total += (encoding.bits * weight.size + 7) // 8 + 4 * table.size
    return total
