"""Run a CLIP tower of transformers up to the layer whose output the language model reads, and keep what the CLS token
attends to in each layer.

Attention kernels give no weights back, so the CLS token's row is computed beside them: its query against all keys, in
time proportional to the tokens. The blocks behind the features' layer, which nothing reads, do not run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from edgekit.errors import EdgekitError
from edgekit.passes.visual_tokens.base import Scores

if TYPE_CHECKING:
    from torch import nn


class ClipTower:
    """layer: the index of the hidden state that the model reads, as `vision_feature_layer` in transformers."""

    def __init__(self, tower: Any, layer: int) -> None:
        self._tower = tower
        self._blocks: list[nn.Module] = list(tower.encoder.layers)
        number = layer if layer >= 0 else len(self._blocks) + 1 + layer
        if not 1 <= number <= len(self._blocks):
            raise EdgekitError(
                f"vision_feature_layer = {layer} of a tower with {len(self._blocks)} blocks; expected the output of "
                "one of them"
            )
        self._run = number

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> tuple[Tensor, Scores]:
        """Return the features of all views without the CLS token, (views, tokens, width), and their scores. pixels:
        (views, 3, side, side)."""
        hidden = self._tower.pre_layrnorm(self._tower.embeddings(pixels))
        rows, keys = [], torch.empty(0)
        heads = self._tower.config.num_attention_heads
        for block in self._blocks[: self._run]:
            row, keys = _cls_row(block, hidden, heads)
            rows.append(row)
            hidden = block(hidden, None)
        attention = torch.stack(rows)
        return hidden[:, 1:], Scores(attention, heads, self._run - 1, keys)


def _cls_row(block: Any, hidden: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """Return (views, tokens) the attention of the CLS token, summed over the heads, and (views, tokens, heads, width)
    the keys."""
    normed = block.layer_norm1(hidden)
    views, tokens, width = normed.shape
    query = block.self_attn.q_proj(normed[:, :1]).view(views, 1, heads, width // heads).transpose(1, 2)
    keys = block.self_attn.k_proj(normed).view(views, tokens, heads, width // heads)
    weights = (
        (query @ keys.permute(0, 2, 3, 1) * block.self_attn.scale).float().softmax(-1)
    )  # (views, heads, 1, tokens)
    return weights[:, :, 0, 1:].sum(1), keys[:, 1:]
