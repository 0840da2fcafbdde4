"""Find how many ids each input of a graph may hold: the rows of the table that a Gather reads with it, or the depth of
a OneHot."""

from __future__ import annotations

import math

import numpy as np
from onnx import ModelProto, NodeProto, numpy_helper

from edgekit.graph.index import Index

# operators that pass ids on: other numbers of the same range, or the same numbers in another shape
PASSES_ON = frozenset(("Cast", "Identity", "Unsqueeze", "Squeeze", "Reshape", "Flatten", "Transpose", "Slice"))


def vocabularies(model: ModelProto) -> dict[str, int]:
    """Return the smallest vocabulary of each input that looks up rows of a stored table."""
    index = Index(model)
    stored = index.initializers
    found: dict[str, int] = {}
    for value in model.graph.input:
        if value.name not in stored and (sizes := _sizes(index, value.name)):
            found[value.name] = min(sizes)
    return found


def compared(model: ModelProto) -> dict[str, list[int]]:
    """Return the whole numbers with which the graph compares an input for equality, by input: a model that serves
    several sampling rates branches on one, and any other number would be meaningless."""
    index = Index(model)
    constants = dict(index.initializers)
    for node in model.graph.node:
        if node.op_type == "Constant":
            constants.update((node.output[0], item.t) for item in node.attribute if item.name == "value")
    found: dict[str, list[int]] = {}
    for value in model.graph.input:
        if value.name in index.initializers:
            continue
        waiting, seen = [value.name], {value.name}
        while waiting:
            for item in index.consumptions(waiting.pop()):
                node = item.node
                if node is None or item.nested or item.slot < 0:
                    continue
                if node.op_type == "Equal":
                    other = constants.get(node.input[1 - item.slot])
                    numbers = numpy_helper.to_array(other).reshape(-1) if other is not None else np.zeros(0)
                    found.setdefault(value.name, []).extend(int(n) for n in numbers if n == int(n))
                elif node.op_type in {*PASSES_ON, "Gather"} and item.slot == 0:
                    new = set(node.output[:1]) - seen
                    seen |= new
                    waiting += new
    return {name: numbers for name, numbers in found.items() if numbers}


def _sizes(index: Index, name: str) -> list[int]:
    """Return the sizes of all tables that consumers of a value read with it."""
    sizes: list[int] = []
    waiting, seen = [name], {name}  # no recursion, because a stranger's chain of nodes may be long
    while waiting:
        for item in index.consumptions(waiting.pop()):
            node = item.node
            if node is None or item.slot < 0:
                continue
            if node.op_type in PASSES_ON and item.slot == 0 and not item.nested:
                new = set(node.output[:1]) - seen
                seen |= new
                waiting += new
            elif size := _size(index, node, item.slot):
                sizes.append(size)
    return sizes


def _size(index: Index, node: NodeProto, slot: int) -> int:
    """Return the size of the table that a node reads with the input of this slot; 0 if it reads none."""
    if node.op_type == "Gather" and slot == 1:
        axis = next((item.i for item in node.attribute if item.name == "axis"), 0)
        table = index.initializers.get(node.input[0])
        if table is None and (maker := index.producers.get(node.input[0])) is not None:  # it is stored as codes
            table = next((index.initializers[n] for n in maker.input if n in index.initializers), None)
        rank = len(table.dims) if table is not None else 0
        return max(0, int(table.dims[axis])) if table is not None and rank > 1 and -rank <= axis < rank else 0
    if node.op_type == "OneHot" and slot == 0:
        depth = index.initializers.get(node.input[1]) if len(node.input) > 1 else None
        found = numpy_helper.to_array(depth).reshape(-1)[:1].tolist() if depth is not None else []
        return max(0, int(found[0])) if found and isinstance(found[0], (int, float)) and math.isfinite(found[0]) else 0
    return 0
