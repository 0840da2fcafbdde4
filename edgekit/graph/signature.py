"""Find which axis of each input and output of a graph is the batch, and how many rows a call takes.

A file names axes as its exporter liked, or not at all, so names only give proposals. The importer takes the first one
with which the graph runs and behaves: a batch of two and of three rows gives outputs with two and three rows along one
axis, and a row gives the same outputs alone. The last proposal, "a row is a call", is always true.

    every input begins with a free axis              that axis is the batch, as exporters write it
    another axis is free, or some inputs have none   the batch is that axis; inputs without it are shared by all rows
    the first axis is 1, or n everywhere             a call takes 1 row, or n rows
    none of these                                    a row is a call
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from onnx import ModelProto, TensorProto, ValueInfoProto, helper

from edgekit.bundle.signature import Call, Signature
from edgekit.bundle.tensors import Arrays, TensorSpec
from edgekit.errors import EdgekitError

BATCH = "batch"
KEY = "edgekit.signature"  # metadata entry of graphs whose rows are not calls as they are
APART = 0.05  # of an output's largest value: what a row's outputs may differ from those in another batch
# element types of inputs and outputs
NUMBERS = frozenset(
    number
    for name, number in TensorProto.DataType.items()
    if re.fullmatch("FLOAT|FLOAT16|DOUBLE|BOOL|U?INT(8|16|32|64)", name)
)
Axes = tuple[int | str, ...]


def of_model(model: ModelProto, source: str = "the graph") -> Signature:
    """Return the signature that the graph's metadata holds, or that of a graph whose batch comes first everywhere."""
    text = next((item.value for item in model.metadata_props if item.key == KEY), None)
    return _plain(model, source) if text is None else described(text, source)


def batch_places(model: ModelProto) -> dict[str, int | None]:
    """Return the index of the batch in each input, None for one without a batch; inputs whose batch comes first may be
    missing."""
    if all(item.key != KEY for item in model.metadata_props):
        return {}
    inputs = of_model(model).inputs.values()
    return {spec.name: None if spec.shared else spec.own_axes.index(spec.shape[0]) for spec in inputs}


def described(text: str, source: str) -> Signature:
    """Return the signature that `to_json` wrote."""
    try:
        held = json.loads(text)
        inputs, outputs = ([_spec(values) for values in held[key]] for key in ("inputs", "outputs"))
        rows = held["rows_per_call"]
        if rows is not None and not (isinstance(rows, int) and rows > 0):
            raise ValueError(f"rows_per_call = {rows!r}")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise EdgekitError(f"{source}: its metadata {KEY!r} is damaged ({error}); import the model again") from None
    return Signature.of(inputs, outputs, rows)


def to_json(signature: Signature) -> str:
    held = {
        "inputs": [spec.to_json() for spec in signature.inputs.values()],
        "outputs": [spec.to_json() for spec in signature.outputs.values()],
        "rows_per_call": signature.rows_per_call,
    }
    return json.dumps(held, sort_keys=True)


def _spec(values: Mapping[str, Any]) -> TensorSpec:
    axes = values.get("axes")
    if not values["shape"]:
        raise ValueError(f"{values['name']!r} has no axis for the rows")
    return TensorSpec(**{**values, "shape": tuple(values["shape"]), "axes": None if axes is None else tuple(axes)})


def marked(model: ModelProto, signature: Signature) -> ModelProto:
    """Return a copy that holds its signature, and that names its axes accordingly, unless its batch comes first
    everywhere."""
    result = ModelProto()
    result.CopyFrom(model)
    if signature.plain:
        return result
    specs = {**signature.inputs, **signature.outputs}
    for value in (*result.graph.input, *result.graph.output):
        if value.name in specs:  # old graphs list stored tensors among their inputs
            own = specs[value.name].own_axes
            for axis, name in zip(value.type.tensor_type.shape.dim, own, strict=True):
                if isinstance(name, str) and not axis.dim_value > 0:
                    axis.dim_param = name
    others = {item.key: item.value for item in result.metadata_props if item.key != KEY}
    helper.set_model_props(result, {**others, KEY: to_json(signature)})
    return result


