"""Make a traced ONNX graph readable: parameters keep their own names, nodes are named after their modules, constants
are folded, and shape arithmetic disappears if only the batch size is unknown.

    Shape -> Gather -> Unsqueeze -\\
                        Unsqueeze --> Concat --> Reshape      becomes      Reshape(x, [-1, 100, 16, 2])
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import ModelProto, NodeProto, numpy_helper, shape_inference

from edgekit.graph.shapes import evaluated

Array = npt.NDArray[Any]
Shape = tuple[int | str | None, ...]
# The roles of an operator's inputs, by index, if they are not "operand".
ROLES = {"Reshape": {1: "shape"}, "Tile": {1: "repeats"}, "Unsqueeze": {1: "axes"}, "ReduceMean": {1: "axes"}}


def tidy(model: ModelProto, prefix: str, buffers: Mapping[str, Array], tied: Mapping[str, str]) -> None:
    """Rewrite the traced graph in place. `prefix` is the tracing wrapper's attribute, which is dropped from every name;
    `buffers` names the constants that are neither parameters nor part of the program, such as positional encodings;
    `tied` maps other names of a parameter to the name under which it is stored once."""
    graph = model.graph
    constants, origins, nodes = _fold(model, prefix, tied)
    nodes = _live(nodes, [value.name for value in graph.output])
    names = {value.name: value.name for value in (*graph.input, *graph.output)}
    _name_nodes(nodes, names, prefix)
    used = _name_constants(nodes, constants, names, origins, buffers)
    for node in nodes:
        node.input[:] = [names[name] if name else "" for name in node.input]
        node.output[:] = [names[name] if name else "" for name in node.output]
    # ascontiguousarray would turn a scalar into a list of one
    initializers = [numpy_helper.from_array(np.asarray(constants[old], order="C"), names[old]) for old in used]
    unique = {tensor.name: tensor for tensor in initializers}
    for field, content in (("node", nodes), ("initializer", unique.values()), ("value_info", ())):
        graph.ClearField(field)
        getattr(graph, field).extend(content)
    strip(model)


def strip(model: ModelProto) -> None:
    """Drop documentation strings and metadata, in which exporters store source lines and stack traces."""
    model.doc_string = ""
    del model.metadata_props[:]
    graph = model.graph
    graph.doc_string = ""
    del graph.metadata_props[:]
    for item in (*graph.node, *graph.input, *graph.output, *graph.initializer):
        item.doc_string = ""
        del item.metadata_props[:]


def shapes(model: ModelProto) -> dict[str, Shape]:
    """Return the shapes of all values by ONNX's own inference. A named axis is its name, and an unknown one is None.
    Raises if the graph contradicts itself."""
    inferred = shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True).graph
    return {
        value.name: tuple(
            axis.dim_value if axis.HasField("dim_value") else (axis.dim_param or None)
            for axis in value.type.tensor_type.shape.dim
        )
        for value in (*inferred.value_info, *inferred.input, *inferred.output)
        if value.type.tensor_type.HasField("shape")
    }


def _fold(
    model: ModelProto, prefix: str, tied: Mapping[str, str]
) -> tuple[dict[str, Array], dict[str, str], list[NodeProto]]:
    """Return the constants by value name, which of them are parameters (perhaps transposed), and the nodes that depend
    on an input."""
    graph, known = model.graph, shapes(model)
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    parameters = _parameters(model, prefix, tied)
    origins = {name: parameters[name] for name in constants if name in parameters}
    two_ways = _read_two_ways(model, parameters)
    outputs = {value.name for value in graph.output}
    same: dict[str, str] = {}  # value -> the equal earlier value
    nodes: list[NodeProto] = []
    for node in graph.node:
        node.input[:] = [same.get(name, name) for name in node.input]
        _fix_target(node, constants, known)
        if node.op_type == "Transpose" and origins.get(node.input[0]) in two_ways:
            nodes.append(node)  # folding it would store the parameter a second time
        elif all(not name or name in constants for name in node.input):
            constants.update(evaluated(model, node, constants))
            if node.output[0] in parameters:
                origins[node.output[0]] = parameters[node.output[0]]
            elif node.op_type == "Transpose" and node.input[0] in origins:
                origins[node.output[0]] = origins[node.input[0]]
        elif _does_nothing(node, known) and node.output[0] not in outputs:
            same[node.output[0]] = node.input[0]
        else:
            nodes.append(node)
    return constants, origins, nodes


def _parameters(model: ModelProto, prefix: str, tied: Mapping[str, str]) -> dict[str, str]:
    """Return the values that are parameters, with their names. The tracer merges equal parameters into one and an
    Identity; only parameters that the network ties share a name."""
    found = [tensor.name for tensor in model.graph.initializer]
    found += [node.output[0] for node in model.graph.node if node.op_type == "Identity"]
    names = {name: name.removeprefix(f"{prefix}.") for name in found if name.startswith(f"{prefix}.")}
    return {value: tied.get(name, name) for value, name in names.items()}


def _read_two_ways(model: ModelProto, parameters: Mapping[str, str]) -> set[str]:
    """Return the parameters that are read both plain and transposed, such as a dictionary that encodes and decodes."""
    ways: dict[str, set[bool]] = {}
    for node in model.graph.node:
        for name in node.input:
            if name in parameters and node.op_type != "Identity":
                ways.setdefault(parameters[name], set()).add(node.op_type == "Transpose")
    return {name for name, seen in ways.items() if len(seen) > 1}


def _fix_target(node: NodeProto, constants: dict[str, Array], known: Mapping[str, Shape]) -> None:
    """Give a Reshape a constant target if only one axis of its result is unknown."""
    shape = known.get(node.output[0])
    if node.op_type == "Reshape" and node.input[1] not in constants and shape is not None:
        target = [axis if isinstance(axis, int) else -1 for axis in shape]
        if target.count(-1) == 1:
            node.input[1] = f"{node.output[0]}.target"
            constants[node.input[1]] = np.array(target, np.int64)


def _does_nothing(node: NodeProto, known: Mapping[str, Shape]) -> bool:
    if node.op_type == "Identity":
        return True
    before, after = (known.get(name, (None,)) for name in (node.input[0], node.output[0]))
    return node.op_type == "Expand" and None not in before and before == after


def _live(nodes: list[NodeProto], wanted: Iterable[str]) -> list[NodeProto]:
    """Return the nodes that the outputs depend on."""
    needed, kept = set(wanted), []
    for node in reversed(nodes):
        if needed.intersection(node.output):
            needed.update(node.input)
            kept.append(node)
    return kept[::-1]


def _scope(traced: str, prefix: str) -> str:
    """Return 'blocks.0.attention.', the traced module, for '/network/blocks.0/attention/MatMul_1'."""
    path = traced.strip("/").split("/")[:-1]
    return "".join(f"{part}." for part in (path[1:] if path[:1] == [prefix] else path))


def _name_nodes(nodes: list[NodeProto], names: dict[str, str], prefix: str) -> None:
    """Name nodes MODULE.Operator, with a number if a module has several, and name values after their producers."""
    bases = [_scope(node.name, prefix) + node.op_type for node in nodes]
    total, seen = Counter(bases), Counter[str]()
    for node, base in zip(nodes, bases, strict=True):
        node.name = f"{base}_{seen[base]}" if total[base] > 1 else base
        seen[base] += 1
        for number, output in enumerate(node.output):
            names.setdefault(output, f"{node.name}:{number}" if number else node.name)


def _name_constants(
    nodes: list[NodeProto],
    constants: Mapping[str, Array],
    names: dict[str, str],
    origins: Mapping[str, str],
    buffers: Mapping[str, Array],
) -> list[str]:
    """Name constants after the parameter or buffer that they hold, or else after their first consumer. Return the
    constants in use, in the order of their first use."""
    used: list[str] = []
    holders: dict[str, Array] = {}
    for node in nodes:
        for number, value in enumerate(node.input):
            if value not in constants or value in names:
                continue
            array = constants[value]
            buffer = next((name for name, known in buffers.items() if known.size > 1 and _equal(known, array)), None)
            role = ROLES.get(node.op_type, {}).get(number, f"operand{number}")
            name = origins.get(value) or buffer or _holder(holders, array) or f"{node.name}.{role}"
            if name in holders and not _equal(holders[name], array):
                name = f"{name}.transposed"  # one parameter, stored in both layouts
            names[value], holders[name] = name, array
            used.append(value)
    return used


def _equal(one: Array, other: Array) -> bool:
    return one.dtype == other.dtype and np.array_equal(one, other)


def _holder(holders: Mapping[str, Array], array: Array) -> str | None:
    """Return the name of an equal constant that is stored already, such as the shape that query, key and value
    share."""
    return next((name for name, held in holders.items() if array.dtype == np.int64 and _equal(held, array)), None)
