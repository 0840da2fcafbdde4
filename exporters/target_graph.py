"""The graph that a target's software reads: its opset, its operators, its precision.

bundle --> ONNX --> opset and operators of the stack --> half precision, if the plan says so --> checked
"""

from __future__ import annotations

import glob
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import onnx
from onnx import ModelProto, NodeProto, TensorProto

from edgekit.errors import EdgekitError, unknown
from edgekit.graph.index import Index, element_types
from edgekit.graph.model import attribute, opset
from edgekit.graph.opset import to_opset
from edgekit.passes.half import Half
from edgekit.targets import profile
from edgekit.targets.profile import Stack, Target
from exporters.float32_pinned import NOTHING, Float32Pinned, float32_pinned
from exporters.parser_versions import ParserVersion, parser_version
from exporters.verify import TOLERANCE

FAVOURED = 17  # every runtime since 2022 reads it; LayerNormalization is one node from here on
WRITTEN = ("float32", "float16", "int8")  # what is verified here: onnxruntime has no bfloat16 arithmetic on CPUs
# difference from the network in float64 that is allowed: float16 has 11 bits; in int8 an activation may fall on the
# other side of a step, and the step is 1/127 of its range
TOLERANCES = {"float32": TOLERANCE, "float16": 1e-2, "int8": 2e-2}
CHOICES = frozenset(
    ("TopK", "ArgMax", "ArgMin", "Less", "LessOrEqual", "Greater", "GreaterOrEqual", "NonMaxSuppression")
)
PRODUCTS = ("MatMul", "Gemm", "Conv")
PRECISIONS: dict[int, str] = {
    TensorProto.FLOAT16: "float16", TensorProto.BFLOAT16: "bfloat16", TensorProto.INT4: "int4",
    TensorProto.UINT4: "int4", TensorProto.FLOAT8E4M3FN: "float8", TensorProto.FLOAT8E5M2: "float8",
    TensorProto.FLOAT8E4M3FNUZ: "float8", TensorProto.FLOAT8E5M2FNUZ: "float8",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class DeploymentTarget:
    """A target, the stack of its that is exported for, and that stack's parser if it has one of its own."""

    target: Target
    stack: Stack
    parser_version: ParserVersion | None

    @property
    def opset(self) -> int:
        """The newest that is read there."""
        read = self.stack.opset or FAVOURED
        return min(read, self.parser_version.opset) if self.parser_version else read

    @property
    def weak(self) -> bool:
        """Whether the builder is told which precisions it may use, and takes the graph's types for a hint."""
        if self.parser_version is None or self.parser_version.typing == "strong":
            return False
        return self.parser_version.typing == "weak" or self.stack.typing == "weak"


@dataclass(frozen=True, slots=True)
class TargetGraph:
    """A graph as a place reads it. `tolerance`: what its verification may allow. `exact`: under weak typing, what must
    be kept out of half."""

    model: ModelProto
    deployment: DeploymentTarget
    precision: str
    tolerance: float
    pinned: Float32Pinned = NOTHING

    @property
    def advice(self) -> str:
        """What to do where the numbers do not come out."""
        return "try --precision float32" if self.precision == "float16" else "try another --opset"

    def described(self) -> dict[str, Any]:
        """What a manifest says of it."""
        target, stack = self.deployment.target, self.deployment.stack
        return {
            "target": target.name,
            "sm": target.sm,
            "stack": {key: value for key, value in asdict(stack).items() if value},
            "precision": self.precision,
            "opset": opset(self.model),
        }


def deployment_target(target: str, runtime: str = "", stack: str = "") -> DeploymentTarget:
    """A target by name, and its first stack with this runtime, or the one of this name."""
    found = profile.find(target)
    stacks = [item for item in found.stacks if not runtime or item.runtime == runtime]
    if not stacks:
        able = [name for name in profile.names() if any(s.runtime == runtime for s in profile.find(name).stacks)]
        there = ", ".join(dict.fromkeys(item.runtime for item in found.stacks))
        raise EdgekitError(
            f"{found.name} has no {runtime}: its runtimes are {there}; targets with {runtime}: {', '.join(able)}"
        )
    chosen = next((item for item in stacks if not stack or item.name == stack), None)
    if chosen is None:
        raise unknown("stack", stack, [item.name for item in stacks], where=found.name)
    return DeploymentTarget(found, chosen, parser_version(chosen))


def target_graph(
    model: ModelProto, where: DeploymentTarget, precision: str = "", version: int | None = None
) -> TargetGraph:
    """The graph in the opset and the precision of a place. `precision`: one of `WRITTEN`, else the first of the plan;
    `version`: an opset, else 17 or the newest that the place reads.

    Raises where the plan forbids the precision, the opset is too new, or the parser lacks an operator.
    """
    newest = where.opset
    if version is not None and version > newest:
        raise EdgekitError(
            f"opset {version} is newer than {where.target.name} reads: {where.stack.name} takes up to {newest}"
        )
    wanted = min(version or FAVOURED, newest, opset(model))
    lowered = to_opset(model, wanted, where.parser_version.operators if where.parser_version else None)
    graph = lowered.model
    quantized = any(node.op_type == "QuantizeLinear" for node in graph.graph.node)
    kind = _precision(where, precision, quantized)
    keep = tuple(glob.escape(name) for name in (*lowered.sums, *_deciding(graph)))
    half = Half(keep_nodes=keep, overflow="keep")  # masks of -1e9 stay in float32
    if where.parser_version:
        where.parser_version.refuse(graph)  # before anything else is wrong with such a graph
    if kind == "float16" and "float16" not in arithmetic(graph):
        try:
            graph = half.converted(graph)
        except EdgekitError as error:
            reason = str(error).removeprefix("half: ").partition(";")[0]
            raise EdgekitError(f"it cannot be put into float16: {reason}; try --precision float32") from error
        onnx.checker.check_model(graph, full_check=True)
    refuse(graph, where)
    return TargetGraph(graph, where, kind, TOLERANCES[kind], _float32_pinned(graph, half, where, kind))


def _float32_pinned(graph: ModelProto, half: Half, where: DeploymentTarget, kind: str) -> Float32Pinned:
    """What must be kept out of half where the builder may choose it. Beside int8 the graph does not say, for it has no
    half in it: what would stay in float32, were the rest in half."""
    if not where.weak or "float16" not in (kind, *(where.target.plan.order if kind == "int8" else ())):
        return NOTHING
    if kind == "float16":
        return float32_pinned(graph)
    mixed = ModelProto()
    mixed.CopyFrom(graph)
    try:
        return float32_pinned(half.converted(mixed))
    except EdgekitError:  # nothing in it can be in half
        return float32_pinned(graph)


def requirements(where: DeploymentTarget, *lines: str) -> bytes:
    """requirements.txt for the device, pinned; `lines` in place of those of the stack."""
    # the last for Python 3.6, 1.19.5, is an illegal instruction on Jetsons (numpy/numpy#18131)
    numpy = "numpy==1.19.4" if where.stack.python == "3.6" else "numpy"
    stack = where.stack
    needed = lines or stack.requirements
    head = f"# {where.target.title}: {stack.name}" + (f", Python {stack.python}" if stack.python else "")
    if not needed:
        head += f"\n# {stack.runtime} comes with {'JetPack ' + stack.jetpack if stack.jetpack else 'its own installer'}"
    never = [f"# never: {item.requirement} ({item.why})" for item in where.target.never if item.requirement]
    return "\n".join([head, *never, *needed, numpy, ""]).encode()


def refuse(graph: ModelProto, where: DeploymentTarget) -> None:
    """Raise for what the target must not be given, or its parser does not take."""
    for kind in sorted(arithmetic(graph)):
        where.target.refuse(kind)
    if where.parser_version:
        where.parser_version.refuse(graph)
    elif opset(graph) > where.opset:
        raise EdgekitError(f"{where.stack.name} reads ONNX opsets up to {where.opset}; the graph is in {opset(graph)}")


def arithmetic(model: ModelProto) -> set[str]:
    """Precisions below float32 that nodes compute in. What is merely stored so, and cast before it is used, does not
    count; codes count as int8 where activations are quantized."""
    found: set[str] = set()
    types = element_types(model)
    for node in model.graph.node:
        if node.op_type == "QuantizeLinear":
            found |= _codes(node, types)
        elif node.op_type not in ("Cast", "DequantizeLinear"):
            found |= {PRECISIONS[types[name]] for name in node.input if types.get(name) in PRECISIONS}
    return found


def _deciding(graph: ModelProto) -> list[str]:
    """Nodes whose values are compared, back to the nearest product: rounded to half, a router would take another expert
    and a code another sign."""
    producers = Index(graph).producers
    waiting = [name for node in graph.graph.node if node.op_type in CHOICES for name in node.input]
    found: dict[str, None] = {}
    while waiting:
        node = producers.get(waiting.pop())
        if node is not None and node.name not in found:
            found[node.name] = None
            waiting += () if node.op_type in PRODUCTS else node.input
    return list(found)


def _codes(node: NodeProto, types: dict[str, int]) -> set[str]:
    zero = node.input[2] if len(node.input) > 2 else ""
    code: int = types.get(zero) or attribute(node, "output_dtype", 0) or TensorProto.UINT8
    return {PRECISIONS.get(code, "int8")}


def _precision(where: DeploymentTarget, asked: str, quantized: bool) -> str:
    plan = where.target.plan
    if quantized:
        where.target.refuse("int8")
        if asked not in ("", "int8"):
            raise EdgekitError(f"the model is quantized to int8; it cannot be exported in {asked}")
        return "int8"
    if asked:
        where.target.refuse(asked)
        if asked == "int8":
            form = "none is fast there" if plan.int8 == "none" else f"--recipe with static_int8, scheme = '{plan.int8}'"
            raise EdgekitError(f"the model is not quantized; int8 comes from `edgekit compress`: {form}")
        if asked == "bfloat16":
            raise EdgekitError("bfloat16 cannot be verified here: onnxruntime has no such arithmetic on CPUs")
        if asked not in WRITTEN:
            raise unknown("precision", asked, WRITTEN)
        return asked
    return next(_floats(where), "float32")


def _floats(where: DeploymentTarget) -> Iterator[str]:
    """The plan's precisions that a float graph can be put into. A CPU computes half in float32, between casts."""
    for name in where.target.plan.order:
        if name == "float32" or (name == "float16" and where.target.kind != "cpu"):
            yield name
