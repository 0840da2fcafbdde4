"""Compare an export with its source network in the model's own unit: difference of probability, rows that change class.

The reference is the network in float64. Float32 cannot always reach 1e-5: where attention scores reach thousands,
PyTorch's own float32 differs from float64 by up to 1e-4. So an export may differ by the tolerance, or by twice the
difference between the source network's own float32 and float64 on the same inputs, whichever is larger.

A bundle that holds a graph is its own reference, in the same batches of the same rows: an unchanged copy differs by 0.
Dynamic quantization takes its scale from the whole batch, so a row's outputs depend on the other rows of its batch. A
runtime that rounds differently moves single activations to the next code; other batches move nearly all of them. So the
export may differ by the tolerance, or by as much as batches move the graph's own outputs, whichever is larger. In 96
exports of dynamic int8 graphs the difference was at most 0.3 of that. Two runs in different batches may differ by twice
as much, because both differ from the row that runs alone.

The largest batch is 1,000 rows, or fewer if their activations would take more than BUDGET bytes or their arithmetic
more than WORK operations: `batches_of` counts both from the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
import torch
from onnx import ModelProto

from edgekit.bundle.format import GRAPH, PROBABILITIES, Bundle
from edgekit.bundle.tensors import Arrays, TensorSpec, golden_inputs, multiple
from edgekit.cost.layers import lengths_of
from edgekit.cost.memory import peak
from edgekit.cost.operators import work
from edgekit.errors import EdgekitError
from edgekit.graph.network import Network
from edgekit.graph.shapes import sized

Array = npt.NDArray[Any]
TOLERANCE = 1e-5  # of a probability, or relative to the largest value of any other output
CEILING = 1e-3  # a network whose float32 differs from its float64 by more than this is not worth exporting in float32
BATCHES = (1, 16, 1000)  # one alert, a few, a backlog: some runtimes are right at one batch size and wrong at another
CALLS = 16  # the largest number of calls at one batch size
# rows, by the largest batch; primes, so that equal rows have different indices in their batches at every batch size
DISTINCT = (251, 61, 17)
BUDGET = 2e9  # bytes that the activations of one call may take, by the count of edgekit.cost
WORK = 1e12  # operations of one call: some ten seconds of one core
LEAST_BATCH = 2  # the largest batch is at least this, so that batches are compared at all
ROUNDING = 1e-4  # the most that rounding of inputs may widen the tolerance of a graph
ROUNDED_ROWS = 16
STEPS = 8  # calls of a model with a state, each with the state of the one before
LENGTHS = (1, 5)  # of a free axis, in its multiples; a tracer saw another length and may have made it a constant
SLICE = 16  # rows of the reference that run at a time: attention scores in float64 are large


@dataclass(frozen=True, slots=True)
class Check:
    """The comparison of one file at one batch size. Differences are in probability, or relative for other outputs."""

    file: str
    bytes: int
    batch: int
    rows: int
    difference: float  # the largest difference from the network in float64, or from the graph in the same batches
    spread: float  # the largest difference of the same row between two batch sizes
    golden: float  # the largest difference from the bundle's golden outputs
    changed: int  # rows whose class differs from the network's, without near ties
    allowed: float  # for `difference`
    between_batches: float  # what is allowed for `spread` and `golden`, which compare rows of different batches
    lengths: Mapping[str, int] = field(default_factory=dict)  # of free axes, if they differ from the golden data's


@dataclass(frozen=True, slots=True)
class Reference:
    """Inputs, and the outputs that an export must give for them."""

    inputs: Arrays
    exact: Arrays  # the network's outputs in float64, or the graph's outputs for each row alone
    golden: Arrays  # expected outputs of the first rows, as the bundle stores them
    noise: float  # the largest difference between the network's own float32 and float64, or between a graph's batches
    batches: Mapping[int, Arrays] = field(default_factory=dict)  # a graph's outputs by batch size

    def outputs(self, name: str, batch: int, rows: int) -> Array:
        """Return the expected output for this many rows that run in batches of this size."""
        return repeated(self.exact[name], rows) if not self.batches else self.batches[batch][name]


def batches_of(model: ModelProto, bundle: Bundle) -> tuple[int, ...]:
    """Return the batch sizes at which a graph is verified: those of BATCHES that its memory and arithmetic per row
    allow, and the largest that they allow."""
    if rows := bundle.manifest.rows_per_call:
        return (rows, CALLS * rows)
    inputs, _ = bundle.golden()
    workload = work(model, sized(model, 1, lengths_of(model, inputs)))
    row = max(peak(workload)[0], 1.0)
    operations = max(sum(item.operations for item in workload.operators), 1.0)
    largest = int(max(LEAST_BATCH, min(max(BATCHES), BUDGET // row, WORK // operations)))
    return (*(batch for batch in BATCHES if batch < largest), largest)


def reference(bundle: Bundle, batches: Sequence[int] = BATCHES) -> Reference:
    """Run the golden rows, and copies of them with noise, through the network in float32 and in float64, or through the
    graph in batches of these sizes."""
    stored, golden = ({name: rows[: _distinct(batches)] for name, rows in arrays.items()} for arrays in bundle.golden())
    if not all(len(rows) for rows in (*stored.values(), *golden.values())):
        raise EdgekitError(
            f"{bundle.manifest.name}: its golden data has no rows to verify with; write the bundle again"
        )
    inputs = {spec.name: _varied(spec, stored[spec.name], _distinct(batches)) for spec in bundle.manifest.inputs}
    names = [spec.name for spec in bundle.manifest.outputs]
    if bundle.is_graph:
        return _graph_reference(bundle, inputs, golden, batches)
    network = Network(bundle).eval()
    single = _outputs(network, inputs, names)
    exact = _outputs(network.double(), inputs, names)
    noise = max(float(differences(name, single[name], exact[name]).max()) for name in names)
    if not noise <= CEILING:  # also true for NaN
        raise EdgekitError(
            f"{bundle.manifest.name}: float32 moves this network's own outputs by {noise:.1e} on its golden inputs, "
            f"more than {CEILING:.0e}; rescale its inputs or weights before exporting it"
        )
    return Reference(inputs, exact, golden, noise)


def _graph_reference(bundle: Bundle, inputs: Arrays, golden: Arrays, batches: Sequence[int]) -> Reference:
    """Run a graph bundle row by row, and in batches of every size that is verified. `noise` is the largest difference
    between a row that runs alone and the same row in one of these batches, or between inputs that differ by rounding,
    up to ROUNDING: another runtime adds in another order, which moves outputs by at least as much."""
    session, specs = bundle.manifest.signature.wrapped(on_onnxruntime(bundle.contents[GRAPH])), bundle.manifest.outputs
    alone = _run(session, inputs, 1, _distinct(batches), specs)
    together = {batch: _run(session, inputs, batch, _rows(batch, batches), specs) for batch in batches}
    noise = 0.0
    for outputs in together.values():
        for name, output in outputs.items():
            noise = _largest(noise, differences(name, output, repeated(alone[name], len(output))))
    moved = {name: _rounded(array) for name, array in inputs.items()}
    rounded = _run(session, moved, 1, min(_distinct(batches), ROUNDED_ROWS), specs)
    rounding = max(
        float(np.max(differences(name, rounded[name], alone[name][: len(rounded[name])]), initial=0.0))
        for name in rounded
    )
    noise = max(noise, min(rounding, ROUNDING))
    return Reference(inputs, alone, golden, noise, together)


def _rounded(array: Array) -> Array:
    """Return the numbers, each a unit in the last place larger."""
    return np.nextafter(array, np.asarray(np.inf, array.dtype)) if array.dtype.kind == "f" else array


def _distinct(batches: Sequence[int]) -> int:
    """Return the number of distinct rows: a prime, and about as many as the largest batch has, up to DISTINCT[0]."""
    return next((count for count in DISTINCT if count <= max(batches)), DISTINCT[-1])


def _rows(batch: int, batches: Sequence[int]) -> int:
    """Return how many rows run at this batch size: as many as the largest batch has, in at most CALLS calls."""
    return min(max(batches), batch * CALLS)


def on_onnxruntime(content: bytes, external_data: Mapping[str, bytes] | None = None) -> Any:
    """Open an ONNX file in ONNX Runtime on the CPU. `external_data`: the files that hold its weights, by name."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # it warns of stored tensors without consumers
    if external_data:
        sizes = [len(weights) for weights in external_data.values()]
        options.add_external_initializers_from_files_in_memory(list(external_data), list(external_data.values()), sizes)
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def verify(
    files: Mapping[str, bytes],
    bundle: Bundle,
    *,
    tolerance: float = TOLERANCE,
    batches: Sequence[int] | None = None,
    graph: ModelProto | None = None,
    load: Callable[[bytes], Any] = on_onnxruntime,
    advice: str = "try another --opset",
) -> list[Check]:
    """Run each file at each batch size, and raise at the first difference beyond the tolerance.

    batches: by default those of `batches_of` for the graph, or BATCHES without one. `load` returns an object with ONNX
    Runtime's method run(names, inputs); the default opens the file as ONNX. `advice` is the next step that an error
    message recommends.
    """
    batches = batches or (BATCHES if graph is None else batches_of(graph, bundle))
    if not bundle.is_graph and _other_lengths(bundle.manifest.inputs):
        advice += "; if the tracer stored a length as a constant, take lengths from tensors' shapes"
    expected = reference(bundle, batches)
    allowed = max(tolerance, expected.noise if bundle.is_graph else 2 * expected.noise)
    checks = []
    for file, content in files.items():
        session = bundle.manifest.signature.wrapped(load(content))
        whole = _run(session, expected.inputs, max(batches), max(batches), bundle.manifest.outputs)
        for batch in batches:
            rows = _rows(batch, batches)
            outputs = (
                whole if batch == max(batches) else _run(session, expected.inputs, batch, rows, bundle.manifest.outputs)
            )
            check = compare(file, content, batch, rows, outputs, whole, expected, allowed)
            _judge(check, bundle.manifest.name, advice)
            checks.append(check)
        if bundle.manifest.state:
            _judge_steps(file, session, bundle, expected, checks[-1], advice)
    if not bundle.is_graph:
        for lengths in _other_lengths(bundle.manifest.inputs):
            checks += _at_lengths(files, bundle, lengths, allowed, load, advice)
    return checks


