"""Draw pictures as SVG text or PNG bytes: the course of a compression, and the quality of a classifier.

The same numbers give the same bytes, so that a bundle with a report in it is reproducible. Text remains text in the
SVG. Inline pictures take their colours from the page (`--plot-...`) and follow its dark theme; other pictures have a
white background.
"""

from __future__ import annotations

import functools
import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, ParamSpec, TypeVar

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from edgekit.compression.guard import Latency
from edgekit.compression.metrics import Float, Labels, check
from edgekit.compression.trials import Outcome, Sensitivity

COLOURS = {
    "ink": "#1f2530",
    "muted": "#68717d",
    "grid": "#dde1e6",
    "kept": "#0a6ebd",
    "lost": "#c8500a",
    "before": "#a9b3be",
}
INK, MUTED, GRID, KEPT, LOST, BEFORE = COLOURS.values()
STYLE: Any = {
    "svg.fonttype": "none", "svg.hashsalt": "edgekit", "text.parse_math": False, "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"], "font.size": 9, "text.color": INK, "axes.labelcolor": INK,
    "axes.edgecolor": MUTED, "axes.linewidth": 0.8, "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "axes.axisbelow": True, "grid.color": GRID, "grid.linewidth": 0.8, "xtick.color": MUTED,
    "ytick.color": MUTED, "xtick.labelcolor": INK, "ytick.labelcolor": INK, "legend.frameon": False,
    "legend.fontsize": 8, "figure.facecolor": "white", "axes.facecolor": "none", "errorbar.capsize": 2.5,
    "lines.solid_capstyle": "round", "path.simplify": False,
}  # fmt: skip
FAR = 3  # multiples of the range that kept passes span: the trajectory's axis extends this far above them
ENOUGH = 10  # samples that a bin of the reliability curve needs to be drawn
P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Point:
    """The result of a pass. low, high: the 95 % interval of the quality, paired with the original's."""

    number: int
    label: str
    bytes: int
    quality: float
    low: float
    high: float
    kept: bool


@dataclass(frozen=True, slots=True)
class Reliability:
    """The reliability in each bin of the winning class's probability, as arrays (bins,): the mean confidence, the share
    of correct answers with its 95 % Wilson interval (all NaN if the bin is empty), and the number of samples. error:
    the expected calibration error."""

    confidence: npt.NDArray[np.float64]
    accuracy: npt.NDArray[np.float64]
    low: npt.NDArray[np.float64]
    high: npt.NDArray[np.float64]
    counts: npt.NDArray[np.int64]
    error: float


def styled(function: Callable[P, R]) -> Callable[P, R]:
    """Run a function with this module's style, and restore matplotlib's settings."""

    @functools.wraps(function)
    def wrapped(*arguments: P.args, **options: P.kwargs) -> R:
        with mpl.rc_context(STYLE):
            return function(*arguments, **options)

    return wrapped


@styled
def to_svg(figure: Figure, title: str, *, inline: bool = False) -> str:
    """Return the figure as SVG text; `title` describes it for screen readers."""
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=inline, metadata=nothing)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*|<style[^>]*>.*?</style>\s*", "", text, flags=re.DOTALL)
    # axes_1, patch_2: these names are not unique once a page has two pictures
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    text = re.sub(r"\n\s*", "\n", text).replace("'DejaVu Sans', sans-serif", "system-ui, sans-serif")
    head = f'<svg role="img" aria-label="{escape(title)}" stroke-linejoin="round"'
    if inline:
        text = re.sub(r' (width|height)="[^"]*pt"', "", text, count=2)
        for name, colour in COLOURS.items():
            text = text.replace(colour, f"var(--plot-{name}, {colour})")
    return text.replace("<svg", head, 1)


