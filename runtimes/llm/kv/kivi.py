"""Keys and values in a few bits by blocks of tokens: a dimension's keys share a scale, and so do a token's values.

Liu et al., KIVI, arXiv 2402.02750, section 3.3. The tokens of the block that is being filled stay in float16.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from runtimes.llm.architecture import Architecture
from runtimes.llm.kv.cache import NO_LIMIT, LayerCache, Policy, Prompt, Read, Tokens, expect
from runtimes.llm.kv.codes import Codes, check_packing, joined, quantized


@dataclass(frozen=True, slots=True)
class Kivi(Policy):
    """bits: of a code; block: tokens to a block."""

    streams: ClassVar[bool] = True
    bits: int = 4
    block: int = 64  # as the native engine has it

    def __post_init__(self) -> None:
        expect(self, "bits", 1, 8)
        expect(self, "block", 1, NO_LIMIT)

    def check(self, architecture: Architecture) -> None:
        check_packing(architecture.head_size, self.bits)

    def begin(self, prompts: Sequence[Prompt]) -> list[LayerCache]:
        return [KiviLayer(prompt, self) for prompt in prompts]


class KiviLayer(LayerCache):
    """Codes have shape (kv heads, blocks, tokens to a block, head size)."""

    def __init__(self, prompt: Prompt, policy: Kivi) -> None:
        super().__init__(prompt.shape)
        self._policy = policy
        self._keys: Codes | None = None
        self._values: Codes | None = None
        self._new_keys, self._new_values = prompt.keys, prompt.values  # float16, of the block that is being filled
        self.settle()

    @property
    def room(self) -> int:
        return self._policy.block - self._new_keys.shape[1]

    def append(self, tokens: Tokens) -> None:
        self._new_keys = torch.cat([self._new_keys, tokens.keys.half()], 1)
        self._new_values = torch.cat([self._new_values, tokens.values.half()], 1)

    def read(self, queries: torch.Tensor) -> Read:
        keys, values = self._new_keys.to(self.shape.dtype), self._new_values.to(self.shape.dtype)
        if self._keys is not None and self._values is not None:
            keys = torch.cat([self._keys.values(self.shape.dtype).flatten(1, 2), keys], 1)
            values = torch.cat([self._values.values(self.shape.dtype).flatten(1, 2), values], 1)
        return Read(keys, values, torch.arange(keys.shape[1], device=self.shape.device)[None])

    def settle(self) -> None:
        block, bits = self._policy.block, self._policy.bits
        full = self._new_keys.shape[1] // block * block
        if not full:
            return
        keys, values = (part[:, :full].unflatten(1, (-1, block)) for part in (self._new_keys, self._new_values))
        self._keys = joined(self._keys, quantized(keys, -2, bits), 1)
        self._values = joined(self._values, quantized(values, -1, bits), 1)
        self._new_keys, self._new_values = (part[:, full:].clone() for part in (self._new_keys, self._new_values))
