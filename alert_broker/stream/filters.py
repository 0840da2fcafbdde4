"""Filters: a small language of expressions over the columns of the result.

    best_class == "KN" and best_probability > 0.8 or n_det_g >= 3
    p_SNIa + p_SNII > 0.9
    survey in ("ztf", "lsst") and best_class is not null

The grammar is Python's: `ast` parses an expression, and Python never runs it. An expression consists of names of
columns, numbers, texts, `true`, `false` and `null`; of `+ - * /` on numbers, in float64; of comparisons, which may be
chained; of `in` and `not in` with a list of values; of `is null`; and of `and`, `or`, `not`. If the name of a column is
not a Python name, such as `p_SLSN-I`, underscores replace the other characters (`p_SLSN_I`), as in Avro output.

As in SQL, a comparison with null is neither true nor false, and neither is `not` of it, nor `and` and `or` if they
depend on it. A filter accepts a row only if the expression is true.
"""

from __future__ import annotations

import ast
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from alert_broker.stream.outputs import avro_name
from edgekit.errors import EdgekitError, unknown

MAX_LENGTH = 2000  # characters
MAX_DEPTH = 32  # nesting levels of expressions; a chain of `and` is one level
SHOWN = 100  # characters of a filter in an error
CATEGORIES = ("number", "text", "boolean", "null")

Value = Any  # an Arrow array or scalar
Evaluate = Callable[[pa.RecordBatch], Value]

ARITHMETIC: dict[type[ast.operator], Callable[[Value, Value], Value]] = {
    ast.Add: pc.add,
    ast.Sub: pc.subtract,
    ast.Mult: pc.multiply,
    ast.Div: pc.divide,
}
COMPARISONS: dict[type[ast.cmpop], Callable[[Value, Value], Value]] = {
    ast.Eq: pc.equal, ast.NotEq: pc.not_equal, ast.Lt: pc.less, ast.LtE: pc.less_equal, ast.Gt: pc.greater,
    ast.GtE: pc.greater_equal,
}  # fmt: skip
CONSTANTS: dict[str, bool | None] = {"true": True, "false": False, "null": None}


@dataclass(frozen=True, slots=True)
class Filter:
    """A compiled expression. columns: the columns that it reads."""

    text: str
    columns: tuple[str, ...]
    _evaluate: Evaluate = field(repr=False)

    def __call__(self, rows: pa.RecordBatch) -> pa.BooleanArray:
        """Return (rows,) whether the filter accepts each row; no element is null."""
        found = self._evaluate(rows)
        if isinstance(found, pa.Scalar):
            found = pa.repeat(found, rows.num_rows)
        return pc.fill_null(found, False)


@dataclass(frozen=True, slots=True)
class _Part:
    """A part of the expression. category: one of CATEGORIES."""

    category: str
    evaluate: Evaluate
    constant: bool = False


