"""GEAR: codes of a few bits, and of their error the largest parts: outliers exactly, the rest in low rank per head.

Kang et al., arXiv 2403.05527, section 3. The outliers of a vector, half of them its largest and half its smallest
numbers, are stored in float16, and the vector's mean is quantised in their place. A vector is a channel's keys over
all tokens of a chunk, or a token's values over all heads. The low-rank part comes from an eigendecomposition and not
from power iteration, so it is the best one of its rank, and the same in each run. A prompt is one
chunk (at most 32,768 tokens); behind it,
`buffer` tokens in float16 become a chunk when the buffer is full.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from edgekit.errors import unknown
from runtimes.llm.architecture import Architecture
from runtimes.llm.kv.cache import NO_LIMIT, LayerCache, Policy, Prompt, Read, Tokens, expect
from runtimes.llm.kv.codes import Codes, check_packing, quantized
from runtimes.llm.kv.low_rank import low_rank

BACKBONES = ("kcvt", "kivi")
MOST_CHUNK = 1 << 15  # vectors whose outliers have an index of 16 bits


@dataclass(frozen=True, slots=True)
class Gear(Policy):
    """bits: of a code; rank: of the error of a prompt, per head; new_rank: of a chunk behind it; outliers: their share;
    buffer: tokens to a chunk behind the prompt. backbone: which numbers share a scale: "kivi", `buffer` keys of a
    channel, and a token's values of a head; or "kcvt", all keys of a channel, and all values of a token."""

    bits: int = 4
    rank: int = 4
    new_rank: int = 2
    outliers: float = 0.02
    buffer: int = 64
    backbone: str = "kcvt"

    def __post_init__(self) -> None:
        for name, least, most in (("bits", 1, 8), ("rank", 0, NO_LIMIT), ("new_rank", 0, NO_LIMIT), ("outliers", 0, 1)):
            expect(self, name, least, most)
        expect(self, "buffer", 1, MOST_CHUNK)
        if self.backbone not in BACKBONES:
            raise unknown("backbone", self.backbone, BACKBONES, where="kv policy Gear")

    def check(self, architecture: Architecture) -> None:
        check_packing(architecture.head_size, self.bits)

    def begin(self, prompts: Sequence[Prompt]) -> list[LayerCache]:
        return [GearLayer(prompt, self) for prompt in prompts]


@dataclass(frozen=True, slots=True)
class Part:
    """A chunk's keys or values. outliers: (vectors, count) float16; at: int16, where in its vector each is; left,
    right: (kv heads, tokens, rank) and (kv heads, head size, rank), whose product is the error's low-rank part."""

    codes: Codes
    outliers: torch.Tensor
    at: torch.Tensor
    left: torch.Tensor
    right: torch.Tensor