def _plain(model: ModelProto, source: str) -> Signature:
    inputs, outputs = _tensors(model, source)
    return Signature.of([_first(name, *item) for name, item in inputs], [_first(name, *item) for name, item in outputs])


def is_plain(model: ModelProto, source: str) -> bool:
    """Return whether every input begins with a free axis and calls no other one batch, and no output is a scalar."""
    inputs, outputs = _tensors(model, source)
    free = all(axes and isinstance(axes[0], str) for _, (axes, _) in inputs)
    elsewhere = any(_called_batch(axes[1:]) and not _called_batch(axes[:1]) for _, (axes, _) in inputs)
    return free and not elsewhere and all(axes for _, (axes, _) in outputs)


def _called_batch(axes: Axes) -> list[str]:
    return [axis for axis in axes if isinstance(axis, str) and BATCH in axis.lower()]


def proposals(model: ModelProto, source: str, state: Mapping[str, str]) -> Iterator[Signature]:
    """Yield signatures to try, the likeliest first; axes of outputs are guesses until `settled`."""
    inputs, outputs = _tensors(model, source)
    if is_plain(model, source) and not state:
        yield _plain(model, source)
        return
    for batch in _candidates(inputs, state):
        placed = [(name, axes, dtype, _place(axes, batch)) for name, (axes, dtype) in inputs]
        if not any(name in state and at is None for name, _, _, at in placed):
            rows = [(name, axes, dtype, _place(axes, batch) or 0) for name, (axes, dtype) in outputs if axes]
            if len(rows) == len(outputs):
                yield Signature.of([_placed(*item) for item in placed], [_placed(*item) for item in rows])
    first = next((axes for name, (axes, _) in inputs if axes and name not in state), ())
    every = [(name, axes, dtype) for name, (axes, dtype) in (*inputs, *outputs)]
    count, made = len(inputs), []
    if first and first[0] == 1:
        made = [_placed(name, axes, dtype, axes.index(1) if 1 in axes else None) for name, axes, dtype in every]
    elif first and isinstance(first[0], int) and all(axes[:1] == first[:1] for _, axes, _ in every):
        made = [_placed(name, axes, dtype, 0) for name, axes, dtype in every]
    if made:
        yield Signature.of(made[:count], made[count:], int(first[0]))
    made = [_placed(name, axes, dtype, None) for name, axes, dtype in every]
    yield Signature.of(made[:count], made[count:], 1)


def settled(signature: Signature, call: Call, inputs: Arrays) -> Signature:
    """Return the signature with the axes of outputs as they were measured. Raises EdgekitError if the graph does not
    behave as a batch of rows: then the proposal is wrong."""
    if signature.rows_per_call is not None:
        return signature
    names = list(signature.outputs)
    two, three = (
        list(call(names, signature.own({name: array[np.arange(rows) % len(array)] for name, array in inputs.items()})))
        for rows in (2, 3)
    )
    found = []
    for spec, less, more in zip(signature.outputs.values(), two, three, strict=True):
        places = [number for number in range(more.ndim) if (less.shape[number], more.shape[number]) == (2, 3)]
        if not places:
            raise EdgekitError(f"output {spec.name!r} has no axis that follows the batch")
        place = spec.own_axes.index(spec.shape[0]) if spec.shape[0] in spec.own_axes else 0
        found.append(_placed(spec.name, spec.own_axes, spec.dtype, place if place in places else places[0]))
    result = replace(signature, outputs={spec.name: spec for spec in found})
    together = result.run(call, names, inputs)
    rows = len(next(iter(inputs.values())))
    parts = [
        result.run(call, names, {name: array[row : row + 1] for name, array in inputs.items()}) for row in range(rows)
    ]
    for number, name in enumerate(names):
        alone = np.concatenate([part[number] for part in parts])
        scale = float(np.abs(alone.astype(np.float64)).max(initial=0)) or 1.0
        if not float(np.abs(alone.astype(np.float64) - together[number]).max(initial=0)) <= APART * scale:
            raise EdgekitError(f"the rows of output {name!r} depend on one another")
    return result


