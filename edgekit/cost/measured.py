"""What operators really take on this machine, in ONNX Runtime on one thread: a table that corrects the roofline.

Small graphs of one operator each are timed with the runtime's profiler, a dozen shapes for each family of operators,
and a sum of what they do is fitted to the times:

    seconds = a + b matrices + c bytes written + d operations + e bytes + f bytes beyond the core's own cache

(operations of products with their columns filled up to whole vector registers, as kernels compute them), with no
negative term (Lawson and Hanson 1974, "Solving least squares problems", chapter 23), by relative error. The time of a
model is the sum over the operators that the runtime makes of it, plus what a call and each operator take besides; and
that times one factor, found on a few small networks: in a model, an operator finds its weights and inputs further away
than when it runs alone, over and over.

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

FORMAT = 2  # of the table and of what it is fitted to
OWN_CACHE = 1 << 20  # bytes of a core's second cache, where the system does not say
TERMS = ("calls", "matrices", "written", "operations", "bytes", "spilled")
PLAIN = "Add"  # for what is in neither
Terms = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class OperatorTable:
    """weights: of TERMS, by family, in seconds for one of each. call, node: what a call, and each operator, take
    besides the kernels; the latter is negative where that is less than what the profiler took for itself. samples,
    error: how many measurements each family was fitted to, and their median relative error."""

    weights: Mapping[str, tuple[float, ...]]
    call: float
    node: float
    own_cache: int
    lanes: int  # float32 numbers of a vector register
    contention: float  # times as long as alone
    samples: Mapping[str, int]
    error: Mapping[str, float]
    machine: Mapping[str, Any]
    runtime: str

    def seconds(self, operator: Operator) -> float:
        """Of the operator's kernel."""
        weights = self.weights.get(family(operator)) or self.weights[PLAIN]
        return float(np.dot(weights, terms(operator, self.own_cache, self.lanes)))

    def total(self, work: Workload) -> float:
        """Of a call."""
        return self.call + sum(self.of(operator) for operator in work.operators)

    def of(self, operator: Operator) -> float:
        """Of the operator in a model: its kernel, and what starting it takes."""
        return self.contention * max(0.0, self.node + self.seconds(operator))


def family(operator: Operator) -> str:
    """The row of the table that an operator belongs to."""
    if operator.view or operator.sizes_only:
        return "Reshape"
    if operator.product:
        if operator.kind == "DynamicQuantizeMatMul":
            return "int8 dynamic"
        if operator.precision == "int8":
            return "int8 convolution" if "Conv" in operator.kind else "int8 product"
        if operator.kind == "ConvTranspose":
            return "ConvTranspose"
        if "Conv" in operator.kind:
            return "depthwise" if operator.matrices > 1 else "convolution"
        return "product with weights" if operator.weights and operator.matrices == 1 else "product of activations"
    kind = ALIKE.get(operator.kind, operator.kind)
    return f"{kind} row" if kind in ROWS and _spread(operator) else kind


def _spread(operator: Operator) -> bool:
    """Whether one input is smaller than the result, as biases are: its loop starts again for each row."""
    written = sum(operator.written.values())
    return sum(operator.read.values()) + sum(operator.weights.values()) < 1.99 * written


def terms(operator: Operator, own_cache: int, lanes: int) -> Terms:
    """What the fitted sum is over, as TERMS names it."""
    moved, written, operations = operator.bytes, sum(operator.written.values()), operator.operations
    if operator.product and family(operator) != "depthwise":
        operations *= -(-operator.columns // lanes) * lanes / operator.columns
    return np.array([1.0, operator.matrices, written, operations, moved, max(0.0, moved - own_cache)])


def table(*, progress: Callable[[str, int, int], None] = lambda what, done, total: None) -> OperatorTable:
    """This machine's table: from the cache, else measured now, which takes half a minute."""
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
    """Weights >= 0 that bring matrix @ weights nearest to the target, each row counted relative to its own target."""
    scaled = matrix / target[:, None]
    size = np.where(scaled.max(axis=0) > 0, scaled.max(axis=0), 1.0)  # terms differ by nine orders of magnitude
    result: Terms = non_negative(scaled / size, np.ones(len(target))) / size
    return result


def non_negative(matrix: Terms, target: Terms, rounds: int = 1000) -> Terms:
    """Least squares without negative weights: Lawson and Hanson's active set."""
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
    """Seconds that a call, and each operator in it, take besides the kernels: from chains of small operators."""
    times = {}
    for length in (2, 42):
        names = ["a", *(f"v{n}" for n in range(length - 1)), "y"]
        kinds = ("Relu", "Sigmoid")  # two of a kind in a row would be one
        nodes = [
            helper.make_node(kinds[n % 2], [names[n]], [names[n + 1]], f"{kinds[n % 2]}{n}") for n in range(length)
        ]
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
    """How many times as long as the sum of their operators alone whole networks take, each after others have run."""

    def second_run(model: ModelProto) -> Timed:
        """Time a run that follows another of the same network."""
        run = functools.partial(open_model(model).run, None, dict(random_feeds(model, 1)))
        once = timed(run, time.thread_time)

        def call() -> tuple[float, ...]:
            run()
            return once()

        return call

    taken = in_turns([second_run(model) for model in networks], least=rounds, most=rounds)[:, :, 0]
    expected = [alone.total(optimized_work(model, 1)) for model in networks]
    return float(np.median(np.median(taken, axis=0) / expected))


def _own_cache(path: Path = Path("/sys/devices/system/cpu/cpu0/cache/index2/size")) -> int:
    """Bytes of the second cache."""
    try:
        text = path.read_text().strip()
    except OSError:
        return OWN_CACHE
    scale = {"K": 1 << 10, "M": 1 << 20}.get(text[-1:].upper())
    return int(text[:-1]) * scale if scale and text[:-1].isdigit() else OWN_CACHE


def _read(path: Path) -> OperatorTable | None:
    """A table that was kept; a damaged one is measured again."""
    try:
        values = json.loads(path.read_text("utf-8"))
        return OperatorTable(**{**values, "weights": {name: tuple(row) for name, row in values["weights"].items()}})
    except (OSError, ValueError, TypeError, KeyError):
        return None
