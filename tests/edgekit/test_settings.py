"""Dataclasses from tables: right values are taken; the error for a wrong one names its position."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from edgekit.errors import EdgekitError
from edgekit.settings import converted, from_table


@dataclass(frozen=True)
class Part:
    name: str
    weight: float = 1.0


@dataclass(frozen=True)
class Whole:
    parts: tuple[Part, ...]
    kind: Literal["a", "b"] = "a"
    spare: Part | None = None
    named: Mapping[str, Part] = field(default_factory=dict)
    count: int = 0

    def __post_init__(self) -> None:
        if self.count < 0:
            raise EdgekitError("count is below 0")


def test_what_fits_goes_in():
    table = {"parts": [{"name": "x", "weight": 2}], "named": {"y": {"name": "z"}}, "spare": {"name": "s"}, "kind": "b"}
    whole = from_table(Whole, table, "file")
    assert whole == Whole((Part("x", 2.0),), "b", Part("s"), {"y": Part("z")})
    assert type(whole.parts[0].weight) is float
    changed = from_table(Whole, {"count": 3}, "flag", whole)
    assert changed == Whole((Part("x", 2.0),), "b", Part("s"), {"y": Part("z")}, 3)
    assert converted(Any, {1: 2}, "x") == {1: 2}


@pytest.mark.parametrize(("table", "said"), [
    ({"part": []}, r"unknown key 'part' in file; expected one of: parts, .*did you mean 'parts'"),
    ({}, r"file: key 'parts' is missing; Whole takes parts, kind"),
    ({"parts": [{"weight": 1}]}, r"file: parts\[0\]: key 'name' is missing"),
    ({"parts": [{"name": 1}]}, r"file: parts\[0\]: name = 1; expected a string"),
    ({"parts": "x"}, r"file: parts = 'x'; expected an array"),
    ({"parts": [], "kind": "c"}, r"unknown kind 'c' in file; expected one of: a, b"),
    ({"parts": [], "count": True}, r"file: count = True; expected a whole number"),
    ({"parts": [], "count": 1.0}, r"file: count = 1.0; expected a whole number"),
    ({"parts": [], "count": -1}, r"file: count is below 0"),
    ({"parts": [], "named": {"y": 1}}, r"file: named.y = 1; expected a table"),
    ([], r"file is \[\]; expected a table"),
])  # fmt: skip
def test_what_does_not_is_named_with_its_place(table, said):
    with pytest.raises(EdgekitError, match=said):
        from_table(Whole, table, "file")
