"""Buffers that grow while Avro data is read into them, and that become Arrow arrays at the end."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from alert_broker.avro import walk
from alert_broker.avro.plan import Array, Node, ReadPlan, Record, compile_plan

INITIAL_CAPACITY = 1024  # initial rows of a level, and initial bytes of a string column; a full buffer doubles


@dataclass(frozen=True, slots=True)
class Fault:
    """The reason why a datum could not be read. datum: its number; start: its first byte; at: the byte of the fault;
    field: the path of the field."""

    datum: int
    start: int
    at: int
    field: str
    reason: str


class Columns:
    """The packets that were read with one plan, or with several plans of the same layout (versions of a schema that
    differ only in skipped fields). `read` appends packets; `take` returns them as Arrow columns and empties the
    buffers."""

    def __init__(self, plan: ReadPlan) -> None:
        self.plan = self._reading = plan
        self._levels = np.zeros((plan.levels, 4), np.int64)
        self._columns = np.zeros((len(plan.level_of), 7), np.int64)
        self._columns[:, walk.LEVEL] = plan.level_of
        self._stack = np.zeros((plan.depth + 1, 2), np.int64)
        self._scratch = np.zeros(2, np.int64)
        self._cells, self._valid, self._text = np.empty(0, np.int64), np.empty(0, np.uint8), np.empty(0, np.uint8)
        self._levels[:, walk.CAPACITY] = INITIAL_CAPACITY
        self._columns[:, walk.TEXT_CAPACITY] = INITIAL_CAPACITY
        self._lay_out()

    def __len__(self) -> int:
        return int(self._levels[0, walk.ROWS])

    @property
    def rows(self) -> int:
        """Rows of the level that has most: the packets, or the rows of one of their lists."""
        numbers: list[int] = self._levels[:, walk.ROWS].tolist()  # for so few numbers, a list is quicker than numpy
        return max(numbers)

    def read(
        self, data: bytes | memoryview, count: int, plan: ReadPlan | None = None
    ) -> tuple[npt.NDArray[np.int64], Fault | None]:
        """Append the `count` datums that the data holds. Return the byte at which each datum ends, and the fault of the
        first datum that could not be read.

        plan: the plan for this data, if it is not the plan of the constructor.

        If bytes are left over after the last datum, `read` appends nothing: the lengths do not add up, so nobody knows
        where the datums start.
        """
        self._reading = plan = plan or self.plan
        assert plan.layout == self.plan.layout
        array = np.frombuffer(data, np.uint8)
        if array.flags.writeable:
            array.flags.writeable = False  # the loop is then compiled for one array type, for every buffer
        ends = np.empty(min(count, len(array) // plan.min_bytes + 1), np.int64)
        report = np.zeros(6, np.int64)
        while (code := self._walk(array, count, ends, report)) == walk.FULL:
            self._grow(int(report[walk.FULL_BUFFER]), int(report[walk.NEEDED]))
        if code == walk.OK:
            return ends, None
        done, start, at, operation = report[: walk.FULL_BUFFER].tolist()
        if code == walk.LEFT:
            return ends[:0], Fault(0, 0, at, "", f"{len(array) - at} bytes left over")
        return ends[:done], Fault(done, start, at, plan.paths[operation], walk.REASONS[code])

    def take(self) -> pa.RecordBatch:
        """Return the packets: one column for each wanted top-level field, with structs and lists as in the schema."""
        arrays = {name: self._array(node, 0) for name, node in self.plan.root.fields.items()}
        self._levels[:, walk.ROWS] = self._columns[:, walk.TEXT_USED] = 0
        return pa.RecordBatch.from_arrays(list(arrays.values()), names=list(arrays))

    def _walk(
        self, data: npt.NDArray[np.uint8], count: int, ends: npt.NDArray[np.int64], report: npt.NDArray[np.int64]
    ) -> int:
        return walk.walk(
            data,
            len(data),
            count,
            self._reading.program,
            self._reading.items,
            self._cells,
            self._valid,
            self._text,
            self._columns,
            self._levels,
            self._stack,
            self._scratch,
            ends,
            report,
        )

    def _grow(self, buffer: int, needed: int) -> None:
        """Double the capacity of a level, or of a string column's text, or set it to `needed` if that is more."""
        table, row, column = self._levels, buffer, walk.CAPACITY
        if buffer >= len(self._levels):
            table, row, column = self._columns, buffer - len(self._levels), walk.TEXT_CAPACITY
        table[row, column] = max(needed, 2 * table[row, column])
        self._lay_out()

    def _lay_out(self) -> None:
        """Allocate new buffers, assign each column its range in them, and copy the data."""
        columns, old = self._columns, self._columns.copy()
        capacities = self._levels[columns[:, walk.LEVEL], walk.CAPACITY]
        columns[:, walk.BASE] = np.cumsum(capacities) - capacities
        columns[:, walk.TEXT_BASE] = np.cumsum(columns[:, walk.TEXT_CAPACITY]) - columns[:, walk.TEXT_CAPACITY]
        cells, valid = np.empty(capacities.sum(), np.int64), np.empty(capacities.sum(), np.uint8)
        text = np.empty(columns[:, walk.TEXT_CAPACITY].sum(), np.uint8)
        for new, before, level in zip(columns, old, columns[:, walk.LEVEL], strict=True):
            rows, used = self._levels[level, walk.ROWS], new[walk.TEXT_USED]
            for target, source in ((cells, self._cells), (valid, self._valid)):
                target[new[walk.BASE] :][:rows] = source[before[walk.BASE] :][:rows]
            text[new[walk.TEXT_BASE] :][:used] = self._text[before[walk.TEXT_BASE] :][:used]
        self._cells, self._valid, self._text = cells, valid, text

    def _array(self, node: Node, level: int) -> pa.Array:
        """Return a node's Arrow array, with one element for each row of a level."""
        rows = int(self._levels[level, walk.ROWS])
        if isinstance(node, Record):
            children = [self._array(inner, level) for inner in node.fields.values()]
            dtype = pa.struct(list(zip(node.fields, (child.type for child in children), strict=True)))
            nulls = self._nulls(node.column, rows) if node.column >= 0 else None
            return pa.Array.from_buffers(dtype, rows, [nulls], children=children)
        nulls, cells = self._nulls(node.column, rows), self._cells[self._columns[node.column, walk.BASE] :][:rows]
        if isinstance(node, Array):
            items = self._array(node.items, node.level)
            return pa.Array.from_buffers(pa.large_list(items.type), rows, [nulls, _offsets(cells)], children=[items])
        if pa.types.is_null(node.type):
            return pa.nulls(rows)
        if pa.types.is_large_string(node.type) or pa.types.is_large_binary(node.type):
            start, used = self._columns[node.column, [walk.TEXT_BASE, walk.TEXT_USED]]
            text = pa.py_buffer(self._text[start : start + used].copy())
            return pa.Array.from_buffers(node.type, rows, [nulls, _offsets(cells), text])
        values = pa.py_buffer(_values(cells, node.type))
        array = pa.Array.from_buffers(node.type, rows, [nulls, values])
        return pa.DictionaryArray.from_arrays(array, list(node.symbols)) if node.symbols else array

    def _nulls(self, column: int, rows: int) -> pa.Buffer | None:
        """Return Arrow's validity bits for a column; None if no value is null."""
        valid = self._valid[self._columns[column, walk.BASE] :][:rows]
        return None if valid.all() else pa.py_buffer(np.packbits(valid, bitorder="little"))