def _other_lengths(specs: Sequence[TensorSpec]) -> list[dict[str, int]]:
    """Return lengths to try for all free axes except the batch. Two axes never get the same length, so that an exporter
    that confuses two axes fails."""
    axes = dict.fromkeys(axis for spec in specs for axis in spec.shape[1:] if isinstance(axis, str))
    return [
        {axis: (length + number) * multiple(axis) for number, axis in enumerate(axes)} for length in LENGTHS if axes
    ]


def _at_lengths(
    files: Mapping[str, bytes],
    bundle: Bundle,
    lengths: Mapping[str, int],
    allowed: float,
    load: Callable[[bytes], Any],
    advice: str,
) -> list[Check]:
    """Compare each file with the network at lengths that differ from the traced ones. Return no checks if the network
    itself cannot run at these lengths."""
    sized = tuple(
        replace(spec, shape=tuple(lengths.get(str(axis), axis) for axis in spec.shape))
        for spec in bundle.manifest.inputs
    )
    inputs = golden_inputs(sized, SLICE)
    names = [spec.name for spec in bundle.manifest.outputs]
    network = Network(bundle).eval()
    try:
        single = _outputs(network, inputs, names)
        exact = _outputs(network.double(), inputs, names)
    except (RuntimeError, IndexError, ValueError):
        return []
    noise = max(float(differences(name, single[name], exact[name]).max()) for name in names)
    expected = Reference(inputs, exact, {name: rows[:0] for name, rows in exact.items()}, noise)
    checks = []
    for file, content in files.items():
        outputs = _run(load(content), inputs, SLICE, SLICE, bundle.manifest.outputs)
        check = compare(file, content, SLICE, SLICE, outputs, outputs, expected, max(allowed, 2 * noise))
        _judge(check, f"{bundle.manifest.name} at lengths {dict(lengths)}", advice)
        checks.append(replace(check, lengths=dict(lengths)))
    return checks


