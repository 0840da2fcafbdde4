"""Import ONNX files."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from edgekit import cache
from edgekit.bundle import zoo
from edgekit.bundle.bounded import arrays_from_npz
from edgekit.bundle.format import GRAPH, ONNX, Bundle, Manifest, assemble_graph
from edgekit.bundle.signature import Call, Signature
from edgekit.bundle.tensors import Arrays, arrays_to_bytes
from edgekit.data.stream import zero_state
from edgekit.errors import EdgekitError
from edgekit.importers import sandbox
from edgekit.importers.base import GOLDEN_ROWS, carried, golden_rows, synthetic_rows
from edgekit.session import Session, open_session

if TYPE_CHECKING:
    from onnx import ModelProto

KEYS = ("in.", "out.")  # before the names of the arrays that the confined process returns
STATE, SIGNATURE = "state", "signature"  # names of its other arrays, which hold JSON as bytes
# of an output's largest value: what a simplified graph may differ by, because it rounds in another order, at least and
# at most
SAME, MOST = 1e-5, 1e-4
GRAPH_BYTES = "graph"  # the simplified graph


def from_onnx(
    content: bytes,
    name: str,
    source: str,
    *,
    golden: Arrays | None = None,
    state: Mapping[str, str] | None = None,
    fix: Mapping[str, float] | None = None,
) -> Bundle:
    """Make a bundle around an ONNX graph. onnxruntime computes its golden outputs in a confined process, because a few
    bytes can describe a loop without end or a tensor that fills the memory. That process also finds the batch of each
    tensor, and without golden inputs, it chooses synthetic ones. state: input -> output that a caller hands back as
    that input in the next call; a state that is not given is zero before the first call. fix: inputs and axes
    that are constants, by name."""
    from edgekit.bundle.onnx_file import load, serialized
    from edgekit.graph.fix import fixed
    from edgekit.graph.model import normalized
    from edgekit.graph.signature import described, marked

    model = normalized(fixed(load(content, source), fix or {}, source))
    known, made = {value.name for value in model.graph.input}, {value.name for value in model.graph.output}
    state = {name: output for name, output in (state or {}).items() if name in known and output in made}
    given = {name: array[:GOLDEN_ROWS] for name, array in (golden or {}).items() if name in known}
    try:
        found = _run_confined(serialized(model), given, source, state)
    except EdgekitError as error:
        remedy = "" if golden else "; these inputs are made up, real ones may do: edgekit import --data FILE.npz"
        raise EdgekitError(f"{error}{remedy}") from None
    signature = described(bytes(found[SIGNATURE]).decode(), source)
    chosen, expected = ({name[len(key) :]: found[name] for name in found if name.startswith(key)} for key in KEYS)
    if missing := set(signature.outputs) - set(expected):
        raise EdgekitError(f"{source}: the graph gave no output {min(missing)!r}; export the model again")
    manifest = Manifest(
        name=name,
        family=ONNX,
        arguments={},
        inputs=tuple(signature.inputs.values()),
        outputs=tuple(signature.outputs.values()),
        state=state,
        synthetic=golden is None,
        rows_per_call=signature.rows_per_call,
    )
    graph = serialized(marked(load(bytes(found[GRAPH_BYTES]), source), signature))
    return assemble_graph(manifest, graph, (chosen, {name: expected[name] for name in signature.outputs}))


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
    _run_confined(graph, {name: rows[:GOLDEN_ROWS] for name, rows in inputs.items()}, source, {})
    if mark is not None:
        cache.keep(mark, b"")
    return bundle


def _run_confined(graph: bytes, inputs: Arrays, source: str, state: dict[str, str]) -> Arrays:
    """Return inputs and outputs of a graph, and its signature, which a confined process computes; without inputs, it
    chooses them."""
    arrays = {f"{KEYS[0]}{name}": array for name, array in inputs.items()} | {STATE: _bytes(json.dumps(state))}
    framed = struct.pack("<Q", len(graph)) + graph + arrays_to_bytes(arrays)
    return arrays_from_npz(sandbox.run("edgekit.importers.onnx:golden_outputs", framed, source), source)


def golden_outputs(framed: bytes, source: str) -> bytes:
    """Run a graph on its golden inputs. Both come as bytes: the length of the graph, the graph, an .npz. If there are
    no inputs, choose synthetic ones. If the graph does not hold its signature, find it."""
    from edgekit.bundle.onnx_file import load
    from edgekit.graph.signature import KEY, of_model, proposals, to_json

    (size,) = struct.unpack_from("<Q", framed)
    graph, arrays = framed[8 : 8 + size], arrays_from_npz(framed[8 + size :], source)
    state = json.loads(bytes(arrays.pop(STATE)))
    given = {name[len(KEYS[0]) :]: array for name, array in arrays.items()}
    model = load(graph, source)
    held = any(item.key == KEY for item in model.metadata_props)
    problem: EdgekitError | None = None
    for proposal in [of_model(model, source)] if held else proposals(model, source, state):
        try:
            rows = (given, _session(graph, proposal).run(given)) if held else None
            signature, chosen, found = (proposal, *rows) if rows else golden_of(model, graph, proposal, given, state)
        except EdgekitError as error:
            problem = problem or error
            continue
        named = zip(KEYS, (chosen, found), strict=True)
        packed = {f"{key}{name}": array for key, arrays in named for name, array in arrays.items()}
        packed[SIGNATURE] = _bytes(to_json(signature))
        if not held:
            packed[GRAPH_BYTES] = _array(_simpler(model, graph, signature, chosen, found))
        return arrays_to_bytes(packed)
    raise EdgekitError(f"{source}: {problem}")


def _simpler(model: ModelProto, graph: bytes, signature: Signature, inputs: Arrays, outputs: Arrays) -> bytes:
    """Return the simplified graph if it gives the same golden outputs up to rounding, or one whose arithmetic is not
    changed at all, or else the graph as it is. Rounding is what a unit in the last place of the inputs moves."""
    from edgekit.bundle.onnx_file import serialized
    from edgekit.graph.simplify import simplified

    try:
        moved = {
            name: array if array.dtype.kind != "f" else np.nextafter(array, array.dtype.type(np.inf))
            for name, array in inputs.items()
        }
        rounding = _apart(outputs, _session(graph, signature).run(moved))
        for fold in (True, False):
            simpler = serialized(simplified(model, fold=fold))
            if _apart(outputs, _session(simpler, signature).run(inputs)) <= max(SAME, min(rounding, MOST)):
                return simpler
    except Exception:  # a stranger's graph may break any rule; the graph as it is has run
        return graph
    return graph


def _apart(outputs: Arrays, found: Arrays) -> float:
    """Return the largest difference relative to an output's largest value; infinite for other shapes, NaN for NaN."""
    worst = [0.0]
    for name, value in outputs.items():
        one, other = value.astype(np.float64), found[name].astype(np.float64)
        scale = float(np.abs(one).max(initial=0)) or 1.0
        worst.append(float(np.abs(one - other).max(initial=0)) / scale if one.shape == other.shape else np.inf)
    return float(np.max(worst))


