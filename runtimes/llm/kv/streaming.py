"""StreamingLLM: the first tokens, which attention uses as a sink, and the last ones.

Xiao et al., arXiv 2309.17453, section 3.2. Positions count within the cache: the sinks stand directly before the last
tokens. Attention depends only on differences of positions, so it is enough to rotate the sinks to their new place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from edgekit.errors import EdgekitError
from runtimes.llm.kv.cache import NO_LIMIT, LayerCache, Prompt, Read, Tokens, expect
from runtimes.llm.kv.eviction import Eviction, KeptLayer


@dataclass(frozen=True, slots=True)
class Streaming(Eviction):
    """sinks: first tokens that are kept, part of the budget."""

    sinks: int = 4

    def __post_init__(self) -> None:
        super(Streaming, self).__post_init__()
        expect(self, "sinks", 0, NO_LIMIT)
        if self.sinks >= self.budget:
            raise EdgekitError(f"kv policy Streaming: {self.sinks} sinks of a budget of {self.budget}; take fewer")

    def begin(self, prompts: Sequence[Prompt]) -> list[LayerCache]:
        return [StreamingLayer(prompt, self) for prompt in prompts]


class StreamingLayer(KeptLayer):
    def __init__(self, prompt: Prompt, policy: Streaming) -> None:
        super().__init__(prompt, policy.budget, policy.every, by_head=False)
        self._sinks = policy.sinks
        self._raw = prompt.raw[:, : policy.sinks].clone()
        self._positions = prompt.positions[None]
        self.evict()

    def append(self, tokens: Tokens) -> None:
        super().append(tokens)
        self._positions = torch.cat([self._positions, tokens.positions.int()[None]], 1)
        if missing := max(0, self._sinks - self._raw.shape[1]):
            self._raw = torch.cat([self._raw, tokens.raw[:, :missing].half()], 1)

    def read(self, queries: torch.Tensor) -> Read:
        found, sinks = super().read(queries), self._sinks
        if self.length <= sinks or int(self.index[0, sinks]) == sinks:  # nothing was evicted
            return found
        first = self._positions[:, sinks].long()[:, None]
        places = first - torch.arange(sinks, 0, -1, device=self.shape.device)[None]
        moved = self.shape.rotate(self._raw.to(self.shape.dtype), places)
        return Read(torch.cat([moved, found.keys[:, sinks:]], 1), found.values, found.index)

    def chosen(self) -> torch.Tensor:
        last = torch.arange(self.length - self.budget + self._sinks, self.length, device=self.shape.device)
        return torch.cat([torch.arange(self._sinks, device=self.shape.device), last])[None]

    def keep(self, chosen: torch.Tensor) -> None:
        super().keep(chosen)
        self._positions = self._positions.gather(1, chosen)
