"""Live torch networks as bundles, and bundles of live networks as graphs that can be saved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from edgekit.bundle.format import ONNX, Bundle, assemble_graph
from edgekit.bundle.tensors import Arrays, TensorSpec
from edgekit.errors import EdgekitError
from edgekit.importers.factory import from_factory
from edgekit.nn import live
from edgekit.session import open_session

if TYPE_CHECKING:
    from torch import nn

TOLERANCE = 1e-3  # of the outputs' largest value: what torch and a runtime may differ by in float32


def from_network(
    network: nn.Module,
    *,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[str],
    factory: str | None = None,
    arguments: Mapping[str, Any] | None = None,
    golden: Arrays | None = None,
) -> Bundle:
    """Return a bundle of a torch network. factory: package.module:function that builds the same network elsewhere from
    `arguments`; without it, only this process can build the bundle's network."""
    name = factory or live.register(network)
    state = {key: value.detach().cpu().numpy() for key, value in network.state_dict().items()}
    bundle = from_factory(name, arguments=arguments or {}, weights=state, inputs=inputs, outputs=outputs, golden=golden)
    title = name if factory else type(network).__name__
    return replace(bundle, manifest=replace(bundle.manifest, name=title.rpartition(":")[2].lower()))


def portable(bundle: Bundle) -> Bundle:
    """Return the bundle as it can be opened elsewhere: its ONNX graph, with the codes that passes left, if its network
    exists in this process alone; else the bundle itself. Raises if the graph does not give the golden outputs."""
    manifest = bundle.manifest
    if not live.is_live(manifest.arguments.get("factory", "")):
        return bundle
    from edgekit.bundle.onnx_file import serialized
    from edgekit.graph.lower import lower

    inputs, expected = bundle.golden()
    graph = serialized(lower(bundle))
    changed = replace(manifest, family=ONNX, arguments={}, bits={})
    found = open_session(assemble_graph(changed, graph, (inputs, expected)), "onnxruntime", threads=1).run(inputs)
    for name, value in expected.items():
        gap = float(np.abs(found[name].astype(np.float64) - value).max(initial=0))
        if not gap <= TOLERANCE * max(1.0, float(np.abs(value).max(initial=0))):
            raise EdgekitError(
                f"{manifest.name}: output {name!r} of its ONNX graph differs from the network's by {gap:.2g}, so it "
                "cannot be saved as a graph; name factory='package.module:function' when you import it"
            )
    return assemble_graph(changed, graph, (inputs, found))
