"""A sliding window: the last tokens and no others.

With `every` = 1 each token sees exactly `budget` tokens behind a prompt; else up to `every` - 1 more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from runtimes.llm.kv.cache import LayerCache, Prompt
from runtimes.llm.kv.eviction import Eviction, KeptLayer


@dataclass(frozen=True, slots=True)
class Window(Eviction):
    def begin(self, prompts: Sequence[Prompt]) -> list[LayerCache]:
        return [WindowLayer(prompt, self) for prompt in prompts]


class WindowLayer(KeptLayer):
    def __init__(self, prompt: Prompt, policy: Window) -> None:
        super().__init__(prompt, policy.budget, policy.every, by_head=False)
        self.evict()

    def chosen(self) -> torch.Tensor:
        return torch.arange(self.length - self.budget, self.length, device=self.shape.device)[None]
