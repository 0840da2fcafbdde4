"""The time of each of a model's operators on a target: estimated, and measured if the target is this machine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy.typing as npt
from onnx import ModelProto

from edgekit.cost.measured import OperatorTable
from edgekit.cost.memory import Memory
from edgekit.cost.operators import Operator, Rates, work
from edgekit.cost.profiled import optimized_work, profiled
from edgekit.cost.roofline import FORMULA, FUSED, estimate, in_mode
from edgekit.graph.shapes import sized
from edgekit.graph.signature import batch_places
from edgekit.targets.profile import Target

MEASURED = "the table of measured operators of this machine (edgekit/cost/measured.py)"


@dataclass(frozen=True, slots=True)
class Row:
    """One operator, or all operators of one type. estimate, measured: seconds; measured is None if the target is
    another machine. roofline: the least time that the rates allow, divided by the time taken (measured, else
    estimated)."""

    name: str
    op_type: str
    count: int
    operations: float
    bytes: float
    estimate: float
    measured: float | None
    roofline: float
    bound: str


@dataclass(frozen=True, slots=True)
class Report:
    """A model at one batch size on a target; times of a call in seconds. measured: None if the target is another
    machine. formula: the source of the estimate. unknown: nodes of unknown shape, which are not counted."""

    target: str
    batch: int
    precision: str
    estimate: float
    measured: float | None
    formula: str
    memory: Memory
    rows: tuple[Row, ...]
    unknown: tuple[str, ...]
    model: str = ""  # its name, if the caller gave one

    def by_op_type(self) -> tuple[Row, ...]:
        """Merge the rows of each operator type into one, the slowest first."""
        groups: dict[str, list[Row]] = {}
        for row in self.rows:
            groups.setdefault(row.op_type, []).append(row)
        merged = [_merged(op_type, rows) for op_type, rows in groups.items()]
        return tuple(sorted(merged, key=lambda row: -(row.measured or row.estimate)))

    def to_json(self, *, layers: bool = False) -> dict[str, Any]:
        """Return plain values, with a row for each operator type, or, with `layers`, for each operator."""
        rows = [asdict(row) for row in (self.rows if layers else self.by_op_type())]
        memory = {"fits": self.memory.fits, "needed": self.memory.needed}
        return {"model": self.model, **asdict(self), **memory, "rows": rows}


def elsewhere(
    model: ModelProto,
    target: Target,
    batch: int,
    *,
    lengths: Mapping[str, int] | None = None,
    precision: str | None = None,
    power: str | None = None,
    threads: int = 1,
) -> Report:
    """Estimate the report from the target's data sheet."""
    if power is not None:
        target = in_mode(target, power)
    found = estimate(work(model, sized(model, batch, lengths)), target, batch, precision=precision, threads=threads)
    rows = [
        Row(
            layer.name,
            layer.op_type,
            1,
            layer.operations,
            layer.bytes,
            layer.seconds,
            None,
            layer.roofline / layer.seconds,
            layer.bound,
        )
        for layer in found.layers
    ]
    formula = FORMULA + (f"; {FUSED}" if any(layer.fused for layer in found.layers) else "")
    return Report(
        target.name, batch, found.precision, found.seconds, None, formula, found.memory, tuple(rows), found.unknown
    )


def here(
    model: ModelProto,
    target: Target,
    feeds: Mapping[str, npt.NDArray[Any]],
    batch: int,
    *,
    table: OperatorTable,
    rates: Rates,
    lengths: Mapping[str, int] | None = None,
    seconds: float = 1.0,
) -> Report:
    """Measure on this machine, on one thread, and compare with the prediction of its operator table. The operators are
    those that ONNX Runtime runs after it has rewritten the graph."""
    plain = estimate(work(model, sized(model, batch, lengths)), target, batch)
    taken = {kernel.name: kernel.seconds for kernel in profiled(model, feeds, seconds=seconds)}
    done = optimized_work(model, batch, lengths)
    rows = [_measured_row(operator, taken.get(operator.name), table, rates) for operator in done.operators]
    total = sum(row.measured or 0.0 for row in rows) + max(0.0, table.call)
    return Report(
        target.name,
        batch,
        plain.precision,
        table.total(done),
        total,
        MEASURED,
        plain.memory,
        tuple(rows),
        (*plain.unknown, *done.unknown),
    )


def _measured_row(operator: Operator, measured: float | None, table: OperatorTable, rates: Rates) -> Row:
    if measured is not None:  # the profiler's own time is in it as well as in the table
        measured = max(0.0, measured + table.node)
    computing, moving = operator.operations / rates.flops, operator.bytes / rates.bytes
    predicted = table.of(operator)
    least, spent = max(computing, moving), measured or predicted
    bound = "compute" if computing > moving else "memory"
    return Row(
        operator.name,
        operator.op_type,
        1,
        operator.operations,
        operator.bytes,
        predicted,
        measured,
        least / spent if spent else 0.0,
        bound if least > 0.1 * spent else "launch",
    )


def lengths_of(model: ModelProto, arrays: Mapping[str, npt.NDArray[Any]]) -> dict[str, int]:
    """Return the lengths that a graph's open axes, except the batch, have in these rows."""
    found, places = {}, batch_places(model)
    for value in model.graph.input:
        if value.name not in arrays:
            continue
        batch, lengths = places.get(value.name, 0), iter(arrays[value.name].shape[1:])
        for number, axis in enumerate(value.type.tensor_type.shape.dim):
            length = 0 if number == batch else int(next(lengths))
            if number != batch and not axis.HasField("dim_value"):
                found[axis.dim_param] = length
    return found


def _merged(op_type: str, rows: list[Row]) -> Row:
    def total(of: Callable[[Row], float]) -> float:
        return sum(of(row) for row in rows)

    measured = None if all(row.measured is None for row in rows) else total(lambda row: row.measured or 0.0)
    spent = total(lambda row: row.measured or row.estimate)
    least = total(lambda row: row.roofline * (row.measured or row.estimate))
    bounds = {row.bound: 0.0 for row in rows}
    for row in rows:
        bounds[row.bound] += row.measured or row.estimate
    return Row(
        op_type,
        op_type,
        len(rows),
        total(lambda row: row.operations),
        total(lambda row: row.bytes),
        total(lambda row: row.estimate),
        measured,
        least / spent if spent else 0.0,
        max(bounds, key=lambda item: bounds[item]),
    )
