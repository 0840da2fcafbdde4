"""H2O: the tokens that got the most attention so far, and the last ones.

Zhang et al., arXiv 2306.14048, section 4. Each head of keys has its own tokens; the queries of its group are added up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from runtimes.llm.kv.cache import LayerCache, Prompt, Tokens, expect
from runtimes.llm.kv.eviction import Eviction, KeptLayer, best


@dataclass(frozen=True, slots=True)
class H2O(Eviction):
    """recent: share of the budget that the last tokens have."""

    recent: float = 0.5

    def __post_init__(self) -> None:
        super(H2O, self).__post_init__()
        expect(self, "recent", 0, 1)

    def begin(self, prompts: Sequence[Prompt]) -> list[LayerCache]:
        return [begun(H2OLayer(prompt, self.budget, self.every, self.recent)) for prompt in prompts]


class H2OLayer(KeptLayer):
    """sinks: first tokens that are kept whatever attention they got."""

    def __init__(self, prompt: Prompt, budget: int, every: int, recent: float, sinks: int = 0) -> None:
        super().__init__(prompt, budget, every, by_head=True)
        self.scores = prompt.scores
        self._recent, self._sinks = recent, sinks

    def append(self, tokens: Tokens) -> None:
        super().append(tokens)
        self.scores = torch.nn.functional.pad(self.scores, (0, len(tokens.index)))

    def observe(self, weights: torch.Tensor) -> None:
        self.scores = self.scores + weights.sum((1, 2), dtype=torch.float32)

    def chosen(self) -> torch.Tensor:
        sinks = min(self._sinks, self.budget)
        recent = min(round(self._recent * self.budget), self.budget - sinks)
        return best(self.scores, self.budget, sinks, recent)

    def keep(self, chosen: torch.Tensor) -> None:
        super().keep(chosen)
        self.scores = self.scores.gather(1, chosen)


def begun(layer: KeptLayer) -> KeptLayer:
    """Evict what the prompt has too much, and return the layer."""
    layer.evict()
    return layer