def with_state(signature: Signature, state: Mapping[str, str], found: Mapping[str, Sequence[int]]) -> Signature:
    """Return the signature in which the outputs of the state have the axes of their inputs, if their shapes `found` in
    a run are equal: exporters leave the axes of such outputs without names."""
    outputs = dict(signature.outputs)
    for name, source in state.items():
        if name in signature.inputs and source in outputs and tuple(found[name]) == tuple(found[source]):
            like = signature.inputs[name]
            outputs[source] = replace(outputs[source], shape=like.shape, axes=like.axes)
    return replace(signature, outputs=outputs)


def _tensors(
    model: ModelProto, source: str
) -> tuple[list[tuple[str, tuple[Axes, str]]], list[tuple[str, tuple[Axes, str]]]]:
    """Return own axes and dtype of inputs and outputs by name."""
    stored = {tensor.name for tensor in model.graph.initializer}
    inputs = [(value.name, _axes(value, source)) for value in model.graph.input if value.name not in stored]
    if not inputs:
        raise EdgekitError(f"{source}: takes no inputs; there is nothing to run it on")
    return inputs, [(value.name, _axes(value, source)) for value in model.graph.output]


def _axes(value: ValueInfoProto, source: str) -> tuple[Axes, str]:
    if not value.type.HasField("tensor_type") or not value.type.tensor_type.HasField("shape"):
        raise EdgekitError(f"{source}: {value.name!r} is not a tensor of known rank; export it with shapes")
    tensor = value.type.tensor_type
    if tensor.elem_type not in NUMBERS:
        raise EdgekitError(
            f"{source}: {value.name!r} has the element type {tensor.elem_type}; edgekit runs models whose inputs and "
            "outputs are whole numbers, floats or truth values"
        )
    axes: list[int | str] = []
    for number, axis in enumerate(tensor.shape.dim):
        given = axis.dim_param.replace(" ", "").replace("*", "x").strip("?")  # "?" names several axes at once
        free = not axis.HasField("dim_value") or axis.dim_value == -1  # some converters write -1 for any length
        axes.append((given or f"axis_{number}") if free else axis.dim_value)
    return tuple(axes), helper.tensor_dtype_to_np_dtype(tensor.elem_type).name


def _candidates(inputs: Sequence[tuple[str, tuple[Axes, str]]], state: Mapping[str, str]) -> list[str]:
    """Return names of free axes that may be the batch: those called so, then first axes, then others."""
    others = [axes for name, (axes, _) in inputs if name not in state]
    firsts = [axes[0] for axes in others if axes]
    every = tuple(axis for _, (axes, _) in inputs for axis in axes)
    return list(dict.fromkeys(axis for axis in (*_called_batch(every), *firsts, *every) if isinstance(axis, str)))


def _place(axes: Axes, batch: str) -> int | None:
    """Return the index of the batch: the axis of this name, or else an axis without a name."""
    if batch in axes:
        return axes.index(batch)
    if not batch.startswith("axis_") and BATCH not in batch.lower():
        return None
    return next((number for number, axis in enumerate(axes) if axis == f"axis_{number}"), None)


def _first(name: str, axes: Axes, dtype: str) -> TensorSpec:
    return TensorSpec(name, (BATCH, *axes[1:]) if axes and isinstance(axes[0], str) else axes, dtype)


def _placed(name: str, axes: Axes, dtype: str, at: int | None) -> TensorSpec:
    """Return a tensor whose batch is the axis `at`, or that has none. An axis that only happens to be called batch gets
    another name."""
    others = tuple("axis_batch" if axis == BATCH else axis for number, axis in enumerate(axes) if number != at)
    if at == 0:
        return TensorSpec(name, (BATCH, *others), dtype)
    own = others if at is None else (*others[:at], BATCH, *others[at:])
    return TensorSpec(name, (BATCH, *others), dtype, axes=own)
