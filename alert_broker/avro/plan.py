"""Compile an Avro schema and the wanted fields into the table of operations that `walk` runs over the bytes.

Fields that nobody wants are skipped in as few operations as possible. Neighbouring fields of fixed size share one
operation. A run of optional fields of fixed size, which is most of an alert, is also one operation, with one row of
`items` for each field.
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

# values, counting each record again wherever it is named: forty times as many as LSST's schema has
MAX_VALUES = 20_000
MAX_FIXED_BYTES = 1 << 30  # bytes
MAX_DEPTH = 64  # nesting levels of values
NO_TAG = -1

# For each Avro type: the operation, its operand and the Arrow type. The operand of `fixed` is its size, and the operand
# of `enum` is its number of symbols.
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
BOOLEAN_ZERO_BITS = 0xFE  # the bits that are 0 in a boolean

Wanted = Mapping[str, Any]  # maps a field to the wanted fields inside it; {} stands for the field's own value


class SchemaError(EdgekitError):
    """A schema that cannot be read safely, or that does not offer a wanted field as a column."""


@dataclass(frozen=True, slots=True)
class Leaf:
    """A column of scalars. symbols: those of an enum, whose column holds their numbers."""

    column: int
    type: pa.DataType
    symbols: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Record:
    """A record's columns. column: the column that says in which rows the record is null, -1 if it is never null."""

    fields: Mapping[str, Node]
    column: int


@dataclass(frozen=True, slots=True)
class Array:
    """An array, whose items are the rows of a level of their own. column: holds the last row of each array, plus
    one."""

    column: int
    level: int
    items: Node


Node = Leaf | Record | Array


@dataclass(frozen=True, slots=True, eq=False)
class ReadPlan:
    """A compiled schema.

    program: (operations, 5) int64, operation and operands; items: (fields, 4) int64, see `walk`; paths: the field of
    each operation; level_of: (columns,) the level whose rows a column holds: level 0 has the packets, and each wanted
    array adds a level; min_bytes: the fewest bytes of a datum; depth: the nesting depth of arrays and maps. layout:
    plans with an equal layout fill the same columns.
    """

    program: npt.NDArray[np.int64]
    items: npt.NDArray[np.int64]
    paths: tuple[str, ...]
    level_of: npt.NDArray[np.int64]
    levels: int
    root: Record
    min_bytes: int
    depth: int
    layout: str


def compile_plan(schema: Any, wanted: Iterable[str], placed: Iterable[str] = ()) -> ReadPlan:
    """Return the plan that reads the wanted fields of a record. A wanted field is a dotted path; arrays add no name to
    it.

    schema: as fastavro parsed it, so that its names are complete. The plan leaves out paths that the schema does not
    have, since versions of a schema differ. placed: further wanted fields, of type bytes, which are not copied: their
    column is int64 and says where in the data each value is (`columns.places`).

    Raises SchemaError if the schema has none of the paths; if it contains itself, is too large, or has array items or
    records that take no bytes; and if a path leads to a value that cannot be a column: a map, or a union of several
    types that are not all numbers.
    """
    tree: dict[str, Any] = {}
    placed = frozenset(placed)
    for path in (*wanted, *sorted(placed)):
        inside = tree
        for name in path.split("."):
            inside = inside.setdefault(name, {})
    compiler = _Compiler(placed)
    root, min_bytes = compiler.value(schema, tree, "", 0, ())
    if not isinstance(root, Record):
        raise SchemaError(f"the schema has none of the fields {', '.join(tree)}")
    if min_bytes == 0:
        raise SchemaError("the schema's values take no bytes")
    compiler.add(walk.END, "the end")
    rows = np.array([operation for operation, _ in compiler.program], dtype=np.int64)
    return ReadPlan(
        rows,
        np.array(compiler.items, dtype=np.int64).reshape(-1, 4),
        tuple(path for _, path in compiler.program),
        np.array(compiler.level_of, dtype=np.int64),
        compiler.levels,
        root,
        min_bytes,
        compiler.depth,
        f"{compiler.depth} {compiler.level_of} {root}",
    )


