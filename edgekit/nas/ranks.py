"""The correlation of ranks (Spearman 1904)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt


def spearman(first: Sequence[float], second: Sequence[float]) -> float:
    """Return the correlation of ranks, NaN if one side has no order."""
    ranks = [_ranks(np.asarray(values, np.float64)) for values in (first, second)]
    if len(first) < 2 or any(np.ptp(rank) == 0 for rank in ranks):
        return math.nan
    a, b = (rank - rank.mean() for rank in ranks)
    return float(a @ b / math.sqrt(float(a @ a) * float(b @ b)))


def _ranks(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return the ranks; equal values share the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    means: npt.NDArray[np.float64] = (ends - (counts - 1) / 2)[inverse]
    return means
