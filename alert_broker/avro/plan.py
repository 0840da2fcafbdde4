"""Compile an Avro schema and the fields that are wanted into the table of operations that `walk` runs over the bytes.

What is not wanted is skipped in as few operations as possible: neighbours of the same kind share one, and a run of
fields that are null or of fixed size, which is most of an alert, is a single operation with a row of `items` for each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from alert_broker.avro import walk
from edgekit.errors import EdgekitError

LARGEST_SCHEMA = 20_000  # values, with each record written out where it is named: forty times LSST's
LARGEST_FIXED = 1 << 30  # bytes
DEEPEST = 64  # values inside each other
NO_TAG = -1

# Operation, its operand, and the Arrow type of each type; the operand of `fixed` is its size, of `enum` its symbols.
SCALARS = {
    "null": (walk.NULL, 0, pa.null()),
    "boolean": (walk.BOOLEAN, 0, pa.bool_()),
    "int": (walk.NUMBER, 5, pa.int32()),
    "long": (walk.NUMBER, 10, pa.int64()),
    "float": (walk.FLOAT, 0, pa.float32()),
    "double": (walk.DOUBLE, 0, pa.float64()),
    "string": (walk.SIZED, 1, pa.large_string()),
    "bytes": (walk.SIZED, 0, pa.large_binary()),
    "fixed": (walk.FIXED, 0, pa.large_binary()),
    "enum": (walk.ENUM, 0, pa.int32()),
}
SIZES = {"null": 0, "boolean": 1, "float": 4, "double": 8}
NUMBERS = ("int", "long", "float", "double")
NOT_OF_BOOLEAN = 0xFE  # the bits that are 0 in a boolean

Wanted = Mapping[str, Any]  # field to what is wanted inside it, {} for its value


class SchemaError(EdgekitError):
    """A schema that cannot be read safely, or not for what is wanted of it."""


@dataclass(frozen=True, slots=True)
class Leaf:
    """A column of scalars; symbols: of an enum, whose column holds their numbers."""

    column: int
    type: pa.DataType
    symbols: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Record:
    """Columns side by side; column: says where the record is null, -1 if it cannot be."""

    fields: Mapping[str, Node]
    column: int


@dataclass(frozen=True, slots=True)
class Array:
    """Rows of a level of their own; column: where the rows of each array end."""

    column: int
    level: int
    items: Node


Node = Leaf | Record | Array


@dataclass(frozen=True, slots=True, eq=False)
class ReadPlan:
    """A compiled schema.

    program: (operations, 5) int64, operation and operands; items: (fields, 4) int64, see `walk`; where: the field of
    each operation; level_of: (columns,) the level whose rows a column has, 0 for the packets, one more for each wanted
    array; least: the fewest bytes of a datum; depth: of arrays and maps inside each other. layout: plans in which it is
    equal fill the same columns.
    """

    program: npt.NDArray[np.int64]
    items: npt.NDArray[np.int64]
    where: tuple[str, ...]
    level_of: npt.NDArray[np.int64]
    levels: int
    root: Record
    least: int
    depth: int
    layout: str


def compile_plan(schema: Any, wanted: Iterable[str]) -> ReadPlan:
    """The plan for reading the wanted fields, as dotted paths in which arrays add no name, out of a record.

    schema: as parsed by fastavro, so that names are complete. Paths that it does not have are left out, since versions
    of a schema differ; SchemaError if none is left, for a schema that contains itself, has values without bytes where
    they would be counted, or is too large, and for a path to what is no column: a map, or a union of several types that
    are not all numbers.
    """
    tree: dict[str, Any] = {}
    for path in wanted:
        inside = tree
        for name in path.split("."):
            inside = inside.setdefault(name, {})
    compiler = _Compiler()
    root, least = compiler.value(schema, tree, "", 0, ())
    if not isinstance(root, Record):
        raise SchemaError(f"it has none of the fields {', '.join(tree)}")
    if least == 0:
        raise SchemaError("its values take no bytes")
    compiler.add(walk.END, "the end")
    rows = np.array([operation for operation, _ in compiler.program], dtype=np.int64)
    return ReadPlan(
        rows,
        np.array(compiler.items, dtype=np.int64).reshape(-1, 4),
        tuple(where for _, where in compiler.program),
        np.array(compiler.level_of, dtype=np.int64),
        compiler.levels,
        root,
        least,
        compiler.depth,
        f"{compiler.depth} {compiler.level_of} {root}",
    )


class _Compiler:
    def __init__(self) -> None:
        self.program: list[tuple[list[int], str]] = []
        self.items: list[list[int]] = []
        self.level_of: list[int] = []
        self.levels = 1
        self.depth = 0
        self._named: dict[str, Any] = {}
        self._values = 0
        self._open = 0  # arrays and maps around the present value
        self._label = 0  # operations before this one are not merged with later ones: a jump leads between them

    def value(
        self, schema: Any, wanted: Wanted | None, path: str, level: int, enclosing: tuple[str, ...]
    ) -> tuple[Node | None, int]:
        """Operations for a value, skipped if `wanted` is None; its columns, if any, and its fewest bytes."""
        self._values += 1
        if self._values > LARGEST_SCHEMA or len(enclosing) > DEEPEST:
            raise SchemaError(f"it is too large: more than {LARGEST_SCHEMA} values or {DEEPEST} inside each other")
        inner = (*enclosing, "")
        if isinstance(schema, list):
            return self._union(schema, wanted, path, level, inner)
        if isinstance(schema, str) and schema in self._named:
            if schema in enclosing:
                raise SchemaError(f"it is recursive: {schema} contains itself")
            schema = self._named[schema]
        avro_type = schema["type"] if isinstance(schema, dict) else schema
        if isinstance(avro_type, (dict, list)):
            return self.value(avro_type, wanted, path, level, inner)
        if name := self._define(schema):
            inner = (*enclosing, name)
        if avro_type in ("record", "error"):
            return self._record(schema, wanted, path, level, inner)
        if avro_type == "array":
            return self._array(schema, wanted, path, level, inner)
        if avro_type == "map":
            if wanted is not None:
                raise SchemaError(f"{path} is a map, which gives no column")
            return self._map(schema, path, level, inner)
        if wanted:
            raise SchemaError(f"{path} is of type {avro_type!r}; it has no field {next(iter(wanted))!r}")
        return self._scalar(schema, wanted, path, level)

    def add(
        self, operation: int, where: str, column: int = -1, first: int = 0, second: int = 0, tag: int = NO_TAG
    ) -> int:
        """Append an operation; its place in the program."""
        self.program.append(([operation, column, first, second, tag], where))
        return len(self.program) - 1

    def _define(self, schema: Any) -> str:
        """Remember a type that has a name, which may stand for it later on; the name."""
        name = schema.get("name", "") if isinstance(schema, dict) else ""
        if name:
            self._named[name] = schema
        return str(name)

    def _column(self, level: int) -> int:
        self.level_of.append(level)
        return len(self.level_of) - 1

    def _scalar(
        self, schema: Any, wanted: Wanted | None, path: str, level: int, tag: int = NO_TAG
    ) -> tuple[Leaf | None, int]:
        """A value with no others inside it, or null where there is a tag."""
        avro_type, size, symbols = _checked(schema)
        operation, operand, arrow = SCALARS[avro_type]
        if avro_type in SIZES or avro_type == "fixed":
            operand, least = size, size
        else:
            operand, least = len(symbols) or operand, 1
        least = least if tag == NO_TAG else 1
        if wanted is not None:
            column = self._column(level)
            self.add(operation, path, column, operand, tag=tag)
            return Leaf(column, arrow, symbols), least
        if tag != NO_TAG and size:
            self._skip_optional(size, tag, NOT_OF_BOOLEAN if avro_type == "boolean" else 0, path)
        elif size and avro_type != "boolean":
            self._skip(size, path)
        elif avro_type != "null":
            self.add(operation, path, -1, operand, tag=tag)
        return None, least

    def _skip(self, size: int, path: str) -> None:
        last = self._last(walk.SKIP)
        if last and last[walk.FIRST] < LARGEST_FIXED:
            last[walk.FIRST] += size
        else:
            self.add(walk.SKIP, path, first=size)

    def _skip_optional(self, size: int, tag: int, zero_bits: int, path: str) -> None:
        before = 0
        if fixed := self._last(walk.SKIP):
            before = fixed[walk.FIRST]
            self.program.pop()
        run = self._last(walk.RUN)
        if run is None:
            run = self.program[self.add(walk.RUN, path, first=len(self.items))][0]
        run[walk.SECOND] += 1
        self.items.append([before, size, tag, zero_bits])

    def _last(self, operation: int) -> list[int] | None:
        """The last operation, if it is this one and no jump leads behind it."""
        if len(self.program) > self._label and self.program[-1][0][0] == operation:
            return self.program[-1][0]
        return None

    def _record(
        self, schema: Any, wanted: Wanted | None, path: str, level: int, enclosing: tuple[str, ...]
    ) -> tuple[Node | None, int]:
        if wanted is not None and not wanted:
            raise SchemaError(f"{path} is a record; name the fields wanted in it")
        found: dict[str, Node] = {}
        least = 0
        for item in schema["fields"]:
            name = item["name"]
            inside = wanted.get(name) if wanted else None
            node, size = self.value(item["type"], inside, f"{path}.{name}".lstrip("."), level, enclosing)
            least += size
            if node is not None:
                found[name] = node
        if least == 0:
            raise SchemaError(f"it has a record that takes no bytes: {schema['name']}")
        return (Record(found, -1) if found else None), least

    def _array(
        self, schema: Any, wanted: Wanted | None, path: str, level: int, enclosing: tuple[str, ...]
    ) -> tuple[Node | None, int]:
        # Whether a wanted field is in it shows only once the items are compiled, so a level is taken back if not.
        columns, levels = len(self.level_of), self.levels
        column = self._column(level) if wanted is not None else -1
        inside = -1
        if wanted is not None:
            inside, self.levels = self.levels, self.levels + 1
        start, node, least = self._block(schema["items"], wanted, path, inside, enclosing)
        if least == 0:
            raise SchemaError(f"it has an array of values that take no bytes: {path}")
        if node is None and wanted is not None:
            del self.level_of[columns:]
            self.levels, column, inside = levels, -1, -1
        self._loop(start, inside, column, least, path)
        return (Array(column, inside, node) if node is not None else None), 1

    def _map(self, schema: Any, path: str, level: int, enclosing: tuple[str, ...]) -> tuple[None, int]:
        start, _, least = self._block(schema["values"], None, path, level, enclosing, keys=True)
        self._loop(start, -1, -1, least, path)
        return None, 1

    def _block(
        self, items: Any, wanted: Wanted | None, path: str, level: int, enclosing: tuple[str, ...], keys: bool = False
    ) -> tuple[int, Node | None, int]:
        """An array or a map up to the end of its loop's body: BEGIN, the key of a map, the item."""
        start = self.add(walk.BEGIN, path)
        self._label = len(self.program)
        self._open += 1
        self.depth = max(self.depth, self._open)
        if keys:
            self._scalar("string", None, path, level)
        node, least = self.value(items, wanted, path, level, enclosing)
        self._open -= 1
        return start, node, least + keys

    def _loop(self, start: int, level: int, column: int, least: int, path: str) -> None:
        """Close the loop that BEGIN at `start` opened."""
        self.program[start][0][walk.FIRST] = self.add(walk.NEXT, path, column, start + 1, level, least)
        self._label = len(self.program)

    def _union(
        self, branches: list[Any], wanted: Wanted | None, path: str, level: int, enclosing: tuple[str, ...]
    ) -> tuple[Node | None, int]:
        avro_types = [_type_name(branch) for branch in branches]
        valued = [avro_type for avro_type in avro_types if avro_type != "null"]
        if not valued:
            raise SchemaError(f"it has a union of nothing: {path}")
        if len(branches) == 2 and len(valued) == 1 and valued[0] in SCALARS and not wanted:
            null = avro_types.index("null")
            self._define(branches[1 - null])
            return self._scalar(branches[1 - null], wanted, path, level, 2 * null)
        if wanted is None:
            return None, self._branches(
                branches, path, lambda branch: self.value(branch, None, path, level, enclosing)[1]
            )
        if len(valued) == 1:
            return self._optional(branches, wanted, path, level, enclosing)
        return self._numbers(avro_types, wanted, path, level)

    def _branches(self, branches: list[Any], path: str, emit: Callable[[Any], int]) -> int:
        """UNION, a jump to each branch, the branches, each with a jump to the end; the fewest bytes."""
        self.add(walk.UNION, path, first=len(branches))
        jumps = [self.add(walk.JUMP, path) for _ in branches]
        ends, least = [], []
        for jump, branch in zip(jumps, branches, strict=True):
            self._aim(jump)
            least.append(emit(branch))
            ends.append(self.add(walk.JUMP, path))
        for end in ends:
            self._aim(end)
        return 1 + min(least)

    def _aim(self, jump: int) -> None:
        """Have a jump lead to what comes next."""
        self.program[jump][0][walk.FIRST] = self._label = len(self.program)

    def _optional(
        self, branches: list[Any], wanted: Wanted, path: str, level: int, enclosing: tuple[str, ...]
    ) -> tuple[Node | None, int]:
        """A record or an array, or null."""
        node: Node | None = None
        nulls: list[int] = []

        def emit(branch: Any) -> int:
            nonlocal node
            if _type_name(branch) == "null":
                # Which columns are null then is known once the other branch is compiled, and that may come second.
                nulls.append(self.add(walk.JUMP, path))
                return 0
            node, least = self.value(branch, wanted, path, level, enclosing)
            if isinstance(node, Record):
                node = Record(node.fields, self._column(level))
                self.add(walk.PRESENT, path, node.column)
            return least

        least = self._branches(branches, path, emit)
        over = self.add(walk.JUMP, path)  # for the branch with a value, which ends here
        for jump in nulls:
            self._aim(jump)
        for column, rows in _columns(node):
            self.add(walk.NULL, path, column, rows)
        self._aim(over)
        return node, least

    def _numbers(self, avro_types: list[Any], wanted: Wanted, path: str, level: int) -> tuple[Node, int]:
        """A union of several kinds of numbers, as the widest of them."""
        if wanted or not all(avro_type in (*NUMBERS, "null") for avro_type in avro_types):
            shown = ", ".join(map(str, avro_types))
            raise SchemaError(f"{path} is a union of {shown}; a column can be of null and one type, or of numbers")
        real = "float" in avro_types or "double" in avro_types
        column = self._column(level)

        def emit(avro_type: str) -> int:
            operation, operand, _ = SCALARS[avro_type]
            self.add(operation, path, column, operand, int(real))
            return SIZES.get(avro_type, 1)

        return Leaf(column, pa.float64() if real else pa.int64()), self._branches(avro_types, path, emit)


