"""Estimate the time of a graph on a device that is not present, from its data sheet.

    seconds of an operator = max(operations / rate, bytes / bandwidth) + launch

rate: of the precision in which the operator computes, from the target's profile; matrix products and convolutions use
the units made for them, and all other operators compute at the float32 rate. bytes: activations read and written and
weights read, once each, from memory (Williams et al. 2009, CACM 52(4)). launch: the least time of a kernel launch, also
from the profile.

On GPUs, elementwise operators (additions of biases and residuals, activations, casts, rounding to int8) count as part
of the operator before them if they are its only consumer: compilers such as TensorRT fuse them into its kernel, so that
neither a launch nor the value in between costs anything. On CPUs nothing is fused. Reshapes cost nothing anywhere;
arithmetic on shapes costs nothing on GPUs, whose compilers do it beforehand.

Real times are longer, mostly by 1.5 to 4 times, and more for small products, because no kernel reaches the full rate.
They are shorter if values stay in a cache, because all bytes count as if they came from memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from onnx import TensorProto

from edgekit.cost.memory import Memory, memory
from edgekit.cost.operators import POINTWISE, PRECISION, Bytes, Operator, Workload
from edgekit.errors import EdgekitError, unknown
from edgekit.graph.shapes import Value
from edgekit.targets.profile import PRECISIONS, Target

FORMULA = "max(operations / rate, bytes / bandwidth) + launch, for each operator"
FUSED = "biases, activations and residuals count with the operator before them"
SIZES = {"float32": 4.0, "float16": 2.0, "bfloat16": 2.0, "int8": 1.0, "float8": 1.0, "int4": 0.5}
EXACT = ("int8", "int4", "float8")  # for products in these precisions, the graph must contain them with their scales


@dataclass(frozen=True, slots=True)
class Layer:
    """An operator and the operators fused into it. roofline: seconds by the rates alone; bound: the largest part of the
    time: compute, memory or launch."""

    name: str
    op_type: str
    precision: str
    operations: float
    bytes: float
    seconds: float
    roofline: float
    bound: str
    fused: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Estimate:
    """The estimate of one call at one batch size. precision: the assumed precision of float32 operators."""

    target: str
    batch: int
    precision: str
    layers: tuple[Layer, ...]
    memory: Memory
    unknown: tuple[str, ...] = ()  # nodes of unknown shape, which count as zero

    @property
    def seconds(self) -> float:
        return sum(layer.seconds for layer in self.layers)

    def check_memory(self) -> None:
        """Raise with the numbers if the model does not fit."""
        if not self.memory.fits:
            raise EdgekitError(
                f"the model does not fit on {self.target} at batch size {self.batch}: {self.memory}; use a smaller "
                "batch, or compress the model"
            )


def precision_on(target: Target, wanted: str | None = None) -> str:
    """Return the assumed precision of float32 operators: the wanted one if the device has it and may use it, else the
    first of its plan that needs no change of the graph."""
    if wanted is None:
        return next(item for item in (*target.plan.order, "float32") if item not in EXACT)
    if wanted not in PRECISIONS:
        raise unknown("precision", wanted, PRECISIONS)
    target.refuse(wanted)
    if wanted not in target.rates:
        raise EdgekitError(f"{target.name} has no {wanted}; it has {', '.join(target.rates)}")
    return wanted


def in_mode(target: Target, name: str) -> Target:
    """Return the target with the rates of one of its power modes."""
    mode = next((mode for mode in target.power if mode.name == name), None)
    if mode is None:
        names = [mode.name for mode in target.power]
        if not names:
            raise EdgekitError(f"{target.name} has no power modes on record; leave the mode out")
        raise unknown("power mode", name, names, where=target.name)
    rates = {
        key: replace(rate, dense=replace(rate.dense, value=rate.dense.value * mode.share))
        for key, rate in target.rates.items()
    }
    bandwidth = replace(target.bandwidth, value=target.bandwidth.value * mode.bandwidth_share)
    return replace(target, rates=rates, bandwidth=bandwidth)


def estimate(work: Workload, target: Target, batch: int, *, precision: str | None = None, threads: int = 1) -> Estimate:
    """Estimate time and memory of a graph on a target. `precision`: of float32 operators; int8 stands for products in
    int8 and all other operators in the plan's best precision. `threads`: cores of a CPU that share the work evenly.
    Raises if the graph computes in a precision that the target forbids."""
    chosen = precision_on(target, precision)
    plain = precision_on(target) if chosen in EXACT else chosen
    check_precisions(work, target)
    cores = min(threads, target.cores) if target.kind == "cpu" else 1

    def size(value: Value) -> float:
        return value.bytes * (SIZES[plain] / 4 if value.dtype == TensorProto.FLOAT else 1)

    layers = []
    for operator, others in _groups(work, fuse=target.kind != "cpu"):
        if operator.view or (operator.sizes_only and target.kind != "cpu"):
            continue
        own = operator.precision if operator.precision in PRECISIONS else "float32"
        runs_in = (chosen if operator.product else plain) if own == "float32" else own
        rate = target.rates[runs_in if operator.product else "float32"].dense.value * cores
        factors = SIZES[chosen] / 4 if operator.product and own == "float32" else SIZES[plain] / 4
        moved = (
            _moved(operator.read, factors)
            + _moved(operator.weights, factors)
            + _moved(others.written, SIZES[plain] / 4)
            + _moved(others.read, SIZES[plain] / 4)
        )
        computing, moving = operator.operations / rate, moved / target.bandwidth.value
        computing += others.operations / (target.rates["float32"].dense.value * cores)
        least = max(computing, moving)
        seconds = least + target.launch.value
        bound = "launch" if target.launch.value > least else "compute" if computing > moving else "memory"
        operations = operator.operations + others.operations
        layers.append(
            Layer(
                operator.name, operator.op_type, runs_in, operations, moved, seconds, least, bound, tuple(others.names)
            )
        )
    return Estimate(target.name, batch, chosen, tuple(layers), memory(work, target, size), work.unknown)


def check_precisions(work: Workload, target: Target) -> None:
    """Raise if products of the graph compute in a precision that the target forbids or that the device has no units
    for."""
    for name in dict.fromkeys(item.precision for item in work.operators if item.product):
        if name in PRECISIONS:
            target.refuse(name)
            if name not in target.rates:
                raise EdgekitError(
                    f"the graph has products in {name}, which {target.name} has no units for; it has "
                    f"{', '.join(target.rates)}"
                )


@dataclass(slots=True)
class _Others:
    """The operators fused into another one: the result that they write, and the further values that they read."""

    written: Bytes
    read: dict[str, float] = field(default_factory=dict)
    operations: float = 0.0
    names: list[str] = field(default_factory=list)


def _moved(bytes_: Bytes, scale: float) -> float:
    """Return bytes in which those of float32 values are scaled to the device's storage."""
    return sum(count * (scale if precision == "float32" else 1) for precision, count in bytes_.items())


