"""Time models in turns in one run, because machines are shared and their clocks change."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgekit.bundle.format import Bundle
from edgekit.bundle.tensors import Arrays, golden_inputs
from edgekit.compression.guard import tiled
from edgekit.compression.job import ShowProgress
from edgekit.cost.timing import GRAIN, in_turns, ratio_interval, timed
from edgekit.errors import EdgekitError, missing_extra
from edgekit.session import open_session

if TYPE_CHECKING:
    from onnx import ModelProto

    from edgekit.cost.layers import Report
    from edgekit.targets.profile import Target

LEAST_ROUNDS, MOST_ROUNDS = 9, 2000


@dataclass(frozen=True, slots=True)
class Timing:
    """The times of one model at one batch size: milliseconds of a call by the clock, and CPU time of the process.
    speedup: the first model's CPU time divided by this model's, with its 95 % interval; roofline: the least possible
    time divided by the measured one, None if it is unknown."""

    model: str
    batch: int
    rounds: int
    p50_ms: float
    p90_ms: float
    p99_ms: float
    cpu_p50_ms: float
    speedup: float
    speedup_low: float
    speedup_high: float
    roofline: float | None


def compare(
    names: Sequence[str],
    bundles: Sequence[Bundle],
    batches: Sequence[int],
    *,
    runtime: str = "onnxruntime",
    threads: int = 1,
    seconds: float = 3.0,
    inputs: Arrays | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> list[Timing]:
    """Return a row for each batch size and model, in that order. The inputs, or else each model's golden inputs, are
    repeated as often as a batch needs."""
    sessions = [open_session(bundle, runtime, threads=threads) for bundle in bundles]
    rows = [inputs or _golden(bundle) for bundle in bundles]
    least = _least_seconds(bundles, rows, batches) if threads == 1 else [{} for _ in bundles]
    result = []
    for done, batch in enumerate(batches):
        feeds = [tiled(arrays, batch) for arrays in rows]
        calls = [
            timed(functools.partial(session.run, feed), time.perf_counter, time.process_time)
            for session, feed in zip(sessions, feeds, strict=True)
        ]
        taken = np.maximum(in_turns(calls, seconds=seconds, least=LEAST_ROUNDS, most=MOST_ROUNDS), GRAIN)
        clock, spent_cpu = taken[:, :, 0] * 1e3, taken[:, :, 1] * 1e3
        for index, name in enumerate(names):
            ratio, low, high = ratio_interval(spent_cpu[:, index], spent_cpu[:, 0])
            p50, p90, p99 = (float(value) for value in np.percentile(clock[:, index], [50, 90, 99]))
            cpu_p50 = float(np.median(spent_cpu[:, index]))
            floor = least[index].get(batch)
            share = None if floor is None else floor / (cpu_p50 / 1e3)
            result.append(Timing(name, batch, len(clock), p50, p90, p99, cpu_p50, ratio, low, high, share))
        progress(done + 1)
    return result


def bench(
    models: str | Path | Bundle | Sequence[str | Path | Bundle],
    *,
    data: Any = None,
    batches: Sequence[int] = (1, 16, 256),
    runtime: str = "onnxruntime",
    threads: int = 1,
    seconds: float = 3.0,
    progress: Callable[[int], None] = lambda done: None,
) -> list[Timing]:
    """Time one model, or several in turns in one run. The result has a row for each batch size and model, in that
    order.

    models: as for `edgekit.open`; data: the inputs by name, (rows, ...) each, instead of each model's golden inputs;
    seconds: for each batch size. The speedup of a row is the first model's CPU time divided by its own.

    >>> import edgekit
    >>> [row.batch for row in edgekit.bench("t2-gr", batches=(1, 4), runtime="torch", seconds=0.05)]
    [1, 4]
    """
    from edgekit.data.live import named_arrays

    names, bundles = _opened(models)
    rows = None
    if data is not None:
        found = named_arrays(data, [spec.name for spec in bundles[0].manifest.inputs])
        rows = {name: array for name, array in found.items() if name not in ("labels", "split")}
    options: dict[str, Any] = {"runtime": runtime, "threads": threads, "seconds": seconds, "progress": progress}
    return compare(names, bundles, batches, inputs=rows, **options)


def bench_target(
    models: str | Path | Bundle | Sequence[str | Path | Bundle],
    target: str | Target,
    *,
    batches: Sequence[int] = (1, 16, 256),
    precision: str | None = None,
    power: str | None = None,
    threads: int = 1,
    seconds: float = 1.0,
    progress: ShowProgress = lambda what, done, total: None,
) -> list[Report]:
    """Estimate the time of each operator of one model, or of several, on a target, and check whether the model fits
    into the target's memory. If the target is this machine, the times are also measured. The result has a report for
    each model and batch size, in that order.

    models: as for `edgekit.open`; target: a device's name, or a Target; precision: that of float32 operators, None for
    the target's plan; power: one of the device's power modes; threads: cores of a CPU; seconds: for each batch size
    that is measured.

    >>> import edgekit
    >>> report, = edgekit.bench_target("t2-gr", "jetson-nano", batches=(16,))
    >>> report.memory.fits, report.measured
    (True, None)

    Raises EdgekitError for a precision or power mode that the target does not have. It also raises if the target is
    this machine and a precision, a power mode or more than one thread is given.
    """
    from edgekit.targets import profile
    from edgekit.targets.local import is_here

    try:
        import onnx  # noqa: F401 - estimates count the operators of an ONNX graph
    except ModuleNotFoundError:
        raise missing_extra("onnx", "onnx", "estimating on a target") from None
    names, bundles = _opened(models)
    device = profile.find(target) if isinstance(target, str) else target
    options: dict[str, Any] = {"precision": precision, "power": power, "threads": threads}
    if not is_here(device):
        found = [_estimated(bundle, device, batches, **options) for bundle in bundles]
    elif precision or power or threads != 1:
        raise EdgekitError(
            f"{device.name} is this machine, where the model is measured as it is, on one thread; leave precision, "
            f"power and threads out (got {precision}, {power} and {threads})"
        )
    else:
        found = [_measured(bundle, device, batches, seconds, progress) for bundle in bundles]
    return [replace(report, model=name) for name, reports in zip(names, found, strict=True) for report in reports]


def _calls(bundle: Bundle, batch: int) -> tuple[int, int]:
    """Return how many calls a batch takes, and how many rows each."""
    rows = bundle.manifest.rows_per_call
    return (1, batch) if rows is None else (-(-batch // rows), rows)


def _check_batches(bundle: Bundle, batches: Sequence[int]) -> None:
    """Raise for batches of several calls: an estimate is of one call."""
    rows = bundle.manifest.rows_per_call
    if rows is not None and (others := [batch for batch in batches if batch != rows]):
        raise EdgekitError(
            f"{bundle.manifest.name}: each call takes {rows} row{'s' * (rows > 1)}, so a batch of {others[0]} is no "
            f"call whose time could be estimated; give --batch {rows}"
        )


def _estimated(bundle: Bundle, target: Target, batches: Sequence[int], **options: Any) -> list[Report]:
    from edgekit.cost import layers

    _check_batches(bundle, batches)
    model = float_graph(bundle)
    lengths = layers.lengths_of(model, _golden(bundle))
    return [layers.elsewhere(model, target, batch, lengths=lengths, **options) for batch in batches]


def _measured(
    bundle: Bundle, target: Target, batches: Sequence[int], seconds: float, progress: ShowProgress
) -> list[Report]:
    from edgekit.cost import layers, measured
    from edgekit.cost.operators import measured_rates

    _check_batches(bundle, batches)
    model, golden = float_graph(bundle), _golden(bundle)
    options: dict[str, Any] = {"lengths": layers.lengths_of(model, golden), "seconds": seconds}
    table, rates = measured.table(progress=progress), measured_rates()
    reports = []
    for done, batch in enumerate(batches):
        progress("batch sizes", done, len(batches))
        feeds = tiled(golden, batch)
        reports.append(layers.here(model, target, feeds, batch, table=table, rates=rates, **options))
    progress("batch sizes", len(batches), len(batches))
    return reports


def _opened(
    models: str | Path | Bundle | Sequence[str | Path | Bundle],
) -> tuple[list[str], list[Bundle]]:
    """Return the names and the bundles of one model, or of several."""
    from edgekit.importers.api import open_to_run

    several = [models] if isinstance(models, (str, Path, Bundle)) else list(models)
    names = [model.manifest.name if isinstance(model, Bundle) else str(model) for model in several]
    return names, [open_to_run(model) for model in several]


def float_graph(bundle: Bundle) -> ModelProto:
    """Return the bundle's graph. The graph of a network is the one that the ONNX exporter writes in float32."""
    if bundle.is_graph:
        return bundle.graph()
    from edgekit.graph.lower import float_graph as of_network

    return of_network(bundle)


