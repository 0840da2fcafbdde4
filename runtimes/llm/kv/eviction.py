"""What policies share that keep some tokens exactly and forget the others."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch

from runtimes.llm.kv.cache import NO_LIMIT, LayerCache, Policy, Prompt, Read, Tokens, expect


@dataclass(frozen=True, slots=True)
class Eviction(Policy):
    """budget: tokens that a layer keeps; every: so many tokens more are taken in before tokens are evicted again."""

    budget: int = 512
    every: int = 32

    def __post_init__(self) -> None:
        expect(self, "budget", 1, NO_LIMIT)
        expect(self, "every", 1, NO_LIMIT)


class KeptLayer(LayerCache):
    """keys, values: (kv heads, kept, head size) float16; index: (kv heads or 1, kept) int32."""

    def __init__(self, prompt: Prompt, budget: int, every: int, *, by_head: bool) -> None:
        super().__init__(prompt.shape)
        self.budget, self._every = budget, every
        self.keys, self.values = prompt.keys, prompt.values
        heads = prompt.shape.kv_heads if by_head else 1
        numbers = torch.arange(len(prompt), dtype=torch.int32, device=prompt.shape.device)
        self.index = numbers.repeat(heads, 1)

    @property
    def length(self) -> int:
        return self.index.shape[1]

    @property
    def room(self) -> int:
        return self.budget + self._every - self.length

    def append(self, tokens: Tokens) -> None:
        self.keys = torch.cat([self.keys, tokens.keys.half()], 1)
        self.values = torch.cat([self.values, tokens.values.half()], 1)
        self.index = torch.cat([self.index, tokens.index.int().expand(len(self.index), -1)], 1)

    def read(self, queries: torch.Tensor) -> Read:
        return Read(self.keys.to(self.shape.dtype), self.values.to(self.shape.dtype), self.index)

    def settle(self) -> None:
        if self.room <= 0:
            self.evict()

    def evict(self) -> None:
        """Keep the budget's tokens."""
        if self.length > self.budget:
            self.keep(self.chosen())

    @abstractmethod
    def chosen(self) -> torch.Tensor:
        """Return (kv heads or 1, budget) which of the tokens are kept, in order."""

    def keep(self, chosen: torch.Tensor) -> None:
        """Forget all others."""
        self.keys, self.values = taken(self.keys, chosen), taken(self.values, chosen)
        self.index = self.index.gather(1, chosen)


def taken(rows: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """Return the chosen (kv heads or 1, kept) of rows (kv heads, tokens, size)."""
    return rows.gather(1, chosen[..., None].expand(len(rows), -1, rows.shape[2]))


def best(scores: torch.Tensor, number: int, sinks: int, recent: int) -> torch.Tensor:
    """Return (heads, number) which of (heads, tokens) have the highest scores, in order. The first `sinks` and the
    last `recent` tokens are always among them."""
    length = scores.shape[1]
    protected = torch.zeros(length, dtype=torch.bool, device=scores.device)
    protected[:sinks] = True
    protected[length - recent :] = True
    return scores.masked_fill(protected, torch.inf).topk(number, 1).indices.sort(1).values