@styled
def to_png(figure: Figure, *, dpi: int = 150) -> bytes:
    """Return the figure as PNG bytes with a white background."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
    return buffer.getvalue()


@styled
def trajectory(start: Point, steps: Sequence[Point], max_loss: float | None, metric: str) -> Figure:
    """Plot quality against packed size. A line connects the kept passes; a dotted line leads to each rolled-back pass,
    which is hollow. An arrow at the upper edge, with its value, stands for a pass that lost far more than is allowed,
    so that the other points remain distinct."""
    figure, axes = _figure(5.6, 5.2)
    limit = start.quality + (max_loss or 0)
    lows = [start.quality, *(step.low for step in steps)]
    kept = [start.quality, limit, *(step.high for step in steps if step.kept)]
    reach = max(kept) - min(lows)
    highest = max([*kept, *(step.high for step in steps)])
    # if nothing was kept and there is no limit, show everything
    top = min(highest, max(kept) + FAR * reach) if reach > 0 else highest
    room = 0.1 * (top - min(lows)) or 0.01
    axes.set_ylim(min(lows) - room, top + room)
    here, path = start, [start]
    for step in steps:
        colour, beyond = (KEPT, False) if step.kept else (LOST, step.quality > top)
        x, y = step.bytes / 1e3, top if beyond else step.quality
        if not beyond:
            spread = np.clip([[y - step.low], [step.high - y]], 0, None)
            axes.errorbar([x], [y], yerr=spread, fmt="none", ecolor=colour, elinewidth=1)
        if not step.kept:
            axes.plot([here.bytes / 1e3, x], [here.quality, y], ":", color=LOST, linewidth=1, zorder=1.5)
            axes.plot([x], [y], "^" if beyond else "o", markersize=7, markerfacecolor="none", markeredgecolor=LOST)
        else:
            here = step
            path.append(step)
        _note(
            axes,
            f"{step.number}: {step.quality:.3g}" if beyond else str(step.number),
            (x, y),
            (6, 4),
            color=colour,
            fontweight="bold",
        )
    axes.plot([p.bytes / 1e3 for p in path], [p.quality for p in path], "-o", color=KEPT, linewidth=1.6, zorder=3)
    axes.plot([start.bytes / 1e3], [start.quality], "s", color=INK, markersize=7, zorder=4)
    _note(axes, start.label, (start.bytes / 1e3, start.quality), (-4, -14), ha="right")
    if max_loss is not None:
        axes.axhline(limit, color=MUTED, linewidth=1, linestyle=(0, (5, 3)))
        _note(axes, "largest allowed loss", (0.99, limit), (0, 3), ha="right", xycoords=axes.get_yaxis_transform())
    axes.set_xlim(0, 1.08 * max(point.bytes for point in [start, *steps]) / 1e3)
    axes.set_xlabel("packed file (kB)")
    axes.set_ylabel(f"{metric} (lower is better)")
    return figure


@styled
def bytes_per_pass(start: Point, steps: Sequence[Point]) -> Figure:
    """Packed bytes after each pass, rolled-back ones hollow."""
    figure, axes = _figure(5.6, 0.75 + 0.3 * (1 + len(steps)))
    rows = [start, *steps]
    names = [start.label, *(f"{step.number} {step.label}" for step in steps)]
    for row, point in enumerate(rows):
        colour = BEFORE if row == 0 else KEPT if point.kept else LOST
        face = colour if point.kept else "none"
        axes.barh(row, point.bytes, height=0.62, facecolor=face, edgecolor=colour, linewidth=1.2)
        note = f"{point.bytes:,}" + ("" if point.kept else ", rolled back")
        _note(axes, note, (point.bytes, row), (4, 0), va="center", color=INK if point.kept else LOST)
    axes.set_yticks(range(len(rows)), names)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlim(0, 1.35 * max(point.bytes for point in rows))
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)
    axes.xaxis.set_major_formatter(lambda value, position: f"{value:,.0f}")
    axes.set_xlabel("packed bytes")
    return figure


@styled
def latency_bars(latency: Sequence[Latency]) -> Figure:
    """CPU time per call before and after, one panel per batch size: their scales differ by orders of magnitude."""
    figure = Figure(figsize=(1.9 * len(latency), 2.9), layout="constrained")
    for number, item in enumerate(latency, start=1):
        axes = figure.add_subplot(1, len(latency), number)
        spread = np.clip([[item.ratio - item.low], [item.high - item.ratio]], 0, None) * item.before_ms
        axes.bar([0], [item.before_ms], width=0.66, color=BEFORE)
        axes.bar([1], [item.before_ms * item.ratio], width=0.66, color=KEPT)
        axes.errorbar([1], [item.before_ms * item.ratio], yerr=spread, fmt="none", ecolor=INK, elinewidth=1)
        axes.set_xticks([0, 1], ["before", "after"])
        axes.set_title(f"batch {item.batch}\n{item.ratio:.2f} x the time", fontsize=9)
        axes.set_ylim(0, 1.12 * item.before_ms * max(1, item.high))
        axes.grid(visible=False, axis="x")
        axes.tick_params(axis="x", length=0)
        if number == 1:
            axes.set_ylabel("CPU ms per call")
    return figure


@styled
def pareto(trials: Sequence[Outcome], chosen: int, max_loss: float, metric: str) -> Figure:
    """Plot the change of quality of every trial of a search against its packed size. A faster trial has a larger
    marker; markers on the Pareto front are filled."""
    figure, axes = _figure(5.6, 4.2)
    shown = [trial for trial in trials if np.isfinite(trial.loss)]
    top = max(3 * max_loss, 3 * min((abs(trial.loss) for trial in shown), default=0.0), 1e-3)
    for trial in shown:
        x, y, beyond = trial.bytes / 1e3, min(trial.loss, top), trial.loss > top
        axes.plot(
            [x],
            [y],
            "^" if beyond else "o",
            markersize=4 + 3 * min(max(trial.speedup, 0.5), 4),
            markerfacecolor=KEPT if trial.on_front else "none",
            markeredgecolor=KEPT if trial.on_front else MUTED,
            alpha=0.85,
        )
        if trial.number == chosen:
            axes.plot([x], [y], "s", markersize=16, markerfacecolor="none", markeredgecolor=INK)
            _note(axes, f"chosen, {trial.speedup:.2f} x as fast", (x, y), (10, 8), color=INK)
    axes.axhline(max_loss, color=MUTED, linewidth=1, linestyle=(0, (5, 3)))
    axes.set_xlim(0, 1.1 * max((trial.bytes for trial in shown), default=1) / 1e3)
    axes.set_xlabel("packed file (kB)")
    axes.set_ylabel(f"change of {metric} on held-out rows")
    return figure


@styled
def sensitivity_bars(rows: Sequence[Sensitivity], metric: str, most: int = 24) -> Figure:
    """Plot how much worse the metric gets if one weight alone is coarse, the most sensitive weight on top."""
    rows = [row for row in rows if np.isfinite(row.change)][:most]
    figure, axes = _figure(5.6, 0.9 + 0.22 * max(1, len(rows)))
    axes.barh(range(len(rows)), [row.change for row in rows], height=0.62, color=KEPT)
    axes.set_yticks(range(len(rows)), [row.name for row in rows], fontsize=7)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel(f"change of {metric}")
    return figure


@styled
def confusion_matrix(counts: npt.NDArray[np.integer], names: Sequence[str]) -> Figure:
    """Plot (true, predicted) counts as percentages of each row; the label of a row has its count."""
    classes = len(names)
    totals = counts.sum(axis=1, keepdims=True)
    shares = counts / np.maximum(totals, 1)
    side = 2.1 + 0.34 * classes
    figure, axes = _figure(side, side - 0.3)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, interpolation="nearest", aspect="equal")
    for row, column in zip(*np.nonzero(shares >= 0.005), strict=True):
        share = shares[row, column]
        axes.text(
            column,
            row,
            f"{100 * share:.0f}",
            ha="center",
            va="center",
            fontsize=7.5,
            color="white" if share > 0.55 else INK,
        )
    axes.set_xticks(range(classes), names, rotation=55, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(classes), [f"{name} ({total:,})" for name, total in zip(names, totals[:, 0], strict=True)])
    axes.grid(visible=False)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class (test objects)")
    return figure


@styled
def reliability_curve(curves: dict[str, Reliability]) -> Figure:
    """Plot the share of correct answers against the confidence, a line for each way of counting; below, the number of
    samples in each bin."""
    figure = Figure(figsize=(4.6, 4.8), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    upper.plot([0, 1], [0, 1], color=MUTED, linewidth=1, linestyle=(0, (5, 3)))
    for (label, curve), colour, marker, shift in zip(curves.items(), (KEPT, LOST), "os", (-0.004, 0.004), strict=False):
        shown = curve.counts >= ENOUGH
        confidence, accuracy, low, high = (
            values[shown] for values in (curve.confidence, curve.accuracy, curve.low, curve.high)
        )
        spread = np.clip([accuracy - low, high - accuracy], 0, None)
        upper.errorbar(
            confidence + shift,
            accuracy,
            yerr=spread,
            fmt=f"-{marker}",
            color=colour,
            markersize=4.5,
            linewidth=1.3,
            elinewidth=1,
            label=f"{label} (error {curve.error:.3f})",
        )
    counts = next(iter(curves.values())).counts
    edges = np.linspace(0, 1, len(counts) + 1)
    lower.bar(edges[:-1], counts, width=np.diff(edges), align="edge", color=BEFORE, edgecolor="white", linewidth=0.8)
    for left, count in zip(edges, counts, strict=False):
        lower.text(left + 0.5 / len(counts), count, f"{count:,}", ha="center", va="bottom", fontsize=7, color=MUTED)
    lower.set_ylim(0, 1.25 * max(counts.max(), 1))
    lower.set_ylabel("objects")
    lower.set_xlabel("probability given to the best class")
    upper.set_xlim(0, 1)
    upper.set_ylim(0, 1)
    upper.set_ylabel("share of that class")
    upper.legend(loc="lower right")
    return figure


@styled
def loss_by_days(days: Sequence[int], losses: Float, whole: float, guess: float, metric: str) -> Figure:
    """Plot (seeds, days) losses of light curves that were cut off some days after the first detection: the mean and the
    range of the seeds."""
    figure, axes = _figure(5.6, 3.5)
    positions = np.log1p(np.asarray(days, dtype=np.float64))  # day 0 has a position, and early days have space
    mean = losses.mean(axis=0)
    if len(losses) > 1:
        axes.fill_between(positions, losses.min(axis=0), losses.max(axis=0), color=KEPT, alpha=0.18, linewidth=0)
    axes.plot(positions, mean, "-o", color=KEPT, linewidth=1.6, markersize=4.5)
    for height, text in ((guess, "all classes alike"), (whole, "whole light curves")):
        axes.axhline(height, color=MUTED, linewidth=1, linestyle=(0, (5, 3)))
        _note(axes, f"{text}: {height:.3f}", (0.99, height), (0, 3), ha="right", xycoords=axes.get_yaxis_transform())
    axes.set_xticks(positions, [str(day) for day in days])
    axes.set_ylim(0, 1.12 * max(guess, float(losses.max())))
    axes.set_xlabel("days since first detection")
    axes.set_ylabel(metric)
    return figure


def confusion(probabilities: Float, labels: Labels) -> npt.NDArray[np.int64]:
    """Return (true, predicted) counts of the most probable class."""
    check(probabilities, labels)
    classes = probabilities.shape[1]
    flat = np.bincount(labels * classes + probabilities.argmax(axis=1), minlength=classes * classes)
    return flat.reshape(classes, classes).astype(np.int64)


def reliability(probabilities: Float, labels: Labels, *, bins: int = 10, balanced: bool = False) -> Reliability:
    """Compare confidence with accuracy. `balanced` weights samples so that every class counts equally: a model trained
    that way states probabilities for such a population, not for one with the data's own shares."""
    check(probabilities, labels)
    confidence = probabilities.max(axis=1).astype(np.float64)
    correct = probabilities.argmax(axis=1) == labels
    weight = 1 / np.bincount(labels)[labels] if balanced else np.ones(len(labels))
    bin_of = np.minimum((confidence * bins).astype(np.int64), bins - 1)
    counts = np.bincount(bin_of, minlength=bins)
    total, squares, right, stated = (
        np.bincount(bin_of, weights=values, minlength=bins)
        for values in (weight, weight**2, weight * correct, weight * confidence)
    )
    with np.errstate(invalid="ignore", divide="ignore"):
        share, mean, size = right / total, stated / total, total**2 / squares  # size: Kish's effective number
        z = 1.96  # Wilson 1927: the interval stays inside 0 to 1
        middle = (share + z**2 / (2 * size)) / (1 + z**2 / size)
        half = z / (1 + z**2 / size) * np.sqrt(share * (1 - share) / size + z**2 / (4 * size**2))
    gaps = np.where(counts > 0, np.abs(np.nan_to_num(share) - np.nan_to_num(mean)), 0)
    return Reliability(mean, share, middle - half, middle + half, counts, float((gaps * total).sum() / total.sum()))


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def _note(axes: Axes, text: str, point: tuple[float, float], shift: tuple[float, float], **options: Any) -> None:
    """Write text `shift` points away from a point in data coordinates, or in those of `xycoords`."""
    axes.annotate(text, point, shift, textcoords="offset points", **{"fontsize": 8, "color": MUTED, **options})
