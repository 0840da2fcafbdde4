"""One line of what `edgekit doctor` says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "warning", "error"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One finding. error: it, or the target, cannot work like this; warning: slower than it need be, or not certain."""

    name: str
    status: Status
    finding: str
    remedy: str = ""


def size(count: float) -> str:
    """Bytes for a person."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
