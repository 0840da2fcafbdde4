"""The real times of operators on this machine, in ONNX Runtime on one thread: a table that corrects the roofline.

The module times small graphs of one operator each with the runtime's profiler, a dozen shapes for each family of
operators, and fits a sum of terms to the times:

    seconds = a + b matrices + c bytes written + d operations + e bytes + f bytes beyond the core's own cache

The operations of a product count columns up to whole vector registers, as kernels compute them. The fit minimizes the
relative error without negative terms (Lawson and Hanson 1974, "Solving least squares problems", chapter 23). The time
of a model is the sum over the operators that the runtime runs, plus the overhead of a call and of each operator, times
a contention factor. This factor is measured on a few small networks: in a model, an operator finds its weights and
inputs in slower memory than when it runs alone in a loop.

The table is kept in edgekit's cache, under the machine and the version of the runtime.
"""

from __future__ import annotations

import functools
import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import ModelProto, helper

from edgekit import cache, machine
from edgekit.cost.operators import Operator, Workload
from edgekit.cost.profiled import open_model, optimized_work, profiled, random_feeds
from edgekit.cost.samples import ALIKE, ROWS, Sample, composites, graph_of, samples
from edgekit.cost.timing import Timed, in_turns, timed
from edgekit.errors import EdgekitError
from edgekit.targets.local import cpu_flags

FORMAT = 2  # version of the table and of its fitted terms
OWN_CACHE = 1 << 20  # bytes of a core's L2 cache, if the system does not report it
TERMS = ("calls", "matrices", "written", "operations", "bytes", "spilled")
PLAIN = "Add"  # for operators that are in neither
Terms = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class OperatorTable:
    """weights: of TERMS, by family, in seconds per unit of each. call, node: the overhead of a call, and of each
    operator, beyond the kernels; `node` is negative if that is less than the profiler's own time. samples, error: the
    number of measurements of each family, and their median relative error."""

    weights: Mapping[str, tuple[float, ...]]
    call: float
    node: float
    own_cache: int
    lanes: int  # float32 numbers of a vector register
    contention: float  # the factor between the time in a model and the time alone
    samples: Mapping[str, int]
    error: Mapping[str, float]
    machine: Mapping[str, Any]
    runtime: str

    def seconds(self, operator: Operator) -> float:
        """Return the seconds of the operator's kernel."""
        weights = self.weights.get(family(operator)) or self.weights[PLAIN]
        return float(np.dot(weights, terms(operator, self.own_cache, self.lanes)))

    def total(self, work: Workload) -> float:
        """Return the seconds of a call."""
        return self.call + sum(self.of(operator) for operator in work.operators)

    def of(self, operator: Operator) -> float:
        """Return the seconds of the operator in a model: its kernel and the overhead of starting it."""
        return self.contention * max(0.0, self.node + self.seconds(operator))


def family(operator: Operator) -> str:
    """Return the row of the table for an operator."""
    if operator.view or operator.sizes_only:
        return "Reshape"
    if operator.product:
        if operator.op_type == "DynamicQuantizeMatMul":
            return "int8 dynamic"
        if operator.precision == "int8":
            return "int8 convolution" if "Conv" in operator.op_type else "int8 product"
        if operator.op_type == "ConvTranspose":
            return "ConvTranspose"
        if "Conv" in operator.op_type:
            return "depthwise" if operator.matrices > 1 else "convolution"
        return "product with weights" if operator.weights and operator.matrices == 1 else "product of activations"
    op_type = ALIKE.get(operator.op_type, operator.op_type)
    return f"{op_type} row" if op_type in ROWS and _spread(operator) else op_type


def _spread(operator: Operator) -> bool:
    """Return whether one input is smaller than the result, as biases are: the kernel's loop restarts for each row."""
    written = sum(operator.written.values())
    return sum(operator.read.values()) + sum(operator.weights.values()) < 1.99 * written


