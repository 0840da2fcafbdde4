"""KIVI: a dimension's keys share a scale over a block of tokens, and a token's values share one (int4, int5).

Liu et al., arXiv 2402.02750, section 3.3. The tokens of the block that is being filled stay in float16.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from runtimes.llm.architecture import Architecture
from runtimes.llm.kv.cache import NO_LIMIT, LayerCache, Policy, Prompt, expect
from runtimes.llm.kv.coded import CodedLayer
from runtimes.llm.kv.codes import check_packing


@dataclass(frozen=True, slots=True)
class Kivi(Policy):
    """bits: of a code; block: tokens to a block."""

    streams: ClassVar[bool] = True
    bits: int = 4
    block: int = 64  # as the native engine has it

    def __post_init__(self) -> None:
        expect(self, "bits", 1, 8)
        expect(self, "block", 2, NO_LIMIT)

    def check(self, architecture: Architecture) -> None:
        check_packing(architecture.head_size, self.bits)

    def begin(self, prompts: Sequence[Prompt]) -> list[LayerCache]:
        return [CodedLayer(prompt, self.bits, self.block, -2) for prompt in prompts]
