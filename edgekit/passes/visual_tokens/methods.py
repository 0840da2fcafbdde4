"""All methods by name. To add one: write its file beside the others, list it here, and add its naive reference to
tests/edgekit/passes/visual_tokens/naive.py; the shared tests then run it."""

from __future__ import annotations

from edgekit.errors import unknown
from edgekit.passes.visual_tokens.base import Method
from edgekit.passes.visual_tokens.base_view import BaseView
from edgekit.passes.visual_tokens.cdpruner import CdPruner
from edgekit.passes.visual_tokens.divprune import DivPrune
from edgekit.passes.visual_tokens.downsample import Downsample
from edgekit.passes.visual_tokens.fastervlm import FasterVlm
from edgekit.passes.visual_tokens.hired import Hired
from edgekit.passes.visual_tokens.hired_released import HiredReleased
from edgekit.passes.visual_tokens.mean_attention import MeanAttention
from edgekit.passes.visual_tokens.prumerge import PruMerge
from edgekit.passes.visual_tokens.random_tokens import RandomTokens
from edgekit.passes.visual_tokens.scope import Scope
from edgekit.passes.visual_tokens.stride import Stride
from edgekit.passes.visual_tokens.visionzip import VisionZip

METHODS: dict[str, Method] = {
    "edgekit": MeanAttention(),
    "hired": Hired(),
    "hired-released": HiredReleased(),
    "base-view": BaseView(),
    "downsample": Downsample(),
    "random": RandomTokens(),
    "stride": Stride(),
    "prumerge": PruMerge(),
    "prumerge+": PruMerge(plus=True),
    "visionzip": VisionZip(),
    "fastervlm": FasterVlm(),
    "divprune": DivPrune(),
    "cdpruner": CdPruner(),
    "scope": Scope(),
}


def method(name: str | Method) -> Method:
    """Return the method with its published parameters, by name; an instance is returned as it is."""
    if not isinstance(name, str):
        return name
    if name not in METHODS:
        raise unknown("method for visual tokens", name, METHODS)
    return METHODS[name]