def terms(operator: Operator, own_cache: int, lanes: int) -> Terms:
    """Return the terms of the fitted sum, in the order of TERMS."""
    moved, written, operations = operator.bytes, sum(operator.written.values()), operator.operations
    if operator.product and family(operator) != "depthwise":
        operations *= -(-operator.columns // lanes) * lanes / operator.columns
    return np.array([1.0, operator.matrices, written, operations, moved, max(0.0, moved - own_cache)])


def table(*, progress: Callable[[str, int, int], None] = lambda what, done, total: None) -> OperatorTable:
    """Return this machine's table from the cache, or measure it now, which takes half a minute."""
    import onnxruntime

    facts = machine.describe()
    runtime = f"onnxruntime {onnxruntime.__version__}"
    identity = json.dumps([FORMAT, facts, runtime], sort_keys=True)
    path = cache.folder("operators") / f"{hashlib.sha256(identity.encode()).hexdigest()[:16]}.json"
    if (known := _read(path)) is not None:
        return known
    found = measure(samples(), progress=progress, facts=facts, runtime=runtime)
    cache.keep(path, json.dumps(asdict(found), indent=1).encode())
    return found


def measure(
    chosen: Sequence[Sample],
    *,
    facts: Mapping[str, Any],
    runtime: str,
    seconds: float = 0.04,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> OperatorTable:
    """Time the samples and fit a row for each family."""
    own_cache, lanes = _own_cache(), 16 if "avx512f" in cpu_flags() else 8
    rows: dict[str, list[Terms]] = {}
    times: dict[str, list[float]] = {}
    for number, sample in enumerate(chosen):
        progress("timing operators", number, len(chosen))
        taken = {
            kernel.name: kernel.seconds
            for kernel in profiled(sample.model, random_feeds(sample.model, 1), seconds=seconds)
        }
        for operator in optimized_work(sample.model, 1).operators:
            if operator.name in taken and family(operator) == sample.family:
                rows.setdefault(sample.family, []).append(terms(operator, own_cache, lanes))
                times.setdefault(sample.family, []).append(taken[operator.name])
    progress("timing operators", len(chosen), len(chosen))
    fitted, error = {}, {}
    for name, vectors in rows.items():
        matrix, target = np.array(vectors), np.array(times[name])
        weights = relative_fit(matrix, target)
        fitted[name] = tuple(float(value) for value in weights)
        error[name] = float(np.median(np.abs(matrix @ weights / target - 1)))
    if PLAIN not in fitted:
        raise EdgekitError(f"no sample of {PLAIN!r} was timed; the table needs one for operators that it does not know")
    counts = {name: len(vectors) for name, vectors in rows.items()}
    found = OperatorTable(fitted, 0.0, 0.0, own_cache, lanes, 1.0, counts, error, facts, runtime)
    call, node = _overheads(found)
    found = replace(found, call=call, node=node)
    return replace(found, contention=_contention(found, composites()))


def relative_fit(matrix: Terms, target: Terms) -> Terms:
    """Return weights >= 0 that bring matrix @ weights nearest to the target, with each row's error relative to its own
    target."""
    scaled = matrix / target[:, None]
    # the sizes of the terms differ by nine orders of magnitude
    size = np.where(scaled.max(axis=0) > 0, scaled.max(axis=0), 1.0)
    result: Terms = non_negative(scaled / size, np.ones(len(target))) / size
    return result


def non_negative(matrix: Terms, target: Terms, rounds: int = 1000) -> Terms:
    """Solve least squares without negative weights by Lawson and Hanson's active set method."""
    count = matrix.shape[1]
    weights, active = np.zeros(count), np.zeros(count, bool)
    for _ in range(rounds):
        gradient = matrix.T @ (target - matrix @ weights)
        gradient[active] = -np.inf
        if active.all() or gradient.max() <= 1e-10:
            break
        active[int(gradient.argmax())] = True
        while True:
            trial = np.zeros(count)
            trial[active] = np.linalg.lstsq(matrix[:, active], target, rcond=None)[0]
            if (trial[active] > 0).all():
                break
            below = active & (trial <= 0)
            step = float(np.min(weights[below] / np.maximum(weights[below] - trial[below], 1e-300)))
            weights = weights + step * (trial - weights)
            active &= weights > 1e-15
            weights[~active] = 0
        weights = trial
    return weights


def _overheads(kernels: OperatorTable) -> tuple[float, float]:
    """Return the seconds of overhead of a call and of each operator in it, from chains of small operators."""
    times = {}
    for length in (2, 42):
        names = ["a", *(f"v{n}" for n in range(length - 1)), "y"]
        pair = ("Relu", "Sigmoid")  # the runtime would merge two equal operators in a row
        nodes = [helper.make_node(pair[n % 2], [names[n]], [names[n + 1]], f"{pair[n % 2]}{n}") for n in range(length)]
        model = graph_of(nodes, [(1, 16, 32)], {})
        session, feeds = open_model(model), dict(random_feeds(model, 1))
        call = timed(functools.partial(session.run, None, feeds), time.thread_time)
        taken = in_turns([call], least=400, most=400)
        operators = optimized_work(model, 1).operators
        times[len(operators)] = float(np.median(taken)) - sum(kernels.seconds(operator) for operator in operators)
    (few, short), (many, long) = sorted(times.items())
    node = (long - short) / (many - few)
    return short - few * node, node


def _contention(alone: OperatorTable, networks: Sequence[ModelProto], rounds: int = 15) -> float:
    """Return how many times longer whole networks take than the sum of their operators alone. Each network runs after
    others have run."""
    taken = in_turns([second_run(model, 1) for model in networks], least=rounds, most=rounds)[:, :, 0]
    expected = [alone.total(optimized_work(model, 1)) for model in networks]
    return float(np.median(np.median(taken, axis=0) / expected))


def second_run(model: ModelProto, batch: int) -> Timed:
    """Return a call that runs a graph twice and times the second run in CPU seconds. Another graph may have run before
    the call; its data, which the first run evicts from the caches, are not part of this graph's time."""
    run = functools.partial(open_model(model).run, None, dict(random_feeds(model, batch)))
    once = timed(run, time.thread_time)

    def call() -> tuple[float, ...]:
        run()
        return once()

    return call


def _own_cache(path: Path = Path("/sys/devices/system/cpu/cpu0/cache/index2/size")) -> int:
    """Return the bytes of the L2 cache."""
    try:
        text = path.read_text().strip()
    except OSError:
        return OWN_CACHE
    scale = {"K": 1 << 10, "M": 1 << 20}.get(text[-1:].upper())
    return int(text[:-1]) * scale if scale and text[:-1].isdigit() else OWN_CACHE


def _read(path: Path) -> OperatorTable | None:
    """Return a stored table; None if it is missing or damaged, so that it is measured again."""
    content = cache.read(path)
    if content is None:
        return None
    try:
        values = json.loads(content)
        return OperatorTable(**{**values, "weights": {name: tuple(row) for name, row in values["weights"].items()}})
    except (ValueError, TypeError, LookupError, AttributeError):
        return None
