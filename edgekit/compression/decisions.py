"""The decisions of a target for `edgekit compress --target NAME`: which passes may run, which values their open
parameters get, how long a call takes on a device that is not present, and whether the result fits into its memory."""

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
    """Return the recipe with the target's values for open parameters. Raises if a pass is not allowed for this
    target."""
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
    """Return whether a pass may run for the target. Raises for a step that is wrong for every target."""
    if target is None:
        return True
    built = with_defaults(target, step).build()
    try:
        refuse(target, built)
    except EdgekitError:
        return False
    return True


def refuse(target: Target, built: Pass[Any]) -> None:
    """Raise if with this pass the model computes in a precision that the target forbids, or contains operators that the
    target's runtime does not read."""
    for precision in built.precisions():
        target.refuse(precision)
    if "DynamicQuantizeLinear" in built.writes and target.stack.runtime in TENSORRT:
        raise EdgekitError(
            f"{target.stack.name}, which runs models on {target.name}, reads no DynamicQuantizeLinear and no "
            f"MatMulInteger; use {'static_int8' if target.plan.int8 != 'none' else ', '.join(target.plan.order)}"
        )


def with_defaults(target: Target, step: Step) -> Step:
    """Return the pass with the target's channel multiple and quantization scheme, unless the recipe sets them."""
    from edgekit.passes.base import load_pass

    pass_class = load_pass(step.name)
    values: dict[str, Any] = {}
    if pass_class.multiple_parameter:
        values[pass_class.multiple_parameter] = target.plan.round_to
    if pass_class.scheme_parameter and target.plan.int8 != "none":
        values[pass_class.scheme_parameter] = target.plan.int8
        # GPUs add in 32 bits; 7 is for CPUs that add in 16
        if target.kind != "cpu" and pass_class.weight_bits_parameter:
            values[pass_class.weight_bits_parameter] = 8
    return replace(step, parameters={**values, **step.parameters})


def measured_here(target: Target | None) -> bool:
    """Return whether latency is measured on this machine: without a target, or if the target is this machine."""
    return target is None or is_here(target)


def rounded(target: Target | None, count: int, whole: int) -> int:
    """Round a number of units to a multiple of the number that the target processes at once, if there are so many."""
    multiple = target.plan.round_to if target else 1
    return count if whole < multiple else max(multiple, round(count / multiple) * multiple)


def graph_work(model: ModelProto, inputs: Arrays, batch: int) -> Workload:
    """Return the graph's operators for inputs of these lengths."""
    return work(model, sized(model, batch, lengths_of(model, inputs)))


def as_written(target: Target) -> str:
    """Return the precision in which float32 operators of a graph run. For weakly typed networks, TensorRT's builders up
    to 10 choose it themselves; all other runtimes follow the graph."""
    return precision_on(target) if target.stack.typing == "weak" else "float32"


def estimated(
    target: Target, before: ModelProto, after: ModelProto, inputs: Arrays, batches: Sequence[int]
) -> list[Latency]:
    """Return the latency on the target by the roofline, which replaces the guard's measurement; an estimate has no
    interval."""
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
    """Return which of these batch sizes takes the most memory, and how much."""
    found = [
        (batch, estimate(graph_work(model, inputs, batch), target, batch, precision=as_written(target)).memory)
        for batch in batches
    ]
    return max(found, key=lambda item: item[1].needed)
