"""Quality in the model's own unit, with its sample count and its uncertainty."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from edgekit.errors import EdgekitError, unknown

Float = npt.NDArray[np.floating]
Labels = npt.NDArray[np.integer]
FLOOR = 1e-15  # a probability of exactly 0 costs 34.5, not infinity


@dataclass(frozen=True, slots=True)
class Measurement:
    """A metric's value with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float
    samples: int

    def __str__(self) -> str:
        return f"{self.value:.4f} [{self.low:.4f}, {self.high:.4f}] (n = {self.samples:,})"


class Metric(Protocol):
    """Lower is better. `value` takes probabilities (samples, classes) and labels (samples,)."""

    name: str

    def value(self, probabilities: Float, labels: Labels) -> float: ...


class ClassAveragedLogLoss:
    """Weighted log-loss of the PLAsTiCC challenge with equal weights: the mean over classes of each class's mean
    -log p(true). Global: class means are taken over the whole set (Malz et al. 2019, AJ 158 171, eq. 4); averaged
    inside batches, as the reference did while training, an absent class counts as 0 and the result looks better.
    """

    name = "class-averaged log-loss"

    def value(self, probabilities: Float, labels: Labels) -> float:
        return float(class_means(sample_losses(probabilities, labels), labels).mean())


class ErrorRate:
    """Share of samples whose most probable class is wrong."""

    name = "error rate"

    def value(self, probabilities: Float, labels: Labels) -> float:
        return float((probabilities.argmax(axis=1) != labels).mean())


METRICS: dict[str, Metric] = {"log-loss": ClassAveragedLogLoss(), "error-rate": ErrorRate()}


def metric(name: str) -> Metric:
    if name not in METRICS:
        raise unknown("metric", name, METRICS)
    return METRICS[name]


def sample_losses(probabilities: Float, labels: Labels) -> npt.NDArray[np.float64]:
    """(samples,) -log of the probability given to the true class."""
    check(probabilities, labels)
    true = probabilities[np.arange(len(labels)), labels].astype(np.float64)
    return -np.log(np.maximum(true, FLOOR))


def class_means(losses: npt.NDArray[np.float64], labels: Labels) -> npt.NDArray[np.float64]:
    """Mean loss of every class that occurs."""
    counts = np.bincount(labels)
    return (np.bincount(labels, weights=losses) / np.maximum(counts, 1))[counts > 0]


def check(probabilities: Float, labels: Labels) -> None:
    """Raise if these cannot be the outputs of a classifier for these labels."""
    if probabilities.ndim != 2 or len(probabilities) != len(labels) or len(labels) == 0:
        raise EdgekitError(
            f"{probabilities.shape} probabilities for {len(labels)} labels; expected (samples, classes), n > 0"
        )
    if labels.min() < 0 or labels.max() >= probabilities.shape[1]:
        raise EdgekitError(f"labels span {labels.min()} to {labels.max()}; expected 0 to {probabilities.shape[1] - 1}")
    if not np.isfinite(probabilities).all():
        bad = int((~np.isfinite(probabilities)).any(axis=1).sum())
        raise EdgekitError(f"the model gives NaN or infinite probabilities for {bad} of {len(labels)} samples")


def measure(
    metric: Metric, probabilities: Float, labels: Labels, *, resamples: int = 400, seed: int = 0
) -> Measurement:
    """The metric with a stratified bootstrap interval: each class keeps its count, so that rare ones never vanish."""
    check(probabilities, labels)
    values = [metric.value(probabilities[rows], labels[rows]) for rows in _resamples(labels, resamples, seed)]
    low, high = np.percentile(values, [2.5, 97.5])
    return Measurement(metric.value(probabilities, labels), float(low), float(high), len(labels))


def measure_change(
    metric: Metric, before: Float, after: Float, labels: Labels, *, resamples: int = 400, seed: int = 0
) -> Measurement:
    """Metric after minus before, on the same samples: paired, so far narrower than two intervals side by side."""
    check(before, labels)
    check(after, labels)
    values = [
        metric.value(after[rows], labels[rows]) - metric.value(before[rows], labels[rows])
        for rows in _resamples(labels, resamples, seed)
    ]
    low, high = np.percentile(values, [2.5, 97.5])
    value = metric.value(after, labels) - metric.value(before, labels)
    return Measurement(value, float(low), float(high), len(labels))


def _resamples(labels: Labels, count: int, seed: int) -> list[npt.NDArray[np.int64]]:
    rng = np.random.default_rng(seed)
    groups = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    return [np.concatenate([rng.choice(group, len(group)) for group in groups]) for _ in range(count)]
