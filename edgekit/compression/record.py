"""The compression of a bundle as types: a record for each pass and a summary of the whole job.

A bundle's manifest holds them as JSON. Only this file reads and writes that JSON: each class has one function for each
direction. JSON has neither NaN nor infinity, so both are written as null.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

from edgekit.bundle.format import MANIFEST, Bundle
from edgekit.compression.guard import Agreement, Latency, Limits, State
from edgekit.compression.metrics import Measurement
from edgekit.compression.trials import SearchRecord
from edgekit.cost.memory import Memory
from edgekit.errors import EdgekitError
from edgekit.passes.change import Change

COMPRESSION, SEARCH = "compression", "search"  # entries of a manifest's metrics
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class PassRecord:
    """One pass: its parameters, the measurements before and after it, and whether the guard kept it.

    loss: change of the metric against the model before compression; after, loss, latency: None or empty for a pass that
    failed before it could be measured; other_outputs: how far the outputs that the metric does not cover are from the
    original's, relative to their size; estimated_on: the target whose latency was estimated, not measured.
    """

    name: str
    parameters: Mapping[str, Any]
    before: State
    kept: bool
    reason: str
    seed: int | None = None
    parent: str | None = None  # digest of the bundle with which the run started
    seconds: float = 0.0
    plan: tuple[Change, ...] = ()
    after: State | None = None
    loss: Measurement | None = None
    latency: tuple[Latency, ...] = ()
    agreement: tuple[Agreement, ...] = ()
    other_outputs: Mapping[str, float] = field(default_factory=dict)
    estimated_on: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return plain values for a manifest, without the fields that do not apply."""
        values = asdict(self)
        optional = ("plan", "after", "loss", "latency", "agreement", "other_outputs", "estimated_on")
        left_out = {name for name in optional if not values[name]}
        found = {"pass" if name == "name" else name: values[name] for name in values if name not in left_out}
        plain: dict[str, Any] = finite(found)
        return plain

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> PassRecord:
        """The inverse of `to_json`."""
        loss = values.get("loss")
        own: dict[str, Any] = {
            "name": values["pass"],
            "before": _state(values["before"]),
            "plan": tuple(Change(**item) for item in values.get("plan", ())),
            "after": _state(values["after"]) if "after" in values else None,
            "loss": None if loss is None else _measurement(loss),
            "latency": _latency(values.get("latency", ())),
            "agreement": _agreement(values.get("agreement", ())),
            "other_outputs": {
                name: math.inf if far is None else far for name, far in values.get("other_outputs", {}).items()
            },
        }
        rest = {name: value for name, value in values.items() if name != "pass"}
        return cls(**{**rest, **own})


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """The measurements of the whole job: the source and the result, in one run.

    original: quality of the source; change: the result's change against it, on the same rows; baseline: session options
    of the source's fastest float32 form; memory: at memory_batch, on a target only.
    """

    metric: str
    original: Measurement
    change: Measurement
    latency: tuple[Latency, ...]
    limits: Limits
    runtime: str
    machine: Mapping[str, Any]
    baseline: Mapping[str, str] = field(default_factory=dict)
    agreement: tuple[Agreement, ...] = ()
    memory: Memory | None = None
    memory_batch: int | None = None
    estimated_on: str | None = None

    @property
    def fits(self) -> bool:
        """Return whether the result fits the target's memory; True without a target."""
        return self.memory is None or self.memory.fits

    def to_json(self) -> dict[str, Any]:
        values = asdict(self)
        del values["memory"], values["memory_batch"], values["estimated_on"]
        if self.memory is not None:
            told = {"fits": self.memory.fits, "needed": self.memory.needed, "text": str(self.memory)}
            values["memory"] = {**asdict(self.memory), "batch": self.memory_batch, **told}
        if self.estimated_on is not None:
            values["estimated_on"] = self.estimated_on
        plain: dict[str, Any] = finite(values)
        return plain

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Summary:
        """The inverse of `to_json`."""
        memory = values.get("memory")
        names = ("weights", "activations", "at", "reserve", "available")
        own: dict[str, Any] = {
            "original": _measurement(values["original"]),
            "change": _measurement(values["change"]),
            "latency": _latency(values["latency"]),
            "limits": _limits(values["limits"]),
            "agreement": _agreement(values.get("agreement", ())),
            "memory": None if memory is None else Memory(**{name: memory[name] for name in names}),
            "memory_batch": None if memory is None else memory["batch"],
        }
        return cls(**{**values, **own})


def records_of(bundle: Bundle) -> tuple[PassRecord, ...]:
    """Return a record for each pass that was tried on the bundle, and on the bundles from which it was made."""
    return tuple(_read(bundle, "a record", PassRecord.from_json, item) for item in bundle.manifest.records)


def summary_of(bundle: Bundle) -> Summary | None:
    """Return the summary of the bundle's compression; None if it was not compressed."""
    found = bundle.manifest.metrics.get(COMPRESSION)
    return None if found is None else _read(bundle, f"metrics.{COMPRESSION}", Summary.from_json, found)


def search_of(bundle: Bundle) -> SearchRecord | None:
    """Return the search that found the bundle's recipe; None if there was none."""
    found = bundle.manifest.metrics.get(SEARCH)
    return None if found is None else _read(bundle, f"metrics.{SEARCH}", SearchRecord.from_json, found)


def finite(value: Any) -> Any:
    """Return the value with None for NaN and infinity, and lists for tuples, as JSON has them."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _read(bundle: Bundle, what: str, parse: Callable[[Any], T], values: Any) -> T:
    try:
        return parse(values)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise EdgekitError(
            f"{bundle.path or bundle.manifest.name}/{MANIFEST}: {what} cannot be read "
            f"({type(error).__name__}: {error}); restore the file, or compress the model again"
        ) from None


def _measurement(values: Mapping[str, Any]) -> Measurement:
    numbers = {name: math.nan if values[name] is None else float(values[name]) for name in ("value", "low", "high")}
    return Measurement(**numbers, samples=values["samples"])


def _state(values: Mapping[str, Any]) -> State:
    return State(_measurement(values["quality"]), values["bytes"], values["parameters"])


def _latency(items: Sequence[Mapping[str, Any]]) -> tuple[Latency, ...]:
    return tuple(Latency(**item) for item in items)


def _agreement(items: Sequence[Mapping[str, Any]]) -> tuple[Agreement, ...]:
    return tuple(Agreement(**{**item, "gap": math.inf if item["gap"] is None else item["gap"]}) for item in items)


def _limits(values: Mapping[str, Any]) -> Limits:
    """Return the limits. A limit of null was infinite, in the direction that forbids nothing."""
    infinite = {"max_loss": math.inf, "max_slowdown": math.inf, "min_gain": -math.inf, "agreement": math.inf}
    found: dict[str, Any] = {name: infinite[name] if value is None else value for name, value in values.items()}
    if "batches" in found:
        found["batches"] = tuple(found["batches"])
    return Limits(**found)
