"""Keys and values in 4 bits behind a Hadamard rotation, which spreads outliers over all dimensions of a head.

Ashkboos et al., QuaRot, arXiv 2404.00456, section 4. Each token has a scale and a minimum for each head.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from edgekit.errors import EdgekitError
from runtimes.llm.architecture import Architecture
from runtimes.llm.kv.cache import NO_LIMIT, LayerCache, Policy, Prompt, expect
from runtimes.llm.kv.coded import CodedLayer
from runtimes.llm.kv.codes import check_packing


@dataclass(frozen=True, slots=True)
class Hadamard(Policy):
    """bits: of a code; block: up to so many of the last tokens stay in float16; 1: none."""

    streams: ClassVar[bool] = True
    bits: int = 4
    block: int = 1

    def __post_init__(self) -> None:
        expect(self, "bits", 1, 8)
        expect(self, "block", 1, NO_LIMIT)

    def check(self, architecture: Architecture) -> None:
        if (size := architecture.head_size) & (size - 1):
            raise EdgekitError(f"kv policy hadamard: the head size is {size}; expected a power of 2; take int4 instead")
        check_packing(size, self.bits)

    def begin(self, prompts: Sequence[Prompt]) -> list[LayerCache]:
        return [HadamardLayer(prompt, self.bits, self.block, -1) for prompt in prompts]


class HadamardLayer(CodedLayer):
    def transform(self, rows: torch.Tensor) -> torch.Tensor:
        return rows.float() @ rotation(self.shape.head_size).to(rows.device, torch.float32)

    def restore(self, rows: torch.Tensor) -> torch.Tensor:
        return rows @ rotation(self.shape.head_size).to(rows.device, rows.dtype)


@functools.cache
def rotation(size: int) -> torch.Tensor:
    """Return the orthonormal Hadamard matrix of a power of 2, which is its own inverse."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)]) / 2**0.5
    return matrix
