"""A network that `edgekit search` found, on the central part of cutouts: what an alert is about is in the centre, and
fewer pixels cost less time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from edgekit.errors import EdgekitError
from edgekit.nn import hiera

IMAGES = 3  # science, template, difference
LARGEST_SIZE = 1024  # pixels along a side


class Central(nn.Module):
    """Cutouts (batch, 3, size, size) to logits (batch, classes), from the square part in the middle that the network
    takes."""

    def __init__(self, size: int, network: hiera.Hiera) -> None:
        super().__init__()
        self.network = network
        self.start = (size - network.config.image) // 2
        self.end = self.start + network.config.image

    def forward(self, cutouts: Tensor) -> Tensor:
        logits: Tensor = self.network(cutouts[:, :, self.start : self.end, self.start : self.end])
        return logits


def build(size: object = None, network: object = None, **others: object) -> Central:
    """Build a network with new random weights from the constructor arguments of a bundle. size: pixels along a side of
    the cutouts; network: the arguments of the searched network (`edgekit.nn.hiera.build`), whose `image` is the side of
    the central part."""
    if others:
        raise EdgekitError(f"central: unknown argument {min(others)[:40]!r}; allowed arguments: size, network")
    if type(size) is not int or not 1 <= size <= LARGEST_SIZE:
        raise EdgekitError(f"central: size = {repr(size)[:40]}; expected a whole number from 1 to {LARGEST_SIZE}")
    if not isinstance(network, Mapping):
        raise EdgekitError(f"central: network = {repr(network)[:40]}; expected the arguments of a hiera")
    given: dict[str, Any] = {str(name): value for name, value in network.items()}
    searched = hiera.build(**given)
    if searched.config.channels != IMAGES or searched.config.image > size:
        raise EdgekitError(
            f"central: the network takes {searched.config.channels} images with {searched.config.image} pixels along a "
            f"side; expected {IMAGES} images of at most size = {size} pixels"
        )
    return Central(size, searched)