def _type_name(schema: Any) -> str:
    """The name of a type, or of one that was defined before; empty if that lies deeper."""
    avro_type = schema["type"] if isinstance(schema, dict) else schema
    return avro_type if isinstance(avro_type, str) else ""


def _checked(schema: Any) -> tuple[str, int, tuple[str, ...]]:
    """A scalar's type, the bytes that it always takes, and the symbols of an enum."""
    avro_type = _type_name(schema)
    if avro_type not in SCALARS:
        raise SchemaError(f"it has a value of unknown type {avro_type!r}")
    if avro_type == "fixed":
        size = schema["size"]
        if isinstance(size, bool) or not isinstance(size, int) or not 0 <= size <= LARGEST_FIXED:
            raise SchemaError(f"it has a fixed of {size!r} bytes; expected 0 to {LARGEST_FIXED}")
        return avro_type, size, ()
    symbols = tuple(map(str, schema["symbols"])) if avro_type == "enum" else ()
    if avro_type == "enum" and not symbols:
        raise SchemaError("it has an enum without symbols")
    return avro_type, SIZES.get(avro_type, 0), symbols


def _columns(node: Node | None) -> Iterator[tuple[int, int]]:
    """Columns that have a row where the node stands: number, and the level of an array's rows, or 0."""
    if isinstance(node, Record):
        for inner in node.fields.values():
            yield from _columns(inner)
        if node.column >= 0:
            yield node.column, 0
    elif node is not None:
        yield node.column, node.level if isinstance(node, Array) else 0