def compare(
    file: str,
    content: bytes,
    batch: int,
    rows: int,
    outputs: Arrays,
    whole: Arrays,
    expected: Reference,
    allowed: float,
) -> Check:
    difference = spread = golden = 0.0
    changed = 0
    for name, output in outputs.items():
        exact, stored = expected.outputs(name, batch, rows), expected.golden[name][:rows]
        difference = _largest(difference, differences(name, output, exact))
        spread = _largest(spread, differences(name, output, whole[name][:rows]))
        golden = _largest(golden, differences(name, output[: len(stored)], stored))
        if name == PROBABILITIES:
            best = np.sort(exact, axis=-1)
            clear = best[:, -1] - best[:, -2] > 2 * allowed
            changed += int((clear & (output.argmax(-1) != exact.argmax(-1))).sum())
    between_batches = max(allowed, 2 * expected.noise)
    return Check(file, len(content), batch, rows, difference, spread, golden, changed, allowed, between_batches)


def _judge_steps(file: str, session: Any, bundle: Bundle, expected: Reference, check: Check, advice: str) -> None:
    """Raise unless the export agrees with its source after STEPS calls in which each hands its own state on: a small
    difference of the state may grow."""
    names = [spec.name for spec in bundle.manifest.outputs]
    if bundle.is_graph:
        source = bundle.manifest.signature.wrapped(on_onnxruntime(bundle.contents[GRAPH])).run
    else:
        network = Network(bundle).eval()

        def source(names: list[str], rows: Arrays) -> list[Array]:
            return list(_outputs(network, rows, names).values())

    rows = len(expected.golden[names[0]])
    inputs = {name: array[:rows] for name, array in expected.inputs.items()}
    wanted, got = (after_steps(partial(run, names), inputs, names, bundle) for run in (source, session.run))
    difference = max(_largest(0.0, differences(name, got[name], wanted[name])) for name in wanted)
    allowed = STEPS * check.between_batches
    if not difference <= allowed:  # also true for NaN
        raise EdgekitError(
            f"{bundle.manifest.name}: {file} after {STEPS} calls that hand their state on: its outputs differ from the "
            f"source's by {difference:.1e}; allowed {allowed:.1e}. Nothing was written; {advice}"
        )


