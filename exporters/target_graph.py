"""Rewrite a graph for a target: its opset, its operators and its precision.

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
from exporters.escape import in_line
from exporters.float32_pinned import NOTHING, Float32Pinned, float32_pinned
from exporters.parser_versions import ParserVersion, parser_version
from exporters.verify import TOLERANCE

FAVOURED = 17  # every runtime since 2022 reads it; from this opset on LayerNormalization is one node
# the precisions that this machine can verify: onnxruntime has no bfloat16 arithmetic on CPUs
WRITTEN = ("float32", "float16", "int8")
# The allowed difference from the network in float64. Float16 has 11 bits. In int8 an activation may be rounded to the
# neighbouring code, and one code is 1/127 of its range.
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
    """A target, one of its software stacks, and the version of the stack's ONNX parser if it has its own."""

    target: Target
    stack: Stack
    parser_version: ParserVersion | None

    @property
    def opset(self) -> int:
        """The newest ONNX opset that the stack reads."""
        read = self.stack.opset or FAVOURED
        return min(read, self.parser_version.opset) if self.parser_version else read

    @property
    def weak(self) -> bool:
        """Whether typing is weak: options tell the builder which precisions it may use, and the graph's types are only
        hints."""
        if self.parser_version is None or self.parser_version.typing == "strong":
            return False
        return self.parser_version.typing == "weak" or self.stack.typing == "weak"


@dataclass(frozen=True, slots=True)
class TargetGraph:
    """A graph for one deployment target. `tolerance`: the largest difference that its verification allows. `pinned`:
    the layers that must stay in float32 under weak typing."""

    model: ModelProto
    deployment: DeploymentTarget
    precision: str
    tolerance: float
    pinned: Float32Pinned = NOTHING

    @property
    def advice(self) -> str:
        """The next step to recommend if the outputs differ by too much."""
        return "try --precision float32" if self.precision == "float16" else "try another --opset"

    def described(self) -> dict[str, Any]:
        """Return the entries about this graph that a manifest holds."""
        target, stack = self.deployment.target, self.deployment.stack
        return {
            "target": target.name,
            "sm": target.sm,
            "stack": {key: value for key, value in asdict(stack).items() if value},
            "precision": self.precision,
            "opset": opset(self.model),
        }


def deployment_target(target: str, runtime: str = "", stack: str = "") -> DeploymentTarget:
    """Find a target by name, and the stack with this name, or else its first stack with this runtime."""
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
    """Convert a graph to the opset and the precision of a deployment target. `precision`: one of `WRITTEN`, by default
    the first of the target's plan; `version`: an opset, by default 17 or the newest that the stack reads.

    Raises if the plan forbids the precision, if the opset is too new, or if the parser lacks an operator.
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
    chosen_precision = _precision(where, precision, quantized)
    keep = tuple(glob.escape(name) for name in (*lowered.sums, *_deciding(graph)))
    half = Half(keep_nodes=keep, overflow="keep")  # masks of -1e9 stay in float32
    if where.parser_version:
        where.parser_version.refuse(graph)  # the parser's own reason is the clearest one, so it is checked first
    if chosen_precision == "float16" and "float16" not in arithmetic(graph):
        try:
            graph = half.converted(graph)
        except EdgekitError as error:
            reason = str(error).removeprefix("half: ").partition(";")[0]
            raise EdgekitError(f"it cannot be put into float16: {reason}; try --precision float32") from error
        onnx.checker.check_model(graph, full_check=True)
    refuse(graph, where)
    return TargetGraph(
        graph,
        where,
        chosen_precision,
        TOLERANCES[chosen_precision],
        _float32_pinned(graph, half, where, chosen_precision),
    )


def _float32_pinned(graph: ModelProto, half: Half, where: DeploymentTarget, chosen_precision: str) -> Float32Pinned:
    """Return the layers that must stay in float32 if the builder may choose half precision. An int8 graph holds no half
    and so does not say which; then they are the nodes that would stay in float32 if the rest were converted to half."""
    if not where.weak or "float16" not in (
        chosen_precision,
        *(where.target.plan.order if chosen_precision == "int8" else ()),
    ):
        return NOTHING
    if chosen_precision == "float16":
        return float32_pinned(graph)
    mixed = ModelProto()
    mixed.CopyFrom(graph)
    try:
        return float32_pinned(half.converted(mixed))
    except EdgekitError:  # no node of this graph can compute in half
        return float32_pinned(graph)


def requirements(where: DeploymentTarget, *pins: str) -> bytes:
    """Return requirements.txt for the device, with pinned versions; `pins` replace the requirements of the stack."""
    # numpy 1.19.5, the last for Python 3.6, executes an illegal instruction on Jetsons (numpy/numpy#18131)
    numpy = "numpy==1.19.4" if where.stack.python == "3.6" else "numpy"
    stack = where.stack
    needed = pins or stack.requirements
    head = [f"# {where.target.title}: {stack.name}" + (f", Python {stack.python}" if stack.python else "")]
    if not needed:
        head.append(
            f"# {stack.runtime} comes with {'JetPack ' + stack.jetpack if stack.jetpack else 'its own installer'}"
        )
    never = [f"# never: {item.requirement} ({item.why})" for item in where.target.never if item.requirement]
    lines = [*head, *never, *needed, numpy]
    return ("\n".join(map(in_line, lines)) + "\n").encode()


def refuse(graph: ModelProto, where: DeploymentTarget) -> None:
    """Raise if the graph contains something that the target forbids or that its parser does not read."""
    for precision in sorted(arithmetic(graph)):
        where.target.refuse(precision)
    if where.parser_version:
        where.parser_version.refuse(graph)
    elif opset(graph) > where.opset:
        raise EdgekitError(f"{where.stack.name} reads ONNX opsets up to {where.opset}; the graph is in {opset(graph)}")


def arithmetic(model: ModelProto) -> set[str]:
    """Return the precisions below float32 in which nodes compute. A tensor that is only stored in such a precision and
    cast before its use does not count; codes count as int8 if activations are quantized."""
    found: set[str] = set()
    types = element_types(model)
    for node in model.graph.node:
        if node.op_type == "QuantizeLinear":
            found |= _codes(node, types)
        elif node.op_type not in ("Cast", "DequantizeLinear"):
            found |= {PRECISIONS[types[name]] for name in node.input if types.get(name) in PRECISIONS}
    return found


def _deciding(graph: ModelProto) -> list[str]:
    """Return the nodes between a comparison and the nearest matrix product before it. Rounded to half, their values
    could compare differently: a router would choose another expert, and a code another sign."""
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
            form = (
                "this target has no fast int8"
                if plan.int8 == "none"
                else f"--recipe with static_int8, scheme = '{plan.int8}'"
            )
            raise EdgekitError(f"the model is not quantized; int8 comes from `edgekit compress`: {form}")
        if asked == "bfloat16":
            raise EdgekitError("bfloat16 cannot be verified here: onnxruntime has no such arithmetic on CPUs")
        if asked not in WRITTEN:
            raise unknown("precision", asked, WRITTEN)
        return asked
    return next(_floats(where), "float32")


def _floats(where: DeploymentTarget) -> Iterator[str]:
    """Return the plan's precisions that a float graph can be converted to. A CPU computes half in float32, between
    casts."""
    for name in where.target.plan.order:
        if name == "float32" or (name == "float16" and where.target.kind != "cpu"):
            yield name
