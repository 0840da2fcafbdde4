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
from edgekit.nas.latency import ANCHORS, BACK_TEST, WORST, Correction, calibrate, parts_of
from edgekit.nas.outline import Outline, costs_of, outline
from edgekit.nas.spec import Spec
from edgekit.nas.strategies import draw, some
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
        correction = asdict(self.correction)
        del correction["disturbed"]  # it changes no prediction
        return _digest({"table": asdict(self.table), "correction": correction})

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
        if self.correction.disturbed:
            text += (
                " Other programs ran while they were measured, so predicted times may be too long: for a better "
                "correction, begin the study in another folder when the machine is idle."
            )
        return {"target": "this machine", "batch": self.batch, "error": error, "worst": worst, "text": text}


@dataclass(frozen=True, slots=True)
class Device:
    """A device's data sheet. Memory is what the network needs there with the reserve of the profile. most: the limit in
    milliseconds, if there is one."""

    target: Target
    batch: int
    most: float | None = None

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
        """Return whether the network fits, and keeps the limit of time even if the estimate is as wrong as the worst
        one of the back-test."""
        memory = estimate(found.work, self.target, self.batch).memory
        in_time = self.most is None or WORST * self.milliseconds(found) <= self.most
        return in_time and memory.needed + 4 * found.parameters <= memory.available

    def describe(self) -> dict[str, Any]:
        tested = " and ".join(f"{low:g} to {high:g} times on {name}" for name, (low, high) in BACK_TEST.items())
        text = (
            f"Times are estimates for {self.target.name} at batch {self.batch}, from its data sheet. In a back-test, "
            "published times of EfficientViT-B1 and -B2 (float16, TensorRT, batch 1) were the estimates "
            f"{tested}: the order of networks is more reliable than the numbers, and a network counts as within the "
            f"limit of time only if {WORST:g} times its estimate is. The times that were measured are of this machine."
        )
        return {"target": self.target.name, "batch": self.batch, "error": None, "worst": None, "text": text}


def open_clock(spec: Spec, folder: Path, progress: Progress) -> Clock:
    """Return the clock of a study: of the target, or of this machine. The latter is kept in the study's folder, so that
    a study that continues has the same one."""
    if spec.limits.target:
        return Device(find(spec.limits.target), spec.limits.batch, spec.limits.milliseconds)
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

    def broken(config: HieraConfig) -> list[str]:
        return spec.limits.broken(costs_of(outline(config, spec.limits.batch)))

    found = some(spec.space, draw("anchors", spec.search.seed), ANCHORS, DRAWS, broken)
    if len(found) < ANCHORS:
        raise EdgekitError(
            f"only {len(found)} networks of {DRAWS:,} drawn ones keep [limits]; {ANCHORS} are needed to correct the "
            "operator table; allow more"
        )
    return found


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:16]
