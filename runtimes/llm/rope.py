"""The rotary position embedding (Su et al., RoFormer, arXiv 2104.09864, section 3.2), and how models stretch it.

A model that was trained on short texts reads longer ones after its frequencies were divided. Each way is a function
here, from the parameters that transformers' config.json has for it to what divides each frequency.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from edgekit.errors import EdgekitError, printed, unknown

Pairs = Literal["adjacent", "halves"]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Rope:
    """size: the dimensions of a head that are rotated, the first ones; base: of the frequencies; pairs: whether
    dimensions 2i and 2i + 1, or i and i + size / 2 are rotated together; factors: (size / 2,) by which frequencies are
    divided; magnitude: by which the rotated dimensions of queries and keys are multiplied.
    """

    size: int
    base: float
    pairs: Pairs
    factors: Floats
    magnitude: float = 1.0
    divisors: Floats = field(init=False, repr=False)  # of a position; computed once, not in each step

    def __post_init__(self) -> None:
        exponents = np.arange(0, self.size, 2) / self.size
        object.__setattr__(self, "divisors", self.base**exponents * self.factors)

    def angles(self, positions: npt.NDArray[np.int64]) -> Floats:
        """Return (positions, size / 2) the angle of each pair of dimensions."""
        return positions[:, None] / self.divisors

    def cosines_and_sines(self, positions: npt.NDArray[np.int64]) -> tuple[Floats, Floats]:
        """Return (positions, size / 2) cosines and sines, times the magnitude."""
        angles = self.angles(positions)
        return np.cos(angles) * self.magnitude, np.sin(angles) * self.magnitude


def rope_of(size: int, pairs: Pairs, parameters: Mapping[str, Any], where: str) -> Rope:
    """Return the embedding that parameters describe. parameters: `rope_theta`, the base; `rope_type`, the way of
    stretching; and the parameters of that way."""
    given = {key: value for key, value in parameters.items() if value is not None}
    name = str(given.pop("rope_type", "default"))[:40]
    if name not in SCALINGS:
        raise unknown("scaling of the rotary embedding", name, SCALINGS, where=where)
    scaling = SCALINGS[name]
    base = given.pop("rope_theta", None)
    for key, value in {"rope_theta": base, **given}.items():
        if key in given and key not in (*scaling.needs, *scaling.may):
            shown = f"{printed(key)} = {repr(value)[:40]}"
            raise EdgekitError(f"{where}: {shown} is no parameter of {name} rotary embeddings")
        if not _is_positive(value, size // 2 if key.endswith("_factor") and isinstance(value, list) else None):
            raise EdgekitError(f"{where}: {key} = {repr(value)[:40]} of the rotary embedding is not positive")
    if absent := [key for key in scaling.needs if key not in given]:
        raise EdgekitError(f"{where}: {name} rotary embeddings need {absent[0]!r}, which is missing; download it again")
    frequencies = float(base or 0) ** -(np.arange(0, size, 2) / size)
    factors, magnitude = scaling.compute(frequencies, float(base or 0), given)
    if not (np.isfinite([*factors, magnitude]).all() and min(*factors, magnitude) > 0):
        raise EdgekitError(f"{where}: {name} gives the rotary embedding factors that are not positive numbers")
    return Rope(size, float(base or 0), pairs, factors, magnitude)


def _is_positive(value: Any, length: int | None) -> bool:
    """Whether a parameter is a positive number, or a list of `length` of them, or true or false."""
    if length is not None:
        return len(value) == length and all(_is_positive(item, None) for item in value)
    return isinstance(value, bool) or (isinstance(value, (int, float)) and 0 < value < 1e18)


# --- ways of stretching: from (size / 2,) the frequencies, their base, and the parameters to (factors, magnitude)

Scaled = tuple[Floats, float]


def _default(frequencies: Floats, base: float, given: Mapping[str, Any]) -> Scaled:
    return np.ones_like(frequencies), 1.0


def _linear(frequencies: Floats, base: float, given: Mapping[str, Any]) -> Scaled:
    """Chen et al., Position Interpolation, arXiv 2306.15595."""
    return np.full_like(frequencies, given["factor"]), 1.0


def _llama3(frequencies: Floats, base: float, given: Mapping[str, Any]) -> Scaled:
    """Llama 3.1: high frequencies stay, low ones are divided, and those between are mixed."""
    low, high = given["low_freq_factor"], given["high_freq_factor"]
    turns = given["original_max_position_embeddings"] * frequencies / (2 * math.pi)  # within the original context
    kept = np.clip((turns - low) / (high - low), 0, 1) if high > low else np.where(turns > high, 1.0, 0.0)
    return 1 / ((1 - kept) / given["factor"] + kept), 1.0


def _yarn(frequencies: Floats, base: float, given: Mapping[str, Any]) -> Scaled:
    """Peng et al., YaRN, arXiv 2309.00071, sections 3.2 to 3.4."""
    half, original, factor = len(frequencies), given["original_max_position_embeddings"], given["factor"]

    def dimension(turns: float) -> float:
        """Return the pair of dimensions that makes this many turns within the original context."""
        return float(half * math.log(original / (turns * 2 * math.pi)) / math.log(base)) if base > 1 else math.nan

    low, high = dimension(given.get("beta_fast", 32)), dimension(given.get("beta_slow", 1))
    if not math.isfinite(low + high):
        return np.zeros_like(frequencies), 1.0
    if given.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * half - 1)
    ramp = np.clip((np.arange(half) - low) / ((high - low) or 0.001), 0, 1)

    def magnitude(by: float) -> float:
        return 0.1 * by * math.log(factor) + 1 if factor > 1 else 1.0

    both = "mscale" in given and "mscale_all_dim" in given
    usual = magnitude(given["mscale"]) / magnitude(given["mscale_all_dim"]) if both else magnitude(1)
    return 1 / (ramp / factor + 1 - ramp), float(given.get("attention_factor", usual))


def _longrope(frequencies: Floats, base: float, given: Mapping[str, Any]) -> Scaled:
    """Ding et al., LongRoPE, arXiv 2402.13753: two sets of factors. A sequence that grows beyond the original context
    would change from one set to the other, and all its keys with it, so edgekit takes the short set and ends the
    context there."""
    original, factor = given["original_max_position_embeddings"], given["factor"]
    usual = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 and original > 1 else 1.0
    return np.array(given["short_factor"], np.float64), float(given.get("attention_factor", usual))


@dataclass(frozen=True, slots=True)
class Scaling:
    """A way of stretching, with the parameters that it needs and those that it may have."""

    compute: Callable[[Floats, float, Mapping[str, Any]], Scaled]
    needs: tuple[str, ...] = ()
    may: tuple[str, ...] = ()


ORIGINAL = "original_max_position_embeddings"
SCALINGS = {
    "default": Scaling(_default),
    "linear": Scaling(_linear, ("factor",)),
    # it scales nothing until a sequence is longer than the model's context, which edgekit does not allow
    "dynamic": Scaling(_default, (), ("factor", ORIGINAL)),
    "llama3": Scaling(_llama3, ("factor", "low_freq_factor", "high_freq_factor", ORIGINAL)),
    "yarn": Scaling(
        _yarn,
        ("factor", ORIGINAL),
        ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    ),
    "longrope": Scaling(_longrope, ("short_factor", "factor", ORIGINAL), ("long_factor", "attention_factor")),
}
