"""The trials and the choice of a search over recipes, as types; the manifest of its result holds them as JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from edgekit.compression.recipe import Step, from_table, to_table


@dataclass(frozen=True, slots=True)
class Constraints:
    """The constraints on the result of a search. max_size: packed bytes; max_latency: CPU milliseconds of a call at the
    first batch size, estimated if the target is not this machine."""

    max_loss: float
    max_size: int | None = None
    max_latency: float | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """One trial. speedup: geometric mean over the batch sizes, against the original in the same run; loss: change of
    the metric on held-out rows; low: the lower end of its interval; fits_memory: whether the model fits into the
    target's memory."""

    number: int
    recipe: tuple[Step, ...]
    loss: float
    bytes: int
    speedup: float
    latency_ms: float
    on_front: bool = False
    fits_memory: bool = True
    low: float = math.nan

    def fits(self, limits: Constraints) -> bool:
        """Return whether the trial keeps to every constraint."""
        return (
            self.loss <= limits.max_loss
            and (limits.max_size is None or self.bytes <= limits.max_size)
            and (limits.max_latency is None or self.latency_ms <= limits.max_latency)
            and self.fits_memory
        )

    @property
    def passes(self) -> str:
        """Return the names of its passes."""
        return ", ".join(step.name for step in self.recipe) or "as it is"

    def to_json(self) -> dict[str, Any]:
        values = {**asdict(self), "recipe": [to_table(step) for step in self.recipe]}
        return {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in values.items()}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Outcome:
        """The inverse of `to_json`. A loss of null was infinite, and a `low` of null was no number."""
        loss, low = values["loss"], values.get("low")
        own = {
            "recipe": tuple(from_table(table) for table in values["recipe"]),
            "loss": math.inf if loss is None else loss,
            "low": math.nan if low is None else low,
        }
        return cls(**{**values, **own})


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """How much worse the metric gets if this weight alone is quantized to few bits. nodes: the nodes of the graph that
    multiply by the weight; passes on graphs know those, not the weight."""

    name: str
    change: float
    nodes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class SearchRecord:
    """A search: all its trials, the sensitivity of the weights, the number of the chosen trial, and the constraints on
    the result."""

    trials: tuple[Outcome, ...]
    sensitivity: tuple[Sensitivity, ...]
    chosen: int
    constraints: Constraints

    @property
    def front(self) -> list[Outcome]:
        """Return the trials on the Pareto front, smallest loss first."""
        return sorted((trial for trial in self.trials if trial.on_front), key=lambda trial: trial.loss)

    def to_json(self) -> dict[str, Any]:
        return {
            "trials": [trial.to_json() for trial in self.trials],
            "sensitivity": [
                {"name": item.name, "change": item.change if math.isfinite(item.change) else None}
                for item in self.sensitivity
            ],
            "chosen": self.chosen,
            "targets": asdict(self.constraints),
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> SearchRecord:
        """The inverse of `to_json`, except for the nodes, which a manifest does not hold."""
        return cls(
            tuple(Outcome.from_json(trial) for trial in values["trials"]),
            tuple(
                Sensitivity(item["name"], math.inf if item["change"] is None else item["change"])
                for item in values["sensitivity"]
            ),
            values["chosen"],
            Constraints(**values["targets"]),
        )
