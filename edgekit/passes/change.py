"""One line of a pass's plan. It stands by itself, so that a bundle's records can be read without torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Change:
    """One line of a plan: what happens to a tensor."""

    tensor: str
    before: str
    after: str
