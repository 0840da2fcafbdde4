"""What a compression of a language model did, as its report says it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edgekit.compression.record import finite
from runtimes.llm.compression.guard import Budget, Quality


@dataclass(frozen=True, slots=True)
class LayerRecord:
    """A layer. formats: of its matrices; bytes: of all its tensors, before and after; damage: the divergence of the
    source with this one layer compressed, None if it was not measured; reason: why it has another format than the
    others, or ""."""

    number: int
    formats: Sequence[str]
    source_bytes: int
    bytes: int
    damage: float | None
    reason: str


@dataclass(frozen=True, slots=True)
class Compressed:
    """A compressed model that was written. bytes: of the files; bits: that a weight takes, of all matrices; texts: on
    which it was calibrated and measured; tokens: of calibration; settings: of the job."""

    path: Path
    source: str
    source_bytes: int
    bytes: int
    bits: float
    quality: Quality
    budget: Budget
    layers: Sequence[LayerRecord]
    texts: Sequence[str]
    tokens: int
    settings: Mapping[str, Any]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        plain: dict[str, Any] = finite({**asdict(self), "path": str(self.path)})
        return plain
