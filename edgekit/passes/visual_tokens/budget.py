"""How many visual tokens of an image are kept: a rate or an absolute count, known before the tower runs."""

from __future__ import annotations

import math
from dataclasses import dataclass

from edgekit.errors import EdgekitError
from edgekit.passes.visual_tokens.geometry import Geometry


@dataclass(frozen=True, slots=True)
class Budget:
    """rate: the share of all tokens of all views, padding included (HiRED, Algorithm 1), above 0 and at most 1;
    tokens: the most tokens of an image. One of the two is given."""

    rate: float | None = None
    tokens: int | None = None

    def __post_init__(self) -> None:
        if (self.rate is None) == (self.tokens is None):
            raise EdgekitError(
                f"a budget has a rate or a number of tokens, one of them; got {self.rate}, {self.tokens}"
            )
        if self.rate is not None and not 0 < self.rate <= 1:
            raise EdgekitError(f"a budget's rate is above 0 and at most 1; got {self.rate}; 0.2 keeps a fifth")
        if self.tokens is not None and (not isinstance(self.tokens, int) or self.tokens < 1):
            raise EdgekitError(f"a budget's tokens are an integer of at least 1; got {self.tokens}")

    @classmethod
    def of(cls, value: float | int | Budget) -> Budget:
        """Return the budget that a number means: a float is a rate, an int a count of tokens."""
        if isinstance(value, Budget):
            return value
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise EdgekitError(f"a budget is a rate such as 0.2 or a number of tokens such as 576; got {value!r}")
        return cls(tokens=value) if isinstance(value, int) else cls(rate=value)

    @property
    def everything(self) -> bool:
        """Whether the model reads what the stock model reads, newlines included."""
        return self.rate == 1.0

    def count(self, geometry: Geometry) -> int:
        """Return how many tokens of this image are kept: exactly so many, whatever the method and the content, and at
        least one. An image has no more than its tokens without padding."""
        views = geometry.views * geometry.tokens
        # a rate such as 0.29 has no exact binary form: without the rounding, 0.29 * 100 tokens would be 28
        asked = self.tokens if self.rate is None else math.floor(round(self.rate * views, 9))
        return max(1, min(asked or 0, len(geometry.candidates)))