def _groups(work: Workload, *, fuse: bool) -> list[tuple[Operator, _Others]]:
    """Return the operators, each with the operators fused into it."""
    groups: list[tuple[Operator, _Others]] = []
    made: dict[str, int] = {}  # value -> index of the group that writes it last
    consumers = _consumers(work)
    for operator in work.operators:
        if operator.view:
            if operator.inputs and operator.inputs[0] in made:
                made |= dict.fromkeys(operator.outputs, made[operator.inputs[0]])
            continue
        host = _host(operator, work, made, consumers) if fuse else None
        if host is None:
            groups.append((operator, _Others(operator.written)))
            made |= dict.fromkeys(operator.outputs, len(groups) - 1)
            continue
        number = made[host]
        others = groups[number][1]
        rest = dict(operator.read)
        inside = work.values[host]
        rest[PRECISION.get(inside.dtype, "other")] -= inside.bytes  # the value in between never leaves the kernel
        for key, count in [*rest.items(), *operator.weights.items()]:
            others.read[key] = others.read.get(key, 0.0) + count
        others.written = operator.written
        others.operations += operator.operations
        others.names.append(operator.name)
        made |= dict.fromkeys(operator.outputs, number)
    return groups


def _host(operator: Operator, work: Workload, made: Mapping[str, int], consumers: Mapping[str, int]) -> str | None:
    """Return the input into whose producer this operator can be fused: among the inputs without another consumer, the
    one produced last."""
    if operator.op_type not in POINTWISE or operator.sizes_only or len(operator.outputs) != 1:
        return None
    count = work.values[operator.outputs[0]].count
    fits = [
        name for name in operator.inputs if name in made and consumers[name] == 1 and work.values[name].count == count
    ]
    return max(fits, key=lambda name: made[name], default=None)


def _consumers(work: Workload) -> Mapping[str, int]:
    """Return how many operators read each value, also through views; an output of the graph counts one more."""
    below: dict[str, list[str]] = {}
    counts: dict[str, int] = {}
    for operator in work.operators:
        for name in operator.inputs:
            if operator.view:
                below.setdefault(name, []).extend(operator.outputs)
            else:
                counts[name] = counts.get(name, 0) + 1
    for name in work.outputs:
        counts[name] = counts.get(name, 0) + 1
    for operator in reversed(work.operators):
        if operator.view and operator.inputs:
            source = operator.inputs[0]
            counts[source] = counts.get(source, 0) + sum(counts.get(name, 0) for name in operator.outputs)
    return {name: counts.get(name, 0) for operator in work.operators for name in (*operator.inputs, *operator.outputs)}
