"""Read the fields of a request's JSON: each with its type and its range. What is left over is refused by name."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NoReturn

from edgekit.errors import unknown
from runtimes.daemon.refusal import RefusedError

NAMES = {
    str: "a text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    list: "an array",
    dict: "an object",
}
DEEPEST = 64  # objects and arrays in one another


def parse(content: bytes) -> dict[str, Any]:
    """Return the object of a body. NaN, infinite and very long numbers are no JSON."""

    def refuse(name: str) -> NoReturn:
        raise ValueError(f"{name} is no number of JSON")

    def finite(text: str) -> float:
        value = float(text)
        if not math.isfinite(value):
            refuse(text[:40])
        return value

    try:
        found = json.loads(content, parse_constant=refuse, parse_float=finite)
        _check_depth(found)
    except RecursionError:
        raise RefusedError(400, f"the JSON is more than {DEEPEST} levels deep") from None
    except (ValueError, MemoryError) as error:
        raise RefusedError(400, f"the body is not valid JSON: {str(error)[:200]}") from None
    if not isinstance(found, dict):
        raise RefusedError(400, f"the body is {NAMES.get(type(found), 'null')}; expected an object")
    return found


def _check_depth(value: Any) -> None:
    """Raise RecursionError if it is too deep: what reads it later, calls itself for each level."""
    level = [value]
    for _ in range(DEEPEST):
        level = [
            item
            for outer in level
            if isinstance(outer, dict | list)
            for item in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(item, dict | list)
        ]
        if not level:
            return
    raise RecursionError


class Fields:
    """The fields of an object. where: its own name, such as "messages[0].", for errors."""

    def __init__(self, table: Mapping[str, Any], where: str = "") -> None:
        self._left, self._where = dict(table), where

    def __contains__(self, name: str) -> bool:
        return self._left.get(name) is not None

    def refused(self, name: str, value: Any, expected: str) -> RefusedError:
        shown = json.dumps(value, default=str)
        shown = shown if len(shown) <= 60 else f"{shown[:57]}..."
        return RefusedError(
            400, f"{self._where}{name} = {shown}; expected {expected}", parameter=f"{self._where}{name}"
        )

    def take(self, name: str, of: type | tuple[type, ...], default: Any = None, *, needed: bool = False) -> Any:
        """Return a field of this type, and the default if it is missing or null."""
        value = self._left.pop(name, None)
        if value is None:
            if needed:
                raise RefusedError(400, f"{self._where}{name} is missing", parameter=f"{self._where}{name}")
            return default
        wanted = of if isinstance(of, tuple) else (of,)
        if (isinstance(value, bool) and bool not in wanted) or not isinstance(value, wanted):
            raise self.refused(name, value, " or ".join(NAMES[item] for item in wanted))
        if isinstance(value, str):
            self._check_text(name, value)
        return value

    def number(self, name: str, default: float, low: float, high: float) -> float:
        value = self.take(name, (int, float), default)
        if not low <= value <= high:
            raise self.refused(name, value, f"{low:g} to {high:g}")
        return float(value)

    def whole(self, name: str, default: int, low: int, high: int) -> int:
        value = self.take(name, int, default)
        if value is not None and not low <= value <= high:
            raise self.refused(name, value, f"{low} to {high}")
        return int(value) if value is not None else default

    def choice(self, name: str, default: str, allowed: Collection[str]) -> str:
        value: str = self.take(name, str, default)
        if value not in allowed:
            raise self.refused(name, value, f"one of: {', '.join(allowed)}")
        return value

    def texts(self, name: str, most: int, longest: int) -> Sequence[str]:
        """Return one text or some."""
        value = self.take(name, (str, list), [])
        found = [value] if isinstance(value, str) else value
        if len(found) > most:
            raise RefusedError(
                400, f"{self._where}{name} has {len(found)} texts; expected up to {most}", parameter=name
            )
        for item in found:
            if not isinstance(item, str) or not 0 < len(item) <= longest:
                raise self.refused(name, item, f"texts of 1 to {longest} characters")
            self._check_text(name, item)
        return found

    def prompts(self, name: str, most: int) -> Sequence[str | Sequence[int]]:
        """Return texts, or token ids: one of either, or several."""
        value = self.take(name, (str, list), needed=True)
        items = [value] if isinstance(value, str) or (value and _is_ids(value)) else value
        if not 1 <= len(items) <= most:
            raise RefusedError(400, f"{name} has {len(items)} entries; expected 1 to {most}", parameter=name)
        for item in items:
            if not isinstance(item, str) and not (isinstance(item, list) and item and _is_ids(item)):
                raise self.refused(name, item, "a text, or an array of token ids")
        return [plain(item, name) for item in items]

    def _check_text(self, name: str, value: str) -> None:
        try:
            value.encode()
        except UnicodeEncodeError:
            raise RefusedError(
                400, f"{self._where}{name} holds half of a surrogate pair, which is no text", parameter=name
            ) from None

    def finish(self, known: Collection[str], neutral: Mapping[str, Any] | None = None) -> None:
        """Raise for a field that is left. neutral: values that change nothing, by name."""
        for name, value in self._left.items():
            if value is None and (name in known or name in (neutral or {})):
                continue
            if neutral is not None and name in neutral:
                if value == neutral[name] and type(value) is type(neutral[name]):
                    continue
                raise RefusedError(
                    400,
                    f"{self._where}{name} is not supported here; leave it out"
                    + ("" if neutral[name] is None else f", or send {json.dumps(neutral[name])}"),
                    code="unsupported_parameter",
                    parameter=f"{self._where}{name}",
                )
            where = self._where.rstrip(".")
            message = str(unknown("field", name[:60], [*known, *(neutral or {})], where=where))
            raise RefusedError(400, message, code="unknown_parameter", parameter=f"{self._where}{name[:60]}")


def plain(value: Any, name: str) -> Any:
    """Return a value of JSON that others read, such as a schema. Raises if a text in it is none."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise RefusedError(400, f"{name} holds half of a surrogate pair, which is no text", parameter=name) from None
    return value


def _is_ids(value: Sequence[Any]) -> bool:
    return all(type(item) is int and 0 <= item < 1 << 31 for item in value)
