"""Columns that grow as Avro data is read into them, and become Arrow arrays in the end."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from alert_broker.avro import walk
from alert_broker.avro.plan import Array, Node, ReadPlan, Record, compile_plan

FIRST_ROOM = 1024  # rows of a level and bytes of a column of strings, which double when they are full


@dataclass(frozen=True, slots=True)
class Fault:
    """Why a datum could not be read. datum: its number; start, at: its byte and that of the fault; field: its path."""

    datum: int
    start: int
    at: int
    field: str
    reason: str


class Columns:
    """Packets read with one plan, or with several of one layout: versions of a schema that differ in what is skipped.
    `read` appends, `take` gives what there is as Arrow columns and starts again."""

    def __init__(self, plan: ReadPlan) -> None:
        self.plan = self._reading = plan
        self._levels = np.zeros((plan.levels, 4), np.int64)
        self._columns = np.zeros((len(plan.level_of), 7), np.int64)
        self._columns[:, walk.LEVEL] = plan.level_of
        self._stack = np.zeros((plan.depth + 1, 2), np.int64)
        self._scratch = np.zeros(2, np.int64)
        self._cells, self._valid, self._text = np.empty(0, np.int64), np.empty(0, np.uint8), np.empty(0, np.uint8)
        self._levels[:, walk.ROOM] = FIRST_ROOM
        self._columns[:, walk.TEXT_ROOM] = FIRST_ROOM
        self._lay_out()

    def __len__(self) -> int:
        return int(self._levels[0, walk.ROWS])

    @property
    def rows(self) -> int:
        """Rows of the level that has most: the packets, or the rows of one of their lists."""
        return int(self._levels[:, walk.ROWS].max())

    def read(
        self, data: bytes | memoryview, count: int, plan: ReadPlan | None = None
    ) -> tuple[npt.NDArray[np.int64], Fault | None]:
        """Append `count` datums that fill the data; where each ends, and what is wrong with the one after them.

        plan: of the data, where it is not the one that these columns were made for.

        If bytes are left over, nothing is appended: the lengths do not add up, so where datums start is not known.
        """
        self._reading = plan = plan or self.plan
        assert plan.layout == self.plan.layout
        array = np.frombuffer(data, np.uint8)
        if array.flags.writeable:
            array.flags.writeable = False  # one type for the compiled loop, whatever the buffer
        ends = np.empty(min(count, len(array) // plan.least + 1), np.int64)
        report = np.zeros(6, np.int64)
        while (code := self._walk(array, count, ends, report)) == walk.FULL:
            self._grow(int(report[walk.WHICH]), int(report[walk.NEEDED]))
        if code == walk.OK:
            return ends, None
        done, start, at, operation = report[: walk.WHICH].tolist()
        if code == walk.LEFT:
            return ends[:0], Fault(0, 0, at, "", f"{len(array) - at} bytes left over")
        return ends[:done], Fault(done, start, at, plan.where[operation], walk.REASONS[code])

    def take(self) -> pa.RecordBatch:
        """What was read: a column for each wanted field at the top, with structs and lists as in the schema."""
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

    def _grow(self, which: int, needed: int) -> None:
        """Give a level, or the text of a column, twice the room or what it needs."""
        table, row, place = self._levels, which, walk.ROOM
        if which >= len(self._levels):
            table, row, place = self._columns, which - len(self._levels), walk.TEXT_ROOM
        table[row, place] = max(needed, 2 * table[row, place])
        self._lay_out()

    def _lay_out(self) -> None:
        """Place the columns behind each other in new buffers, and move what was read."""
        columns, old = self._columns, self._columns.copy()
        rooms = self._levels[columns[:, walk.LEVEL], walk.ROOM]
        columns[:, walk.BASE] = np.cumsum(rooms) - rooms
        columns[:, walk.TEXT_BASE] = np.cumsum(columns[:, walk.TEXT_ROOM]) - columns[:, walk.TEXT_ROOM]
        cells, valid = np.empty(rooms.sum(), np.int64), np.empty(rooms.sum(), np.uint8)
        text = np.empty(columns[:, walk.TEXT_ROOM].sum(), np.uint8)
        for new, before, level in zip(columns, old, columns[:, walk.LEVEL], strict=True):
            rows, used = self._levels[level, walk.ROWS], new[walk.TEXT_USED]
            for target, source in ((cells, self._cells), (valid, self._valid)):
                target[new[walk.BASE] :][:rows] = source[before[walk.BASE] :][:rows]
            text[new[walk.TEXT_BASE] :][:used] = self._text[before[walk.TEXT_BASE] :][:used]
        self._cells, self._valid, self._text = cells, valid, text

    def _array(self, node: Node, level: int) -> pa.Array:
        """The Arrow array of a node in the rows of a level."""
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
        """Arrow's bits for what is not null; None if nothing is."""
        valid = self._valid[self._columns[column, walk.BASE] :][:rows]
        return None if valid.all() else pa.py_buffer(np.packbits(valid, bitorder="little"))


def _offsets(ends: npt.NDArray[np.int64]) -> pa.Buffer:
    return pa.py_buffer(np.concatenate([np.zeros(1, np.int64), ends]))


def _values(cells: npt.NDArray[np.int64], dtype: pa.DataType) -> npt.NDArray[Any]:
    """Cells of 64 bits as the bytes that Arrow has for the type."""
    if pa.types.is_boolean(dtype):
        return np.packbits(cells != 0, bitorder="little")
    if pa.types.is_float32(dtype) or pa.types.is_int32(dtype):
        return cells.astype(np.int32)  # the bits of a float32, too
    return cells.copy()


def is_compiled() -> bool:
    """Whether this process has the loop; the first read otherwise loads it from numba's cache or compiles it."""
    return bool(walk.walk.signatures)  # type: ignore[attr-defined]


def is_cached() -> bool:
    """Whether numba has compiled the loop on this machine before."""
    return any(Path(walk.walk.stats.cache_path).glob("walk.walk-*.nbi"))  # type: ignore[attr-defined]


def warm_up() -> None:
    """Compile the loop, some seconds, or load it from numba's cache on disk."""
    schema = {"type": "record", "name": "one", "fields": [{"name": "number", "type": "int"}]}
    Columns(compile_plan(schema, ["number"])).read(b"\0", 1)
