"""Quantize a model in one step: apply one pass at its stock settings, compare outputs, sizes and times, and stop there.

    int8   dynamic int8 of products, convolutions and tables of ids; with data, static int8
    int4   matrices in 4 bits, in groups with a scale each
    fp16   weights and arithmetic in half precision

The guard of `edgekit compress` measures much more and takes longer. This path refuses a result only if its outputs
point elsewhere than the original's: if their cosine is below a limit.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from edgekit.bundle.bounded import Arrays
from edgekit.bundle.format import GRAPH, TOKENIZER_FILES, Bundle, assemble_graph, with_files
from edgekit.compression.guard import time_in_turns
from edgekit.data.dataset import UNKNOWN, Dataset
from edgekit.errors import EdgekitError, unknown
from edgekit.passes.base import Context, GraphCandidate, Pass
from edgekit.session import check_inputs, open_session

FORMS = ("int8", "int4", "fp16")
ROWS = 64  # of the data, on which outputs are compared
GOLDEN_ROWS = 8
BATCH_BYTES = 64 << 20  # of the inputs of one call: rows that take more run in several calls
LEAST_COSINE = 0.98


@dataclass(frozen=True, slots=True)
class Quantized:
    """The result and what was measured. cosine: the least of any row and output; difference: the largest, relative to
    the output's largest value; bytes: of the two graphs; milliseconds: of a call with one row on one thread."""

    bundle: Bundle
    passed: str
    cosine: float
    difference: float
    bytes: tuple[int, int]
    milliseconds: tuple[float, float]
    seconds: float


def quantize(
    bundle: Bundle, to: str, data: Mapping[str, npt.NDArray[Any]] | None = None, *, least_cosine: float = LEAST_COSINE
) -> Quantized:
    """Return the bundle in fewer bits. data: real inputs by name, to calibrate, to compare, and as golden rows. Raises
    if the outputs' cosine with the original's is below `least_cosine`."""
    from edgekit.bundle.onnx_file import serialized
    from edgekit.graph.lower import lower

    started = time.perf_counter()
    if to not in FORMS:
        raise unknown("form", to, FORMS)
    inputs = _rows(bundle, data)
    source = lower(bundle, weights="float32")
    built = _pass_of(to, calibrated=data is not None)
    train = Dataset(inputs, np.full(len(next(iter(inputs.values()))), UNKNOWN))
    result = built.apply(GraphCandidate(source), Context(train, None, 0, inputs=bundle.manifest.inputs))
    assert isinstance(result, GraphCandidate)
    before = assemble_graph(bundle.manifest, serialized(source), bundle.golden())
    golden = {name: array[:GOLDEN_ROWS] for name, array in inputs.items()}
    after = assemble_graph(bundle.manifest, serialized(result.model), bundle.golden())
    sessions = [open_session(item, "onnxruntime", threads=1) for item in (before, after)]
    expected, found = (_outputs(session, inputs) for session in sessions)
    cosine, difference = compared(expected, found)
    if not cosine >= least_cosine:  # also true for NaN
        raise EdgekitError(
            f"{bundle.manifest.name}: in {to}, the cosine of outputs with the original's is {cosine:.4f}; at least "
            f"{least_cosine:g} is expected. Nothing was written; edgekit compress searches for what the model can bear"
        )
    sizes = len(before.contents[GRAPH]), len(after.contents[GRAPH])
    if sizes[1] >= sizes[0]:
        raise EdgekitError(
            f"{bundle.manifest.name}: {to} does not make it smaller: {sizes[0]:,} to {sizes[1]:,} bytes. Nothing was "
            "written; try another form, or --data, with which int8 is static"
        )
    times = np.median(time_in_turns(sessions, inputs, 1, seconds=0.5), axis=0) * 1e3
    manifest = replace(after.manifest, parent=bundle.digest, synthetic=bundle.manifest.synthetic and data is None)
    final = assemble_graph(manifest, after.contents[GRAPH], (golden, sessions[1].run(golden)))
    carried = {name: content for name, content in bundle.contents.items() if name in TOKENIZER_FILES}
    return Quantized(
        with_files(final, {**final.contents, **carried}),
        built.name,
        cosine,
        difference,
        sizes,
        (float(times[0]), float(times[1])),
        time.perf_counter() - started,
    )


def _pass_of(to: str, *, calibrated: bool) -> Pass[GraphCandidate]:
    if to == "fp16":
        from edgekit.passes.half import Half

        return Half(overflow="keep")  # masks hold numbers that float16 cannot, and they may stay
    if to == "int4":
        from edgekit.passes.weight_only import WeightOnly

        return WeightOnly(bits=4)
    if calibrated:
        from edgekit.passes.static_int8 import StaticInt8

        return StaticInt8()
    from edgekit.passes.dynamic_int8 import DynamicInt8

    return DynamicInt8(operators=("MatMul", "Gemm", "Conv", "Gather"))


def _rows(bundle: Bundle, data: Mapping[str, npt.NDArray[Any]] | None) -> Arrays:
    """Return the rows on which outputs are compared: of the data, or the golden rows."""
    if data is None:
        return bundle.golden()[0]
    rows = {spec.name: np.asarray(data[spec.name])[:ROWS] for spec in bundle.manifest.inputs if spec.name in data}
    check_inputs(bundle.manifest.inputs, rows)
    return rows


def _outputs(session: Any, inputs: Arrays) -> Arrays:
    """Return the outputs of all rows. A call gets as many rows as BATCH_BYTES of inputs hold."""
    count = len(next(iter(inputs.values())))
    row = max(1, sum(array.nbytes for array in inputs.values()) // count)
    step = int(max(1, min(count, BATCH_BYTES // row)))
    parts = [
        session.run({name: array[at : at + step] for name, array in inputs.items()}) for at in range(0, count, step)
    ]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def compared(expected: Arrays, found: Arrays) -> tuple[float, float]:
    """Return the least cosine of any row of any output of floats, and the largest difference relative to the output's
    largest value."""
    cosines, differences = [1.0], [0.0]
    for name, value in expected.items():
        if value.dtype.kind != "f":
            continue
        one, other = (array.reshape(len(value), -1).astype(np.float64) for array in (value, found[name]))
        lengths = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
        same = (one * other).sum(axis=1) / np.where(lengths > 0, lengths, 1.0)
        both_zero = (one == 0).all(axis=1) & (other == 0).all(axis=1)
        cosines.append(float(np.where(both_zero, 1.0, same).min()))
        differences.append(float(np.abs(one - other).max(initial=0)) / (float(np.abs(one).max(initial=0)) or 1.0))
    return float(np.min(cosines)), float(np.max(differences))
