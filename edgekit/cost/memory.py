"""The memory that a graph needs: its stored tensors, and the activations that are alive at the same time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgekit.targets.profile import RESERVE, Target

if TYPE_CHECKING:  # records of bundles hold a Memory, and reading them must not need onnx
    from edgekit.cost.operators import Workload
    from edgekit.graph.shapes import Value


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes. weights: stored tensors; activations: the largest sum alive at once, which is at the node `at`; reserve:
    memory that other software takes; available: the device's whole memory."""

    weights: float
    activations: float
    at: str
    reserve: float
    available: float

    @property
    def needed(self) -> float:
        return self.weights + self.activations + self.reserve

    @property
    def fits(self) -> bool:
        return self.needed <= self.available

    def __str__(self) -> str:
        parts = f"weights {size_text(self.weights)} + activations {size_text(self.activations)} (most at {self.at})"
        verdict = "fits in" if self.fits else "DOES NOT FIT in"
        return (
            f"{parts} + reserve {size_text(self.reserve)} = {size_text(self.needed)}: {verdict} "
            f"{size_text(self.available)}"
        )


def memory(work: Workload, target: Target, size: Callable[[Value], float] = lambda value: value.bytes) -> Memory:
    """Return the memory that the graph needs on a target; `size`: bytes of a value as the device stores it. The
    workspace of the runtime's fastest kernels is not included, because it is not known."""
    activations, at = peak(work, size)
    weights = sum(size(value) for value in work.stored.values())
    return Memory(weights, activations, at, RESERVE[target.kind], target.memory.value)


def peak(work: Workload, size: Callable[[Value], float] = lambda value: value.bytes) -> tuple[float, str]:
    """Return the largest sum of activations that are alive at one node, and that node. Nodes run in the graph's order.
    A value is alive from its producer to its last consumer; inputs are alive all the time, because they are the
    caller's, and outputs until the end. Views share their input's bytes; nothing is computed in place."""
    roots = _roots(work)
    last: dict[str, int] = {}
    first = dict.fromkeys(work.inputs, 0)
    for number, operator in enumerate(work.operators):
        for name in operator.outputs:
            first.setdefault(roots[name], number)
        for name in (*operator.inputs, *operator.outputs):
            last[roots.get(name, name)] = number
    end = len(work.operators)
    for name in (*work.inputs, *work.outputs):
        last[roots.get(name, name)] = end
    alive, largest, at = 0.0, 0.0, ""
    born: dict[int, list[str]] = {}
    dying: dict[int, list[str]] = {}
    for name, number in first.items():
        born.setdefault(number, []).append(name)
        dying.setdefault(last.get(name, number), []).append(name)
    for number, operator in enumerate(work.operators):
        alive += sum(size(work.values[name]) for name in born.get(number, ()) if name in work.values)
        if alive > largest:
            largest, at = alive, operator.name
        alive -= sum(size(work.values[name]) for name in dying.get(number, ()) if name in work.values)
    return largest, at


def _roots(work: Workload) -> Mapping[str, str]:
    """Return for each activation the one whose bytes it shares: itself, unless a view made it."""
    roots = {name: name for name in work.inputs}
    for operator in work.operators:
        for name in operator.outputs:
            source = operator.inputs[0] if operator.view and operator.inputs else name
            roots[name] = roots.get(source, source)
    return roots


def size_text(count: float) -> str:
    """Return bytes as text, in powers of ten as in data sheets."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count:.0f} B"
