"""What a target decides for `edgekit compress --target NAME`: which passes may run, what their parameters are where the
recipe leaves them open, how long a call takes on a device that is not here, and whether the result fits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy.typing as npt
from onnx import ModelProto

from edgekit.compression.guard import Latency
from edgekit.compression.recipe import Step
from edgekit.cost.layers import lengths_of
from edgekit.cost.memory import Memory
from edgekit.cost.operators import Workload, work
from edgekit.cost.roofline import estimate, precision_on
from edgekit.errors import EdgekitError
from edgekit.graph.shapes import sized
from edgekit.targets.local import is_here
from edgekit.targets.profile import Target

if TYPE_CHECKING:
    from edgekit.passes.base import Pass

TENSORRT = ("tensorrt", "tensorrt-rtx")
Arrays = Mapping[str, npt.NDArray[Any]]


def fitted(target: Target, steps: Sequence[Step]) -> tuple[Step, ...]:
    """The recipe with the target's values where it leaves them open; an error if a pass is not for this target."""
    result = []
    for number, step in enumerate(steps, start=1):
        step = with_defaults(target, step)
        try:
            refuse(target, step.build())
        except EdgekitError as error:
            raise EdgekitError(f"pass {number} ({step.name!r}): {error}") from None
        result.append(step)
    return tuple(result)


def allowed(target: Target | None, step: Step) -> bool:
    """Whether a pass may run for the target."""
    try:
        if target is not None:
            refuse(target, with_defaults(target, step).build())
    except EdgekitError:
        return False
    return True


def refuse(target: Target, built: Pass[Any]) -> None:
    """Raise if the pass makes the model compute in what the target must never be given, or writes operators that its
    runtime does not read."""
    for precision in built.precisions():
        target.refuse(precision)
    if "DynamicQuantizeLinear" in built.writes and target.stack.runtime in TENSORRT:
        raise EdgekitError(
            f"{target.stack.name}, which runs models on {target.name}, reads no DynamicQuantizeLinear and no "
            f"MatMulInteger; use {'static_int8' if target.plan.int8 != 'none' else ', '.join(target.plan.order)}"
        )


def with_defaults(target: Target, step: Step) -> Step:
    """The pass with the target's multiple of channels and quantization scheme, unless the recipe has its own."""
    from edgekit.passes.base import load_pass

    kind = load_pass(step.name)
    values: dict[str, Any] = {}
    if kind.multiple_parameter:
        values[kind.multiple_parameter] = target.plan.round_to
    if kind.scheme_parameter and target.plan.int8 != "none":
        values[kind.scheme_parameter] = target.plan.int8
        if target.kind != "cpu" and kind.weight_bits_parameter:  # they add in 32 bits; 7 is for CPUs that add in 16
            values[kind.weight_bits_parameter] = 8
    return replace(step, parameters={**values, **step.parameters})


def measured_here(target: Target | None) -> bool:
    """Whether latency is measured on this machine: always without a target, else if it is this machine."""
    return target is None or is_here(target)


def rounded(target: Target | None, count: int, whole: int) -> int:
    """A number of units to keep, as a multiple of what the target's units take at a time, if there are so many."""
    multiple = target.plan.round_to if target else 1
    return count if whole < multiple else max(multiple, round(count / multiple) * multiple)


def graph_work(model: ModelProto, inputs: Arrays, batch: int) -> Workload:
    """The graph's operators for inputs of these lengths."""
    return work(model, sized(model, batch, lengths_of(model, inputs)))


def as_written(target: Target) -> str:
    """What float32 operators of a graph run in. TensorRT's builders up to 10 choose for themselves on a network that is
    weakly typed; everything else does as the graph says."""
    return precision_on(target) if target.stack.typing == "weak" else "float32"


def estimated(
    target: Target, before: ModelProto, after: ModelProto, inputs: Arrays, batches: Sequence[int]
) -> list[Latency]:
    """Latency on the target by the roofline, in place of what the guard measures; an estimate has no interval."""
    result = []
    for batch in batches:
        first, second = (
            1e3 * estimate(graph_work(model, inputs, batch), target, batch, precision=as_written(target)).seconds
            for model in (before, after)
        )
        ratio = second / first
        result.append(Latency(batch, first, second, ratio, ratio, ratio))
    return result


def needed(target: Target, model: ModelProto, inputs: Arrays, batches: Sequence[int]) -> tuple[int, Memory]:
    """The batch size, of these, that takes the most memory, and how much."""
    found = [
        (batch, estimate(graph_work(model, inputs, batch), target, batch, precision=as_written(target)).memory)
        for batch in batches
    ]
    return max(found, key=lambda item: item[1].needed)