class _Compiler:
    def __init__(self, placed: frozenset[str] = frozenset()) -> None:
        self._placed = placed
        self.program: list[tuple[list[int], str]] = []
        self.items: list[list[int]] = []
        self.level_of: list[int] = []
        self.levels = 1
        self.depth = 0
        self._named: dict[str, Any] = {}
        self._values = 0
        self._open = 0  # arrays and maps around the current value
        self._label = 0  # operations before this one are not merged with later ones, because a jump leads between them

    def value(
        self, schema: Any, wanted: Wanted | None, path: str, level: int, enclosing: tuple[str, ...]
    ) -> tuple[Node | None, int]:
        """Add the operations for a value, which skip it if `wanted` is None. Return its columns, if any, and its fewest
        bytes."""
        self._values += 1
        if self._values > MAX_VALUES or len(enclosing) > MAX_DEPTH:
            raise SchemaError(f"the schema has more than {MAX_VALUES} values, or nests them more than {MAX_DEPTH} deep")
        inner = (*enclosing, "")
        if isinstance(schema, list):
            return self._union(schema, wanted, path, level, inner)
        if isinstance(schema, str) and schema in self._named:
            if schema in enclosing:
                raise SchemaError(f"the schema is recursive: {schema} contains itself")
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
                raise SchemaError(f"{path} is a map, which cannot be a column")
            return self._map(schema, path, level, inner)
        if wanted:
            raise SchemaError(f"{path} is of type {avro_type!r}; it has no field {next(iter(wanted))!r}")
        return self._scalar(schema, wanted, path, level)

    def add(
        self, operation: int, path: str, column: int = -1, first: int = 0, second: int = 0, tag: int = NO_TAG
    ) -> int:
        """Append an operation and return its index in the program."""
        self.program.append(([operation, column, first, second, tag], path))
        return len(self.program) - 1

    def _define(self, schema: Any) -> str:
        """Remember a type that has a name, because the name may stand for the type later on. Return the name."""
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
        """Add the operation for a value without inner values. With a tag, the value may be null."""
        avro_type, size, symbols = _scalar_parts(schema)
        operation, operand, arrow = SCALARS[avro_type]
        if avro_type in SIZES or avro_type == "fixed":
            operand, min_bytes = size, size
        else:
            operand, min_bytes = len(symbols) or operand, 1
        min_bytes = min_bytes if tag == NO_TAG else 1
        if wanted is not None and path in self._placed:
            if avro_type != "bytes":
                raise SchemaError(f"{path} is of type {avro_type!r}; only the place of bytes can be read")
            column = self._column(level)
            self.add(operation, path, column, operand, 1, tag)
            return Leaf(column, pa.int64()), min_bytes
        if wanted is not None:
            column = self._column(level)
            self.add(operation, path, column, operand, tag=tag)
            return Leaf(column, arrow, symbols), min_bytes
        if tag != NO_TAG and size:
            self._skip_optional(size, tag, BOOLEAN_ZERO_BITS if avro_type == "boolean" else 0, path)
        elif size and avro_type != "boolean":
            self._skip(size, path)
        elif avro_type != "null":
            self.add(operation, path, -1, operand, tag=tag)
        return None, min_bytes

    def _skip(self, size: int, path: str) -> None:
        last = self._last(walk.SKIP)
        if last and last[walk.FIRST] < MAX_FIXED_BYTES:
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
        """Return the last operation if it is this one and no jump leads to the position after it."""
        if len(self.program) > self._label and self.program[-1][0][0] == operation:
            return self.program[-1][0]
        return None

    def _record(
        self, schema: Any, wanted: Wanted | None, path: str, level: int, enclosing: tuple[str, ...]
    ) -> tuple[Node | None, int]:
        if wanted is not None and not wanted:
            raise SchemaError(f"{path} is a record; name the fields wanted in it")
        found: dict[str, Node] = {}
        min_bytes = 0
        for item in schema["fields"]:
            name = item["name"]
            inside = wanted.get(name) if wanted else None
            node, size = self.value(item["type"], inside, f"{path}.{name}".lstrip("."), level, enclosing)
            min_bytes += size
            if node is not None:
                found[name] = node
        if min_bytes == 0:
            raise SchemaError(f"the record {schema['name']} takes no bytes")
        return (Record(found, -1) if found else None), min_bytes

    def _array(
        self, schema: Any, wanted: Wanted | None, path: str, level: int, enclosing: tuple[str, ...]
    ) -> tuple[Node | None, int]:
        # Only the compiled items show whether the schema has a wanted field in them. If not, the level is removed
        # again.
        columns, levels = len(self.level_of), self.levels
        column = self._column(level) if wanted is not None else -1
        inside = -1
        if wanted is not None:
            inside, self.levels = self.levels, self.levels + 1
        start, node, min_bytes = self._block(schema["items"], wanted, path, inside, enclosing)
        if min_bytes == 0:
            raise SchemaError(f"the items of the array {path} take no bytes")
        if node is None and wanted is not None:
            del self.level_of[columns:]
            self.levels, column, inside = levels, -1, -1
        self._loop(start, inside, column, min_bytes, path)
        return (Array(column, inside, node) if node is not None else None), 1

    def _map(self, schema: Any, path: str, level: int, enclosing: tuple[str, ...]) -> tuple[None, int]:
        start, _, min_bytes = self._block(schema["values"], None, path, level, enclosing, keys=True)
        self._loop(start, -1, -1, min_bytes, path)
        return None, 1

    def _block(
        self, items: Any, wanted: Wanted | None, path: str, level: int, enclosing: tuple[str, ...], keys: bool = False
    ) -> tuple[int, Node | None, int]:
        """Add an array or a map up to the end of its loop's body: BEGIN, a map's key, and the item."""
        start = self.add(walk.BEGIN, path)
        self._label = len(self.program)
        self._open += 1
        self.depth = max(self.depth, self._open)
        if keys:
            self._scalar("string", None, path, level)
        node, min_bytes = self.value(items, wanted, path, level, enclosing)
        self._open -= 1
        return start, node, min_bytes + keys

    def _loop(self, start: int, level: int, column: int, min_bytes: int, path: str) -> None:
        """Close the loop that BEGIN at `start` opened."""
        self.program[start][0][walk.FIRST] = self.add(walk.NEXT, path, column, start + 1, level, min_bytes)
        self._label = len(self.program)

    def _union(
        self, branches: list[Any], wanted: Wanted | None, path: str, level: int, enclosing: tuple[str, ...]
    ) -> tuple[Node | None, int]:
        avro_types = [_type_name(branch) for branch in branches]
        non_null = [avro_type for avro_type in avro_types if avro_type != "null"]
        if not non_null:
            raise SchemaError(f"the union {path} has no type but null")
        if len(branches) == 2 and len(non_null) == 1 and non_null[0] in SCALARS and not wanted:
            null = avro_types.index("null")
            self._define(branches[1 - null])
            return self._scalar(branches[1 - null], wanted, path, level, 2 * null)
        if wanted is None:
            return None, self._branches(
                branches, path, lambda branch: self.value(branch, None, path, level, enclosing)[1]
            )
        if len(non_null) == 1:
            return self._optional(branches, wanted, path, level, enclosing)
        return self._numbers(avro_types, wanted, path, level)

    def _branches(self, branches: list[Any], path: str, emit: Callable[[Any], int]) -> int:
        """Add UNION, a jump to each branch, and the branches, each followed by a jump to the end. Return the fewest
        bytes."""
        self.add(walk.UNION, path, first=len(branches))
        jumps = [self.add(walk.JUMP, path) for _ in branches]
        ends, min_bytes = [], []
        for jump, branch in zip(jumps, branches, strict=True):
            self._set_target(jump)
            min_bytes.append(emit(branch))
            ends.append(self.add(walk.JUMP, path))
        for end in ends:
            self._set_target(end)
        return 1 + min(min_bytes)

    def _set_target(self, jump: int) -> None:
        """Make a jump lead to the next operation."""
        self.program[jump][0][walk.FIRST] = self._label = len(self.program)

    def _optional(
        self, branches: list[Any], wanted: Wanted, path: str, level: int, enclosing: tuple[str, ...]
    ) -> tuple[Node | None, int]:
        """Add a record or an array that may be null."""
        node: Node | None = None
        nulls: list[int] = []

        def emit(branch: Any) -> int:
            nonlocal node
            if _type_name(branch) == "null":
                # Only the compiled other branch shows which columns are null then, and that branch may come second.
                nulls.append(self.add(walk.JUMP, path))
                return 0
            node, min_bytes = self.value(branch, wanted, path, level, enclosing)
            if isinstance(node, Record):
                node = Record(node.fields, self._column(level))
                self.add(walk.PRESENT, path, node.column)
            return min_bytes

        min_bytes = self._branches(branches, path, emit)
        skip_nulls = self.add(walk.JUMP, path)  # the branch with a value ends here and skips the nulls
        for jump in nulls:
            self._set_target(jump)
        for column, rows in _columns(node):
            self.add(walk.NULL, path, column, rows)
        self._set_target(skip_nulls)
        return node, min_bytes

    def _numbers(self, avro_types: list[Any], wanted: Wanted, path: str, level: int) -> tuple[Node, int]:
        """Add a union of several number types, as a column of the widest of them."""
        if wanted or not all(avro_type in (*NUMBERS, "null") for avro_type in avro_types):
            shown = ", ".join(map(str, avro_types))
            raise SchemaError(f"{path} is a union of {shown}; a column can hold null and one type, or numbers")
        real = "float" in avro_types or "double" in avro_types
        column = self._column(level)

        def emit(avro_type: str) -> int:
            operation, operand, _ = SCALARS[avro_type]
            self.add(operation, path, column, operand, int(real))
            return SIZES.get(avro_type, 1)

        return Leaf(column, pa.float64() if real else pa.int64()), self._branches(avro_types, path, emit)