def after_steps(
    run: Callable[[Arrays], Sequence[Array]], inputs: Arrays, names: Sequence[str], bundle: Bundle
) -> Arrays:
    """Return the outputs of the last of STEPS calls, of which each gets the state that the one before gave."""
    now = dict(inputs)
    outputs: Arrays = {}
    for _ in range(STEPS):
        outputs = dict(zip(names, run(now), strict=True))
        now |= {name: outputs[source] for name, source in bundle.manifest.state.items()}
    return outputs


def _judge(check: Check, model: str, advice: str) -> None:
    complaints = {
        "its outputs differ from the source network's by": (check.difference, check.allowed),
        "the same row differs from one batch size to another by": (check.spread, check.between_batches),
        "its outputs differ from the bundle's golden outputs by": (check.golden, check.between_batches),
    }
    for complaint, (value, allowed) in complaints.items():
        if not value <= allowed:  # also true for NaN
            raise EdgekitError(
                f"{model}: {check.file} at batch {check.batch}: {complaint} {value:.1e}; allowed {allowed:.1e}. "
                f"Nothing was written; if the bundle's weights and golden data are right, {advice}"
            )
    if check.changed:
        raise EdgekitError(
            f"{model}: {check.file} at batch {check.batch}: {check.changed} of {check.rows} rows change class; "
            f"allowed 0. Nothing was written; {advice}"
        )


def _varied(spec: TensorSpec, array: Array, rows: int) -> Array:
    """Return the rows, and then the rows again with 5 % noise: no two are equal and all are realistic. A value that the
    rows of a call share stays as it is."""
    tiled = repeated(array, rows)
    if array.dtype.kind == "f" and not spec.shared:
        tiled[len(array) :] *= 1 + 0.05 * np.random.default_rng(0).standard_normal(tiled[len(array) :].shape)
    return tiled


def repeated(array: Array, rows: int) -> Array:
    """Return the first `rows` rows; if the array has fewer, its rows repeat from the start."""
    return array[np.arange(rows) % len(array)]


def _outputs(network: Network, inputs: Arrays, names: Sequence[str]) -> Arrays:
    """Return the network's outputs for the inputs, computed on one thread. One thread gives the same numbers on every
    machine, and it is several times faster than two threads if other programs occupy a core."""
    dtype = next(network.parameters()).dtype
    tensors = [torch.from_numpy(array) for array in inputs.values()]
    tensors = [tensor.to(dtype) if tensor.is_floating_point() else tensor for tensor in tensors]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            parts = [network(*rows) for rows in zip(*(tensor.split(SLICE) for tensor in tensors), strict=True)]
    finally:
        torch.set_num_threads(threads)
    return {name: torch.cat(columns).numpy() for name, columns in zip(names, zip(*parts, strict=True), strict=True)}


def _run(session: Any, inputs: Arrays, batch: int, rows: int, specs: Sequence[TensorSpec]) -> Arrays:
    names = [spec.name for spec in specs]
    cycled = {name: repeated(array, rows) for name, array in inputs.items()}
    try:
        parts = [
            session.run(names, {name: array[start : start + batch] for name, array in cycled.items()})
            for start in range(0, rows, batch)
        ]
    except Exception as error:  # the exceptions of onnxruntime share no base class
        raise EdgekitError(
            f"the graph does not run on inputs of shapes { ({name: array.shape for name, array in inputs.items()}) }: "
            f"{str(error).splitlines()[0][-200:]}; if the network runs on them, "
            "the tracer stored a length as a constant: "
            "take lengths from tensors' shapes, in operators that torch can trace"
        ) from error
    return {name: np.concatenate(columns) for name, columns in zip(names, zip(*parts, strict=True), strict=True)}


def differences(name: str, got: Array, expected: Array) -> Array:
    if got.shape != expected.shape:
        raise EdgekitError(f"output {name!r} has shape {got.shape}; the network gives {expected.shape}")
    if expected.dtype.kind in "iub":  # codes and classes: the share of values that differ
        return np.asarray(np.mean(got != expected) if expected.size else 0.0)
    scale = 1.0 if name == PROBABILITIES else float(np.abs(expected).max(initial=0)) or 1.0
    difference: Array = np.abs(got - expected) / scale
    return difference


def _largest(one: float, others: Array) -> float:
    """Return the larger of the two, or NaN if any value is NaN."""
    return float(np.max(others, initial=one))
