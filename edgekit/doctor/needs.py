"""List what a model requires of a device, and check whether the device, or this machine, provides it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgekit.bundle.family import find_family
from edgekit.bundle.format import Bundle
from edgekit.doctor.checks import gpu_of
from edgekit.doctor.finding import Finding, size
from edgekit.doctor.providers import CPU
from edgekit.doctor.system import System
from edgekit.targets.profile import RESERVE, Target

if TYPE_CHECKING:
    from onnx import ModelProto

FULL = 0.7  # share of the free memory above which a model may not fit, because runtimes allocate buffers too


@dataclass(frozen=True, slots=True)
class Needs:
    """What a model requires. opset: of a stored graph; None for a network, whose exports get the opset of the target.
    domains: operator domains that only one runtime knows. weights, activations: bytes, the latter at `batch` rows, or
    None if only the exported graph could tell."""

    name: str
    family: str
    parameters: int
    precisions: tuple[str, ...]
    weights: int
    batch: int = 1
    opset: int | None = None
    domains: tuple[str, ...] = ()
    asymmetric: bool = False  # Q/DQ with zero points other than 0
    activations: int | None = None


def of(bundle: Bundle, graph: ModelProto | None, batch: int) -> Needs:
    """What a bundle requires. graph: the bundle's own, or the one that its network is lowered to, or None."""
    manifest = bundle.manifest
    if graph is None:
        size = bundle.parameters
        return Needs(manifest.name, manifest.family, size, ("float32",), 4 * size, batch)
    own = bundle.is_graph
    weights, activations = bytes_needed(graph, batch)
    return Needs(
        manifest.name,
        manifest.family,
        bundle.parameters,
        precisions(graph),
        int(weights),
        batch,
        next((item.version for item in graph.opset_import if item.domain in ("", "ai.onnx")), None) if own else None,
        tuple(sorted({node.domain for node in graph.graph.node} - {"", "ai.onnx"})),
        _asymmetric(graph),
        None if activations is None else int(activations),
    )


def precisions(model: ModelProto) -> tuple[str, ...]:
    """The data types in which a graph stores weights or to which it casts values."""
    from edgekit.bundle.onnx_file import learnt
    from edgekit.cost.operators import PRECISION

    found: set[int] = {tensor.data_type for tensor in learnt(model)}
    found |= {
        item.i for node in model.graph.node if node.op_type == "Cast" for item in node.attribute if item.name == "to"
    }
    return tuple(sorted({PRECISION[dtype] for dtype in found if dtype in PRECISION}))


def bytes_needed(model: ModelProto, batch: int) -> tuple[float, float | None]:
    """The bytes of the stored tensors, and the largest total of live activations; None for the latter if a shape is not
    known."""
    from edgekit.cost.memory import peak
    from edgekit.cost.operators import work
    from edgekit.graph.shapes import sized

    operators = work(model, sized(model, batch))
    weights = sum(value.bytes for value in operators.stored.values())
    return weights, None if operators.unknown else peak(operators)[0]


def _asymmetric(model: ModelProto) -> bool:
    from edgekit.bundle.onnx_file import to_array

    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    points = {
        node.input[2]
        for node in model.graph.node
        if node.op_type in ("QuantizeLinear", "DequantizeLinear") and len(node.input) > 2
    }
    return any(to_array(stored[name]).any() for name in points if name in stored)


def judge(needs: Needs, target: Target | None, system: System | None) -> list[Finding]:
    """Check the model against a target, or, if a system is given, against this machine."""
    opset = f", opset {needs.opset}" if needs.opset else ""
    precisions = ", ".join(needs.precisions)
    found = [
        Finding("model", "ok", f"{needs.name}: {needs.family}, {needs.parameters:,} parameters, {precisions}{opset}")
    ]
    if target:
        found += [*_precision(needs, target), *_graph(needs, target)]
    return [*found, *_memory(needs, target, system), *(_runtime(needs, system) if system else ())]


