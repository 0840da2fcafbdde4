"""Measure quality in the model's own unit, with the sample count and the uncertainty."""

from __future__ import annotations

import contextlib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from edgekit.errors import EdgekitError, unknown
from edgekit.plugins import imported

Array = npt.NDArray[Any]
Float = npt.NDArray[np.floating]
Labels = npt.NDArray[np.integer]
FLOOR = 1e-15  # a probability of exactly 0 then costs 34.5, not infinity


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
    """A measure of quality; lower is better. `value` takes the model's first output, (samples, ...), and the expected
    values: labels, or the original model's outputs if `labelled` is False."""

    name: str
    labelled: bool

    def value(self, outputs: Float, expected: Array) -> float: ...


class PerSample(ABC):
    """A metric that is an average of one loss per sample, so that a bootstrap computes and checks the losses once."""

    @abstractmethod
    def losses(self, outputs: Float, labels: Array) -> Array:
        """Return (samples,) losses. Raises if these cannot be the outputs for these labels."""

    def average(self, losses: Array, labels: Array) -> float:
        return float(losses.mean())

    def value(self, outputs: Float, labels: Array) -> float:
        return self.average(self.losses(outputs, labels), labels)


class ClassAveragedLogLoss(PerSample):
    """Weighted log-loss with equal weights of the classes: the mean over classes of each class's mean -log p(true).

    The class means cover the whole set (Malz et al. 2019, AJ 158 171, eq. 4). The reference averaged inside batches
    while it trained; there, an absent class counts as 0, and the result looks better.
    """

    name = "class-averaged log-loss"
    labelled = True

    def losses(self, outputs: Float, labels: Labels) -> Array:
        losses = sample_losses(outputs, labels)
        if not np.allclose(outputs.sum(axis=1), 1, atol=0.05):
            raise EdgekitError("log-loss: the outputs are not probabilities, they do not add up to 1; use error-rate")
        return losses

    def average(self, losses: Array, labels: Labels) -> float:
        return float(class_means(losses, labels).mean())


class ErrorRate(PerSample):
    """The share of samples whose most probable class is wrong."""

    name = "error rate"
    labelled = True

    def losses(self, outputs: Float, labels: Labels) -> Array:
        check(outputs, labels)
        wrong: Array = outputs.argmax(axis=1) != labels
        return wrong


class MeanAbsoluteError:
    """The mean |output - label| of a regression, in the label's unit."""

    name = "mean absolute error"
    labelled = True

    def value(self, outputs: Float, labels: Array) -> float:
        if outputs.shape != labels.shape:
            raise EdgekitError(f"mean-absolute-error: outputs {outputs.shape} for labels {labels.shape}")
        return float(np.abs(outputs.astype(np.float64) - labels).mean())


class Changed:
    """The share of rows, or of tokens if each row has several, whose highest score differs from that of the original
    model. This metric needs no labels. One changed bit of a code in a thousand changes one token in fifty: count
    tokens, not bits."""

    name = "share changed"
    labelled = False

    def value(self, outputs: Float, original: Float) -> float:
        if outputs.dtype.kind in "iub":  # codes, not scores
            return float((outputs != original).mean())
        return float((outputs.argmax(axis=-1) != original.argmax(axis=-1)).mean())


class RelativeError:
    """The Euclidean distance from the original model's outputs, relative to the norm of these outputs. It needs no
    labels."""

    name = "relative error"
    labelled = False

    def value(self, outputs: Float, original: Float) -> float:
        exact = original.astype(np.float64)
        return float(np.linalg.norm(outputs - exact) / max(float(np.linalg.norm(exact)), 1e-30))


@dataclass(slots=True)
class Custom:
    """The user's own function: (outputs, labels) -> a number, lower is better."""

    name: str
    function: Callable[[Float, Array], float]
    labelled: bool = True

    def value(self, outputs: Float, labels: Array) -> float:
        try:
            return float(self.function(outputs, labels))
        except Exception as error:  # the function is the user's and may raise anything, which the user must see
            raise EdgekitError(f"metric {self.name}: {type(error).__name__}: {error}") from error


METRICS: dict[str, Metric] = {
    "log-loss": ClassAveragedLogLoss(),
    "error-rate": ErrorRate(),
    "mean-absolute-error": MeanAbsoluteError(),
    "changed": Changed(),
    "relative-error": RelativeError(),
}


def metric(name: str) -> Metric:
    """Return a metric by its name, or the user's function 'package.module:function' as a metric."""
    if ":" in name:
        return Custom(name, imported(name, "metric"))
    if name not in METRICS:
        raise unknown("metric", name, [*METRICS, "package.module:function"])
    return METRICS[name]


