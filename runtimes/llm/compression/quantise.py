"""Quantise the matrices of one layer."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from edgekit.passes.gptq import inverse_factor
from runtimes.llm.architecture import Architecture, Layer
from runtimes.llm.compression.forward import INPUTS, Moments
from runtimes.llm.compression.plan import of
from runtimes.llm.compression.rounding import fits, plain, rounded
from runtimes.llm.compression.scaling import scaled

GROUP_OF = {role: group for group, roles in INPUTS.items() for role in roles}  # the matrix whose input it shares


def quantised(
    layer: Layer, form: str, method: str, moments: Moments, architecture: Architecture, damping: float
) -> Layer:
    """Return a layer in a format, by a method that knows the second moments of the matrices' inputs. Scaling changes
    all matrices of a layer; it is left out if one of them cannot be stored in the format."""
    present = of(layer)
    weights = {role: tensor.values() for role, tensor in present.items()}
    chosen = [role for role in GROUP_OF if fits(present[role], form)]
    if "awq" in method and len(chosen) == len(GROUP_OF):
        weights, moments = scaled(weights, moments, form, architecture)
    factors = (
        {group: inverse_factor(second.numpy(), damping) for group, second in moments.items()}
        if "gptq" in method
        else {}
    )
    found = {}
    for role, tensor in present.items():
        if role in chosen:
            found[role] = rounded(tensor.name, weights[role], form, factors.get(GROUP_OF[role]))
        elif not np.array_equal(weights[role], tensor.values()):
            found[role] = plain(tensor.name, weights[role])  # a norm or a bias that has taken a scale
    return replace(layer, **found)


def in_format(layer: Layer, form: str) -> Layer:
    """Return a layer with its matrices rounded to the nearest where that makes them smaller."""
    chosen = {role: tensor for role in GROUP_OF if fits(tensor := getattr(layer, role), form)}
    return replace(layer, **{role: rounded(item.name, item.values(), form) for role, item in chosen.items()})
