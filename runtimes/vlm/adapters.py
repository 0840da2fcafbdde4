"""What differs between the families of vision-language models: which views an image has, and where their tokens lie in
the prompt."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from edgekit.errors import EdgekitError, unknown
from edgekit.passes.visual_tokens.geometry import Geometry, anyres, single
from runtimes.vlm.clip_tower import ClipTower


class Llava:
    """LLaVA-1.5 (Liu et al. 2023, arXiv 2310.03744): one view of each image."""

    def __init__(self, model: Any) -> None:
        self.config, self.base = model.config, model.model
        vision = self.config.vision_config
        if vision.model_type != "clip_vision_model" or self.config.vision_feature_select_strategy != "default":
            raise EdgekitError(
                f"a tower of type {vision.model_type!r} with the strategy "
                f"{self.config.vision_feature_select_strategy!r}; a token budget needs a CLIP tower whose CLS token is "
                "left out ('default')"
            )
        layer = self.config.vision_feature_layer
        if not isinstance(layer, int):
            raise EdgekitError(f"vision_feature_layer = {layer}; a token budget needs the output of one layer")
        self.tower = ClipTower(self.base.vision_tower, layer)
        self.side, self.patch = vision.image_size, vision.patch_size

    @property
    def tokens(self) -> int:
        """Tokens along a side of a view."""
        return int(self.side // self.patch)

    def images(self, inputs: Mapping[str, Any]) -> list[tuple[Geometry, Tensor]]:
        """Return the geometry of each image, and its views, (views, 3, side, side)."""
        pixels: Tensor = inputs["pixel_values"]
        return [(single(self.tokens, self.tokens), view[None]) for view in pixels]

    def project(self, features: Tensor) -> Tensor:
        """Return (tokens, width of the language model) of (tokens, width of the tower)."""
        found: Tensor = self.base.multi_modal_projector(features)
        return found


class LlavaNext(Llava):
    """LLaVA-NeXT (Liu et al. 2024): the image in tiles, and as a whole."""

    def images(self, inputs: Mapping[str, Any]) -> list[tuple[Geometry, Tensor]]:
        pixels: Tensor = inputs["pixel_values"]
        sizes = inputs.get("image_sizes")
        if sizes is None or len(sizes) != len(pixels):
            raise EdgekitError("image_sizes are missing, or not as many as images; pass on what the processor returns")
        canvases = tuple((int(height), int(width)) for height, width in self.config.image_grid_pinpoints)
        found = []
        for views, (height, width) in zip(pixels, torch.as_tensor(sizes).tolist(), strict=True):
            geometry = anyres((int(height), int(width)), canvases, self.side, self.tokens)
            if len(views) < geometry.views:
                raise EdgekitError(
                    f"an image of {height}x{width} pixels has {geometry.views} views, and pixel_values holds "
                    f"{len(views)}"
                )
            found.append((geometry, views[: geometry.views]))
        return found


ADAPTERS: Mapping[str, Callable[[Any], Llava]] = {"llava": Llava, "llava_next": LlavaNext}


def adapter(model: Any) -> Llava:
    """Return the adapter of a model of transformers. Raises EdgekitError if its family is not supported."""
    family = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    if family not in ADAPTERS:
        raise unknown("family of vision-language models", str(family), ADAPTERS, where="token_budget")
    return ADAPTERS[family](model)
