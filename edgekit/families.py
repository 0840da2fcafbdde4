"""Network families: the constructors that a bundle's `family` names."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from edgekit.encoding import Float
from edgekit.errors import EdgekitError, missing_extra, unknown

if TYPE_CHECKING:
    from torch import nn

FAMILIES = {"t2": "edgekit.nn.t2"}  # each module has build(**arguments) -> nn.Module


def build(family: str, arguments: Mapping[str, Any], weights: Mapping[str, Float] | None = None) -> nn.Module:
    """A network of the family, in evaluation mode; fresh weights unless given."""
    if family not in FAMILIES:
        raise unknown("model family", family, FAMILIES)
    try:
        import torch
    except ImportError:
        raise missing_extra("torch", "compress", f"building a {family} network") from None
    model: nn.Module = importlib.import_module(FAMILIES[family]).build(**arguments)
    if weights is not None:
        try:
            model.load_state_dict({name: torch.from_numpy(value.copy()) for name, value in weights.items()})
        except RuntimeError as error:
            raise EdgekitError(
                f"weights do not fit {family} {dict(arguments)}: {str(error).splitlines()[-1].strip()}"
            ) from None
    return model.eval()
