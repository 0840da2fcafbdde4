"""Simplify a file's graph once, before any pass reads it: passes look for weights that the graph itself stores.

    opset 7 to 12                                17, by onnx's version converter
    weights in branches of an If                 stored by the graph itself
    Shape -> Gather -> Equal, of known lengths   a constant
    If of a constant                             the nodes of the branch that runs
    Identity                                     removed
    Conv -> BatchNormalization                   Conv

Each rule keeps the function of the graph, up to rounding. The importer still compares both graphs on the golden rows,
and keeps the original if they differ.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import (
    GraphProto,
    ModelProto,
    NodeProto,
    TensorProto,
    defs,
    helper,
    numpy_helper,
    shape_inference,
    version_converter,
)

from edgekit.graph.index import Index
from edgekit.graph.model import attribute, eliminate_dead_nodes, name_nodes, opset, unique_name, value_names
from edgekit.graph.shapes import LARGEST, RANDOM, evaluated

Array = npt.NDArray[Any]
Shapes = dict[str, list[int | None]]
LEAST_OPSET, NEWER = 13, 17  # the first with a scale per channel; the newest that every runtime since 2022 reads
ROUNDS = 50  # of all rules; each round that changes something removes a node
STANDARD = ("", "ai.onnx")


def simplified(model: ModelProto, *, fold: bool = True) -> ModelProto:
    """Return a simpler copy. fold: whether to fold batch normalization, which rounds in another order."""
    result = _newer(model)
    _hoist(result)
    for _ in range(ROUNDS):
        shapes = _shapes(result)
        # every rule runs in every round, because one makes work for another
        if not any([_fold(result, shapes), _inline(result), _remove_identities(result)]):
            break
    if fold:
        _fold_batch_normalization(result)
    result.graph.ClearField("value_info")  # it describes values that no longer exist
    eliminate_dead_nodes(result)
    name_nodes(result)
    return result


def _newer(model: ModelProto) -> ModelProto:
    """Return a copy, in opset NEWER if the model's is older than the passes need. A graph that the converter does not
    know how to convert stays in its opset."""
    result = ModelProto()
    result.CopyFrom(model)
    if opset(model) >= LEAST_OPSET:
        return result
    if result.ir_version < 4:  # the converter takes stored tensors of such files only if they are inputs as well
        listed = {value.name for value in result.graph.input}
        result.graph.input.extend(
            helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
            for tensor in result.graph.initializer
            if tensor.name not in listed
        )
    try:
        converted = version_converter.convert_version(result, NEWER)
        onnx.checker.check_model(converted, full_check=True)
    except Exception:  # the converter raises many types
        return result
    stored = {tensor.name for tensor in converted.graph.initializer}
    inputs = [value for value in converted.graph.input if value.name not in stored]
    converted.graph.ClearField("input")
    converted.graph.input.extend(inputs)
    converted.ir_version = max(converted.ir_version, helper.find_min_ir_version_for(list(converted.opset_import), True))
    return converted


def _hoist(model: ModelProto) -> None:
    """Give the values of every subgraph names of their own, and store its tensors in the graph itself. Branches of an
    If often use the same names."""
    taken = value_names(model)

    def visit(nodes: Iterable[NodeProto], names: dict[str, str]) -> None:
        for node in nodes:
            node.input[:] = [names.get(name, name) for name in node.input]
            for item in node.attribute:
                for graph in [item.g] if item.HasField("g") else item.graphs:
                    inside(graph, names)

    def inside(graph: GraphProto, outer: dict[str, str]) -> None:
        names = dict(outer)
        own = [*(item.name for item in (*graph.input, *graph.initializer))]
        for name in (*own, *(name for node in graph.node for name in node.output if name)):
            names[name] = unique_name(f"{graph.name or 'branch'}.{name}", taken)
            taken.add(names[name])
        for value in (*graph.input, *graph.output):
            value.name = names.get(value.name, value.name)
        outputs = {value.name for value in graph.output}
        graph.ClearField("value_info")
        for tensor in graph.initializer:
            tensor.name = names[tensor.name]
        kept = []
        for node in graph.node:
            node.output[:] = [names[name] if name else "" for name in node.output]
            tensor = attribute(node, "value", None)
            if node.op_type == "Constant" and isinstance(tensor, TensorProto) and node.output[0] not in outputs:
                tensor.name = node.output[0]
                model.graph.initializer.append(tensor)
            else:
                kept.append(node)
        visit(kept, names)
        stored = [tensor for tensor in graph.initializer if tensor.name not in outputs]
        rest = [tensor for tensor in graph.initializer if tensor.name in outputs]
        model.graph.initializer.extend(stored)
        for field, items in (("node", kept), ("initializer", rest)):
            copies = [type(item).FromString(item.SerializeToString()) for item in items]
            graph.ClearField(field)
            getattr(graph, field).extend(copies)

    visit(model.graph.node, {})


def _shapes(model: ModelProto) -> Shapes:
    """Return the lengths of the axes of every value of the graph itself, None for those that are not known."""
    try:
        inferred = shape_inference.infer_shapes(model, data_prop=True).graph
    except shape_inference.InferenceError:
        return {}
    return {
        value.name: [axis.dim_value if axis.dim_value > 0 else None for axis in value.type.tensor_type.shape.dim]
        for value in (*inferred.input, *inferred.value_info, *inferred.output)
        if value.type.tensor_type.HasField("shape")
    }


def _fold(model: ModelProto, shapes: Shapes) -> bool:
    """Compute the small values that depend on no input, and lengths of axes that are the same for every input."""
    graph = model.graph
    known = {
        tensor.name: numpy_helper.to_array(tensor)
        for tensor in graph.initializer
        if int(np.prod(tensor.dims)) <= LARGEST
    }
    outputs, kept, new = {value.name for value in graph.output}, [], dict[str, Array]()
    for node in graph.node:
        found = None if outputs & set(node.output) else _value(model, node, {**known, **new}, shapes)
        if found is None or any(value.size > LARGEST or value.dtype.kind not in "ifb" for value in found.values()):
            kept.append(node)
        else:
            new |= found
    if not new:
        return False
    graph.initializer.extend(numpy_helper.from_array(np.asarray(value, order="C"), name) for name, value in new.items())
    _replace_nodes(graph, kept)
    return True


def _value(model: ModelProto, node: NodeProto, known: dict[str, Array], shapes: Shapes) -> dict[str, Array] | None:
    """Return the outputs of a node if they are the same for every input of the graph."""
    if node.domain not in STANDARD or node.op_type in RANDOM or _has_graph(node):
        return None
    if node.op_type == "Shape" and node.input[0] in shapes:
        shape = shapes[node.input[0]][attribute(node, "start", 0) : attribute(node, "end", None)]
        return None if None in shape else {node.output[0]: np.array(shape, np.int64)}
    if node.op_type == "Gather" and (picked := _picked(model, node, known, shapes)) is not None:
        return {node.output[0]: picked}
    if node.op_type == "Size" and node.input[0] in shapes and None not in shapes[node.input[0]]:
        return {node.output[0]: np.array(int(np.prod(np.array(shapes[node.input[0]], np.int64))), np.int64)}
    if node.op_type != "Constant" and not (node.input and all(not name or name in known for name in node.input)):
        return None
    if not defs.has(node.op_type, opset(model), ""):
        return None
    try:
        return evaluated(model, node, known)
    except Exception:  # a node that the reference cannot compute stays in the graph, where a runtime computes it
        return None


def _picked(model: ModelProto, node: NodeProto, known: dict[str, Array], shapes: Shapes) -> Array | None:
    """Return one axis' length out of Gather(Shape(x), index), if it is known though others are not."""
    maker = next((item for item in model.graph.node if node.input[0] in item.output), None)
    index = known.get(node.input[1])
    if maker is None or maker.op_type != "Shape" or index is None or attribute(node, "axis", 0) != 0:
        return None
    shape = shapes.get(maker.input[0], [])[attribute(maker, "start", 0) : attribute(maker, "end", None)]
    places = np.asarray(index, np.int64)
    if not shape or places.size == 0 or places.min() < -len(shape) or places.max() >= len(shape):
        return None
    lengths = [shape[place] for place in places.reshape(-1)]
    return None if None in lengths else np.array(lengths, np.int64).reshape(places.shape)