def _golden(bundle: Bundle) -> Arrays:
    inputs, _ = bundle.golden()
    rows = len(next(iter(inputs.values())))
    return inputs if rows else golden_inputs(bundle.manifest.inputs, 1)


def _least_seconds(
    bundles: Sequence[Bundle], inputs: Sequence[Arrays], batches: Sequence[int]
) -> list[dict[int, float]]:
    """Return the roofline of each model for one thread, by batch size, at the lengths of its inputs. The rate that
    several threads reach together depends on the other programs of the machine. The result is empty for a model without
    a graph, which a runtime may run, and for all models if the packages that count operators are not installed."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
    except ModuleNotFoundError:
        return [{} for _ in bundles]
    from edgekit.cost.layers import lengths_of
    from edgekit.cost.operators import graph_cost, least_seconds, measured_rates

    rates = measured_rates()
    found: list[dict[int, float]] = []
    for bundle, arrays in zip(bundles, inputs, strict=True):
        try:
            model = float_graph(bundle)
        except EdgekitError:
            found.append({})
            continue
        lengths = lengths_of(model, arrays)
        calls = {batch: _calls(bundle, batch) for batch in batches}
        costs = {batch: graph_cost(model, rows, lengths) for batch, (_, rows) in calls.items()}
        found.append({batch: count * least_seconds(costs[batch], rates) for batch, (count, _) in calls.items()})
    return found
