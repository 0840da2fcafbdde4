"""Networks that exist only as objects of this process, known by a name that bundles of the family "module" can use.

    register(network)    -> "edgekit.nn.live:network_1"

The name is looked up as any other factory's is. Building it copies the network that was registered, so that passes can
change their copy, and cut again what earlier passes have removed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING

from edgekit.nn.module import trust

if TYPE_CHECKING:
    from torch import nn

PREFIX = f"{__name__}:"
_networks: dict[str, nn.Module] = {}


def register(network: nn.Module) -> str:
    """Keep a copy of the network until the process ends, and return the name of the factory that copies it again."""
    name = f"network_{len(_networks) + 1}"
    _networks[name] = copy.deepcopy(network).cpu().eval()
    trust(PREFIX + name)
    return PREFIX + name


def is_live(factory: object) -> bool:
    """Return whether a factory's name stands for a network of one process."""
    return str(factory).startswith(PREFIX)


def __getattr__(name: str) -> Callable[[], nn.Module]:
    if name not in _networks:
        raise AttributeError(f"{name!r} is a network that only the process that registered it can build")
    return lambda: copy.deepcopy(_networks[name])
