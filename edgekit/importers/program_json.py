"""Check the JSON of an exported program before torch reads it.

torch.export.load was written for trusted files. It turns strings of this JSON into code: sympy evaluates sizes
(`expr_str`), guards are compiled (`guards_code`), an operator's name is looked up attribute by attribute (`target`;
"_operator.attrgetter" is found), types of containers are looked up by name (`in_spec`), and names of values and
keywords are pasted into generated Python. `checked` accepts the strings that torch itself writes for networks of plain
tensors and refuses every other string; it removes entries that the import does not need.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping
from typing import Any

from edgekit.errors import EdgekitError

LONGEST_EXPRESSION = 2_000  # characters; a size that torch writes has some tens
LONGEST_TEXT = 200  # characters of a string argument, such as an equation of einsum
LARGEST_INTEGER = 2**63
LARGEST_EXPONENT = 8
NAME = re.compile(r"[A-Za-z_]\w*(\.\w+)*", re.ASCII)
TEXT = re.compile(r"[\w .,>+:-]*", re.ASCII)
SYMBOL = re.compile(r"[A-Za-z_]\w*", re.ASCII)
# Sizes consist of these: sympy's classes, and torch's own functions of whole numbers.
FUNCTIONS = frozenset(
    (
        "Integer", "Add", "Mul", "Max", "Min", "Mod", "PythonMod", "FloorDiv", "CeilDiv", "CleanDiv", "Eq", "Ne", "Lt",
        "Le", "Gt", "Ge", "Equality", "Unequality", "StrictLessThan", "LessThan", "StrictGreaterThan", "GreaterThan",
        "And", "Or", "Not", "Identity",
    )
)  # fmt: skip
ASSUMPTIONS = frozenset(("integer", "positive", "nonnegative", "real", "finite", "zero"))
OPERATORS = (ast.Add, ast.Sub, ast.Mult, ast.FloorDiv, ast.Mod, ast.Div, ast.Pow)
# Operators of the dispatcher compute with tensors and do nothing else, except these few.
DISPATCHED = re.compile(r"torch\.ops\.(aten|prims|quantized_decomposed)\.(\w+)\.(\w+)", re.ASCII)
NOT_ARITHMETIC = frozenset(("from_file", "_print", "_assert_async", "record_stream", "set_"))
PLAIN = frozenset(
    (
        "add", "sub", "mul", "floordiv", "truediv", "mod", "neg", "pow", "pos", "abs", "getitem", "eq", "ne", "lt",
        "le", "gt", "ge", "and_", "or_", "not_", "lshift", "rshift",
    )
)  # fmt: skip
ROUNDING = frozenset(("ceil", "floor", "trunc", "sqrt"))
SYMBOLIC = frozenset(("sym_int", "sym_float", "sym_max", "sym_min", "sym_not", "sym_ite", "sym_sum", "sym_sqrt"))
CONTAINERS = frozenset((None, "builtins.tuple", "builtins.list", "builtins.dict", "collections.OrderedDict"))
REFUSED = frozenset(("as_custom_obj", "as_script_object", "custom_obj", "as_opaque_value"))


def checked(content: bytes, source: str) -> bytes:
    """Return the JSON of a program without guards and notes. Raises at the first string that torch does not write for a
    network of plain tensors."""
    try:
        program = json.loads(content)
        if not isinstance(program, dict):
            raise EdgekitError(f"{source}: the program is a {type(program).__name__}, not an object; save it again")
        program["guards_code"] = []
        for expression in program.get("range_constraints") or {}:
            _check_expression(expression, source)
        return json.dumps(_clean(program, "", source)).encode()
    except (ValueError, RecursionError) as error:
        raise EdgekitError(f"{source}: not a program that torch wrote ({error}); save it again") from None


def _clean(value: Any, key: str, source: str) -> Any:
    """Return the value under a key, checked; dictionaries of notes become empty."""
    if key in REFUSED and value:
        raise EdgekitError(
            f"{source}: {key} holds a Python object, which edgekit does not load; export the model to ONNX"
        )
    if key == "metadata":
        return {}
    if isinstance(value, Mapping):
        for name in value:
            if key not in ("range_constraints", "") and not NAME.fullmatch(name):
                raise EdgekitError(f"{source}: {name[:60]!r} is no name; torch would paste it into code")
        return {name: _clean(item, name, source) for name, item in value.items()}
    if isinstance(value, list):
        return [_clean(item, key, source) for item in value]
    if isinstance(value, str):
        _check_text(value, key, source)
    return value


def _check_text(text: str, key: str, source: str) -> None:
    if key == "expr_str":
        _check_expression(text, source)
    elif key in ("target", "as_operator"):
        _check_operator(text, source)
    elif key in ("in_spec", "out_spec"):
        _check_containers(text, source)
    elif key in ("as_string", "as_strings", "torch_version"):
        if len(text) > LONGEST_TEXT or not TEXT.fullmatch(text):
            raise EdgekitError(
                f"{source}: {key} is {text[:60]!r}; expected up to {LONGEST_TEXT} letters, digits and .,->+:"
            )
    elif text and not NAME.fullmatch(text):
        raise EdgekitError(f"{source}: {key} is {text[:60]!r}, which is no name; torch would paste it into code")


def _check_operator(text: str, source: str) -> None:
    dispatched = DISPATCHED.fullmatch(text)
    module, _, name = text.rpartition(".")
    allowed = (
        (dispatched is not None and dispatched[2] not in NOT_ARITHMETIC)
        or (module == "_operator" and name in PLAIN)
        or (module == "math" and name in ROUNDING)
        or (module == "torch" and name in SYMBOLIC)
    )
    if not allowed:
        raise EdgekitError(
            f"{source}: the operator {text[:60]!r} is not arithmetic on tensors (torch.ops.aten, prims, "
            "quantized_decomposed), so torch would run code that edgekit does not know; export the model to ONNX"
        )


def _check_containers(text: str, source: str) -> None:
    """Check a tree of tuples, lists and dictionaries with plain keys."""
    waiting = [json.loads(text)[1]] if text else []
    while waiting:
        node = waiting.pop()
        context = json.loads(node["context"]) if isinstance(node.get("context"), str) else node.get("context")
        keys = context if isinstance(context, list) else [] if context is None else [context]
        if node.get("type") not in CONTAINERS or not all(isinstance(key, str) and NAME.fullmatch(key) for key in keys):
            raise EdgekitError(
                f"{source}: inputs or outputs are packed in {node.get('type')!r} with {str(context)[:60]!r}; expected "
                "tuples, lists and dictionaries with names as keys"
            )
        waiting += node.get("children_spec", [])


def _check_expression(text: str, source: str) -> None:
    """Check a size: whole numbers, symbols, + - * // % and the functions of `FUNCTIONS`, nested as Python writes
    them."""
    if len(text) > LONGEST_EXPRESSION:
        raise EdgekitError(f"{source}: a size has {len(text):,} characters; expected up to {LONGEST_EXPRESSION:,}")
    try:
        node = ast.parse(text, mode="eval").body  # a syntax tree: nothing is evaluated
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        node = None
    if node is None or not _is_size(node):
        raise EdgekitError(
            f"{source}: the size {text[:80]!r} is not made of numbers, symbols and arithmetic; torch would run it"
        )


def _is_size(node: ast.expr) -> bool:
    if isinstance(node, ast.Constant):
        return type(node.value) is bool or (type(node.value) is int and abs(node.value) < LARGEST_INTEGER)
    if isinstance(node, ast.Name):
        return re.fullmatch(r"[suz]+\d+|int_oo|oo", node.id) is not None
    if isinstance(node, ast.UnaryOp):
        return isinstance(node.op, ast.USub) and _is_size(node.operand)
    if isinstance(node, ast.BinOp):
        small = (
            isinstance(node.right, ast.Constant)
            and type(node.right.value) is int
            and 0 <= node.right.value <= LARGEST_EXPONENT
        )
        power = not isinstance(node.op, ast.Pow) or small
        return isinstance(node.op, OPERATORS) and power and _is_size(node.left) and _is_size(node.right)
    if isinstance(node, ast.Compare):
        return all(map(_is_size, [node.left, *node.comparators]))
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
        return False
    if node.func.id == "Symbol":
        return _is_symbol(node)
    if node.func.id == "Pow":
        return not node.keywords and len(node.args) == 2 and _is_size(node.args[0]) and _is_exponent(node.args[1])
    return node.func.id in FUNCTIONS and not node.keywords and all(map(_is_size, node.args))


def _is_exponent(node: ast.expr) -> bool:
    """Return whether the node is a small whole number, or Integer of one: a power of a power of ten would take all
    memory."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Integer" and node.args:
        node = node.args[0]
    return isinstance(node, ast.Constant) and type(node.value) is int and 0 <= node.value <= LARGEST_EXPONENT


def _is_symbol(node: ast.Call) -> bool:
    """Return whether the node is a call such as Symbol('s0', positive=True, integer=True)."""
    name = node.args[0] if len(node.args) == 1 else None
    return (
        isinstance(name, ast.Constant)
        and isinstance(name.value, str)
        and SYMBOL.fullmatch(name.value) is not None
        and all(
            word.arg in ASSUMPTIONS and isinstance(word.value, ast.Constant) and type(word.value.value) is bool
            for word in node.keywords
        )
    )
