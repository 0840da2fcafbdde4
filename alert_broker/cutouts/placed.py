"""Stem and convolutional blocks of a network that `edgekit search` found, with a head that knows where it looks.

A searched classifier takes the mean of its last features over all positions. The source of an alert is in the centre
of its cutouts, so here each position has weights of its own, as in braai (Duev et al. 2019, arXiv 1907.11259, section
3). One convolution over the whole side computes that, in place of a mean, a normalization and a product.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from edgekit.errors import EdgekitError
from edgekit.nn import hiera

MOST_NUMBERS = 1 << 24  # of the head's weights


class Placed(nn.Module):
    """Cutouts (batch, channels, side, side) to logits (batch, classes)."""

    def __init__(self, network: hiera.Hiera) -> None:
        super().__init__()
        config = network.config
        self.stem, self.convolutions = network.stem, network.convolutions
        self.head = nn.Conv2d(config.widths[-1], config.classes, config.sides[-1])

    def forward(self, cutouts: Tensor) -> Tensor:
        logits: Tensor = self.head(self.convolutions(self.stem(cutouts)))
        return logits.flatten(1)


def build(fused: object = False, network: object = None, **others: object) -> Placed:
    """Build a network with new random weights from the constructor arguments of a bundle. network: the arguments of the
    searched network (`edgekit.nn.hiera.build`), whose stages are all convolutional. fused: with one convolution in
    place of each normalized one."""
    if others:
        raise EdgekitError(f"placed: unknown argument {min(others)[:40]!r}; allowed arguments: network, fused")
    if type(fused) is not bool:
        raise EdgekitError(f"placed: fused = {repr(fused)[:40]}; expected true or false")
    if not isinstance(network, Mapping) or "fused" in network:
        raise EdgekitError(f"placed: network = {repr(network)[:60]}; expected the arguments of a searched network")
    given: dict[str, Any] = {str(name): value for name, value in network.items()}
    searched = hiera.build(**given)
    config = searched.config
    if config.first_attention < len(config.kinds):
        raise EdgekitError(f"placed: kinds = {config.kinds}; expected convolutional stages alone")
    if (numbers := config.widths[-1] * config.classes * config.sides[-1] ** 2) > MOST_NUMBERS:
        raise EdgekitError(f"placed: a head of {numbers:,} weights; edgekit builds up to {MOST_NUMBERS:,}")
    return Placed(hiera.fuse(searched) if fused else searched)