def places(column: pa.Array) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return (rows,) the first byte and the size of each value of a placed column. A null has size 0, as an empty
    value; a size of LARGEST_PLACED stands for that size and for all larger ones."""
    cells = column.fill_null(0).to_numpy()
    return cells >> walk.PLACE_BITS, cells & walk.LARGEST_PLACED


def _offsets(ends: npt.NDArray[np.int64]) -> pa.Buffer:
    return pa.py_buffer(np.concatenate([np.zeros(1, np.int64), ends]))


def _values(cells: npt.NDArray[np.int64], dtype: pa.DataType) -> npt.NDArray[Any]:
    """Return 64-bit cells in the width that Arrow uses for the type."""
    if pa.types.is_boolean(dtype):
        return np.packbits(cells != 0, bitorder="little")
    if pa.types.is_float32(dtype) or pa.types.is_int32(dtype):
        return cells.astype(np.int32)  # for a float32, these are its bits
    return cells.copy()


def is_compiled() -> bool:
    """Whether this process has loaded the compiled loop. If not, the first read loads it from numba's cache or compiles
    it."""
    return bool(walk.walk.signatures)  # type: ignore[attr-defined]


def is_cached() -> bool:
    """Whether numba's cache on this machine holds the compiled loop."""
    return any(Path(walk.walk.stats.cache_path).glob("walk.walk-*.nbi"))  # type: ignore[attr-defined]


def warm_up() -> None:
    """Load the loop from numba's cache on disk, or compile it, which takes some seconds."""
    schema = {"type": "record", "name": "one", "fields": [{"name": "number", "type": "int"}]}
    Columns(compile_plan(schema, ["number"])).read(b"\0", 1)
