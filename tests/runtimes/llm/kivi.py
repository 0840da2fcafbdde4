"""A reference in torch for the cache in 4 bits, by the formulas of KIVI (Liu et al., arXiv 2402.02750, section 3.3)."""

import torch

from runtimes.llm.torch_engine import TorchEngine

GROUP = 64


def rounded(values: torch.Tensor, axis: int) -> torch.Tensor:
    """Values in 4 bits, with a scale and a minimum (float16) along the axis."""
    values = values.half().double()
    least, most = values.amin(axis, keepdim=True), values.amax(axis, keepdim=True)
    scale, least = ((most - least) / 15).half().double(), least.half().double()
    codes = ((values - least) / scale.clamp_min(1e-20)).round().clamp(0, 15)
    return codes * scale + least


class KiviEngine(TorchEngine):
    """Each token sees the full blocks before its own in 4 bits, and its own block in float16. The cache of the torch
    engine itself is exact."""

    def _attend(self, queries, keys, values, index, window=0):
        found = []
        for row, at in zip(queries, index.tolist(), strict=True):
            start = at // GROUP * GROUP
            seen = []
            for exact, axis in ((keys, 0), (values, -1)):  # a dimension's keys share a scale, and a token's values
                parts = [rounded(exact[first : first + GROUP], axis) for first in range(0, start, GROUP)]
                seen.append(torch.cat([*parts, exact[start : at + 1].half().double()]))
            found.append(super()._attend(row[None], *seen, torch.tensor([at]), window))
        return torch.cat(found)
