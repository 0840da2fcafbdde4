"""Import ONNX files."""

from __future__ import annotations

import numpy as np

from edgekit.bundle.format import ONNX, Bundle, Manifest, assemble_graph, replace_golden
from edgekit.bundle.tensors import Arrays
from edgekit.errors import EdgekitError
from edgekit.importers.base import golden_rows
from edgekit.session import open_session


def from_onnx(content: bytes, name: str, source: str, *, golden: Arrays | None = None) -> Bundle:
    """Make a bundle around an ONNX graph; onnxruntime computes its golden outputs from the golden inputs."""
    from edgekit.bundle.onnx_file import load, serialized
    from edgekit.graph.model import normalized, specs

    model = load(content, source)
    inputs, outputs = specs(model, source)
    given = golden_rows(inputs, golden)
    manifest = Manifest(name=name, family=ONNX, arguments={}, inputs=inputs, outputs=outputs)
    empty = {spec.name: np.zeros(0, np.float32) for spec in outputs}
    bundle = assemble_graph(manifest, serialized(normalized(model)), (given, empty))
    try:
        found = open_session(bundle, "onnxruntime", threads=1).run(given)
    except EdgekitError as error:
        remedy = "" if golden else "; these inputs are made up, real ones may do: edgekit import --data FILE.npz"
        raise EdgekitError(f"{source}: {error}{remedy}") from None
    return replace_golden(bundle, (given, found))