def _inline(model: ModelProto) -> bool:
    """Replace each If of a stored truth value by the nodes of the branch that runs."""
    graph = model.graph
    stored = {tensor.name: tensor for tensor in graph.initializer}
    nodes: list[NodeProto] = []
    changed = False
    for node in graph.node:
        condition = stored.get(node.input[0]) if node.op_type == "If" and node.domain in STANDARD else None
        if condition is None:
            nodes.append(node)
            continue
        key = "then_branch" if bool(numpy_helper.to_array(condition).reshape(-1)[0]) else "else_branch"
        branch = attribute(node, key, None)
        nodes += branch.node
        graph.initializer.extend(branch.initializer)
        made = zip(branch.output, node.output, strict=True)
        nodes += [
            helper.make_node("Identity", [value.name], [name], f"{name}.Identity") for value, name in made if name
        ]
        changed = True
    if changed:
        _replace_nodes(graph, nodes)
    return changed


def _remove_identities(model: ModelProto) -> bool:
    """Remove each Identity: its consumers read what it reads. If its result is an output of the graph, the node that
    makes the value gives it the output's name."""
    graph = model.graph
    outputs = {value.name for value in graph.output}
    made = {name for node in graph.node for name in node.output}
    renamed: dict[str, str] = {}
    kept = []
    for node in graph.node:
        identity = node.op_type == "Identity" and node.domain in STANDARD
        source = renamed.get(node.input[0], node.input[0]) if identity else ""
        if identity and node.output[0] not in outputs:
            renamed[node.output[0]] = source
        elif identity and source in made - outputs and source not in renamed.values():
            renamed[source] = node.output[0]
        else:
            kept.append(node)
    if not renamed:
        return False
    for node in kept:
        node.output[:] = [renamed.get(name, name) if name in made else name for name in node.output]
    _replace_nodes(graph, kept)
    _rename(graph.node, renamed)
    return True


