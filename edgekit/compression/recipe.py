"""A recipe: an ordered list of passes with their parameters, as TOML.

[[pass]]
name = "structured_prune"
keep = { heads = 8, ff_dim = 64 }

[[pass]]
name = "cluster"
bits = 4

A pass may have a `seed`; without one it is the job's seed plus the pass's number.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tomli_w

from edgekit import plugins
from edgekit.bundle.format import MANIFEST, Bundle
from edgekit.bundle.store import open_bundle
from edgekit.errors import EdgekitError, unknown
from edgekit.settings import converted, read_toml

if TYPE_CHECKING:
    from edgekit.passes.base import Pass

# the names of passes and parameters before 0.1.0, which stored recipes and bundles may contain
OLD_PASSES = {"quantise": "quantize"}
OLD_PARAMETERS = {
    ("static_int8", "form"): "scheme",
    ("qat_int8", "form"): "scheme",
    ("weight_only", "form"): "layout",
    ("half", "kind"): "dtype",
}


@dataclass(frozen=True, slots=True)
class Step:
    """One pass by name with its parameters, not yet built: a recipe can be read without torch."""

    name: str
    parameters: Mapping[str, Any]
    seed: int | None = None  # None: the job's seed plus the pass's number

    def build(self) -> Pass[Any]:
        """Return the pass. Errors for unknown names, unknown parameters and wrong types say what is allowed."""
        from edgekit.passes.base import load_pass  # imports torch

        return self.build_as(load_pass(self.name))

    def build_as(self, pass_class: type[Pass[Any]]) -> Pass[Any]:
        """Return the pass as an object of this class, which need not be registered."""
        from edgekit.passes.base import parameters_of

        hints = typing.get_type_hints(pass_class)
        fields = parameters_of(pass_class)
        values = {}
        for name, value in self.parameters.items():
            if name not in fields:
                raise unknown("parameter", name, fields, where=f"pass {self.name!r}")
            values[name] = converted(hints[name], value, f"pass {self.name!r}: {name}")
        for name, field in fields.items():
            required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
            if required and name not in values:
                raise EdgekitError(f"pass {self.name!r}: parameter {name!r} is missing; it takes {', '.join(fields)}")
        try:
            return pass_class(**values)
        except EdgekitError as error:
            raise EdgekitError(f"pass {self.name!r}: {error}") from None


def renamed(name: str, parameters: Mapping[str, Any], seed: int | None) -> Step:
    """Return the step with the present names of a pass and of its parameters."""
    name = OLD_PASSES.get(name, name)
    return Step(name, {OLD_PARAMETERS.get((name, key), key): value for key, value in parameters.items()}, seed)


def read(path: str | Path) -> list[Step]:
    """Read and check a recipe file, or read the recipe of a bundle: the passes that were kept, with their seeds."""
    path = Path(path)
    if (path / MANIFEST).is_file():
        return of_bundle(open_bundle(path))
    if not path.is_file():
        raise EdgekitError(f"{path}: no such recipe; write one (see `edgekit compress --help`) or leave --recipe out")
    values = read_toml(path)
    return parse(values, str(path))


def parse(values: Mapping[str, Any], source: str) -> list[Step]:
    """Return the steps of a recipe's tables."""
    for key in values:
        if key != "pass":
            raise unknown("key", key, ["pass"], where=source)
    entries = values.get("pass", [])
    if not isinstance(entries, list) or not entries:
        raise EdgekitError(f"{source}: no passes; a recipe is one or more [[pass]] tables, each with a name")
    steps = []
    for number, entry in enumerate(entries, start=1):
        if not isinstance(entry, Mapping) or not isinstance(entry.get("name"), str):
            raise EdgekitError(
                f"{source}: pass {number} has no name; expected one of: {', '.join(plugins.names('edgekit.passes'))}"
            )
        seed = entry.get("seed")
        if seed is not None and (not isinstance(seed, int) or isinstance(seed, bool) or seed < 0):
            raise EdgekitError(f"{source}: pass {number}: seed = {seed!r}; expected a whole number from 0")
        step = from_table(entry)
        try:
            step.build()
        except EdgekitError as error:
            raise EdgekitError(f"{source}: {error}") from None
        steps.append(step)
    return steps


def of_bundle(bundle: Bundle) -> list[Step]:
    """Return the passes that made a bundle from its parent. Running them again gives the same bytes."""
    records = [record for record in bundle.manifest.records if record.get("parent") == bundle.manifest.parent]
    kept = [renamed(record["pass"], record["parameters"], record.get("seed")) for record in records if record["kept"]]
    if not kept:
        raise EdgekitError(f"{bundle.path}: no pass has changed it, so there is no recipe to take from it")
    for step in kept:
        step.build()
    return kept


def to_tables(steps: Sequence[Step]) -> dict[str, Any]:
    """Return the tables of a recipe, as `parse` reads them."""
    return {"pass": [to_table(step) for step in steps]}


def to_table(step: Step) -> dict[str, Any]:
    """Return a step as one flat table, for recipes, manifests, studies of a search and keys of the cache."""
    seed = {} if step.seed is None else {"seed": step.seed}
    return {"name": step.name, **seed, **step.parameters}


def from_table(table: Mapping[str, Any]) -> Step:
    """The inverse of `to_table`. The table of an older edgekit gives a step with the present names."""
    parameters = {key: value for key, value in table.items() if key not in ("name", "seed")}
    return renamed(table["name"], parameters, table.get("seed"))


def to_toml(steps: Sequence[Step]) -> str:
    return tomli_w.dumps(to_tables(steps))
