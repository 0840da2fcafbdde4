"""The reference engine: the formulas in torch, in float32 or float64, on any device.

It is written to be read and compared with. Weights are decoded when the engine is made. Results of one row may differ
in the last bits from batch to batch, as torch's products do; float64 makes that irrelevant for a comparison.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from edgekit.errors import unknown
from edgekit.importers.gguf import Tensor
from runtimes.llm.architecture import Layer, Model
from runtimes.llm.blocks import BLOCK
from runtimes.llm.engine import Batch, Engine, Floats

DTYPES = {"float32": torch.float32, "float64": torch.float64}


@dataclass(slots=True)
class State:
    """hidden: (rows, width); cosine, sine: (rows, size of the rotary embedding / 2)."""

    hidden: torch.Tensor
    cosine: torch.Tensor
    sine: torch.Tensor


class TorchEngine(Engine):
    """A model in torch. blocks: of 16 tokens, of the cache; dtype: "float32" or "float64"; device: a torch device."""

    def __init__(self, model: Model, *, blocks: int = 512, dtype: str = "float32", device: str = "cpu") -> None:
        super().__init__(model.architecture, blocks)
        if dtype not in DTYPES:
            raise unknown("dtype", dtype, DTYPES)
        self._dtype, self._device = DTYPES[dtype], torch.device(device)
        of = model.architecture
        shape = (of.layers, 2, blocks, BLOCK, of.kv_heads, of.head_size)
        self._cache = torch.zeros(shape, dtype=self._dtype, device=self._device)
        self._embedding = self._load(model.embedding)
        self._layers = [
            {role: self._load(tensor) for role in Layer.__slots__ if (tensor := getattr(layer, role)) is not None}
            for layer in model.layers
        ]
        self._norm = self._load(model.norm)
        self._head = self._embedding if model.head is model.embedding else self._load(model.head)

    def _load(self, tensor: Tensor) -> torch.Tensor:
        return torch.from_numpy(tensor.values()).to(self._device, self._dtype)

    def close(self) -> None:
        self._layers.clear()
        del self._cache, self._embedding, self._head

    @torch.inference_mode()
    def begin(self, batch: Batch) -> State:
        ids = torch.from_numpy(np.maximum(batch.ids, 0)).to(self._device)
        hidden = self._embedding[ids]
        if batch.embeddings is not None:
            given = torch.from_numpy(batch.embeddings).to(self._device, self._dtype)
            hidden = torch.where(torch.from_numpy(batch.ids < 0).to(self._device)[:, None], given, hidden)
        angles = torch.from_numpy(self.architecture.rope.angles(batch.positions)).to(self._device)
        return State(hidden, angles.cos().to(self._dtype), angles.sin().to(self._dtype))

    @torch.inference_mode()
    def run_layers(self, state: State, batch: Batch, first: int, end: int) -> None:
        for number in range(first, end):
            weights = self._layers[number]
            normed = self._normed(state.hidden, weights["attention_norm"])
            attended = self._attention(number, normed, state, batch)
            state.hidden = state.hidden + self._product(number, "attention_output", attended)
            normed = self._normed(state.hidden, weights["mlp_norm"])
            gated = torch.nn.functional.silu(self._product(number, "gate", normed)) * self._product(
                number, "up", normed
            )
            state.hidden = state.hidden + self._product(number, "down", gated)

    @torch.inference_mode()
    def finish(self, state: State, batch: Batch) -> Floats:
        rows = self._normed(state.hidden[torch.from_numpy(batch.wanted).to(self._device)], self._norm)
        return np.asarray((rows @ self._head.T).to("cpu", torch.float32))

    def copy_block(self, source: int, target: int) -> None:
        self._cache[:, :, target] = self._cache[:, :, source]

    def export_blocks(self, blocks: npt.NDArray[np.int32]) -> npt.NDArray[Any]:
        content = self._cache[:, :, torch.from_numpy(blocks).to(self._device, torch.int64)]
        return np.asarray(content.movedim(2, 0).to("cpu").clone())

    def import_blocks(self, blocks: npt.NDArray[np.int32], content: npt.NDArray[Any]) -> None:
        at = torch.from_numpy(blocks).to(self._device, torch.int64)
        self._cache[:, :, at] = torch.from_numpy(content).to(self._device).movedim(0, 2)

    def _attention(self, number: int, normed: torch.Tensor, state: State, batch: Batch) -> torch.Tensor:
        """Return (rows, heads * head size); writes the rows' keys and values into the cache."""
        of = self.architecture
        queries = self._rotated(self._projected(number, "query", normed, of.heads), state)
        keys = self._rotated(self._projected(number, "key", normed, of.kv_heads), state)
        values = self._projected(number, "value", normed, of.kv_heads)
        found = []
        for span, table in zip(batch.spans, batch.tables, strict=True):
            index = torch.from_numpy(batch.index[span]).to(self._device)
            blocks = torch.from_numpy(table).to(self._device, torch.int64)
            where = (blocks[index // BLOCK], index % BLOCK)
            self._cache[number, 0][where] = keys[span]
            self._cache[number, 1][where] = values[span]
            length = int(batch.index[span][-1]) + 1
            seen_keys, seen_values = self._cache[number][:, blocks].flatten(1, 2)[:, :length]
            found.append(self._attend(queries[span], seen_keys, seen_values, index))
        return torch.cat(found)

    def _attend(
        self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, index: torch.Tensor
    ) -> torch.Tensor:
        """Attention of (tokens, heads, size) over (length, kv heads, size). A token at `index` sees those up to it."""
        of = self.architecture
        keys, values = (part.repeat_interleave(of.queries_per_key, dim=1) for part in (keys, values))
        scores = torch.einsum("thd,lhd->htl", queries, keys) / of.head_size**0.5
        later = torch.arange(len(keys), device=self._device)[None] > index[:, None]
        weights = scores.masked_fill(later, -torch.inf).softmax(dim=-1)
        return torch.einsum("htl,lhd->thd", weights, values).flatten(1)

    def _product(self, number: int, role: str, rows: torch.Tensor) -> torch.Tensor:
        """Return the product of (rows, inputs) with a matrix of a layer."""
        return rows @ self._layers[number][role].T

    def _projected(self, number: int, role: str, normed: torch.Tensor, heads: int) -> torch.Tensor:
        """Return (rows, heads, head size) queries, keys or values, before the rotary embedding."""
        weights = self._layers[number]
        rows = self._product(number, role, normed)
        if (bias := weights.get(f"{role}_bias")) is not None:
            rows = rows + bias
        rows = rows.unflatten(1, (heads, self.architecture.head_size))
        norm = weights.get(f"{role}_norm")
        return rows if norm is None else self._normed(rows, norm)

    def _normed(self, rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """The root-mean-square norm of the last axis (Zhang and Sennrich, arXiv 1910.07467, equation 4)."""
        return rows * (rows.square().mean(-1, keepdim=True) + self.architecture.epsilon).rsqrt() * weight

    def _rotated(self, rows: torch.Tensor, state: State) -> torch.Tensor:
        """Apply the rotary embedding to (rows, heads, head size)."""
        rope = self.architecture.rope
        first, second = (
            (slice(0, rope.size, 2), slice(1, rope.size, 2))
            if rope.pairs == "adjacent"
            else (slice(0, rope.size // 2), slice(rope.size // 2, rope.size))
        )
        cosine, sine = state.cosine[:, None], state.sine[:, None]
        rotated = rows.clone()
        rotated[..., first] = rows[..., first] * cosine - rows[..., second] * sine
        rotated[..., second] = rows[..., second] * cosine + rows[..., first] * sine
        return rotated
