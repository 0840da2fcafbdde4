"""Network families: the constructors that a bundle's `family` names."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgekit.bundle.encoding import Float
from edgekit.errors import EdgekitError, missing_extra, unknown

if TYPE_CHECKING:
    from torch import nn

# each module has build(**arguments) -> nn.Module, and prunable_groups(model) if units can be removed from it
FAMILIES = {"t2": "edgekit.nn.t2", "module": "edgekit.nn.module"}


@dataclass(frozen=True, slots=True)
class PrunableGroup:
    """Units of one layer that can be removed together: attention heads, or feed-forward units.

    argument: the constructor argument that counts them; size: how many there are; width: rows of a weight that each
    takes; rows, columns: parameters that lose rows, or columns; consumer: the module whose input they are.
    """

    argument: str
    size: int
    width: int
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    consumer: str


def build(family: str, arguments: Mapping[str, Any], weights: Mapping[str, Float] | None = None) -> nn.Module:
    """A network of the family, in evaluation mode; fresh weights unless given."""
    if family not in FAMILIES:
        raise unknown("model family", family, FAMILIES)
    try:
        import torch

        module = importlib.import_module(FAMILIES[family])
    except ModuleNotFoundError as error:
        raise missing_extra(error.name or "torch", "compress", f"building a {family} network") from None
    model: nn.Module = module.build(**arguments)
    if weights is not None:
        from edgekit.nn.module import tied

        state = {name: torch.from_numpy(value.copy()) for name, value in weights.items()}
        state |= {alias: state[name] for alias, name in tied(model).items() if name in state}
        try:
            model.load_state_dict(state)
        except RuntimeError as error:
            raise EdgekitError(
                f"weights do not fit {family} {dict(arguments)}: {str(error).splitlines()[-1].strip()}"
            ) from None
    return model.eval()


def countable_units(family: str, model: nn.Module) -> dict[str, int]:
    """Constructor arguments that count units which can be removed, and how many there are; none for a network whose
    family does not say."""
    module = importlib.import_module(FAMILIES[family])
    if not hasattr(module, "prunable_groups"):
        return {}
    return {group.argument: group.size for group in module.prunable_groups(model)}


def prunable_groups(family: str, model: nn.Module) -> list[PrunableGroup]:
    """What can be removed from a network of the family, layer by layer."""
    module = importlib.import_module(FAMILIES[family])
    if not hasattr(module, "prunable_groups"):
        raise EdgekitError(f"a {family} names no units that can be removed; leave structured_prune out of the recipe")
    groups: list[PrunableGroup] = module.prunable_groups(model)
    return groups
