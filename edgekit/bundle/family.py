"""Model families: how the network that a bundle's `family` names is built, which of its units can be removed, and which
runtimes run it. A package adds one by the entry point `edgekit.families`."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgekit import plugins
from edgekit.bundle.encoding import Float
from edgekit.errors import EdgekitError, missing_extra

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, slots=True)
class PrunableGroup:
    """Units of one layer that can be removed together: attention heads, or feed-forward units.

    argument: the constructor argument that counts them; size: how many units there are; width: rows of a weight that
    each takes; rows, columns: parameters that lose rows, or columns; consumer: the module that reads the units'
    outputs.
    """

    argument: str
    size: int
    width: int
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    consumer: str


@dataclass(frozen=True, slots=True)
class Family:
    """The properties of a model family that a bundle's manifest names.

    builder: package.module:function, which builds the network from the bundle's arguments; "" for bundles that hold a
    graph. groups: package.module:function, which lists the units of a network that can be removed; "" if the family has
    none. runtimes: those that can run it, fastest first.
    """

    name: str
    builder: str = ""
    groups: str = ""
    runtimes: tuple[str, ...] = ("onnxruntime", "openvino", "torch")

    @property
    def written_in_c(self) -> bool:
        """Return whether the C exporter supports its networks."""
        return "c" in self.runtimes


def find_family(name: str) -> Family:
    """Return the family with this name. Raises if no such family is installed."""
    family: Family = plugins.load("edgekit.families", name, problem_with)
    return family


def problem_with(family: Any, name: str) -> str:
    """Say why an object is not a family; "" if it is one."""
    if not isinstance(family, Family):
        return f"it is a {type(family).__name__}; expected an edgekit.bundle.family.Family"
    return "" if family.name == name else f"its name is {family.name!r}, and it is registered as {name!r}"


def build(family: str, arguments: Mapping[str, Any], weights: Mapping[str, Float] | None = None) -> nn.Module:
    """Build a network of the family, in evaluation mode, with new random weights unless weights are given."""
    builder = find_family(family).builder
    if not builder:
        raise EdgekitError(f"a bundle of the family {family!r} holds a graph; there is no network to build")
    try:
        import torch

        make = _function(builder)
    except ModuleNotFoundError as error:
        raise missing_extra(error.name or "torch", "compress", f"building a {family} network") from None
    model: nn.Module = make(**arguments)
    if weights is not None:
        state = {name: torch.from_numpy(value.copy()) for name, value in weights.items()}
        state |= {alias: state[name] for alias, name in tied(model).items() if name in state}
        try:
            model.load_state_dict(state)
        except RuntimeError as error:
            raise EdgekitError(
                f"weights do not fit {family} {dict(arguments)}: {str(error).splitlines()[-1].strip()}"
            ) from None
    return model.eval()


def tied(model: nn.Module) -> dict[str, str]:
    """Return the further names of tied parameters, with the first name, under which named_parameters() lists them."""
    first: dict[int, str] = {}
    return {
        name: first[id(value)]
        for name, value in model.named_parameters(remove_duplicate=False)
        if first.setdefault(id(value), name) != name
    }


def countable_units(family: str, model: nn.Module) -> dict[str, int]:
    """Return the constructor arguments that count removable units, and the number of these units; an empty result if
    the family lists none."""
    groups = find_family(family).groups
    return {group.argument: group.size for group in _function(groups)(model)} if groups else {}


def prunable_groups(family: str, model: nn.Module) -> list[PrunableGroup]:
    """Return the removable units of a network of the family, layer by layer."""
    groups = find_family(family).groups
    if not groups:
        raise EdgekitError(f"a {family} names no units that can be removed; leave structured_prune out of the recipe")
    found: list[PrunableGroup] = _function(groups)(model)
    return found


def _function(text: str) -> Callable[..., Any]:
    """Return the function 'package.module:function' of an installed package."""
    module, _, name = text.partition(":")
    found: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return found
