"""Each token's key and value in a few bits, with a scale and a minimum for each head: int8, and others by option."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from runtimes.llm.architecture import Architecture
from runtimes.llm.kv.cache import LayerCache, Policy, Prompt, Read, Tokens, expect
from runtimes.llm.kv.codes import Codes, check_packing, joined, quantized


@dataclass(frozen=True, slots=True)
class PerToken(Policy):
    """bits: of a code."""

    streams: ClassVar[bool] = True
    bits: int = 8

    def __post_init__(self) -> None:
        expect(self, "bits", 1, 8)

    def check(self, architecture: Architecture) -> None:
        check_packing(architecture.head_size, self.bits)

    def begin(self, prompts: Sequence[Prompt]) -> list[LayerCache]:
        return [PerTokenLayer(prompt, self.bits) for prompt in prompts]


class PerTokenLayer(LayerCache):
    """transform: applied to keys and values before they are quantised; `restore` takes it back."""

    def __init__(self, prompt: Prompt, bits: int) -> None:
        super().__init__(prompt.shape)
        self._bits = bits
        self._length = 0
        self._keys: Codes | None = None
        self._values: Codes | None = None
        if len(prompt):
            self.append(prompt.tokens())

    def transform(self, rows: torch.Tensor) -> torch.Tensor:
        return rows

    def restore(self, rows: torch.Tensor) -> torch.Tensor:
        return rows

    def append(self, tokens: Tokens) -> None:
        self._keys = joined(self._keys, quantized(self.transform(tokens.keys), -1, self._bits), 1)
        self._values = joined(self._values, quantized(self.transform(tokens.values), -1, self._bits), 1)
        self._length += len(tokens.index)

    def read(self, queries: torch.Tensor) -> Read:
        assert self._keys is not None
        assert self._values is not None
        dtype = self.shape.dtype
        index = torch.arange(self._length, device=self.shape.device)[None]
        return Read(self.restore(self._keys.values(dtype)), self.restore(self._values.values(dtype)), index)
