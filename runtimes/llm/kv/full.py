"""Every key and value in float16: what the other policies are compared with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from runtimes.llm.kv.cache import LayerCache, Policy, Prompt, Read, Tokens


@dataclass(frozen=True, slots=True)
class Full(Policy):
    """All tokens in float16."""

    streams: ClassVar[bool] = True

    def begin(self, prompts: Sequence[Prompt]) -> list[LayerCache]:
        return [FullLayer(prompt) for prompt in prompts]


class FullLayer(LayerCache):
    def __init__(self, prompt: Prompt) -> None:
        super().__init__(prompt.shape)
        self.keys, self.values = prompt.keys, prompt.values

    def append(self, tokens: Tokens) -> None:
        self.keys = torch.cat([self.keys, tokens.keys.half()], 1)
        self.values = torch.cat([self.values, tokens.values.half()], 1)

    def read(self, queries: torch.Tensor) -> Read:
        index = torch.arange(self.keys.shape[1], device=self.shape.device)[None]
        return Read(self.keys.to(self.shape.dtype), self.values.to(self.shape.dtype), index)
