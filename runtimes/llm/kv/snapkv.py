"""SnapKV: the tokens of a prompt that its last queries look at. Tokens behind the prompt are all kept.

Li et al., arXiv 2404.14469, section 4. Scores are pooled over neighbours, so that runs of tokens stay together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from edgekit.errors import EdgekitError
from runtimes.llm.kv.cache import NO_LIMIT, QUERIES, LayerCache, Policy, Prompt, expect
from runtimes.llm.kv.eviction import KeptLayer, best


@dataclass(frozen=True, slots=True)
class SnapKV(Policy):
    """budget: tokens of a prompt that a layer keeps; window: last queries that look at it, whose tokens are kept;
    pool: neighbours over which scores are averaged."""

    budget: int = 512
    window: int = 32
    pool: int = 5

    def __post_init__(self) -> None:
        expect(self, "budget", 1, NO_LIMIT)
        expect(self, "window", 1, min(QUERIES, self.budget))
        expect(self, "pool", 1, NO_LIMIT)
        if self.pool % 2 == 0:
            raise EdgekitError(f"kv policy SnapKV: pool = {self.pool}; expected an odd number")

    def begin(self, prompts: Sequence[Prompt]) -> list[LayerCache]:
        return [SnapKVLayer(prompt, self) for prompt in prompts]


class SnapKVLayer(KeptLayer):
    def __init__(self, prompt: Prompt, policy: SnapKV) -> None:
        super().__init__(prompt, policy.budget, NO_LIMIT, by_head=True)
        if self.length > self.budget:
            self.keep(best(scores(prompt, policy), policy.budget, 0, policy.window))

    def chosen(self) -> torch.Tensor:
        raise AssertionError("tokens behind the prompt are never evicted")


def scores(prompt: Prompt, policy: SnapKV) -> torch.Tensor:
    """Return (kv heads, tokens) the attention of the last queries, averaged over neighbours."""
    assert prompt.queries is not None
    heads, size = prompt.shape.kv_heads, prompt.shape.head_size
    queries = prompt.queries[:, -policy.window :].unflatten(0, (heads, -1))
    products = torch.einsum("kgtd,kld->kgtl", queries, prompt.keys.to(queries.dtype)) / size**0.5
    last = torch.arange(len(prompt) - queries.shape[2], len(prompt), device=products.device)
    later = torch.arange(len(prompt), device=products.device)[None] > last[:, None]
    weights = products.masked_fill(later, -torch.inf).softmax(-1).sum((1, 2))
    return torch.nn.functional.avg_pool1d(weights, policy.pool, 1, policy.pool // 2)