def compressed(exact: torch.Tensor, policy: Gear, rank: int, axis: int) -> Part:
    """Compress (kv heads, tokens, head size). axis: of the numbers that share a scale: 1 for keys, 2 for values."""
    exact = exact.double()
    vectors = _vectors(exact, axis)
    length = vectors.shape[1]
    count = min(length, max(2, round(policy.outliers * length))) if policy.outliers else 0
    top = vectors.topk(count // 2, 1).indices
    rest = vectors.scatter(1, top, torch.inf)  # of equal numbers, none is chosen twice
    at = torch.cat([rest.topk(count - count // 2, 1, largest=False).indices, top], 1)
    filled = vectors.scatter(1, at, vectors.mean(1, keepdim=True).expand(-1, count))
    codes = quantized(*_grouped(_from_vectors(filled, exact, axis), axis, policy), policy.bits)
    coded = _ungrouped(codes.values(torch.float64), exact)
    error = _vectors(exact - coded, axis).scatter(1, at, 0.0)
    left, right = low_rank(_from_vectors(error, exact, axis), rank)
    return Part(codes, vectors.gather(1, at).half(), at.short(), left, right)


def restored(part: Part, like: tuple[int, int, int], axis: int, dtype: torch.dtype) -> torch.Tensor:
    """Return (kv heads, tokens, head size), the shape that `like` says."""
    shape = torch.empty(like, device="meta")
    values = _ungrouped(part.codes.values(dtype), shape)
    if part.left.shape[-1]:
        values = values + part.left.to(dtype) @ part.right.to(dtype).mT
    if not part.at.shape[1]:
        return values
    vectors = _vectors(values, axis).scatter(1, part.at.long(), part.outliers.to(dtype))
    return _from_vectors(vectors, shape, axis)


def _vectors(rows: torch.Tensor, axis: int) -> torch.Tensor:
    """(kv heads, tokens, head size) to vectors: channels over tokens, or tokens over all heads."""
    found: torch.Tensor = rows.transpose(1, 2).flatten(0, 1) if axis == 1 else rows.transpose(0, 1).flatten(1)
    return found


def _from_vectors(vectors: torch.Tensor, like: torch.Tensor, axis: int) -> torch.Tensor:
    heads, _, size = like.shape
    found: torch.Tensor = (
        vectors.unflatten(0, (heads, size)).transpose(1, 2)
        if axis == 1
        else vectors.unflatten(1, (heads, size)).transpose(0, 1)
    )
    return found


def _grouped(rows: torch.Tensor, axis: int, policy: Gear) -> tuple[torch.Tensor, int]:
    """Return the rows so that the numbers that share a scale lie along one axis, and which axis that is."""
    if axis == 2:
        return (rows, -1) if policy.backbone == "kivi" else (rows.transpose(0, 1).flatten(1), -1)
    group = policy.buffer if policy.backbone == "kivi" else rows.shape[1]
    return rows.unflatten(1, (-1, group)), -2


def _ungrouped(rows: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    if rows.dim() == 2:
        rows = rows.unflatten(1, (like.shape[0], like.shape[2])).transpose(0, 1)
    return rows.flatten(1, 2) if rows.dim() == 4 else rows


class GearLayer(LayerCache):
    def __init__(self, prompt: Prompt, policy: Gear) -> None:
        super().__init__(prompt.shape)
        self._policy = policy
        self._chunks: tuple[tuple[int, Part, Part], ...] = ()
        self._new_keys, self._new_values = prompt.keys, prompt.values  # float16
        most = MOST_CHUNK // policy.buffer * policy.buffer
        while whole := min(self._new_keys.shape[1] // policy.buffer * policy.buffer, most):
            self._compress(whole, policy.rank)

    @property
    def room(self) -> int:
        return self._policy.buffer - self._new_keys.shape[1]

    def append(self, tokens: Tokens) -> None:
        self._new_keys = torch.cat([self._new_keys, tokens.keys.half()], 1)
        self._new_values = torch.cat([self._new_values, tokens.values.half()], 1)

    def read(self, queries: torch.Tensor) -> Read:
        dtype, heads, size = self.shape.dtype, self.shape.kv_heads, self.shape.head_size
        keys = [restored(part, (heads, tokens, size), 1, dtype) for tokens, part, _ in self._chunks]
        values = [restored(part, (heads, tokens, size), 2, dtype) for tokens, _, part in self._chunks]
        every = torch.cat([*keys, self._new_keys.to(dtype)], 1)
        index = torch.arange(every.shape[1], device=self.shape.device)[None]
        return Read(every, torch.cat([*values, self._new_values.to(dtype)], 1), index)

    def settle(self) -> None:
        if not self.room:
            self._compress(self._policy.buffer, self._policy.new_rank)

    def _compress(self, tokens: int, rank: int) -> None:
        """Make a chunk of the first tokens of the buffer."""
        keys = compressed(self._new_keys[:, :tokens], self._policy, rank, 1)
        values = compressed(self._new_values[:, :tokens], self._policy, rank, 2)
        self._chunks = (*self._chunks, (tokens, keys, values))
        self._new_keys, self._new_values = (part[:, tokens:].clone() for part in (self._new_keys, self._new_values))
