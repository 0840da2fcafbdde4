"""Run a model one layer at a time over windows of text: only one layer's weights are decoded at once.

All windows pass a layer before the next layer is decoded, so the memory is that of one layer, of the embedding and the
head, and of (tokens, width) numbers between two layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from runtimes.llm.architecture import Layer, Model
from runtimes.llm.blocks import blocks_for
from runtimes.llm.engine import Batch, Ids, Item
from runtimes.llm.torch_engine import State, TorchEngine

# matrices that have the same input, by the one that is asked for it
INPUTS: Mapping[str, tuple[str, ...]] = {
    "query": ("query", "key", "value"),
    "attention_output": ("attention_output",),
    "gate": ("gate", "up"),
    "down": ("down",),
}
ROWS = 128  # tokens whose logits are in memory at once
Moments = dict[str, torch.Tensor]  # (inputs, inputs) sums of x x^T, by the keys of INPUTS, in float64


@dataclass(slots=True)
class Window:
    """A window of text in the middle of the model. state: what the next layer reads."""

    ids: Ids
    batch: Batch
    state: State

    def copy(self) -> Window:
        return Window(self.ids, self.batch, replace(self.state))


class LayerEngine(TorchEngine):
    """The reference engine with the weights of one layer at a time. window: the most tokens of a window."""

    def __init__(self, model: Model, window: int) -> None:
        super().__init__(replace(model, layers=()), blocks=blocks_for(window))
        self._layers = [{} for _ in model.layers]
        self._moments: Moments | None = None
        self.blocks.reserve([(0, window)])

    def begun(self, windows: Sequence[Ids]) -> list[Window]:
        """Return the windows before the first layer."""
        batches = [self._batch([Item(0, ids, logits="all")]) for ids in windows]
        return [Window(ids, batch, self.begin(batch)) for ids, batch in zip(windows, batches, strict=True)]

    def run_layer(self, number: int, layer: Layer, windows: Sequence[Window], moments: Moments | None = None) -> None:
        """Take the windows through a layer. moments: the inputs of its matrices are added to them."""
        names = [role for role in Layer.__slots__ if getattr(layer, role) is not None]
        self._layers[number] = {role: self._load(getattr(layer, role)) for role in names}
        self._moments = moments
        try:
            for window in windows:
                self.run_layers(window.state, window.batch, number, number + 1)
        finally:
            self._layers[number], self._moments = {}, None

    def log_probabilities(self, window: Window) -> Iterator[tuple[slice, torch.Tensor]]:
        """Yield (rows, vocabulary) log p of the next token behind a window's tokens, in float64, and which rows."""
        for start in range(0, len(window.ids), ROWS):
            rows = slice(start, min(start + ROWS, len(window.ids)))
            logits = self.finish(window.state, replace(window.batch, wanted=np.arange(rows.start, rows.stop)))
            yield rows, torch.from_numpy(logits).double().log_softmax(-1)

    def _product(self, number: int, role: str, rows: torch.Tensor) -> torch.Tensor:
        if self._moments is not None and role in INPUTS:
            second = (rows.T @ rows).double()
            self._moments[role] = self._moments[role] + second if role in self._moments else second
        return super()._product(number, role, rows)
