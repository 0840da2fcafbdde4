"""The reference engine: the formulas in torch, in float32 or float64, on any device.

It is written to be read and compared with. Weights are decoded when the engine is made. Results of one row may differ
in the last bits from batch to batch, as torch's products do; float64 makes that irrelevant for a comparison.

The default cache is exact and paged. With another policy (`runtimes/llm/kv/`) each sequence has buffers of its own, and
the blocks only count its tokens. The engine keeps the caches from before the last step, so that it can be taken back.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from edgekit.errors import EdgekitError, unknown
from edgekit.importers.gguf import Tensor
from runtimes.llm.architecture import Architecture, Layer, Model
from runtimes.llm.blocks import BLOCK
from runtimes.llm.engine import Batch, Engine, Floats, Ids, Item
from runtimes.llm.kv.cache import LayerCache, Memory, Policy, Prompt, Shape, Tokens, memory
from runtimes.llm.kv.policies import EXACT, policy
from runtimes.llm.rope import Rope

DTYPES = {"float32": torch.float32, "float64": torch.float64}
MOST_QUERIES = 256  # rows of one product of attention with a policy's cache


@dataclass(frozen=True, slots=True)
class Cached:
    """A sequence of `length` tokens under a policy. reading: the layers are `Prompt`s, which the policy has not got."""

    layers: Sequence[LayerCache]
    length: int
    reading: bool


@dataclass(slots=True)
class State:
    """hidden: (rows, width); cosines, sines: of each rotary embedding, (rows, its size / 2); cached: of each item, the
    caches that the step changes."""

    hidden: torch.Tensor
    cosines: list[torch.Tensor]
    sines: list[torch.Tensor]
    cached: Sequence[Cached]


class TorchEngine(Engine):
    """A model in torch. blocks: of 16 tokens, of the cache; dtype: "float32" or "float64"; device: a torch device; kv:
    the policy of the key-value cache or its name, perhaps with options, such as "h2o:budget=256"."""

    def __init__(
        self,
        model: Model,
        *,
        blocks: int = 512,
        dtype: str = "float32",
        device: str = "cpu",
        kv: str | Policy = EXACT,
    ) -> None:
        super().__init__(model.architecture, blocks)
        self.kv = policy(kv) if isinstance(kv, str) else kv
        if self.kv is not None:
            _check_attention(model.architecture, self.kv)
            self.kv.check(model.architecture)
        if dtype not in DTYPES:
            raise unknown("dtype", dtype, DTYPES)
        self._dtype, self._device = DTYPES[dtype], torch.device(device)
        of = model.architecture
        shape = (of.layers, 2, blocks if self.kv is None else 0, BLOCK, of.kv_heads, of.head_size)
        self._cached: dict[int, Cached] = {}
        self._before: dict[int, Cached] = {}  # the last step
        self._open: Sequence[Cached] = ()  # what the step that has begun changes
        self._cache = torch.zeros(shape, dtype=self._dtype, device=self._device)
        self._embedding = self._load(model.embedding)
        self._layers = [
            {role: self._load(tensor) for role in Layer.__slots__ if (tensor := getattr(layer, role)) is not None}
            for layer in model.layers
        ]
        self._norm = self._load(model.norm)
        self._norm_bias, self._head_bias = (
            None if tensor is None else self._load(tensor) for tensor in (model.norm_bias, model.head_bias)
        )
        self._head = self._embedding if model.head is model.embedding else self._load(model.head)

    def _load(self, tensor: Tensor) -> torch.Tensor:
        return torch.from_numpy(tensor.values()).to(self._device, self._dtype)

    def close(self) -> None:
        self._layers.clear()
        self._cached.clear()
        self._before.clear()
        del self._cache, self._embedding, self._head

    @torch.inference_mode()
    def begin(self, batch: Batch) -> State:
        ids = torch.from_numpy(np.maximum(batch.ids, 0)).to(self._device)
        hidden = self._embedding[ids] * self.architecture.embedding_scale
        if batch.embeddings is not None:
            given = torch.from_numpy(batch.embeddings).to(self._device, self._dtype)
            hidden = torch.where(torch.from_numpy(batch.ids < 0).to(self._device)[:, None], given, hidden)
        found = [rope.cosines_and_sines(batch.positions) for rope in self.architecture.ropes]
        cosines, sines = (
            [torch.from_numpy(part).to(self._device, self._dtype) for part in parts]
            for parts in zip(*found, strict=True)
        )
        self._open = [] if self.kv is None else [self._copied(sequence) for sequence in batch.sequences]
        return State(hidden, cosines, sines, self._open)

    @torch.inference_mode()
    def run_layers(self, state: State, batch: Batch, first: int, end: int) -> None:
        for number in range(first, end):
            weights = self._layers[number]
            normed = self._normed(state.hidden, weights["attention_norm"], weights.get("attention_norm_bias"))
            attended = self._attention(number, normed, state, batch)
            added = self._product(number, "attention_output", attended)
            if "post_attention_norm" in weights:
                added = self._normed(added, weights["post_attention_norm"])
            state.hidden = state.hidden + added
            if not self.architecture.parallel:
                normed = self._normed(state.hidden, weights["mlp_norm"])
            added = self._product(number, "down", self._activated(number, normed))
            if "post_mlp_norm" in weights:
                added = self._normed(added, weights["post_mlp_norm"])
            state.hidden = state.hidden + added
        if self._device.type == "cuda" and end - first < self.architecture.layers:
            torch.cuda.synchronize(self._device)  # the caller pauses here: work that is only queued would not let it

    @torch.inference_mode()
    def finish(self, state: State, batch: Batch) -> Floats:
        wanted = torch.from_numpy(batch.wanted).to(self._device)
        logits = self._normed(state.hidden[wanted], self._norm, self._norm_bias) @ self._head.T
        if self._head_bias is not None:
            logits = logits + self._head_bias
        return np.asarray(_capped(logits, self.architecture.logit_cap).to("cpu", torch.float32))

    def _activated(self, number: int, normed: torch.Tensor) -> torch.Tensor:
        """Return (rows, hidden) what the feed-forward's last matrix is multiplied with."""
        up = self._product(number, "up", normed)
        gated = "gate" in self._layers[number]
        gate = self._product(number, "gate", normed) if gated else up
        if self.architecture.activation == "gelu":
            activated = torch.nn.functional.gelu(gate, approximate="tanh")
        else:
            activated = torch.nn.functional.silu(gate)
        return activated * up if gated else activated

    def _product(self, number: int, role: str, rows: torch.Tensor) -> torch.Tensor:
        """Return the product of (rows, inputs) with a matrix of a layer, plus its bias if it has one."""
        weights = self._layers[number]
        product = rows @ weights[role].T
        bias = weights.get(f"{role}_bias")
        return product if bias is None else product + bias

    # --- sequences under a policy

    def end_prompt(self, sequence: int) -> None:
        """Let the policy compress a prompt. A step from which logits of a sequence are wanted does so, too."""
        found = self._cached[sequence]
        if self.kv is not None and found.reading:
            prompts = [layer for layer in found.layers if isinstance(layer, Prompt)]
            with torch.inference_mode():
                self._cached[sequence] = Cached(self.kv.begin(prompts), found.length, reading=False)

    def memory(self, sequence: int) -> Memory:
        """Return the bytes that a sequence's cache holds under its policy, counted from its buffers."""
        if self.kv is None:
            blocks = self.blocks.count(self.length(sequence))
            return Memory(blocks * self._cache[:, :, 0].nbytes, 0)
        return memory(self._cached[sequence].layers)

    def _copied(self, sequence: int) -> Cached:
        """Return caches that a step may change."""
        if sequence in self._cached:
            found = self._cached[sequence]
            return Cached([copy.copy(layer) for layer in found.layers], found.length, found.reading)
        assert self.kv is not None
        of = self.architecture
        rotations = [functools.partial(self._rotated_at, of.rope_number(number)) for number in range(of.layers)]
        prompts = [Prompt(Shape(of.kv_heads, of.head_size, self._dtype, self._device, item)) for item in rotations]
        return Cached(self.kv.begin(prompts) if self.kv.streams else prompts, 0, reading=not self.kv.streams)

    def commit(self, items: Sequence[Item], batch: Batch) -> None:
        super().commit(items, batch)
        for item, found in zip(items, self._open, strict=False):
            if item.sequence in self._cached:
                self._before[item.sequence] = self._cached[item.sequence]
            self._cached[item.sequence] = Cached(found.layers, self.length(item.sequence), found.reading)
            if item.logits != "none":
                self.end_prompt(item.sequence)

    def reuse(self, sequence: int, ids: Ids) -> int:
        """See `Engine.reuse`. Under a policy nothing is reused, because a sequence's tokens are compressed together."""
        return super().reuse(sequence, ids) if self.kv is None else 0

    def fork(self, sequence: int, new: int) -> None:
        super().fork(sequence, new)
        if sequence in self._cached:
            self._cached[new] = self._cached[sequence]
            if sequence in self._before:
                self._before[new] = self._before[sequence]

    def truncate(self, sequence: int, length: int) -> int:
        """See `Engine.truncate`. Under a policy the last step can be taken back, or else the whole sequence."""
        if self.kv is not None and 0 <= length < self.length(sequence):
            before = self._before.pop(sequence, None)
            if before is not None and before.length <= length:
                self._cached[sequence], length = before, before.length
            else:
                del self._cached[sequence]
                length = 0
        return super().truncate(sequence, length)

    def remove(self, sequence: int) -> None:
        super().remove(sequence)
        self._cached.pop(sequence, None)
        self._before.pop(sequence, None)

    # --- blocks in memory

    def copy_block(self, source: int, target: int) -> None:
        if self.kv is None:
            self._cache[:, :, target] = self._cache[:, :, source]

    def export_blocks(self, blocks: npt.NDArray[np.int32]) -> npt.NDArray[Any]:
        if self.kv is not None:
            raise EdgekitError(f"a sequence under the kv policy {self.kv} cannot be saved or restored; fork it instead")
        content = self._cache[:, :, torch.from_numpy(blocks).to(self._device, torch.int64)]
        return np.asarray(content.movedim(2, 0).to("cpu").clone())

    def import_blocks(self, blocks: npt.NDArray[np.int32], content: npt.NDArray[Any]) -> None:
        at = torch.from_numpy(blocks).to(self._device, torch.int64)
        self._cache[:, :, at] = torch.from_numpy(content).to(self._device).movedim(0, 2)

    # --- attention

    def _attention(self, number: int, normed: torch.Tensor, state: State, batch: Batch) -> torch.Tensor:
        """Return (rows, heads * head size); takes the rows' keys and values into the cache."""
        of = self.architecture
        rope = of.rope_number(number)
        queries = self._rotated(self._projected(number, "query", normed, of.heads), state, rope)
        raw = self._projected(number, "key", normed, of.kv_heads)
        keys = self._rotated(raw, state, rope)
        values = self._projected(number, "value", normed, of.kv_heads)
        found = []
        for item, (span, table) in enumerate(zip(batch.spans, batch.tables, strict=True)):
            index = torch.from_numpy(batch.index[span]).to(self._device)
            if state.cached:
                positions = torch.from_numpy(batch.positions[span]).to(self._device)
                new_raw, new_keys, new_values = (rows[span].transpose(0, 1) for rows in (raw, keys, values))
                tokens = Tokens(new_raw, new_keys, new_values, index, positions)
                found.append(self._attend_cached(state.cached[item].layers[number], queries[span], tokens))
                continue
            blocks = torch.from_numpy(table).to(self._device, torch.int64)
            where = (blocks[index // BLOCK], index % BLOCK)
            self._cache[number, 0][where] = keys[span]
            self._cache[number, 1][where] = values[span]
            length = int(batch.index[span][-1]) + 1
            seen_keys, seen_values = self._cache[number][:, blocks].flatten(1, 2)[:, :length]
            found.append(self._attend(queries[span], seen_keys, seen_values, index, of.window(number)))
        return torch.cat(found)

    def _attend_cached(self, cache: LayerCache, queries: torch.Tensor, tokens: Tokens) -> torch.Tensor:
        """Attention of (tokens, heads, size) over a policy's cache, which takes the tokens in."""
        of, found, start = self.architecture, [], 0
        while start < len(queries):
            part = slice(start, start + min(cache.room, MOST_QUERIES))
            start = part.stop
            cache.append(tokens.part(part))
            asked = queries[part].transpose(0, 1)
            seen = cache.read(asked)
            grouped = asked.unflatten(0, (of.kv_heads, -1))
            scores = grouped @ seen.keys.mT[:, None] * of.query_scale
            later = seen.index[:, None, None] > tokens.index[part, None]
            weights = scores.masked_fill(later, -torch.inf).softmax(dim=-1)
            found.append((weights @ seen.values[:, None]).flatten(0, 1).transpose(0, 1).flatten(1))
            cache.observe(weights)
            cache.settle()
        return torch.cat(found)

    def _attend(
        self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, index: torch.Tensor, window: int = 0
    ) -> torch.Tensor:
        """Attention of (tokens, heads, size) over (length, kv heads, size). A token at `index` sees those up to it, and
        with a window the last `window` of them."""
        of = self.architecture
        keys, values = (part.repeat_interleave(of.queries_per_key, dim=1) for part in (keys, values))
        scores = _capped(torch.einsum("thd,lhd->htl", queries, keys) * of.query_scale, of.score_cap)
        behind = index[:, None] - torch.arange(len(keys), device=self._device)[None]
        hidden = (behind < 0) | (behind >= window) if window else behind < 0
        weights = scores.masked_fill(hidden, -torch.inf).softmax(dim=-1)
        return torch.einsum("htl,lhd->thd", weights, values).flatten(1)

    def _projected(self, number: int, role: str, normed: torch.Tensor, heads: int) -> torch.Tensor:
        """Return (rows, heads, head size) queries, keys or values, before the rotary embedding."""
        weights = self._layers[number]
        rows = self._product(number, role, normed).unflatten(1, (heads, self.architecture.head_size))
        norm = weights.get(f"{role}_norm")
        return rows if norm is None else self._normed(rows, norm)

    def _normed(self, rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """The root-mean-square norm of the last axis (Zhang and Sennrich, arXiv 1910.07467, equation 4), or with a bias
        LayerNorm (Ba et al., arXiv 1607.06450, equation 3)."""
        if bias is not None:
            return torch.nn.functional.layer_norm(rows, rows.shape[-1:], weight, bias, self.architecture.epsilon)
        return rows * (rows.square().mean(-1, keepdim=True) + self.architecture.epsilon).rsqrt() * weight

    def _rotated(self, rows: torch.Tensor, state: State, number: int) -> torch.Tensor:
        """Apply a rotary embedding to (rows, heads, head size)."""
        rope = self.architecture.ropes[number]
        return _rotated_by(rope, rows, state.cosines[number][:, None], state.sines[number][:, None])

    def _rotated_at(self, number: int, keys: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Apply a rotary embedding at positions (kv heads or 1, tokens) to keys (kv heads, tokens, head size)."""
        rope = self.architecture.ropes[number]
        found = (torch.from_numpy(part) for part in rope.cosines_and_sines(positions.flatten().cpu().numpy()))
        cosine, sine = (part.to(self._device, self._dtype).unflatten(0, positions.shape) for part in found)
        return _rotated_by(rope, keys, cosine, sine)


def _check_attention(of: Architecture, kv: Policy) -> None:
    """Raise if the layers' attention is another one than that of the policies."""
    unlike = {
        "layers that see a window of tokens": any(of.windows),
        "scores with a cap": of.score_cap != 0,
        f"a query scale of {of.query_scale:g}": not math.isclose(of.query_scale, of.head_size**-0.5),
    }
    if found := [what for what, holds in unlike.items() if holds]:
        raise EdgekitError(
            f"kv policy {type(kv).__name__}: this {of.family} model has {found[0]}; expected plain attention, or "
            f"kv={EXACT}"
        )


def _rotated_by(rope: Rope, rows: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    first, second = (
        (slice(0, rope.size, 2), slice(1, rope.size, 2))
        if rope.pairs == "adjacent"
        else (slice(0, rope.size // 2), slice(rope.size // 2, rope.size))
    )
    rotated = rows.clone()
    rotated[..., first] = rows[..., first] * cosine - rows[..., second] * sine
    rotated[..., second] = rows[..., second] * cosine + rows[..., first] * sine
    return rotated


def _capped(values: torch.Tensor, cap: float) -> torch.Tensor:
    return torch.tanh(values / cap) * cap if cap else values
