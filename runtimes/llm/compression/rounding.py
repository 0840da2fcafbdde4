"""Store a matrix of a language model in a format of fewer bits: rounded to the nearest, or with GPTQ."""

from __future__ import annotations

import numpy as np

from edgekit.errors import EdgekitError
from edgekit.importers.gguf import Tensor
from edgekit.importers.gguf_encode import BLOCK, ENCODINGS, Grid, nearest, pack
from edgekit.importers.gguf_formats import FORMATS, NUMBERS, Bytes, Floats
from edgekit.passes.gptq import Float64, gptq

FORMS = tuple(ENCODINGS)


def bits(form: str) -> float:
    """Return the bits that a format takes for a value."""
    found = FORMATS[NUMBERS[form]]
    return 8 * found.bytes / found.values


def fits(tensor: Tensor, form: str) -> bool:
    """Return whether a tensor becomes smaller in a format, and the format can store its rows."""
    return tensor.shape[-1] % BLOCK == 0 and bits(form) < bits(tensor.format.name)


def rounded(name: str, weight: Floats, form: str, factor: Float64 | None = None) -> Tensor:
    """Return a matrix (rows, inputs) in a format. factor: of its inputs, as `edgekit.passes.gptq.inverse_factor`
    returns it, for GPTQ; without it each weight is rounded to the nearest, as llama.cpp does it."""
    if not np.isfinite(weight).all():
        raise EdgekitError(f"tensor {name!r} holds NaN or infinite values; it cannot be quantised")
    try:
        content = nearest(form, weight) if factor is None else _compensated(weight, form, factor)
    except EdgekitError as error:
        raise EdgekitError(f"tensor {name!r}: {error}") from None
    return Tensor(name, FORMATS[NUMBERS[form]], weight.shape, content.reshape(-1))


def plain(name: str, values: Floats) -> Tensor:
    """Return values as a tensor in float32."""
    content = np.ascontiguousarray(values, "<f4").view(np.uint8).reshape(-1)
    return Tensor(name, FORMATS[NUMBERS["F32"]], values.shape, content)


def _compensated(weight: Floats, form: str, factor: Float64) -> Bytes:
    codes, grids = gptq(weight.astype(np.float64), factor, BLOCK, lambda block, cost: Grid.fit(form, block, cost))
    scales, least = (np.stack([getattr(grid, part) for grid in grids], axis=1) for part in ("scale", "least"))
    return pack(form, scales, least, codes.reshape(len(codes), -1, BLOCK))
