"""Write a graph in an older opset, and without operators that a parser lacks.

Most operators differ between the versions only in types or options that the graph does not use; they are only checked.
Operators that the older version or the parser lacks are replaced by several simpler ones:

    LayerNormalization     ReduceMean, Sub, Mul, ReduceMean, Add, Sqrt, Div, Mul, Add
    Gelu                   Erf or Tanh
    GroupNormalization     Reshape around the same sums, per group
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, defs, helper, numpy_helper

from edgekit.errors import EdgekitError
from edgekit.graph.cleanup import shapes
from edgekit.graph.model import attribute, eliminate_dead_nodes, name_nodes, opset, unique_name, value_names

OLDEST = 13  # the first with a scale per channel in DequantizeLinear and with axes of Squeeze as an input
# Their meaning changed while the signature stayed the same, so in the old opset they would compute something else.
CHANGED = {"RoiAlign": 16, "GridSample": 20}
# Their axes became an input in opset 18; those of ReduceSum became one in opset 13.
REDUCTIONS = ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "SumSquare")
Array = npt.NDArray[Any]


@dataclass(slots=True)
class _Draft:
    """Nodes and tensors that replace one node; their values are named after it."""

    node: NodeProto
    rank: int | None  # of the first input
    length: dict[int, int]  # lengths of its axes, if known
    stored: dict[str, Array]
    opset: int
    taken: set[str]
    nodes: list[NodeProto] = field(default_factory=list)
    tensors: dict[str, Array] = field(default_factory=dict)

    def add(self, operator: str, *inputs: str, to: str = "", **attributes: Any) -> str:
        name = unique_name(f"{self.node.name}.{operator}", self.taken)
        self.taken.add(name)
        self.nodes.append(helper.make_node(operator, list(inputs), [to or name], name, **attributes))
        return to or name

    def constant(self, role: str, value: Any, dtype: Any = np.float32) -> str:
        name = unique_name(f"{self.node.name}.{role}", self.taken)
        self.taken.add(name)
        self.tensors[name] = np.asarray(value, dtype)
        return name

    def mean(self, value: str, axes: list[int]) -> str:
        """Add a ReduceMean, whose axes became an input in opset 18."""
        if self.opset < 18:
            return self.add("ReduceMean", value, axes=axes, keepdims=1)
        return self.add("ReduceMean", value, self.constant("axes", axes, np.int64), keepdims=1)

    def normalized(self, value: str, axes: list[int], epsilon: float) -> str:
        """Add (value - mean) / sqrt(variance + epsilon) over axes."""
        apart = self.add("Sub", value, self.mean(value, axes))
        variance = self.mean(self.add("Mul", apart, apart), axes)
        root = self.add("Sqrt", self.add("Add", variance, self.constant("epsilon", epsilon)))
        return self.add("Div", apart, root)

    def known_rank(self) -> int:
        if self.rank is None:
            raise EdgekitError(f"node {self.node.name!r}: the rank of its input is not known; export it with shapes")
        return self.rank


@dataclass(frozen=True, slots=True)
class Lowered:
    """A lowered graph. sums: nodes that replaced normalizations, which must not be converted to half precision."""

    model: ModelProto
    sums: tuple[str, ...]


def to_opset(model: ModelProto, version: int, known: Collection[str] | None = None) -> Lowered:
    """Return a copy in this opset, which must not be newer than the graph's. `known`: the parser's operators. Others
    are replaced if possible; if not, they stay, and `ParserVersion.refuse` names them."""
    result = ModelProto()
    result.CopyFrom(model)
    own = opset(model)
    if version != own and not OLDEST <= version <= own:
        allowed = f"{OLDEST} to {own}, the graph's own" if own > OLDEST else f"{own}, the graph's own"
        raise EdgekitError(f"opset {version} cannot be written; expected {allowed}")
    name_nodes(result)
    _store_constants(result)
    try:
        sums = _lower(result, result.graph, version, known)
    except onnx.shape_inference.InferenceError as error:
        raise EdgekitError(f"the graph contradicts itself: {_first_line(error)}; export it again") from error
    for entry in result.opset_import:
        if entry.domain in ("", "ai.onnx"):
            entry.version = version
    result.ir_version = min(result.ir_version, helper.find_min_ir_version_for(list(result.opset_import), True))
    eliminate_dead_nodes(result)
    result.graph.ClearField("value_info")
    try:
        onnx.checker.check_model(result, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise EdgekitError(f"the graph cannot be written in opset {version}: {_first_line(error)}") from error
    return Lowered(result, tuple(sums))


def _store_constants(model: ModelProto) -> None:
    """Replace Constant nodes by stored tensors."""
    kept = []
    for node in model.graph.node:
        value = attribute(node, "value", None) if node.op_type == "Constant" else None
        if isinstance(value, onnx.TensorProto):
            stored = model.graph.initializer.add()
            stored.CopyFrom(value)
            stored.name = node.output[0]
        else:
            kept.append(_copy(node))
    model.graph.ClearField("node")
    model.graph.node.extend(kept)


def _lower(model: ModelProto, graph: GraphProto, version: int, known: Collection[str] | None) -> list[str]:
    """Rewrite in place; return the names of the nodes that normalize."""
    now, taken = opset(model), value_names(model)
    found = shapes(model)
    stored = {tensor.name: tensor for tensor in graph.initializer}
    nodes: list[NodeProto] = []
    sums: list[str] = []
    for node in graph.node:
        for item in node.attribute:
            for inner in [item.g] if item.type == AttributeProto.GRAPH else item.graphs:
                sums += _lower(model, inner, version, known)
        if node.domain not in ("", "ai.onnx"):
            nodes.append(node)
            continue
        rule = RULES.get(node.op_type)
        lacking = not _exists(node.op_type, version) or (known is not None and node.op_type not in known)
        if rule and (lacking or (node.op_type in ADAPTED and version < 18 <= now)):
            shape = found.get(node.input[0]) if node.input else None
            length = {number: axis for number, axis in enumerate(shape or ()) if isinstance(axis, int)}
            values = {name: numpy_helper.to_array(stored[name]) for name in node.input if name in stored}
            draft = _Draft(node, None if shape is None else len(shape), length, values, version, taken)
            rule(draft)
            taken |= {name for made in draft.nodes for name in made.output}
            nodes += draft.nodes
            graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in draft.tensors.items())
            sums += [made.name for made in draft.nodes] if node.op_type.endswith("Normalization") else []
        else:
            nodes.append(_same(node, now, version))
    kept = [_copy(node) for node in nodes]
    graph.ClearField("node")
    graph.node.extend(kept)
    return sums


def _first_line(error: Exception) -> str:
    return next(line for line in f"{error}\n{type(error).__name__}".splitlines() if line.strip())


def _copy(node: NodeProto) -> NodeProto:
    copied = NodeProto()
    copied.CopyFrom(node)
    return copied


def _exists(operator: str, version: int) -> bool:
    try:
        return not defs.get_schema(operator, version, "").deprecated
    except defs.SchemaError:
        return False


def _same(node: NodeProto, now: int, version: int) -> NodeProto:
    """Return the node if the older version computes the same, that is, if options that it lacks have their defaults."""
    if not _exists(node.op_type, version):
        raise EdgekitError(
            f"node {node.name!r}: {node.op_type} is not in ONNX opset {version}; write that layer with operators that "
            "are, or choose a target whose runtime reads a newer opset"
        )
    new, old = defs.get_schema(node.op_type, now, ""), defs.get_schema(node.op_type, version, "")
    if new.since_version == old.since_version:
        return node
    if version < CHANGED.get(node.op_type, 0) <= now:
        raise EdgekitError(f"node {node.name!r}: {node.op_type} means something else in ONNX opset {version}")
    kept = _copy(node)
    kept.ClearField("attribute")
    for item in node.attribute:
        if item.name in old.attributes:
            kept.attribute.append(item)
        elif helper.get_attribute_value(item) != helper.get_attribute_value(new.attributes[item.name].default_value):
            raise EdgekitError(
                f"node {node.name!r}: {node.op_type} has no option {item.name!r} in ONNX opset {version}; leave it out"
            )
    while kept.input and not kept.input[-1]:
        del kept.input[-1]
    if len(kept.input) > old.max_input:
        raise EdgekitError(
            f"node {node.name!r}: {node.op_type} takes {old.max_input} inputs in ONNX opset {version}, not "
            f"{len(kept.input)}"
        )
    return kept


def _layer_normalization(draft: _Draft) -> None:
    node, axis = draft.node, attribute(draft.node, "axis", -1)
    if any(node.output[1:]):
        raise EdgekitError(f"node {node.name!r}: LayerNormalization with mean and deviation as outputs cannot be split")
    axes = list(range(axis if axis < 0 else axis - draft.known_rank(), 0))
    value = draft.normalized(node.input[0], axes, attribute(node, "epsilon", 1e-5))
    biased = len(node.input) > 2 and node.input[2]
    value = draft.add("Mul", value, node.input[1], to="" if biased else node.output[0])
    if biased:
        draft.add("Add", value, node.input[2], to=node.output[0])


def _rms_normalization(draft: _Draft) -> None:
    node, axis = draft.node, attribute(draft.node, "axis", -1)
    axes = list(range(axis if axis < 0 else axis - draft.known_rank(), 0))
    x = node.input[0]
    square = draft.mean(draft.add("Mul", x, x), axes)
    epsilon = draft.constant("epsilon", attribute(node, "epsilon", 1e-5))
    value = draft.add("Div", x, draft.add("Sqrt", draft.add("Add", square, epsilon)))
    draft.add("Mul", value, node.input[1], to=node.output[0])


def _group_normalization(draft: _Draft) -> None:
    """Replace GroupNormalization of (batch, channels, ...): statistics per group; a scale and a bias per channel (opset
    21)."""
    node, rank, groups = draft.node, draft.known_rank(), attribute(draft.node, "num_groups", 0)
    channels = draft.stored[node.input[1]].size if node.input[1] in draft.stored else draft.length.get(1)
    if channels is None or (node.input[1] in draft.stored and draft.length.get(1, channels) != channels):
        raise EdgekitError(f"node {node.name!r}: GroupNormalization with a scale per group cannot be replaced")
    flat = draft.add("Reshape", node.input[0], draft.constant("groups", [0, groups, -1], np.int64))
    value = draft.normalized(flat, [-1], attribute(node, "epsilon", 1e-5))
    value = draft.add("Reshape", value, draft.add("Shape", node.input[0]))
    per_channel = draft.constant("per_channel", [1, channels] + [1] * (rank - 2), np.int64)
    value = draft.add("Mul", value, draft.add("Reshape", node.input[1], per_channel))
    draft.add("Add", value, draft.add("Reshape", node.input[2], per_channel), to=node.output[0])


def _gelu(draft: _Draft) -> None:
    x, half = draft.node.input[0], draft.constant("half", 0.5)
    if attribute(draft.node, "approximate", b"none") == b"tanh":
        cube = draft.add("Mul", draft.add("Mul", x, x), x)
        inner = draft.add("Add", x, draft.add("Mul", cube, draft.constant("cubic", 0.044715)))
        bent = draft.add("Tanh", draft.add("Mul", inner, draft.constant("slope", math.sqrt(2 / math.pi))))
    else:
        bent = draft.add("Erf", draft.add("Div", x, draft.constant("root", math.sqrt(2))))
    share = draft.add("Mul", draft.add("Add", bent, draft.constant("one", 1.0)), half)
    draft.add("Mul", x, share, to=draft.node.output[0])


def _hard_swish(draft: _Draft) -> None:
    x = draft.node.input[0]
    draft.add("Mul", x, draft.add("HardSigmoid", x, alpha=1 / 6, beta=0.5), to=draft.node.output[0])


def _mish(draft: _Draft) -> None:
    x = draft.node.input[0]
    draft.add("Mul", x, draft.add("Tanh", draft.add("Softplus", x)), to=draft.node.output[0])


def _swish(draft: _Draft) -> None:
    x, alpha = draft.node.input[0], attribute(draft.node, "alpha", 1.0)
    scaled = x if alpha == 1 else draft.add("Mul", x, draft.constant("alpha", alpha))
    draft.add("Mul", x, draft.add("Sigmoid", scaled), to=draft.node.output[0])


def _reciprocal(draft: _Draft) -> None:
    draft.add("Div", draft.constant("one", 1.0), draft.node.input[0], to=draft.node.output[0])


def _reduction(draft: _Draft) -> None:
    """Write the axes as an attribute, as before opset 18."""
    node = draft.node
    given = len(node.input) > 1 and node.input[1]
    if given and given not in draft.stored:
        raise EdgekitError(f"node {node.name!r}: {node.op_type} with computed axes needs ONNX opset 18")
    axes = [int(axis) for axis in draft.stored[given].reshape(-1)] if given else []
    if not axes and attribute(node, "noop_with_empty_axes", 0):
        draft.nodes.append(helper.make_node("Identity", [node.input[0]], list(node.output), node.name))
        return
    made = helper.make_node(
        node.op_type, [node.input[0]], list(node.output), node.name, keepdims=attribute(node, "keepdims", 1)
    )
    if axes:
        made.attribute.append(helper.make_attribute("axes", axes))
    draft.nodes.append(made)


def _split(draft: _Draft) -> None:
    """Write the sizes of the parts if the last is shorter: before opset 18, a Split without sizes has equal parts."""
    node, axis = draft.node, attribute(draft.node, "axis", 0)
    inputs, parts = [name for name in node.input if name], len(node.output)
    if len(inputs) == 1:
        length = draft.length.get(axis if axis >= 0 else axis + draft.known_rank())
        if length is None:
            raise EdgekitError(f"node {node.name!r}: Split of an axis of unknown length needs ONNX opset 18")
        each = -(-length // parts)
        sizes = [min(each, length - each * number) for number in range(parts)]
        inputs.append(draft.constant("split", sizes, np.int64))
    draft.nodes.append(helper.make_node("Split", inputs, list(node.output), node.name, axis=axis))


def _pad(draft: _Draft) -> None:
    """Write the padding of all axes, as before opset 18."""
    node, rank = draft.node, draft.known_rank()
    inputs = list(node.input)
    if len(inputs) > 3 and inputs[3]:
        if not {inputs[1], inputs[3]} <= set(draft.stored):
            raise EdgekitError(f"node {node.name!r}: Pad with computed axes needs ONNX opset 18")
        pads, axes = draft.stored[inputs[1]], draft.stored[inputs[3]]
        full = np.zeros(2 * rank, np.int64)
        for number, axis in enumerate(axes % rank):
            full[axis], full[axis + rank] = pads[number], pads[number + len(axes)]
        inputs[1] = draft.constant("pads", full, np.int64)
    mode = attribute(node, "mode", b"constant").decode()
    if mode == "wrap":
        raise EdgekitError(f"node {node.name!r}: Pad has no mode 'wrap' before ONNX opset 19")
    inputs = inputs[: 3 if len(inputs) > 2 and inputs[2] else 2]
    draft.nodes.append(helper.make_node("Pad", inputs, list(node.output), node.name, mode=mode))


ADAPTED = frozenset((*(f"Reduce{name}" for name in REDUCTIONS), "Split", "Pad"))  # their signature changed in opset 18
RULES: dict[str, Callable[[_Draft], None]] = {
    "LayerNormalization": _layer_normalization,
    "RMSNormalization": _rms_normalization,
    "GroupNormalization": _group_normalization,
    "Gelu": _gelu,
    "HardSwish": _hard_swish,
    "Mish": _mish,
    "Swish": _swish,
    "Reciprocal": _reciprocal,
    "Split": _split,
    "Pad": _pad,
    **{f"Reduce{name}": _reduction for name in REDUCTIONS},
}
