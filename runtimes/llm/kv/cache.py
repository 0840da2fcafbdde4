"""The interface of policies: a `Policy` has the parameters, and a `LayerCache` holds one layer of one sequence.

The engine appends tokens, computes attention over what `read` returns, tells the cache the attention weights, and lets
it `settle`, which is where it compresses. It never appends more than `room` tokens in between, so when a token is
compressed depends on the token's number and not on how a sequence was cut into steps.

A policy that needs the whole prompt gets it from the engine as `Prompt`s, one for each layer, when the prompt is over.
Until then each token of the prompt sees the exact ones before it. A policy that `streams` needs no prompt.

Tensors of a cache are replaced and never written in place. A shallow copy is therefore a copy of a cache's state, and
costs nothing: forks, and steps that are taken back, are shallow copies.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, ClassVar

import torch

from edgekit.errors import EdgekitError
from runtimes.llm.architecture import Architecture

NO_LIMIT = 1 << 40  # tokens
QUERIES = 64  # last queries of a prompt that are kept for policies
Rotate = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Shape:
    """What a cache must know of its engine. rotate: applies the rotary embedding of positions (kv heads or 1, tokens)
    to keys (kv heads, tokens, head size); dtype: of what attention reads. Exact copies are stored in float16."""

    kv_heads: int
    head_size: int
    dtype: torch.dtype
    device: torch.device
    rotate: Rotate


@dataclass(frozen=True, slots=True)
class Tokens:
    """New tokens of a layer. raw: keys before the rotary embedding; keys: after it; values: each (kv heads, tokens,
    head size); index: (tokens,) of each token in its sequence; positions: (tokens,) for the rotary embedding."""

    raw: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    index: torch.Tensor
    positions: torch.Tensor

    def part(self, which: slice) -> Tokens:
        """Return some of the tokens."""
        raw, keys, values = self.raw[:, which], self.keys[:, which], self.values[:, which]
        return Tokens(raw, keys, values, self.index[which], self.positions[which])


@dataclass(frozen=True, slots=True)
class Read:
    """What attention reads. keys, values: (kv heads, kept, head size); index: (kv heads or 1, kept) of the tokens in
    their sequence: a query does not see those behind it."""

    keys: torch.Tensor
    values: torch.Tensor
    index: torch.Tensor


@dataclass(frozen=True, slots=True)
class Slow:
    """A tensor that lies in slow memory, from which a step reads a part."""

    tensor: torch.Tensor


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of allocated buffers, in fast and in slow memory."""

    fast: int
    slow: int


class LayerCache(ABC):
    """The keys and values of one layer of one sequence."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape

    @property
    def room(self) -> int:
        """How many tokens can be appended before `settle` is called."""
        return NO_LIMIT

    @abstractmethod
    def append(self, tokens: Tokens) -> None:
        """Take new tokens in."""

    @abstractmethod
    def read(self, queries: torch.Tensor) -> Read:
        """Return what these queries (heads, tokens, head size), those of the tokens appended last, attend to."""

    def observe(self, weights: torch.Tensor) -> None:  # noqa: B027 - most policies do not look at them
        """See the attention weights (kv heads, queries to a key, tokens, kept) over what was read last."""

    def settle(self) -> None:  # noqa: B027 - a policy that compresses each token at once has nothing to do
        """Compress or evict what is due."""


class Prompt(LayerCache):
    """A layer's prompt while it is read, exact, with what policies choose tokens by. scores: (kv heads, tokens), the
    sums of attention weights that each token got; queries: (heads, up to 64, head size), the last ones."""

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape)
        empty = torch.empty(shape.kv_heads, 0, shape.head_size, dtype=torch.float16, device=shape.device)
        self.raw = self.keys = self.values = empty
        self.positions = torch.empty(0, dtype=torch.int32, device=shape.device)
        self.scores = torch.empty(shape.kv_heads, 0, device=shape.device)
        self.queries: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.positions)

    def append(self, tokens: Tokens) -> None:
        self.raw = torch.cat([self.raw, tokens.raw.half()], 1)
        self.keys = torch.cat([self.keys, tokens.keys.half()], 1)
        self.values = torch.cat([self.values, tokens.values.half()], 1)
        self.positions = torch.cat([self.positions, tokens.positions.int()])
        self.scores = torch.nn.functional.pad(self.scores, (0, len(tokens.index)))

    def read(self, queries: torch.Tensor) -> Read:
        every = queries if self.queries is None else torch.cat([self.queries, queries], 1)
        self.queries = every[:, -QUERIES:].clone()
        index = torch.arange(len(self), device=self.shape.device)[None]
        return Read(self.keys.to(self.shape.dtype), self.values.to(self.shape.dtype), index)

    def observe(self, weights: torch.Tensor) -> None:
        self.scores = self.scores + weights.sum((1, 2), dtype=torch.float32)

    def tokens(self) -> Tokens:
        """Return all tokens, as a cache takes them."""
        index = torch.arange(len(self), device=self.shape.device)
        return Tokens(self.raw, self.keys, self.values, index, self.positions)


class Policy(ABC):
    """The parameters of a policy, a frozen dataclass. streams: it compresses a prompt while the prompt is read."""

    streams: ClassVar[bool] = False

    @abstractmethod
    def begin(self, prompts: Sequence[Prompt]) -> Sequence[LayerCache]:
        """Return the caches of all layers behind a prompt, compressed. A policy that streams begins with no tokens."""

    def check(self, architecture: Architecture) -> None:  # noqa: B027 - most policies run every model
        """Raise if the policy cannot cache this model's keys and values."""


def expect(policy: object, name: str, least: float, most: float) -> None:
    """Raise unless a parameter of a policy is in a range."""
    value = getattr(policy, name)
    if not least <= value <= most:
        allowed = f"at least {least}" if most == NO_LIMIT else f"{least} to {most}"
        raise EdgekitError(f"kv policy {type(policy).__name__}: {name} = {value}; expected {allowed}")


def memory(caches: Sequence[LayerCache]) -> Memory:
    """Return the bytes of all buffers that these caches hold; a buffer that several hold counts once."""
    found: dict[tuple[bool, int], int] = {}
    for cache in caches:
        for slow, tensor in _tensors(vars(cache)):
            storage = tensor.untyped_storage()
            found[slow, storage.data_ptr()] = storage.nbytes()
    return Memory(
        sum(size for (slow, _), size in found.items() if not slow),
        sum(size for (slow, _), size in found.items() if slow),
    )


def _tensors(value: Any, slow: bool = False) -> Iterator[tuple[bool, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        yield slow, value
    elif isinstance(value, dict):
        for part in value.values():
            yield from _tensors(part, slow)
    elif isinstance(value, tuple | list):
        for part in value:
            yield from _tensors(part, slow)
    elif is_dataclass(value):
        for part in fields(value):
            yield from _tensors(getattr(value, part.name), slow or isinstance(value, Slow))
