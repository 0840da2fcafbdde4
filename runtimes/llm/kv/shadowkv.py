"""ShadowKV: keys in low rank, values in slow memory, of which each step reads a few chunks.

Sun et al., arXiv 2410.21465, section 4. A prompt's keys before the rotary embedding are factored over all heads at
once. Each chunk of 8 tokens has a landmark, the mean of its rotated keys. A query looks at the landmarks, and attention
reads the chunks whose landmarks it likes: keys from the factors, values from slow memory. The chunks whose keys are
least like their landmark, the last chunks of the prompt, and the tokens behind it stay exact in fast memory. Here both
memories are the same device's: `Memory` counts them apart, and `moved` counts the bytes that a step would move.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from runtimes.llm.kv.cache import NO_LIMIT, LayerCache, Policy, Prompt, Read, Slow, Tokens, expect
from runtimes.llm.kv.eviction import taken
from runtimes.llm.kv.low_rank import low_rank


@dataclass(frozen=True, slots=True)
class ShadowKV(Policy):
    """rank: of the keys of all heads; budget: tokens that a step reads by landmarks; chunk: tokens to a landmark;
    outliers: chunks that stay exact, for each head (the paper's 48 are for 128,000 tokens); local: last chunks that
    stay exact."""

    rank: int = 64
    budget: int = 256
    chunk: int = 8
    outliers: int = 4
    local: int = 4

    def __post_init__(self) -> None:
        for name in ("rank", "chunk"):
            expect(self, name, 1, NO_LIMIT)
        for name in ("budget", "outliers", "local"):
            expect(self, name, 0, NO_LIMIT)

    def begin(self, prompts: Sequence[Prompt]) -> list[LayerCache]:
        return [ShadowLayer(prompt, self) for prompt in prompts]


class ShadowLayer(LayerCache):
    """left, right: (tokens, rank) and (kv heads, head size, rank) float16, the factors of the keys; landmarks: (kv
    heads, chunks, head size); outliers: (kv heads, chunks) which are exact, and their keys and values; new: the exact
    tokens behind the chunks, which begin at `start`."""

    def __init__(self, prompt: Prompt, policy: ShadowKV) -> None:
        super().__init__(prompt.shape)
        self._policy = policy
        self._chunks = max(0, len(prompt) // policy.chunk - policy.local)
        self._start = start = self._chunks * policy.chunk
        self._new_keys, self._new_values = prompt.keys[:, start:].clone(), prompt.values[:, start:].clone()
        self.moved = 0
        if not self._chunks:
            return
        heads = self.shape.kv_heads
        raw = prompt.raw[:, :start].double().transpose(0, 1).flatten(1)  # (tokens, all heads)
        left, right = low_rank(raw[None], policy.rank)
        self._left, self._right = left[0], right[0].unflatten(0, (heads, -1)).contiguous()
        self._positions = prompt.positions[:start].clone()
        self._slow = Slow(prompt.values[:, :start].clone())
        keys = prompt.keys[:, :start].double().unflatten(1, (-1, policy.chunk))
        means = keys.mean(2, keepdim=True)
        alike = torch.nn.functional.cosine_similarity(keys, means, dim=-1).amin(-1)
        self._landmarks = means[:, :, 0].half()
        number = min(policy.outliers, self._chunks)
        self._outliers = alike.topk(number, 1, largest=False).indices.sort(1).values.int()
        tokens = self._tokens_of(self._outliers.long())
        self._outlier_keys, self._outlier_values = taken(prompt.keys, tokens), taken(prompt.values, tokens)

    @property
    def room(self) -> int:
        return 1  # each token's query chooses its own chunks

    def append(self, tokens: Tokens) -> None:
        self._new_keys = torch.cat([self._new_keys, tokens.keys.half()], 1)
        self._new_values = torch.cat([self._new_values, tokens.values.half()], 1)

    def read(self, queries: torch.Tensor) -> Read:
        dtype, heads = self.shape.dtype, self.shape.kv_heads
        number = self._start + self._new_keys.shape[1]
        new = torch.arange(self._start, number, device=self.shape.device).expand(heads, -1)
        keys, values, index = [self._new_keys.to(dtype)], [self._new_values.to(dtype)], [new]
        if self._chunks:
            chosen = self._tokens_of(self._selected(queries))
            exact = self._tokens_of(self._outliers.long())
            gathered = taken(self._slow.tensor, chosen)
            self.moved = gathered.nbytes
            keys = [self._keys(chosen), self._outlier_keys.to(dtype), *keys]
            values = [gathered.to(dtype), self._outlier_values.to(dtype), *values]
            index = [chosen, exact, *index]
        return Read(torch.cat(keys, 1), torch.cat(values, 1), torch.cat(index, 1))

    def _selected(self, queries: torch.Tensor) -> torch.Tensor:
        """Return (kv heads, chunks) whose landmarks the queries like best, without the outliers."""
        number = min(self._policy.budget // self._policy.chunk, self._chunks - self._outliers.shape[1])
        queries = queries.unflatten(0, (self.shape.kv_heads, -1))
        products = torch.einsum("kgtd,kcd->kgtc", queries, self._landmarks.to(queries.dtype))
        liked = (products / self.shape.head_size**0.5).softmax(-1).sum(2).amax(1)
        liked = liked.scatter(1, self._outliers.long(), -1.0)
        best: torch.Tensor = liked.topk(number, 1).indices
        return best.sort(1).values

    def _tokens_of(self, chunks: torch.Tensor) -> torch.Tensor:
        """Return (kv heads, tokens) the tokens of (kv heads, chunks)."""
        size = self._policy.chunk
        tokens: torch.Tensor = chunks[..., None] * size + torch.arange(size, device=chunks.device)
        return tokens.flatten(1)

    def _keys(self, chosen: torch.Tensor) -> torch.Tensor:
        """Return rotated keys of tokens (kv heads, chosen) from the factors."""
        dtype = self.shape.dtype
        raw = self._left.to(dtype)[chosen] @ self._right.to(dtype).mT
        rotated: torch.Tensor = self.shape.rotate(raw, self._positions.long()[chosen])
        return rotated
