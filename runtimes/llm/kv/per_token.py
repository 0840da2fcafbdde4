"""Each token's key and value in a few bits, with a scale and a minimum for each head (int8)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from runtimes.llm.architecture import Architecture
from runtimes.llm.kv.cache import NO_LIMIT, LayerCache, Policy, Prompt, expect
from runtimes.llm.kv.coded import CodedLayer
from runtimes.llm.kv.codes import check_packing


@dataclass(frozen=True, slots=True)
class PerToken(Policy):
    """bits: of a code; block: up to so many of the last tokens stay in float16; 1: none."""

    streams: ClassVar[bool] = True
    bits: int = 8
    block: int = 1

    def __post_init__(self) -> None:
        expect(self, "bits", 1, 8)
        expect(self, "block", 1, NO_LIMIT)

    def check(self, architecture: Architecture) -> None:
        check_packing(architecture.head_size, self.bits)

    def begin(self, prompts: Sequence[Prompt]) -> list[LayerCache]:
        return [CodedLayer(prompt, self.bits, self.block, -1) for prompt in prompts]
