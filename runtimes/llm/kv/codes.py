"""Numbers in a few bits: codes that are packed into bytes, with a scale and a minimum in float16 for each group."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from edgekit.errors import EdgekitError


@dataclass(frozen=True, slots=True)
class Codes:
    """bytes: uint8, the codes of the last axis packed; scale, least: float16; a value is code * scale + least."""

    bits: int
    bytes: torch.Tensor
    scale: torch.Tensor
    least: torch.Tensor

    def values(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the numbers again."""
        return unpacked(self.bytes, self.bits).to(dtype) * self.scale.to(dtype) + self.least.to(dtype)


def quantized(values: torch.Tensor, axis: int, bits: int) -> Codes:
    """Return numbers in codes of some bits. Those along `axis` share a scale and a minimum (asymmetric)."""
    exact = values.float() if values.dtype == torch.float16 else values
    smallest, most = exact.amin(axis, keepdim=True), (1 << bits) - 1
    least, scale = smallest.half(), ((exact.amax(axis, keepdim=True) - smallest) / most).half()
    codes = ((exact - least.to(exact.dtype)) / scale.to(exact.dtype).clamp_min(1e-20)).round().clamp(0, most)
    return Codes(bits, packed(codes.to(torch.uint8), bits), scale, least)


def joined(first: Codes | None, second: Codes, axis: int) -> Codes:
    """Return two arrays of codes as one."""
    if first is None:
        return second
    parts = zip(*((of.bytes, of.scale, of.least) for of in (first, second)), strict=True)
    return Codes(first.bits, *(torch.cat(pair, axis) for pair in parts))


def check_packing(size: int, bits: int) -> None:
    """Raise unless the codes of a head fill whole bytes."""
    if size * bits % 8 or size % (math.lcm(bits, 8) // bits):
        raise EdgekitError(f"the head size is {size}; codes of {bits} bits need a multiple of 8; take 2, 4 or 8 bits")


def _word(bits: int) -> tuple[int, torch.dtype]:
    """Return the bytes of the shortest run of codes that fills whole bytes, and a dtype that holds these bytes."""
    size = math.lcm(bits, 8) // 8
    return size, torch.uint8 if size == 1 else torch.int64


def packed(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack the last axis, whose length is a multiple of 8."""
    size, dtype = _word(bits)
    shifts = torch.arange(0, size * 8, bits, device=codes.device)
    shifted: torch.Tensor = codes.unflatten(-1, (-1, len(shifts))).to(dtype) << shifts.to(dtype)
    words = shifted.sum(-1, keepdim=True, dtype=dtype)
    if size > 1:
        words = (words >> torch.arange(0, size * 8, 8, device=codes.device)) & 255
    return words.to(torch.uint8).flatten(-2)


def unpacked(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """Return the codes of bytes that `packed` made."""
    size, dtype = _word(bits)
    parts = packed.unflatten(-1, (-1, size)).to(dtype)
    if size > 1:
        parts = (parts << torch.arange(0, size * 8, 8, device=packed.device)).sum(-1, keepdim=True)
    shifts = torch.arange(0, size * 8, bits, device=packed.device, dtype=dtype)
    found: torch.Tensor = (parts >> shifts) & ((1 << bits) - 1)
    return found.flatten(-2)