def source(name: str) -> str:
    """Return what a metric's values depend on besides its name: the source text of the module of the user's function,
    or of the function alone if it was typed into an interpreter; "" if it is compiled."""
    if ":" not in name:
        return ""
    function = imported(name, "metric")
    for item in filter(None, (inspect.getmodule(function), function)):
        with contextlib.suppress(TypeError, OSError):
            return inspect.getsource(item)
    return ""


def check_direction(metric: Metric, outputs: Float, expected: Array) -> None:
    """Raise if a metric rates right answers worse than wrong ones. An example is an accuracy: under it, a model that
    forgot everything would count as a gain. The check skips outputs for which labels define no right answer."""
    if outputs.size == len(outputs) == expected.size:
        right = expected.reshape(outputs.shape).astype(np.float64)
        wrong = right.min() + right.max() - right
    elif outputs.ndim == 2 and expected.ndim == 1 and expected.dtype.kind in "iu" and expected.min() >= 0:
        classes = outputs.shape[1]
        right, wrong = (np.eye(classes)[(expected + turn) % classes] for turn in (0, 1))
    else:
        return
    try:
        best, worst = (metric.value(answers.astype(outputs.dtype), expected) for answers in (right, wrong))
    except EdgekitError:  # the function may refuse such simple answers; it must only accept those of the model
        return
    if best > worst:
        raise EdgekitError(
            f"metric {metric.name}: {best:g} for right answers and {worst:g} for wrong ones; lower must be better, so "
            "return an error such as 1 - accuracy, or the negative"
        )


def sample_losses(probabilities: Float, labels: Labels) -> npt.NDArray[np.float64]:
    """Return (samples,) -log of the probability of the true class."""
    check(probabilities, labels)
    true = probabilities[np.arange(len(labels)), labels].astype(np.float64)
    return -np.log(np.maximum(true, FLOOR))


def class_means(losses: npt.NDArray[np.float64], labels: Labels) -> npt.NDArray[np.float64]:
    """Return the mean loss of every class that occurs."""
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
    check_outputs(probabilities, labels)


def measure(
    metric: Metric, probabilities: Float, labels: Labels, *, resamples: int = 400, seed: int = 0
) -> Measurement:
    """Return the metric with a stratified bootstrap interval: each class keeps its count, so that rare classes never
    vanish."""
    check_outputs(probabilities, labels)
    value = metric.value(probabilities, labels)
    values = _values(metric, probabilities, labels, _resamples(labels, resamples, seed))
    low, high = np.percentile(values, [2.5, 97.5])
    return Measurement(value, float(low), float(high), len(labels))


def measure_change(
    metric: Metric, before: Float, after: Float, labels: Labels, *, resamples: int = 400, seed: int = 0
) -> Measurement:
    """Return the metric after minus the metric before, on the same samples. The interval of paired samples is much
    narrower than the difference of two separate intervals."""
    check_outputs(before, labels)
    check_outputs(after, labels)
    resampled = _resamples(labels, resamples, seed)
    values = _values(metric, after, labels, resampled) - _values(metric, before, labels, resampled)
    low, high = np.percentile(values, [2.5, 97.5])
    value = metric.value(after, labels) - metric.value(before, labels)
    return Measurement(value, float(low), float(high), len(labels))


def _values(
    metric: Metric, outputs: Float, labels: Array, resampled: list[npt.NDArray[np.int64]]
) -> npt.NDArray[np.float64]:
    """Return the metric of each resample."""
    if isinstance(metric, PerSample):
        losses = metric.losses(outputs, labels)
        return np.array([metric.average(losses[rows], labels[rows]) for rows in resampled])
    return np.array([metric.value(outputs[rows], labels[rows]) for rows in resampled])


def check_outputs(outputs: Float, expected: Array) -> None:
    """Raise unless there is a finite output for every row."""
    if len(outputs) != len(expected) or len(expected) == 0:
        raise EdgekitError(f"{len(outputs)} outputs for {len(expected)} labels; expected one for each, n > 0")
    if outputs.dtype.kind == "f" and not np.isfinite(outputs).all():
        bad = int((~np.isfinite(outputs)).reshape(len(outputs), -1).any(axis=1).sum())
        raise EdgekitError(f"the model gives NaN or infinite outputs for {bad} of {len(outputs)} samples")


def _resamples(labels: Array, count: int, seed: int) -> list[npt.NDArray[np.int64]]:
    """Draw rows with replacement, `count` times; within each class if there are classes."""
    rng = np.random.default_rng(seed)
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        return [rng.integers(0, len(labels), len(labels)) for _ in range(count)]
    groups = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    return [np.concatenate([group[rng.integers(0, len(group), len(group))] for group in groups]) for _ in range(count)]
