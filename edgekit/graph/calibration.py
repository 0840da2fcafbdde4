"""Run a graph on calibration data and collect statistics of its activations. The statistics are added up batch by
batch, so that memory does not grow with the number of rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from edgekit.bundle.onnx_file import serialized
from edgekit.bundle.tensors import Arrays
from edgekit.data.dataset import Dataset
from edgekit.errors import EdgekitError, missing_extra
from edgekit.graph.signature import of_model
from edgekit.session import check_inputs

if TYPE_CHECKING:
    from onnx import ModelProto

# of a histogram of magnitudes: with an outlier of 100 times the other values, these still fill some 80 bins
BINS = 8192
COARSE = 2048
LEVELS = 128  # magnitudes that int8 has
CANDIDATES = 256  # the number of thresholds to try
BATCH = 16  # rows at a time: each requested intermediate value takes memory for this many rows
Float64 = npt.NDArray[np.float64]


def calibration_rows(model: ModelProto, data: Dataset, samples: int, seed: int) -> Dataset:
    """Draw `samples` rows of the training data with the seed (all rows if there are fewer), and check them against the
    graph."""
    if len(data) == 0:
        raise EdgekitError("calibration: the training data has no rows; give some (split 0 in the data file)")
    inputs = list(of_model(model, "calibration").inputs.values())
    rows = np.sort(np.random.default_rng(seed).permutation(len(data))[:samples])
    chosen = data.take(rows)
    try:
        check_inputs(inputs, chosen.inputs)
    except EdgekitError as error:
        raise EdgekitError(f"calibration data does not fit the graph: {error}; give data of that shape") from None
    return chosen


def batches(data: Dataset) -> list[Arrays]:
    """Return the inputs in batches of `BATCH` rows."""
    starts = range(0, len(data), BATCH)
    return [{name: array[start : start + BATCH] for name, array in data.inputs.items()} for start in starts]


def activations(model: ModelProto, names: Iterable[str], data: Dataset) -> Iterator[Arrays]:
    """Yield the values with these names, call by call, as the graph's own tensors; the names may include inputs of the
    graph."""
    import onnx

    try:
        import onnxruntime
    except ModuleNotFoundError:
        raise missing_extra("onnxruntime", "onnx", "calibration") from None

    wanted = list(dict.fromkeys(names))
    inputs = {value.name for value in model.graph.input}
    computed = [name for name in wanted if name not in inputs]
    probe = type(model)()
    probe.CopyFrom(model)
    present = {value.name for value in probe.graph.output}
    probe.graph.output.extend(onnx.ValueInfoProto(name=name) for name in computed if name not in present)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1  # so that sums do not depend on the number of cores
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(serialized(probe), options, providers=["CPUExecutionProvider"])
    signature = of_model(model, "calibration")
    for rows in (own for batch in batches(data) for own in signature.feeds(batch)):
        values = dict(zip(computed, session.run(computed, rows), strict=True)) if computed else {}
        yield {name: rows[name] if name in inputs else values[name] for name in wanted}


@dataclass(slots=True)
class Moments:
    """Statistics of the vectors of length k along an activation's last axis."""

    count: int
    second: Float64  # (k, k): sum of x x^T
    largest: Float64  # (k,): max |x|

    @property
    def norms(self) -> Float64:
        """Return the (k,) Euclidean norm of every feature over all vectors."""
        return np.sqrt(np.diag(self.second))


def moments(model: ModelProto, names: Iterable[str], data: Dataset) -> dict[str, Moments]:
    """Return second moments and largest magnitudes of activations (..., k), in float64."""
    result: dict[str, Moments] = {}
    for values in activations(model, names, data):
        for name, array in values.items():
            vectors = array.reshape(-1, array.shape[-1]).astype(np.float64)
            if not np.isfinite(vectors).all():
                raise EdgekitError(f"calibration: {name!r} is NaN or infinite on training data; repair the model first")
            found = result.setdefault(name, _none(vectors.shape[1]))
            found.count += len(vectors)
            found.second += vectors.T @ vectors
            np.maximum(found.largest, np.abs(vectors).max(axis=0), out=found.largest)
    return result


def ranges(
    model: ModelProto, names: Iterable[str], data: Dataset, method: str, percentile: float
) -> dict[str, tuple[float, float]]:
    """Choose the lowest and highest value of each activation's grid by `method`.

        minmax      the lowest and highest value seen
        percentile  the magnitude below which this percentage of the nonzero magnitudes lies
        entropy     the threshold at which the histogram on 128 levels is nearest to the original in relative entropy
                    (Wu et al. 2020, arXiv 2004.09602, section 3, on calibration)

    The function runs over the data twice: the first run finds the ranges, so that an outlier in the last batch cannot
    make the first batch's bins too narrow or too many. onnxruntime's calibrator, fed batch by batch, took six minutes
    with one outlier.
    """
    names = list(names)
    ends: dict[str, tuple[float, float]] = {}
    for values in activations(model, names, data):
        for name, array in values.items():
            low, high = ends.get(name, (np.inf, -np.inf))
            # np.minimum keeps a NaN, which Python's min would lose
            ends[name] = float(np.minimum(low, array.min())), float(np.maximum(high, array.max()))
    for name, found in ends.items():
        if not np.isfinite(found).all():
            raise EdgekitError(f"calibration: {name!r} is NaN or infinite on training data; repair the model first")
    if method == "minmax":
        return ends
    largest = {name: max(-low, high) or 1.0 for name, (low, high) in ends.items()}
    counts = {name: np.zeros(BINS) for name in names}
    for values in activations(model, names, data):
        for name, array in values.items():
            # zero is on every grid; the many zeros after a Relu would make the method clip the rest
            magnitudes = np.abs(array[array != 0])
            counts[name] += np.histogram(magnitudes, BINS, (0, largest[name]))[0]
    result = {}
    for name, (low, high) in ends.items():
        if method == "percentile":
            share = _of_share(counts[name], percentile / 100) / BINS
        else:  # Use coarser bins: nearly empty ones are all alike, so clipping them looks free.
            share = least_divergent(counts[name].reshape(COARSE, -1).sum(axis=1)) / COARSE
        threshold = largest[name] * share
        result[name] = max(low, -threshold), min(high, threshold)
    return result


def _of_share(counts: Float64, share: float) -> int:
    """Return how many bins hold this share of all counts."""
    return int(np.searchsorted(np.cumsum(counts), share * counts.sum())) + 1


def least_divergent(counts: Float64) -> int:
    """Return how many bins to keep, so that the kept bins on `LEVELS` levels differ least from the clipped
    histogram."""
    candidates = np.unique(np.linspace(LEVELS, len(counts), CANDIDATES).astype(int))
    divergences = []
    for kept in candidates:
        inside = counts[:kept]
        clipped = inside.copy()
        clipped[-1] += counts[kept:].sum()
        level = np.arange(kept) * LEVELS // kept
        filled = np.bincount(level, inside > 0)
        mean = np.bincount(level, inside) / np.maximum(filled, 1)
        levelled = np.where(inside > 0, mean[level], 0.0)
        p, q = clipped / max(clipped.sum(), 1.0), levelled / max(levelled.sum(), 1.0)
        divergences.append(np.sum(p[p > 0] * np.log(p[p > 0] / np.maximum(q[p > 0], 1e-12))))
    return int(candidates[int(np.argmin(divergences))])


def _none(features: int) -> Moments:
    return Moments(0, np.zeros((features, features)), np.zeros(features))
