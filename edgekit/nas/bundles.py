"""A network of a space as a bundle: it is compressed, exported and run as any other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy.typing as npt
import torch

from edgekit.bundle.format import PROBABILITIES, Bundle, Manifest, assemble
from edgekit.bundle.synthetic import candidates
from edgekit.bundle.tensors import Arrays, TensorSpec
from edgekit.importers.base import GOLDEN_ROWS
from edgekit.nas.space import Space, key_of
from edgekit.nn import hiera
from edgekit.nn.hiera_config import HieraConfig, arguments


def manifest_of(what: Space | HieraConfig) -> Manifest:
    """Return the manifest of a network; for a space, what all its networks take."""
    image = TensorSpec("image", ("batch", what.channels, what.image, what.image))
    network = what if isinstance(what, HieraConfig) else None
    return Manifest(
        name=f"search-{key_of(network)}" if network else "the space",
        family="hiera",
        arguments={**arguments(network), "fused": True} if network else {},
        inputs=(image,),
        outputs=(TensorSpec(PROBABILITIES, ("batch", what.classes)),),
    )


def bundle_of(
    config: HieraConfig, weights: Mapping[str, npt.NDArray[Any]] | None = None, rows: Arrays | None = None
) -> Bundle:
    """Return a network as a bundle. weights: of the fused network, or None for new ones; rows: inputs for its reference
    outputs, or None for synthetic ones."""
    torch.manual_seed(0)
    model = hiera.build(fused=True, **arguments(config)).eval()
    if weights is not None:
        model.load_state_dict({name: torch.from_numpy(value) for name, value in weights.items()})
    manifest = replace(manifest_of(config), synthetic=rows is None)
    inputs = rows or next(iter(candidates(manifest.inputs, GOLDEN_ROWS, {})))
    with torch.no_grad():
        found = torch.softmax(model(torch.from_numpy(inputs["image"])), dim=-1).numpy()
    stored = {name: value.numpy() for name, value in model.state_dict().items()}
    return assemble(manifest, stored, {}, (dict(inputs), {PROBABILITIES: found}))