def _type_name(schema: Any) -> str:
    """Return the name of a type, or of a type that was defined before; "" if the type is nested deeper."""
    avro_type = schema["type"] if isinstance(schema, dict) else schema
    return avro_type if isinstance(avro_type, str) else ""


def _scalar_parts(schema: Any) -> tuple[str, int, tuple[str, ...]]:
    """Return a scalar's type, the number of bytes that it always takes (0 if that varies), and the symbols of an
    enum."""
    avro_type = _type_name(schema)
    if avro_type not in SCALARS:
        raise SchemaError(f"the schema has a value of unknown type {avro_type!r}")
    if avro_type == "fixed":
        size = schema["size"]
        if isinstance(size, bool) or not isinstance(size, int) or not 0 <= size <= MAX_FIXED_BYTES:
            raise SchemaError(f"the schema has a fixed type of {size!r} bytes; expected 0 to {MAX_FIXED_BYTES}")
        return avro_type, size, ()
    symbols = tuple(map(str, schema["symbols"])) if avro_type == "enum" else ()
    if avro_type == "enum" and not symbols:
        raise SchemaError("the schema has an enum without symbols")
    return avro_type, SIZES.get(avro_type, 0), symbols


def _columns(node: Node | None) -> Iterator[tuple[int, int]]:
    """Yield each column that has one row per row of the node: its number, and for an array the level of its items'
    rows, else 0."""
    if isinstance(node, Record):
        for inner in node.fields.values():
            yield from _columns(inner)
        if node.column >= 0:
            yield node.column, 0
    elif node is not None:
        yield node.column, node.level if isinstance(node, Array) else 0
