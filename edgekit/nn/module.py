"""Any torch network, by the Python function that makes it.

A bundle is data and must not run code that its reader did not choose, so the function is called only if the user named
it: on the command line that imported the model, by `edgekit --trust`, or in $EDGEKIT_TRUST.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from torch import nn

from edgekit.errors import EdgekitError
from edgekit.plugins import imported

_trusted: set[str] = set()


def trust(factory: str) -> None:
    """Allow this process to call package.module:function."""
    _trusted.add(factory)


def build(factory: str, arguments: Mapping[str, Any] | None = None) -> nn.Module:
    """What the function makes of its keyword arguments, with its own fresh weights."""
    if factory not in _trusted and factory not in os.environ.get("EDGEKIT_TRUST", "").split(","):
        raise EdgekitError(
            f"the model is built by the Python function {factory}, which would be run; if you trust it: "
            f"edgekit --trust {factory} COMMAND ..."
        )
    model = imported(factory, "model")(**(arguments or {}))
    if not isinstance(model, nn.Module):
        raise EdgekitError(f"{factory} gives a {type(model).__name__}; expected a torch.nn.Module")
    return model
