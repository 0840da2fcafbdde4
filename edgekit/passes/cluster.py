"""Share weights: fit k-means codebooks of 2**bits values per matrix, then train the codebooks (Han et al. 2016, "Deep
compression", arXiv 1510.00149, section 3). Weights that are zero stay zero."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from edgekit.bundle.encoding import Encoding, Float, Palette
from edgekit.passes.base import (
    Candidate,
    Change,
    Context,
    Pass,
    at_least,
    decoded,
    frozen,
    matrices,
    owner,
    recover,
    register,
    unregister,
)

ITERATIONS = 50  # of Lloyd's algorithm; 300 bring no further gain


@dataclass(frozen=True, slots=True)
class Cluster(Pass[Candidate]):
    """`bits`: the width of an index into a matrix's codebook."""

    name: ClassVar[str] = "cluster"
    summary: ClassVar[str] = "let weights share a few values per matrix, then train those values"
    epochs_parameter: ClassVar[str] = "epochs"

    bits: int
    epochs: int = 4
    learning_rate: float = 1e-3
    include: tuple[str, ...] = ("*",)

    def __post_init__(self) -> None:
        at_least("bits", self.bits, 1, 8)
        at_least("epochs", self.epochs, 0, 10_000)
        at_least("learning_rate", self.learning_rate, 1e-7, 1.0)

    def plan(self, candidate: Candidate) -> list[Change]:
        state = candidate.model.state_dict()
        return [
            Change(
                name,
                f"{state[name].numel()} x 32 bit",
                f"{state[name].numel()} x {self.bits} bit + {2**self.bits} values",
            )
            for name in matrices(candidate.model, self.include)
        ]

    def apply(self, candidate: Candidate, context: Context) -> Candidate:
        model = candidate.copy_model()
        names = matrices(model, self.include)
        codes = {}
        for name in names:
            module, attribute = owner(model, name)
            codes[name], palette = kmeans(getattr(module, attribute).detach().numpy(), 2**self.bits)
            lookup = Lookup(torch.from_numpy(codes[name].astype(np.int64)), torch.from_numpy(palette))
            register(model, name, lookup)
        encodings: dict[str, Encoding] = {name: e for name, e in candidate.encodings.items() if name not in names}
        frozen(model, encodings)
        model = recover(model, context, self.epochs, self.learning_rate, self.name)
        for name in names:
            module, attribute = owner(model, name)
            lookup = module.parametrizations[attribute][0]  # type: ignore[index, assignment]
            trained = unregister(model, name) * lookup.nonzero_mask
            encodings[name] = Palette(self.bits, codes[name], trained.numpy().astype(np.float32))
        decoded(encodings, model)
        return Candidate(candidate.family, candidate.arguments, model, encodings)


def kmeans(weight: Float, clusters: int) -> tuple[npt.NDArray[np.uint8], Float]:
    """Return codes of the weight's shape and a sorted codebook; exact zeros have their own cluster. Lloyd's algorithm
    starts from centres whose density is the cube root of the values' density (Panter & Dite 1951). At 16 clusters this
    ends within a tenth of the optimum; centres at quantiles, which have the values' own density, end at up to twice the
    error."""
    values = weight.astype(np.float64).ravel()
    ordered = np.sort(values[values != 0])
    zeros = len(ordered) < len(values)
    free = clusters - zeros
    centres = np.unique(ordered)
    if len(centres) > free:
        spread = np.concatenate([[0.0], np.cumsum(np.diff(ordered) ** (2 / 3))])  # a gap is 1 / density
        centres = np.unique(np.interp((np.arange(free) + 0.5) / free * spread[-1], spread, ordered))
    sums = np.concatenate([[0.0], np.cumsum(ordered)])
    for _ in range(ITERATIONS):
        # In one dimension a cluster is an interval of the sorted values, between the midpoints of neighbouring centres.
        edges = np.concatenate([[0], np.searchsorted(ordered, (centres[1:] + centres[:-1]) / 2), [len(ordered)]])
        counts = np.diff(edges)
        moved = np.where(counts > 0, np.diff(sums[edges]) / np.maximum(counts, 1), centres)
        if np.array_equal(moved, centres):
            break
        centres = np.sort(moved)
    palette = np.sort(np.concatenate([centres, [0.0]])) if zeros else centres
    midpoints = (palette[1:] + palette[:-1]) / 2
    codes = np.searchsorted(midpoints, values)
    if zeros:
        zero = int(np.searchsorted(palette, 0.0))
        codes[values == 0] = zero
        # only exact zeros are pruned: a small weight in the zero cluster moves to the nearer neighbouring cluster
        stray = (codes == zero) & (values != 0)
        if len(palette) > 1:
            below, above = max(zero - 1, 0), min(zero + 1, len(palette) - 1)
            below, above = (above if zero == 0 else below), (below if zero == len(palette) - 1 else above)
            nearer = np.abs(values[stray] - palette[below]) <= np.abs(values[stray] - palette[above])
            codes[stray] = np.where(nearer, below, above)
    return codes.reshape(weight.shape).astype(np.uint8), palette.astype(np.float32)


class Lookup(nn.Module):
    """Weight = palette[codes], trained through the palette: a shared value's gradient is the sum over its weights. A
    palette entry of exactly zero stands for pruned weights and does not change."""

    codes: Tensor
    nonzero_mask: Tensor
    start: Tensor

    def __init__(self, codes: Tensor, palette: Tensor) -> None:
        super().__init__()
        self.register_buffer("codes", codes)
        self.register_buffer("nonzero_mask", (palette != 0).to(palette.dtype))
        self.register_buffer("start", palette)

    def forward(self, palette: Tensor) -> Tensor:
        return (palette * self.nonzero_mask)[self.codes]

    def right_inverse(self, weight: Tensor) -> Tensor:
        return self.start.clone()
