"""D2O: H2O with a budget for each layer, and evicted tokens merged into similar ones.

Wan et al., arXiv 2406.13035, section 3. A layer whose attention is spread over many tokens gets more of the budget: the
budgets are a softmax of -F over layers, where F is the variance over tokens of the attention that each token got. F
spans many orders of magnitude, so it is scaled to 0 to 1 over the layers. An evicted token is merged into the most
similar one that is kept, if the two are more similar than a threshold, which is the running mean of the similarities.
Keys are compared and merged before the rotary embedding by default: rotated keys of different positions do not add up.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from edgekit.errors import EdgekitError, unknown
from runtimes.llm.kv.cache import NO_LIMIT, LayerCache, Prompt, Read, Tokens, expect
from runtimes.llm.kv.eviction import Eviction, taken
from runtimes.llm.kv.h2o import H2OLayer, begun

MERGES, ROPES, ALLOCATIONS = ("none", "v", "kv"), ("before", "after"), ("variance", "equal")


@dataclass(frozen=True, slots=True)
class D2O(Eviction):
    """budget: tokens that a layer keeps, on the average over layers; recent: share of the last tokens; sinks: first
    tokens that are kept; merge: what of an evicted token goes into a similar one; rope: whether keys are merged before
    or after the rotary embedding; beta: weight of the new similarities in the threshold; layers: how the budget is
    divided; least: share of a prompt that each layer keeps."""

    recent: float = 0.25
    sinks: int = 4
    merge: str = "v"
    rope: str = "before"
    beta: float = 0.7
    layers: str = "variance"
    least: float = 0.01

    def __post_init__(self) -> None:
        super(D2O, self).__post_init__()
        expect(self, "sinks", 0, NO_LIMIT)
        for name in ("recent", "beta", "least"):
            expect(self, name, 0, 1)
        for name, allowed in (("merge", MERGES), ("rope", ROPES), ("layers", ALLOCATIONS)):
            if getattr(self, name) not in allowed:
                raise unknown(name, getattr(self, name), allowed, where="kv policy D2O")
        if self.sinks >= self.budget:
            raise EdgekitError(f"kv policy D2O: {self.sinks} sinks of a budget of {self.budget}; take fewer")

    def begin(self, prompts: Sequence[Prompt]) -> list[LayerCache]:
        budgets = self.budgets(prompts)
        return [begun(D2OLayer(prompt, self, budget)) for prompt, budget in zip(prompts, budgets, strict=True)]

    def budgets(self, prompts: Sequence[Prompt]) -> list[int]:
        """Return each layer's budget. Their sum is `budget` times the layers."""
        length = len(prompts[0])
        if self.layers == "equal" or length <= self.budget:
            return [self.budget] * len(prompts)
        spread = torch.stack([prompt.scores.sum(0).var() for prompt in prompts]).double()
        spread = (spread - spread.min()) / (spread.max() - spread.min()).clamp_min(1e-30)
        least = min(self.budget, max(self.sinks + 1, math.ceil(self.least * length)))
        return divided((-spread).softmax(0).tolist(), self.budget * len(prompts), least, length)


def divided(shares: Sequence[float], total: int, least: int, most: int) -> list[int]:
    """Divide a whole number in proportion to shares, each part within limits."""
    low, high = 0.0, total / min(shares) + most
    for _ in range(200):  # the factor at which the limited parts have the right sum
        factor = (low + high) / 2
        parts = [min(max(share * factor, least), most) for share in shares]
        low, high = (factor, high) if sum(parts) < total else (low, factor)
    found = [math.floor(part) for part in parts]
    by_rest = sorted(range(len(parts)), key=lambda at: found[at] - parts[at])
    for at in [at for at in by_rest if found[at] < most][: total - sum(found)]:
        found[at] += 1
    return found


class D2OLayer(H2OLayer):
    """keys: before the rotary embedding, if they are merged there."""

    def __init__(self, prompt: Prompt, policy: D2O, budget: int) -> None:
        super().__init__(prompt, budget, policy.every, policy.recent, policy.sinks)
        self._policy = policy
        self._threshold: float | None = None
        self._positions: torch.Tensor | None = None
        if policy.rope == "before":
            self.keys = prompt.raw
            self._positions = prompt.positions.repeat(prompt.shape.kv_heads, 1)

    def append(self, tokens: Tokens) -> None:
        if self._positions is not None:
            new = tokens.positions.int().expand(len(self._positions), -1)
            self._positions = torch.cat([self._positions, new], 1)
            tokens = replace(tokens, keys=tokens.raw)
        super().append(tokens)

    def read(self, queries: torch.Tensor) -> Read:
        found = super().read(queries)
        if self._positions is None:
            return found
        return Read(self.shape.rotate(found.keys, self._positions.long()), found.values, found.index)

    def keep(self, chosen: torch.Tensor) -> None:
        keys, values = self.keys.double(), self.values.double()
        super().keep(chosen)
        if self._positions is not None:
            self._positions = self._positions.gather(1, chosen)
        if self._policy.merge != "none":
            self._merge(keys, values, chosen)

    def _merge(self, keys: torch.Tensor, values: torch.Tensor, chosen: torch.Tensor) -> None:
        """Merge what was evicted of these keys and values into what is kept."""
        length = keys.shape[1]
        numbers = torch.arange(length, device=keys.device).expand(len(keys), -1)
        evicted = numbers[~torch.zeros_like(numbers, dtype=torch.bool).scatter(1, chosen, True)].unflatten(
            0, (len(keys), length - chosen.shape[1])
        )
        unit = torch.nn.functional.normalize(keys, dim=-1)
        similar, target = (taken(unit, evicted) @ taken(unit, chosen).mT).max(-1)
        mean, beta = float(similar.mean()), self._policy.beta
        self._threshold = mean if self._threshold is None else beta * mean + (1 - beta) * self._threshold
        weights = torch.where(similar >= self._threshold, similar.exp(), 0.0)
        self.values = merged(values, chosen, evicted, target, weights)
        if self._policy.merge == "kv":
            self.keys = merged(keys, chosen, evicted, target, weights)


def merged(
    rows: torch.Tensor, chosen: torch.Tensor, evicted: torch.Tensor, target: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """Return the chosen rows, float16, each the weighted mean of itself, with weight e, and of the evicted rows that
    have it as target (equation 8)."""
    own = taken(rows, chosen)
    where = target[..., None].expand(-1, -1, rows.shape[2])
    total = (math.e * own).scatter_add(1, where, weights[..., None] * taken(rows, evicted))
    divisor = torch.full_like(own[..., 0], math.e).scatter_add(1, target, weights)
    return (total / divisor[..., None]).half()