def golden_of(
    model: ModelProto, graph: bytes, proposal: Signature, given: Arrays, state: Mapping[str, str]
) -> tuple[Signature, Arrays, Arrays]:
    """Return the signature with the axes of outputs, golden inputs and golden outputs. Raises EdgekitError if the graph
    does not run with the proposal."""
    from edgekit.graph.signature import settled, with_state
    from edgekit.graph.vocabulary import compared, vocabularies

    specs, session = tuple(proposal.inputs.values()), _session(graph, proposal)
    simple = proposal.plain and not state
    call = None if simple else _call(graph)
    run = session.run if call is None else _once(proposal, call)
    if given:
        chosen = golden_rows(specs, {**zero_state(specs, given, state), **given})
        found = run(chosen)
    else:
        chosen, found = synthetic_rows(specs, vocabularies(model), run, state, compared(model))
    if call is None:
        return proposal, chosen, found
    signature = with_state(settled(proposal, call, chosen), state, _shapes(proposal, chosen, found))
    session = _session(graph, signature)
    if not set(state) & set(given) and _returns(signature, state):
        chosen = carried(session.run, chosen, state)
    return signature, chosen, session.run(chosen)


def _returns(signature: Signature, state: Mapping[str, str]) -> bool:
    """Return whether each output of the state fits its input."""
    pairs = [(signature.inputs[name], signature.outputs[output]) for name, output in state.items()]
    return all((one.shape, one.dtype) == (other.shape, other.dtype) for one, other in pairs)


def _once(signature: Signature, call: Call) -> Callable[[Arrays], Arrays]:
    """Return run(rows), which gives the outputs of one call as the graph's own tensors, whose batch is not known."""
    names = list(signature.outputs)

    def run(rows: Arrays) -> Arrays:
        first = {name: array[: signature.rows_per_call] for name, array in rows.items()}
        return dict(zip(names, call(names, signature.own(first)), strict=True))

    return run


def _shapes(signature: Signature, inputs: Arrays, outputs: Arrays) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the graph's own tensors in that call."""
    own = signature.own({name: array[: signature.rows_per_call] for name, array in inputs.items()})
    return {name: array.shape for name, array in (own | outputs).items()}


def _session(graph: bytes, signature: Signature) -> Session:
    inputs, outputs = tuple(signature.inputs.values()), tuple(signature.outputs.values())
    manifest = Manifest("model", ONNX, {}, inputs, outputs, rows_per_call=signature.rows_per_call)
    empty: Arrays = {name: np.zeros(0, np.float32) for name in signature.outputs}
    return open_session(assemble_graph(manifest, graph, ({}, empty)), "onnxruntime", threads=1)


def _call(graph: bytes) -> Call:
    """Return run(names, tensors), which runs the graph as it is and raises EdgekitError."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])

    def call(names: Sequence[str], arrays: Mapping[str, npt.NDArray[Any]]) -> Sequence[npt.NDArray[Any]]:
        try:
            found: Sequence[npt.NDArray[Any]] = session.run(list(names), dict(arrays))
            return found
        except Exception as error:  # the exceptions of onnxruntime share no base class
            raise EdgekitError(next(iter(str(error).splitlines()), type(error).__name__)) from error

    return call


def _bytes(text: str) -> npt.NDArray[np.uint8]:
    return _array(text.encode())


def _array(content: bytes) -> npt.NDArray[np.uint8]:
    return np.array(bytearray(content), np.uint8)
