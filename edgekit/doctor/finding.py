"""One line of the output of `edgekit doctor`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "warning", "error"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One finding. error: the part, or the target, cannot work; warning: it works slower than it could, or it may not
    work."""

    name: str
    status: Status
    finding: str
    remedy: str = ""


def size(count: float) -> str:
    """A number of bytes in a unit that is easy to read."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