def _rename(nodes: Iterable[NodeProto], names: dict[str, str]) -> None:
    for node in nodes:
        node.input[:] = [names.get(name, name) for name in node.input]
        for item in node.attribute:
            for graph in [item.g] if item.HasField("g") else item.graphs:
                for value in graph.output:
                    value.name = names.get(value.name, value.name)
                _rename(graph.node, names)


def _fold_batch_normalization(model: ModelProto) -> None:
    """Fold each BatchNormalization into the Conv before it, if nothing else reads the Conv or its weight."""
    index = Index(model)
    absorbed: set[str] = set()
    for node in list(model.graph.node):
        after = index.only_consumer(node.output[0]) if node.op_type == "Conv" else None
        if after is None or after.op_type != "BatchNormalization" or after.input[0] != node.output[0]:
            continue
        tensors = [index.initializers.get(name) for name in (node.input[1], *after.input[1:5])]
        bias = index.initializers.get(node.input[2]) if len(node.input) > 2 and node.input[2] else None
        simple = len(after.output) == 1 and not attribute(after, "training_mode", 0)
        if not simple or (bias is None and len(node.input) > 2 and node.input[2]):
            continue
        if any(item is None or item.data_type != TensorProto.FLOAT for item in tensors):
            continue
        if len(index.consumptions(node.input[1])) > 1:
            continue
        weight, *parameters = (numpy_helper.to_array(item).astype(np.float64) for item in tensors if item is not None)
        factor, shift = normalization(parameters, attribute(after, "epsilon", 1e-5))
        weight = weight * factor.reshape(-1, *[1] * (weight.ndim - 1))
        before = numpy_helper.to_array(bias).astype(np.float64) if bias is not None else 0.0
        added = unique_name(f"{node.output[0]}.bias", value_names(model))
        stored = next(item for item in model.graph.initializer if item.name == node.input[1])
        stored.CopyFrom(numpy_helper.from_array(weight.astype(np.float32), node.input[1]))
        model.graph.initializer.append(numpy_helper.from_array((before * factor + shift).astype(np.float32), added))
        node.input[:] = [*node.input[:2], added]
        node.output[0] = after.output[0]
        absorbed.add(after.output[0])
    kept = [node for node in model.graph.node if node.op_type != "BatchNormalization" or node.output[0] not in absorbed]
    _replace_nodes(model.graph, kept)


def normalization(parameters: list[npt.NDArray[np.float64]], epsilon: float) -> tuple[Array, Array]:
    """Return factor and shift of a BatchNormalization: gamma / sqrt(variance + epsilon), and beta - mean times that."""
    gamma, beta, mean, variance = parameters
    factor = gamma / np.sqrt(variance + epsilon)
    return factor, beta - mean * factor


def _replace_nodes(graph: GraphProto, nodes: Iterable[NodeProto]) -> None:
    copies = [NodeProto.FromString(node.SerializeToString()) for node in nodes]
    graph.ClearField("node")
    graph.node.extend(copies)


def _has_graph(node: NodeProto) -> bool:
    return any(item.HasField("g") or item.graphs for item in node.attribute)
