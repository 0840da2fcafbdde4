"""The formats in which GGUF stores weights: blocks of 32 or 256 values with their scales.

Each format is one function, from (..., bytes of a block) to (..., values of a block) in float32. The layouts are facts
of the format (ggml's block structures); the functions are the plain formulas, and the reference of every fast kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class BlockFormat:
    """values: of a block; bytes: of a block."""

    name: str
    values: int
    bytes: int
    decode_blocks: Callable[[Bytes], Floats]

    def decode(self, rows: Bytes) -> Floats:
        """Return (rows, values of a row) from (rows, bytes of a row)."""
        blocks = rows.reshape(len(rows), -1, self.bytes)
        return self.decode_blocks(blocks).reshape(len(rows), -1)


def _float32(blocks: Bytes) -> Floats:
    return blocks.view("<f4").astype(np.float32)


def _float16(blocks: Bytes) -> Floats:
    return blocks.view("<f2").astype(np.float32)


def _bfloat16(blocks: Bytes) -> Floats:
    return (blocks.view("<u2").astype(np.uint32) << 16).view(np.float32)


def _scale(blocks: Bytes, start: int) -> Floats:
    """Return (..., 1) the float16 at this byte of each block."""
    return np.ascontiguousarray(blocks[..., start : start + 2]).view("<f2").astype(np.float32)


def _nibbles(packed: Bytes) -> Bytes:
    """Return (..., 2 n) from (..., n) bytes: all low halves, then all high halves."""
    return np.concatenate([packed & 15, packed >> 4], axis=-1)


def _fifth_bits(blocks: Bytes, start: int) -> Bytes:
    """Return (..., 32) the bits of four bytes, each as 0 or 16."""
    bits = np.unpackbits(blocks[..., start : start + 4], axis=-1, bitorder="little")
    return np.left_shift(bits, 4, dtype=np.uint8)


def _q4_0(blocks: Bytes) -> Floats:
    return (_nibbles(blocks[..., 2:]).astype(np.float32) - 8) * _scale(blocks, 0)


def _q4_1(blocks: Bytes) -> Floats:
    return _nibbles(blocks[..., 4:]).astype(np.float32) * _scale(blocks, 0) + _scale(blocks, 2)


def _q5_0(blocks: Bytes) -> Floats:
    codes = _nibbles(blocks[..., 6:]) | _fifth_bits(blocks, 2)
    return (codes.astype(np.float32) - 16) * _scale(blocks, 0)


def _q5_1(blocks: Bytes) -> Floats:
    codes = _nibbles(blocks[..., 8:]) | _fifth_bits(blocks, 4)
    return codes.astype(np.float32) * _scale(blocks, 0) + _scale(blocks, 2)


def _q8_0(blocks: Bytes) -> Floats:
    return blocks[..., 2:].view(np.int8).astype(np.float32) * _scale(blocks, 0)


def _six_bit_scales(packed: Bytes) -> tuple[Floats, Floats]:
    """Return (..., 8) scales and (..., 8) minima, six bits each, from 12 bytes."""
    low, high = packed[..., :4], packed[..., 4:8]
    rest = packed[..., 8:12]
    scales = np.concatenate([low & 63, (rest & 15) | ((low >> 6) << 4)], axis=-1)
    minima = np.concatenate([high & 63, (rest >> 4) | ((high >> 6) << 4)], axis=-1)
    return scales.astype(np.float32), minima.astype(np.float32)


def _k_codes(packed: Bytes) -> Bytes:
    """Return (..., 8, 32) from 128 bytes: each 32 bytes hold the low halves of one group, then those of the next."""
    parts = packed.reshape(*packed.shape[:-1], 4, 32)
    return np.stack([parts & 15, parts >> 4], axis=-2).reshape(*packed.shape[:-1], 8, 32)


def _with_minima(codes: Bytes, blocks: Bytes) -> Floats:
    """Return (..., 256): codes (..., 8, 32) with the block's scales, less its minima."""
    scales, minima = _six_bit_scales(blocks[..., 4:16])
    scale = (_scale(blocks, 0) * scales)[..., None]
    least = (_scale(blocks, 2) * minima)[..., None]
    values: Floats = codes.astype(np.float32) * scale - least
    return values.reshape(*blocks.shape[:-1], 256)


def _q4_k(blocks: Bytes) -> Floats:
    return _with_minima(_k_codes(blocks[..., 16:144]), blocks)


def _q5_k(blocks: Bytes) -> Floats:
    bits = np.unpackbits(blocks[..., 16:48, None], axis=-1, bitorder="little").swapaxes(-1, -2)  # (..., 8, 32)
    return _with_minima(_k_codes(blocks[..., 48:176]) | np.left_shift(bits, 4, dtype=np.uint8), blocks)


def _q6_k(blocks: Bytes) -> Floats:
    shape = blocks.shape[:-1]
    low = blocks[..., :128].reshape(*shape, 2, 2, 32)  # two halves of 128 values
    high = blocks[..., 128:192].reshape(*shape, 2, 1, 32) >> np.array([0, 2, 4, 6], np.uint8)[:, None] & 3
    codes = np.concatenate([low & 15, low >> 4], axis=-2) | high << 4  # (..., 2, 4, 32)
    scales = blocks[..., 192:208].view(np.int8).astype(np.float32).reshape(*shape, 16, 1)
    values: Floats = (codes.astype(np.float32) - 32).reshape(*shape, 16, 16) * (scales * _scale(blocks, 208)[..., None])
    return values.reshape(*shape, 256)


# by the number that the file uses
FORMATS = {
    0: BlockFormat("F32", 1, 4, _float32),
    1: BlockFormat("F16", 1, 2, _float16),
    2: BlockFormat("Q4_0", 32, 18, _q4_0),
    3: BlockFormat("Q4_1", 32, 20, _q4_1),
    6: BlockFormat("Q5_0", 32, 22, _q5_0),
    7: BlockFormat("Q5_1", 32, 24, _q5_1),
    8: BlockFormat("Q8_0", 32, 34, _q8_0),
    12: BlockFormat("Q4_K", 256, 144, _q4_k),
    13: BlockFormat("Q5_K", 256, 176, _q5_k),
    14: BlockFormat("Q6_K", 256, 210, _q6_k),
    30: BlockFormat("BF16", 1, 2, _bfloat16),
}
NUMBERS = {form.name: number for number, form in FORMATS.items()}