def _precision(needs: Needs, target: Target) -> Iterator[Finding]:
    allowed = ", ".join(target.plan.order)
    for name in needs.precisions:
        if name in target.plan.never:
            yield Finding(
                "precision",
                "error",
                f"{name} must not be used on {target.name}: {target.plan.reason}",
                f"export or compress it in one of: {allowed}",
            )
        elif name not in target.rates:
            yield Finding(
                "precision", "warning", f"{target.name} has no units for {name} that are known", f"use {allowed}"
            )
    if not set(needs.precisions) & {*target.plan.never} and set(needs.precisions) <= set(target.rates):
        held = ", ".join(needs.precisions) or "no weights"
        yield Finding("precision", "ok", f"{held} on {target.name}; best first: {allowed}")


def _graph(needs: Needs, target: Target) -> Iterator[Finding]:
    stacks = [stack for stack in target.stacks if stack.opset]
    if needs.opset and stacks:
        fitting = [stack for stack in stacks if stack.opset is not None and stack.opset >= needs.opset]
        newest = max(stack.opset or 0 for stack in stacks)
        if not fitting:
            parsers = any(stack.runtime.startswith("tensorrt") for stack in stacks)  # the command runs them, too
            yield Finding(
                "opset",
                "warning" if parsers else "error",
                f"opset {needs.opset} as it is stored; runtimes of {target.name} read up to {newest}",
                f"edgekit export --target {target.name} writes it in an older one, where its operators allow "
                f"it; or export the model again from its source with opset {newest}",
            )
        elif fitting[0] is not stacks[0]:
            yield Finding(
                "opset",
                "warning",
                f"opset {needs.opset}: {stacks[0].name} reads up to {stacks[0].opset}",
                f"use {fitting[0].name}, or export the model again with opset {stacks[0].opset}",
            )
        else:
            yield Finding("opset", "ok", f"{needs.opset}; {fitting[0].name} reads up to {fitting[0].opset}")
    first = target.stack
    of_tensorrt = first.runtime in ("tensorrt", "tensorrt-rtx")
    if needs.domains and target.kind != "cpu":
        yield Finding(
            "operators",
            "error" if of_tensorrt else "warning",
            f"operators of {', '.join(needs.domains)}, which TensorRT cannot parse",
            "export the model without the optimizations of one runtime",
        )
    if needs.asymmetric and target.plan.int8 == "s8s8":
        yield Finding(
            "int8 form",
            "error" if of_tensorrt else "warning",
            "zero points other than 0, which TensorRT refuses",
            "quantize it with the scheme s8s8",
        )


def _memory(needs: Needs, target: Target | None, system: System | None) -> Iterator[Finding]:
    need = needs.weights + (needs.activations or 0)
    where, room = "", 0.0
    if system:
        gpu = gpu_of(system, target)
        where, room = ("the GPU", float(gpu.free)) if gpu and gpu.free else ("this machine", float(system.available))
    elif target:
        where, room = f"{target.name} after the reserve for the system", target.memory.value - RESERVE[target.kind]
    if not room:
        return
    told = f"activations at batch {needs.batch}" if needs.activations is not None else "activations not known"
    free = "free on" if system else "on"
    finding = f"{size(need)} for weights and {told}, {size(room)} {free} {where}"
    if need > room:
        yield Finding("model memory", "error", finding, "use a smaller batch, or compress the model: edgekit compress")
    elif need > FULL * room:
        yield Finding(
            "model memory", "warning", f"{finding}: this leaves little for the runtime", "try a smaller batch"
        )
    else:
        yield Finding("model memory", "ok", finding)


def _runtime(needs: Needs, system: System) -> Iterator[Finding]:
    """Which of the runtimes that can run this family are installed."""
    have = {
        "c": bool(system.compiler),
        "onnxruntime": any(item.active for item in system.providers),
        "openvino": "openvino" in system.packages,
        "torch": "torch" in system.packages,
    }
    family = find_family(needs.family)
    found = [name for name in family.runtimes if have.get(name)]
    if family.builder and "torch" not in system.packages:
        yield Finding(
            "runtime",
            "warning",
            "its network cannot be exported here, because torch is not installed",
            "export it on a machine with torch, or: pip install 'edgekit[compress]'",
        )
    if found:
        devices = [item.name for item in system.providers if item.active and item.name != CPU]
        yield Finding("runtime", "ok", f"{', '.join(found)}{f' ({devices[0]})' if devices else ''}")
    else:
        yield Finding(
            "runtime", "error", f"none of {', '.join(family.runtimes)} works here", "pip install 'edgekit[onnx]'"
        )
