"""Fix what is constant where a model is deployed: the value of an input, or the length of a free axis.

sr=16000          the input sr becomes a stored number, and no input any more
sequence=576      every axis of this name has this length
input[1]=576      this axis of this input, if it has no name
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np
from onnx import ModelProto, helper, numpy_helper

from edgekit.errors import EdgekitError

AXIS = re.compile(r"(.+)\[(\d+)\]")


def parse(texts: tuple[str, ...]) -> dict[str, float]:
    """Read NAME=NUMBER pairs."""
    found: dict[str, float] = {}
    for text in texts:
        name, _, value = text.rpartition("=")
        try:
            found[name] = float(value)
        except ValueError:
            name = ""
        if not name or not np.isfinite(found[name]):
            raise EdgekitError(f"--fix {text!r}; expected NAME=NUMBER, such as sr=16000, sequence=576 or input[1]=576")
    return found


def fixed(model: ModelProto, values: Mapping[str, float], source: str) -> ModelProto:
    """Return a copy in which these inputs and axes are constants. Raises for names that the graph does not have, and
    for inputs of more than one number."""
    result = ModelProto()
    result.CopyFrom(model)
    for name, value in values.items():
        given = next((item for item in result.graph.input if item.name == name), None)
        if given is not None:
            _store(result, name, value, source)
        elif not _set_length(result, name, value):
            axes = {axis.dim_param for item in model.graph.input for axis in item.type.tensor_type.shape.dim}
            known = [item.name for item in model.graph.input] + sorted(axes - {""})
            raise EdgekitError(
                f"{source}: nothing to fix is called {name!r}; it has {', '.join(known)}, and axes such as "
                f"{model.graph.input[0].name}[0]"
            )
    return result


def _store(model: ModelProto, name: str, value: float, source: str) -> None:
    given = next(item for item in model.graph.input if item.name == name)
    dims = [axis.dim_value for axis in given.type.tensor_type.shape.dim]
    dtype = helper.tensor_dtype_to_np_dtype(given.type.tensor_type.elem_type)
    if any(length != 1 for length in dims) or np.asarray(value).astype(dtype) != value:
        raise EdgekitError(
            f"{source}: {name} = {value:g} cannot be fixed; expected one {dtype} for an input of shape {dims}"
        )
    model.graph.initializer.append(numpy_helper.from_array(np.full(dims, value, dtype), name))
    model.graph.input.remove(given)


def _set_length(model: ModelProto, name: str, value: float) -> bool:
    """Set the length of each axis of this name; return whether there is one."""
    indexed = AXIS.fullmatch(name)
    if value < 1 or value != int(value):
        raise EdgekitError(f"the axis {name!r} cannot have the length {value:g}; expected a whole number from 1")
    done = False
    for item in model.graph.input:
        for number, axis in enumerate(item.type.tensor_type.shape.dim):
            here = indexed is not None and (item.name, number) == (indexed[1], int(indexed[2]))
            if (here or axis.dim_param == name) and not axis.dim_value > 0:
                axis.dim_value = int(value)
                done = True
    if done:  # their outputs may have lengths that follow from it
        for item in model.graph.output:
            for axis in item.type.tensor_type.shape.dim:
                if axis.dim_param == name:
                    axis.dim_value = int(value)
    return done
