"""A bundle's network with the outputs that its manifest names."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from edgekit.bundle.format import PROBABILITIES, Bundle
from edgekit.errors import EdgekitError


class Network(nn.Module):
    """A bundle's network, or one derived from it, that returns the outputs in the order of the manifest."""

    def __init__(self, bundle: Bundle, network: nn.Module | None = None) -> None:
        super().__init__()
        self.network = bundle.model() if network is None else network
        self.softmaxed = [spec.name == PROBABILITIES for spec in bundle.manifest.outputs]

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        raw = self.network(*inputs)
        outputs = raw if isinstance(raw, tuple) else (raw,)
        if len(outputs) != len(self.softmaxed):
            raise EdgekitError(
                f"the network gives {len(outputs)} outputs, its manifest names {len(self.softmaxed)}; "
                "correct the manifest's outputs and write the bundle again"
            )
        return tuple(
            torch.softmax(output, dim=-1) if softmaxed else output
            for output, softmaxed in zip(outputs, self.softmaxed, strict=True)
        )
