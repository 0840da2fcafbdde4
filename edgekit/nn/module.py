"""Any torch network, described by the Python function that builds it and by the parts that passes have removed since.

A bundle is data and must not run code that its user did not choose. So edgekit calls the function only if the user
named it: on the command line that imported the model, with `edgekit --trust`, or in $EDGEKIT_TRUST.

The removed parts are a list of steps, so that a bundle alone restores the pruned shape:

    {"removed": "0,3-5", "from": ["fc1.weight:0", "fc1.bias:0", "fc2.weight:1"]}    indices along a tensor's axis
    {"removed": "2", "blocks": "layers"}                                           items of a ModuleList or Sequential
    {"attributes": {"attention.num_heads": 2}}                                     counts that the code reads
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from edgekit.errors import EdgekitError
from edgekit.plugins import imported

MOST_REMOVED = 10_000_000  # rows of one tensor

# it builds a network from a configuration and runs no code of the bundle's author
_trusted: set[str] = {"edgekit.nn.hugging_face:build"}


def trust(factory: str) -> None:
    """Allow this process to call package.module:function."""
    _trusted.add(factory)


def build(
    factory: str,
    arguments: Mapping[str, Any] | None = None,
    inputs: Mapping[str, Any] | None = None,
    pruned: Sequence[Mapping[str, Any]] = (),
) -> nn.Module:
    """Call the function with its keyword arguments and remove the parts that passes have removed. The weights are the
    function's own, new ones.

    inputs: dtype and axes by name, such as {"image": "float32:batch,3,32,32"}, with which passes trace the network.
    """
    if factory not in _trusted and factory not in os.environ.get("EDGEKIT_TRUST", "").split(","):
        raise EdgekitError(
            f"opening this model would run the Python function {factory}; if you trust it: "
            f"edgekit --trust {factory} COMMAND ..."
        )
    try:
        model = imported(factory, "model")(**(arguments or {}))
    except TypeError as error:  # it does not take one of the keywords
        raise EdgekitError(f"{factory} does not take the arguments {dict(arguments or {})}: {error}") from None
    if not isinstance(model, nn.Module):
        raise EdgekitError(f"{factory} gives a {type(model).__name__}; expected a torch.nn.Module")
    return remove(model, pruned)


def remove(model: nn.Module, steps: Iterable[Mapping[str, Any]]) -> nn.Module:
    """Cut the model in place, step by step, and return it."""
    try:
        for step in steps:
            if "blocks" in step:
                blocks: Any = model.get_submodule(step["blocks"])
                for index in sorted(positions(step["removed"]), reverse=True):
                    del blocks[index]
            for tensor_axis in step.get("from", ()):
                name, _, axis = tensor_axis.rpartition(":")
                _cut(model, name, int(axis), positions(step["removed"]))
            for name, value in step.get("attributes", {}).items():
                path, _, attribute = name.rpartition(".")
                module = model.get_submodule(path)
                if not isinstance(getattr(module, attribute), int) or not isinstance(value, int):
                    raise ValueError(f"{name} is no count")
                setattr(module, attribute, value)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise EdgekitError(
            f"the pruning steps do not fit the network that the factory builds now ({error}); use the version of its "
            "code with which the bundle was made"
        ) from None
    return model


def _cut(model: nn.Module, name: str, axis: int, removed: Sequence[int]) -> None:
    path, _, attribute = name.rpartition(".")
    module = model.get_submodule(path)
    tensor = getattr(module, attribute)
    kept = torch.ones(tensor.shape[axis], dtype=torch.bool)
    kept[list(removed)] = False
    depthwise = isinstance(module, _ConvNd) and module.groups == module.out_channels > 1
    # the Parameter object stays, so that a tied one stays tied
    tensor.data = tensor.data.index_select(axis, kept.nonzero().flatten())
    _declare(module, depthwise)


def _declare(module: nn.Module, depthwise: bool) -> None:
    """Set a layer's own counts to those of its tensors."""
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, _ConvTransposeNd):
        module.in_channels, module.out_channels = module.weight.shape[:2]
    elif isinstance(module, _ConvNd):
        module.out_channels = module.weight.shape[0]
        module.groups = module.out_channels if depthwise else module.groups
        module.in_channels = module.weight.shape[1] * module.groups
    elif isinstance(module, _NormBase):
        module.num_features = len(module.running_mean if module.weight is None else module.weight)
    elif isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        module.normalized_shape = tuple(module.weight.shape)
    elif isinstance(module, nn.GroupNorm):
        module.num_channels = len(module.weight)
    elif isinstance(module, nn.Embedding):
        module.embedding_dim = module.weight.shape[1]
    elif isinstance(module, nn.PReLU):
        module.num_parameters = len(module.weight)


def positions(text: str) -> list[int]:
    """Parse '0,3-5' as [0, 3, 4, 5]."""
    runs = [
        range(int(first), int(last or first) + 1)
        for first, _, last in (part.partition("-") for part in text.split(","))
    ]
    if sum(map(len, runs)) > MOST_REMOVED:
        raise ValueError(f"more than {MOST_REMOVED:,} parts are removed at once")
    return [index for run in runs for index in run]


def ranges(indices: Iterable[int]) -> str:
    """The inverse of `positions`."""
    runs: list[list[int]] = []
    for index in sorted(indices):
        if runs and index == runs[-1][-1] + 1:
            runs[-1] = [runs[-1][0], index]
        else:
            runs.append([index])
    return ",".join("-".join(map(str, run)) for run in runs)