def compile(text: str, schema: pa.Schema) -> Filter:
    """Compile an expression over rows of a schema. Raises EdgekitError with the reason if the text is not a valid
    expression."""
    text = text.strip()
    if len(text) > MAX_LENGTH:
        raise EdgekitError(f"the filter {shown(text)} has {len(text)} characters; expected at most {MAX_LENGTH}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # warnings of odd escapes in texts
            tree = ast.parse(text, mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        reason = (
            error.msg
            if isinstance(error, SyntaxError)
            else "it is nested too deep, or has characters that no expression may have"
        )
        where = f" at character {error.offset}" if isinstance(error, SyntaxError) and error.offset else ""
        raise EdgekitError(f"the filter {shown(text)} is not an expression{where}: {reason}") from None
    compiler = _Compiler(text, schema)
    part = compiler.part(tree.body, 0)
    if part.category not in ("boolean", "null"):
        raise compiler.error(tree.body, f"is a {part.category}; expected a condition, such as a comparison")
    return Filter(text, tuple(compiler.columns), part.evaluate)


def shown(text: str) -> str:
    """Return the text in quotes, shortened if it is long."""
    return repr(text if len(text) <= SHOWN else f"{text[:SHOWN]}...")


class _Compiler:
    def __init__(self, text: str, schema: pa.Schema) -> None:
        self.text, self.schema = text, schema
        self.columns: dict[str, None] = {}
        self._names = {avro_name(name): name for name in schema.names}

    def part(self, node: ast.expr, depth: int) -> _Part:
        if depth > MAX_DEPTH:
            raise EdgekitError(
                f"the filter {shown(self.text)} nests expressions more than {MAX_DEPTH} deep; simplify it"
            )
        match node:
            case ast.Constant(value=value):
                return self._constant(node, value)
            case ast.Name(id=name) if name in CONSTANTS:
                return self._constant(node, CONSTANTS[name])
            case ast.Name(id=name):
                return self._column(name)
            case ast.BoolOp(op=operator, values=values):
                combine = pc.and_kleene if isinstance(operator, ast.And) else pc.or_kleene
                parts = [self._condition(value, depth) for value in values]
                return _Part("boolean", _fold(combine, parts))
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                return _Part("boolean", _apply(pc.invert, self._condition(operand, depth)))
            case ast.UnaryOp(op=ast.USub() | ast.UAdd() as sign, operand=ast.Constant(value=int() | float() as value)):
                return self._constant(node, -value if isinstance(sign, ast.USub) else value)
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return _Part("number", _apply(pc.negate, self._number(operand, depth)))
            case ast.BinOp(left=left, op=operator, right=right) if type(operator) in ARITHMETIC:
                sides = self._number(left, depth), self._number(right, depth)
                return _Part("number", _apply(ARITHMETIC[type(operator)], *sides))
            case ast.Compare(left=left, ops=operators, comparators=rights):
                pairs = zip([left, *rights], operators, rights, strict=False)
                return _Part("boolean", _fold(pc.and_kleene, [self._comparison(*pair, depth) for pair in pairs]))
        raise self.error(
            node,
            "is not part of the filter language; it has columns, constants, + - * /, comparisons, "
            "in, is null, and, or, not",
        )

    def error(self, node: ast.expr, reason: str) -> EdgekitError:
        source = ast.get_source_segment(self.text, node) or ""
        return EdgekitError(f"in the filter {shown(self.text)}: {shown(source)} {reason}")

    def _column(self, name: str) -> _Part:
        if name not in self._names:
            raise unknown("column", name, self._names, where=f"the filter {shown(self.text)}")
        column = self._names[name]
        self.columns[column] = None
        dtype = self.schema.field(column).type
        if pa.types.is_boolean(dtype):
            found = "boolean"
        elif pa.types.is_integer(dtype) or pa.types.is_floating(dtype):
            found = "number"
        elif pa.types.is_string(dtype) or pa.types.is_large_string(dtype):
            found = "text"
        else:
            raise EdgekitError(
                f"the filter {shown(self.text)} reads {column!r}, which is of type {dtype}; only numbers, texts and "
                "booleans can be compared"
            )
        return _Part(found, lambda rows: rows.column(column))

    def _constant(self, node: ast.expr, value: object) -> _Part:
        if isinstance(value, bool):
            category, scalar = "boolean", pa.scalar(value)
        elif isinstance(value, int):
            if not -(2**63) <= value < 2**63:
                raise self.error(node, "does not fit into 64 bits")
            category, scalar = "number", pa.scalar(value, pa.int64())
        elif isinstance(value, float):
            category, scalar = "number", pa.scalar(value, pa.float64())
        elif isinstance(value, str):
            try:
                category, scalar = "text", pa.scalar(value)
            except UnicodeEncodeError:
                raise self.error(node, "has a character that is not valid Unicode") from None
        elif value is None:
            category, scalar = "null", pa.scalar(None, pa.bool_())
        else:
            raise self.error(node, "is not a number, a text, true, false or null")
        return _Part(category, lambda rows: scalar, constant=True)

    def _condition(self, node: ast.expr, depth: int) -> _Part:
        part = self.part(node, depth + 1)
        if part.category not in ("boolean", "null"):
            raise self.error(node, f"is a {part.category}; expected a condition, such as a comparison")
        return part

    def _number(self, node: ast.expr, depth: int) -> _Part:
        """Return the value as float64, in which arithmetic cannot overflow."""
        part = self.part(node, depth + 1)
        if part.category != "number":
            raise self.error(node, f"is a {part.category}; expected a number")
        return _Part("number", _apply(lambda value: pc.cast(value, pa.float64(), safe=False), part))

    def _comparison(self, left: ast.expr, operator: ast.cmpop, right: ast.expr, depth: int) -> _Part:
        if isinstance(operator, (ast.In, ast.NotIn)):
            return self._membership(left, right, depth, negate=isinstance(operator, ast.NotIn))
        first, second = self.part(left, depth + 1), self.part(right, depth + 1)
        if isinstance(operator, (ast.Is, ast.IsNot)):
            if second.category != "null":
                raise self.error(right, "follows `is`, which only compares with null; use ==")
            return _Part("boolean", _apply(pc.is_null if isinstance(operator, ast.Is) else pc.is_valid, first))
        if "null" in (first.category, second.category):
            raise self.error(right, "cannot be compared: null equals nothing; use `is null`")
        if first.category != second.category:
            raise self.error(right, f"is a {second.category}, and it is compared with a {first.category}")
        if first.category == "boolean" and not isinstance(operator, (ast.Eq, ast.NotEq)):
            raise self.error(right, "is a boolean, and booleans have no order; use == or !=")
        return _Part("boolean", _apply(COMPARISONS[type(operator)], first, second))

    def _membership(self, left: ast.expr, right: ast.expr, depth: int, *, negate: bool) -> _Part:
        items = right.elts if isinstance(right, (ast.Tuple, ast.List)) else [right]  # in Python, ("ztf") is "ztf"
        if not items:
            raise self.error(right, 'is empty; expected values in parentheses, such as ("ztf", "lsst")')
        first = self.part(left, depth + 1)
        found = []
        for item in items:
            value = self.part(item, depth + 1)
            if not value.constant or value.category != first.category:
                raise self.error(
                    item,
                    f"is not a {first.category} constant; `in` compares a {first.category} with a list of constants",
                )
            found.append(_Part("boolean", _apply(pc.equal, first, value)))
        member = _fold(pc.or_kleene, found)
        return _Part("boolean", (lambda rows: pc.invert(member(rows))) if negate else member)


def _apply(function: Callable[..., Value], *parts: _Part) -> Evaluate:
    return lambda rows: function(*(part.evaluate(rows) for part in parts))


def _fold(function: Callable[[Value, Value], Value], parts: Sequence[_Part]) -> Evaluate:
    def evaluate(rows: pa.RecordBatch) -> Value:
        value = parts[0].evaluate(rows)
        for part in parts[1:]:
            value = function(value, part.evaluate(rows))
        return value

    return evaluate
