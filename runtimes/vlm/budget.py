"""An exact budget of visual tokens over a stock model of transformers: the tower is run and tokens are chosen here, and
the model gets their features by its public argument `mm_encoder_outputs`. Nothing in the model is replaced.

`with token_budget(model, 0.2): model.generate(...)` would need to replace the model's own methods while the block runs,
for all threads. So the budget is an object with the model's two calls instead.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from edgekit.errors import EdgekitError, unknown
from edgekit.passes.visual_tokens.base import Method
from edgekit.passes.visual_tokens.budget import Budget
from edgekit.passes.visual_tokens.geometry import NEWLINE, Geometry
from edgekit.passes.visual_tokens.methods import method as method_of
from runtimes.vlm.adapters import adapter

POSITIONS = ("compact", "original")
Positions = Literal["compact", "original"]


@dataclass(frozen=True, slots=True)
class Report:
    """What the last prompt kept. visual: (kept, all) visual tokens of each image, without line ends; length: tokens of
    the longest row."""

    visual: tuple[tuple[int, int], ...]
    length: int


def token_budget(
    model: Any, budget: float | int | Budget, method: str | Method = "edgekit", *, positions: Positions = "compact"
) -> Pruned:
    """Return the model with a budget of visual tokens for each image.

    budget: a share of all tokens of all views, such as 0.2, or a number of tokens; 1.0 calls the model as it is, to the
    same bits. method: `edgekit.passes.visual_tokens.methods` lists them. positions: "compact" numbers the tokens that
    are left without gaps, as HiRED does; "original" keeps the positions that they had. Raises EdgekitError for a model
    whose family is not supported.
    """
    if positions not in POSITIONS:
        raise unknown("positions", positions, POSITIONS, where="token_budget")
    return Pruned(model, Budget.of(budget), method_of(method), positions)


class Pruned:
    """A model under a budget. It is called and generates as the model, with what its processor returns."""

    def __init__(self, model: Any, budget: Budget, method: Method, positions: Positions) -> None:
        self.model, self.budget, self.method, self.positions = model, budget, method, positions
        self._adapter = adapter(model)
        self.report: Report | None = None

    def generate(self, **inputs: Any) -> Any:
        """Return what `model.generate` returns: a row begins with the shortened prompt."""
        return self.model.generate(**self.prepare(**inputs))

    def __call__(self, **inputs: Any) -> Any:
        return self.model(**self.prepare(**inputs))

    @torch.no_grad()
    def prepare(self, **inputs: Any) -> dict[str, Any]:
        """Return the model's arguments: shortened rows, their mask and positions, and the features of the tokens that
        are kept, in place of the images. Prompts without images, and a budget of 1.0, are returned as they are."""
        if self.budget.everything or inputs.get("pixel_values") is None:
            return inputs
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        features, kept, counts = [], [], []
        for geometry, views in self._adapter.images(inputs):
            tower, scores = self._adapter.tower(views.to(self.model.device, self.model.dtype))
            selection = self.method.select(tower, scores, geometry, self.budget)
            features.append(self._adapter.project(selection.features(tower)))
            kept.append(_kept_of(geometry, selection.indices))
            counts.append((len(selection.indices), len(geometry.candidates)))
        ids: Tensor = inputs["input_ids"]
        mask = inputs.get("attention_mask")
        rest = {name: value for name, value in inputs.items() if name not in ("pixel_values", "image_sizes")}
        rows = self._rows(ids, torch.ones_like(ids) if mask is None else mask, kept)
        self.report = Report(tuple(counts), rows["input_ids"].shape[1])
        encoded = BaseModelOutputWithPooling(pooler_output=features)  # type: ignore[arg-type] # a list for each image
        return {**rest, **rows, "mm_encoder_outputs": {"image": encoded}}

    def _rows(self, ids: Tensor, mask: Tensor, kept: list[Tensor]) -> dict[str, Tensor]:
        """Return the rows without the placeholders that are not kept, padded on the left to the same length."""
        is_image = ids == self.model.config.image_token_id
        wanted = sum(len(places) for places in kept)
        if int(is_image.sum()) != wanted:
            raise EdgekitError(
                f"the prompts have {int(is_image.sum())} placeholders of images, and the images {wanted} tokens; pass "
                "on what the processor returns"
            )
        keep = mask.bool().clone()
        keep[is_image] = torch.cat([places.to(ids.device) for places in kept])
        numbers = mask.long().cumsum(1) - 1  # the positions in the whole prompt
        length = int(keep.sum(1).max())
        config = self.model.config
        pad = getattr(config, "pad_token_id", None)
        pad = getattr(config.text_config, "pad_token_id", None) if pad is None else pad
        new = torch.full((len(ids), length), 0 if pad is None else pad, dtype=ids.dtype, device=ids.device)
        new_mask = torch.zeros((len(ids), length), dtype=mask.dtype, device=ids.device)
        places = torch.ones((len(ids), length), dtype=torch.long, device=ids.device)
        for row in range(len(ids)):
            count = int(keep[row].sum())
            new[row, length - count :] = ids[row, keep[row]]
            new_mask[row, length - count :] = 1
            places[row, length - count :] = numbers[row, keep[row]]
        found = {"input_ids": new, "attention_mask": new_mask}
        return found if self.positions == "compact" else {**found, "position_ids": places}


def _kept_of(geometry: Geometry, indices: Tensor) -> Tensor:
    """Return (sequence,) bool: which placeholders of an image stay. Line ends go."""
    kept = torch.zeros(len(geometry.sequence), dtype=torch.bool)
    places = geometry.order[indices.cpu()]
    kept[places] = True
    assert int(kept.sum()) == len(indices)
    assert not kept[geometry.sequence == NEWLINE].any()
    return kept
