"""How long a network would take: on this machine, by its operator table, or on a device that is not here, by its data
sheet."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from edgekit.bundle.files import write_file
from edgekit.cost.measured import OperatorTable, table
from edgekit.cost.roofline import estimate
from edgekit.errors import EdgekitError
from edgekit.nas.latency import ANCHORS, Correction, calibrate, parts_of
from edgekit.nas.outline import Outline, outline
from edgekit.nas.space import key_of
from edgekit.nas.spec import Spec
from edgekit.nas.strategies import draw
from edgekit.nn.hiera_config import HieraConfig
from edgekit.targets.profile import Target, find

FILE = "latency.json"
DRAWS = 20_000  # of networks, until enough of them keep the limits to correct the operator table
Progress = Callable[[str, int, int], None]


class Clock(Protocol):
    """Predicts the time of a call at one batch size."""

    @property
    def digest(self) -> str:
        """What predictions depend on, as 16 hexadecimal digits."""
        ...

    def milliseconds(self, found: Outline) -> float: ...

    def parts(self, found: Outline) -> dict[str, float]:
        """Return the seconds of each type of operator."""
        ...

    def fits(self, found: Outline) -> bool:
        """Return whether the network fits into the device's memory, and keeps the limit of time in the worst case."""
        ...

    def describe(self) -> dict[str, Any]:
        """Return what the numbers are, as JSON with a `text` for people."""
        ...


@dataclass(frozen=True, slots=True)
class ThisMachine:
    """The operator table of this machine, corrected by measured networks of the space at the same batch size. most: the
    limit in milliseconds, if there is one."""

    table: OperatorTable
    correction: Correction
    batch: int
    most: float | None = None

    @property
    def digest(self) -> str:
        return _digest({"table": asdict(self.table), "correction": asdict(self.correction)})

    def milliseconds(self, found: Outline) -> float:
        return 1e3 * self.correction.seconds(parts_of(found.work, self.table))

    def parts(self, found: Outline) -> dict[str, float]:
        times: dict[str, float] = {}
        for operator in found.work.operators:
            if not operator.view:
                times[operator.op_type] = times.get(operator.op_type, 0.0) + self.table.of(operator)
        return times

    def fits(self, found: Outline) -> bool:
        """Return whether the network keeps the limit even if the prediction is as wrong as the worst one that was seen:
        a search for the largest network under a limit finds those whose time is predicted too short."""
        return self.most is None or self.milliseconds(found) * (1 + self.correction.worst) <= self.most

    def describe(self) -> dict[str, Any]:
        error, worst = self.correction.error, self.correction.worst
        text = (
            f"Predicted times are CPU times of one thread of this machine in ONNX Runtime at batch {self.batch}. On "
            f"networks that the correction had not seen, their median error was {error:.1%}, the largest {worst:.1%}."
        )
        return {"target": "this machine", "batch": self.batch, "error": error, "worst": worst, "text": text}


@dataclass(frozen=True, slots=True)
class Device:
    """A device's data sheet. Memory is what the network needs there with the reserve of the profile."""

    target: Target
    batch: int

    @property
    def digest(self) -> str:
        return _digest(asdict(self.target))

    def milliseconds(self, found: Outline) -> float:
        return 1e3 * estimate(found.work, self.target, self.batch).seconds

    def parts(self, found: Outline) -> dict[str, float]:
        times: dict[str, float] = {}
        for layer in estimate(found.work, self.target, self.batch).layers:
            times[layer.op_type] = times.get(layer.op_type, 0.0) + layer.seconds
        return times

    def fits(self, found: Outline) -> bool:
        memory = estimate(found.work, self.target, self.batch).memory
        return memory.needed + 4 * found.parameters <= memory.available

    def describe(self) -> dict[str, Any]:
        text = (
            f"Times are estimates for {self.target.name} at batch {self.batch}, from its data sheet. Real times are "
            "longer, mostly by 1.5 to 4 times; the order of networks is more reliable than the numbers. The times that "
            "were measured are of this machine."
        )
        return {"target": self.target.name, "batch": self.batch, "error": None, "worst": None, "text": text}


def open_clock(spec: Spec, folder: Path, progress: Progress) -> Clock:
    """Return the clock of a study: of the target, or of this machine. The latter is kept in the study's folder, so that
    a study that continues has the same one."""
    if spec.limits.target:
        return Device(find(spec.limits.target), spec.limits.batch)
    path, batch, most = folder / FILE, spec.limits.batch, spec.limits.milliseconds
    if path.is_file():
        try:
            values = json.loads(path.read_bytes())
            weights = {name: tuple(row) for name, row in values["table"]["weights"].items()}
            correction = Correction(**{**values["correction"], "factors": tuple(values["correction"]["factors"])})
            return ThisMachine(OperatorTable(**{**values["table"], "weights": weights}), correction, batch, most)
        except (ValueError, TypeError, LookupError, AttributeError):
            raise EdgekitError(f"{path}: damaged; delete the folder and begin the study again") from None
    measured = table(progress=progress)
    found = ThisMachine(measured, calibrate(_anchors(spec), measured, batch, progress), batch, most)
    content = {"table": asdict(found.table), "correction": asdict(found.correction)}
    write_file(path, json.dumps(content, indent=1).encode())
    return found


def _anchors(spec: Spec) -> list[HieraConfig]:
    """Return networks of the space by which the operator table is corrected; they keep the limits that need no
    clock."""
    limits = {name: getattr(spec.limits, name) for name in ("parameters", "macs", "activations")}
    rng, found = draw("anchors", spec.search.seed), dict[str, HieraConfig]()
    for _ in range(DRAWS):
        try:
            config = spec.space.config(spec.space.sample(rng))
        except EdgekitError:
            continue
        costs = outline(config, spec.limits.batch)
        if all(limit is None or getattr(costs, name) <= limit for name, limit in limits.items()):
            found[key_of(config)] = config
        if len(found) == ANCHORS:
            return list(found.values())
    raise EdgekitError(
        f"only {len(found)} networks of {DRAWS:,} drawn ones keep [limits]; {ANCHORS} are needed to correct the "
        "operator table; allow more"
    )


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:16]
