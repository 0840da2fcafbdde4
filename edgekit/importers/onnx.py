"""Import ONNX files."""

from __future__ import annotations

import hashlib
import struct

import numpy as np

from edgekit import cache
from edgekit.bundle import zoo
from edgekit.bundle.bounded import arrays_from_npz
from edgekit.bundle.format import GRAPH, ONNX, Bundle, Manifest, assemble_graph
from edgekit.bundle.tensors import Arrays, arrays_to_bytes
from edgekit.errors import EdgekitError
from edgekit.importers import sandbox
from edgekit.importers.base import GOLDEN_ROWS, golden_rows, synthetic_rows
from edgekit.session import open_session

KEYS = ("in.", "out.")  # before the names of the arrays that the confined process returns


def from_onnx(content: bytes, name: str, source: str, *, golden: Arrays | None = None) -> Bundle:
    """Make a bundle around an ONNX graph. onnxruntime computes its golden outputs in a confined process, because a few
    bytes can describe a loop without end or a tensor that fills the memory. Without golden inputs, that process also
    chooses synthetic ones."""
    from edgekit.bundle.onnx_file import load, serialized
    from edgekit.graph.model import normalized, specs

    model = load(content, source)
    inputs, outputs = specs(model, source)
    graph = serialized(normalized(model))
    try:
        given = {} if golden is None else golden_rows(inputs, golden)
        found = _run_confined(graph, given, source)
    except EdgekitError as error:
        remedy = "" if golden else "; these inputs are made up, real ones may do: edgekit import --data FILE.npz"
        raise EdgekitError(f"{error}{remedy}") from None
    chosen, expected = ({name[len(key) :]: found[name] for name in found if name.startswith(key)} for key in KEYS)
    if missing := {spec.name for spec in outputs} - set(expected):
        raise EdgekitError(f"{source}: the graph gave no output {min(missing)!r}; export the model again")
    manifest = Manifest(name=name, family=ONNX, arguments={}, inputs=inputs, outputs=outputs, synthetic=golden is None)
    return assemble_graph(manifest, graph, (chosen, {spec.name: expected[spec.name] for spec in outputs}))


def try_out(bundle: Bundle) -> Bundle:
    """Return the bundle. If it holds a graph from a file, the graph has run once on its golden inputs in a confined
    process, because running it here could take all memory or never end. The cache remembers the graphs that have run;
    without a cache each call runs the graph. Models that come with edgekit are not tried."""
    if not bundle.is_graph or bundle.path is None or bundle.path.resolve() in zoo.folders().values():
        return bundle
    from edgekit.bundle.onnx_file import load

    source, graph = str(bundle.path), bundle.contents[GRAPH]
    try:
        mark = cache.folder("tried") / hashlib.sha256(graph).hexdigest()
        if cache.read(mark) is not None:
            return bundle
    except EdgekitError:
        mark = None
    load(graph, source)
    inputs, _ = bundle.golden()
    _run_confined(graph, {name: rows[:GOLDEN_ROWS] for name, rows in inputs.items()}, source)
    if mark is not None:
        cache.keep(mark, b"")
    return bundle


def _run_confined(graph: bytes, inputs: Arrays, source: str) -> Arrays:
    """Return inputs and outputs of a graph, which a confined process computes; without inputs, it chooses them."""
    framed = struct.pack("<Q", len(graph)) + graph + arrays_to_bytes(inputs)
    return arrays_from_npz(sandbox.run("edgekit.importers.onnx:golden_outputs", framed, source), source)


def golden_outputs(framed: bytes, source: str) -> bytes:
    """Run a graph on its golden inputs. Both come as bytes: the length of the graph, the graph, an .npz. If
    there are no inputs, choose synthetic ones."""
    from edgekit.bundle.onnx_file import load
    from edgekit.graph.model import specs
    from edgekit.graph.vocabulary import vocabularies

    (size,) = struct.unpack_from("<Q", framed)
    graph, given = framed[8 : 8 + size], arrays_from_npz(framed[8 + size :], source)
    model = load(graph, source)
    inputs, outputs = specs(model, source)
    manifest = Manifest(name="model", family=ONNX, arguments={}, inputs=inputs, outputs=outputs)
    bundle = assemble_graph(manifest, graph, (given, {spec.name: np.zeros(0, np.float32) for spec in outputs}))
    try:
        session = open_session(bundle, "onnxruntime", threads=1)
        chosen, found = (
            (given, session.run(given)) if given else synthetic_rows(inputs, vocabularies(model), session.run)
        )
        named = zip(KEYS, (chosen, found), strict=True)
        return arrays_to_bytes({f"{key}{name}": array for key, arrays in named for name, array in arrays.items()})
    except EdgekitError as error:
        raise EdgekitError(f"{source}: {error}") from None
