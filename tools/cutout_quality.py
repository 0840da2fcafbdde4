"""How far the scores of two real/bogus networks agree: what the card of cutout-rb states."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import stats

VERDICT = 0.5  # at or above it, a source is real
Scores = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Share:
    """count of rows of `of`, with a 95 % Wilson interval."""

    count: int
    of: int

    @property
    def value(self) -> float:
        return self.count / self.of

    @property
    def interval(self) -> tuple[float, float]:
        found = stats.binomtest(self.count, self.of).proportion_ci(method="wilson")
        return float(found.low), float(found.high)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.value:.1%} ({self.count} of {self.of}) [{low:.1%}, {high:.1%}]"


@dataclass(frozen=True, slots=True)
class Agreement:
    """agree: rows with the same verdict; missed: rows that the reference calls real, and the network does not;
    false_positives: rows that the network calls real, and the reference does not; rank: Spearman's correlation."""

    agree: Share
    missed: Share
    false_positives: Share
    rank: float


def agreement(reference: Scores, scores: Scores) -> Agreement:
    """Compare the scores of a network, (rows,), with those of a reference."""
    real, called = reference >= VERDICT, scores >= VERDICT
    return Agreement(
        Share(int((real == called).sum()), len(real)),
        Share(int((real & ~called).sum()), int(real.sum())),
        Share(int((called & ~real).sum()), int((~real).sum())),
        float(stats.spearmanr(reference, scores).statistic),
    )
