"""Light curves to the network's inputs. The one function that training and serving share, so that they cannot drift
apart: its parameters travel in the bundle's `preprocessing`.

Differences from the published preprocessing, on purpose: scaling is one constant per band for all objects (served per
object, amplitude is lost), an arcsinh tames the five decades of flux, and what the even grid hides is given as numbers
beside it: how long the light curve is, how significant its best point, how fast it varies.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from alert_broker.gaussian_process import GaussianProcess, Status
from alert_broker.lightcurve import LightCurves
from alert_broker.work_budget import Budget
from edgekit.errors import EdgekitError, unknown

ID = "light-curve-gp/1"
CONTEXT = ("log_span", "log_signal_to_noise", "log_time_scale", "redshift", "redshift_error")
# where the logarithms are 0: typical values, so that the network sees numbers of order one
SPAN_DAYS, SIGNAL_TO_NOISE, TIME_SCALE_DAYS = 100.0, 10.0, 10.0


@dataclass(frozen=True, slots=True)
class Features:
    """light_curve: (objects, grid_points, bands) float32; context: (objects, numbers) float32, no columns if the model
    takes none; status: (objects,) of `gaussian_process.Status`, and where it is not OK the row is zeros."""

    light_curve: npt.NDArray[np.float32]
    context: npt.NDArray[np.float32]
    status: npt.NDArray[np.int64]

    def inputs(self) -> dict[str, npt.NDArray[np.float32]]:
        """The arrays by the names of the model's inputs."""
        return {"light_curve": self.light_curve} | ({"context": self.context} if self.context.shape[1] else {})


@dataclass(frozen=True, slots=True)
class LightCurveFeatures:
    """What turns light curves into inputs."""

    bands: tuple[str, ...]  # whose points the Gaussian process is fitted to
    wavelengths: tuple[float, ...]  # of `bands`, in angstrom: one survey's filters
    scale: tuple[float, ...]  # FLUXCAL that the arcsinh bends at, per channel: twice the training set's median |flux|
    context: tuple[str, ...] = ("log_span",)
    grid_points: int = 100
    margin_days: float = 50.0  # points farther than this from every detection say nothing about the event
    channels: tuple[str, ...] = ()  # bands that the network sees; () for all

    def __post_init__(self) -> None:
        if len(self.wavelengths) != len(self.bands):
            raise EdgekitError(
                f"preprocessing: {len(self.wavelengths)} wavelengths for the bands {', '.join(self.bands)}"
            )
        for name in self.channels:
            if name not in self.bands:
                raise unknown("channel", name, self.bands)
        if len(self.scale) != len(self.seen):
            raise EdgekitError(f"preprocessing: {len(self.scale)} scales for the channels {', '.join(self.seen)}")
        for name in self.context:
            if name not in CONTEXT:
                raise unknown("context number", name, CONTEXT)

    @property
    def seen(self) -> tuple[str, ...]:
        """The bands that the network sees, in its order."""
        return self.channels or self.bands

    @classmethod
    def from_bundle(cls, preprocessing: Mapping[str, Any] | None, source: str) -> LightCurveFeatures:
        """The parameters that a bundle's manifest holds."""
        if preprocessing is None or preprocessing.get("id") != ID:
            got = preprocessing and preprocessing.get("id")
            raise EdgekitError(f"{source}: preprocessing {got!r}; classifying alerts needs a bundle with {ID!r}")
        given = {name: value for name, value in preprocessing.items() if name != "id"}
        values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in given.items()}
        for name in values:
            if name not in (names := [item.name for item in fields(cls)]):
                raise unknown("preprocessing parameter", name, names, where=source)
        return cls(**values)

    def to_bundle(self) -> dict[str, Any]:
        return {"id": ID} | {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self).items()}

    def select(self, curves: LightCurves) -> LightCurves:
        """The points that count: measurements in the model's bands, within the margin of the first and last detection
        anywhere. What is not finite, or has no positive error, must not stretch the span that the grid covers."""
        index = np.array([self.bands.index(band) if band in self.bands else -1 for band in curves.bands], dtype=np.int8)
        measured = np.isfinite(curves.time) & np.isfinite(curves.flux) & np.isfinite(curves.flux_error)
        known = curves.where(measured & (curves.flux_error > 0) & (index[curves.band] >= 0))
        mine = LightCurves(
            self.bands, known.offsets, known.time, index[known.band], known.flux, known.flux_error, known.detected
        )
        first = np.full(len(mine), np.inf)
        last = np.full(len(mine), -np.inf)
        owner = mine.object_of_point
        np.minimum.at(first, owner[mine.detected], mine.time[mine.detected])
        np.maximum.at(last, owner[mine.detected], mine.time[mine.detected])
        undetected = first > last  # forced photometry alone: nothing to trim to
        low = np.where(undetected, -np.inf, first - self.margin_days)[owner]
        high = np.where(undetected, np.inf, last + self.margin_days)[owner]
        return mine.where((mine.time >= low) & (mine.time <= high))

    def __call__(
        self,
        curves: LightCurves,
        *,
        redshift: npt.NDArray[np.floating] | None = None,
        threads: int | None = None,
        budget: Budget | None = None,
    ) -> Features:
        """Inputs of the network for every object; redshift: (objects, 2), photometric redshift and its error; budget:
        of the Gaussian process."""
        chosen = self.select(curves)
        process = GaussianProcess(self.wavelengths, grid_points=self.grid_points)
        seen = [self.bands.index(band) for band in self.seen]
        result = process.interpolate(chosen, bands=seen, threads=threads, budget=budget)
        light_curve = np.arcsinh(result.mean / np.array(self.scale)).astype(np.float32)
        status = result.fit.status
        visible = np.isin(chosen.band, seen)
        # a light curve without a point in any channel would be a guess from its other colours
        status[np.bincount(chosen.object_of_point[visible], minlength=len(chosen)) == 0] = Status.NO_POINTS
        empty = (status == Status.NO_POINTS) | (status == Status.NO_FLUX)
        light_curve[empty] = 0.0
        columns = {
            "log_span": np.log10((_span(chosen) + 1.0) / SPAN_DAYS),
            "log_signal_to_noise": np.log10(_signal_to_noise(chosen) / SIGNAL_TO_NOISE),
            "log_time_scale": np.where(
                np.isfinite(fitted := result.fit.log_metric), fitted / (2 * np.log(10)) - np.log10(TIME_SCALE_DAYS), 0.0
            ),
        }
        if redshift is not None:
            columns |= {"redshift": np.log1p(redshift[:, 0]), "redshift_error": redshift[:, 1]}
        for name in self.context:
            if name not in columns:
                raise EdgekitError(
                    f"the model needs a {name}, which these light curves come without; use a model without redshift"
                )
        context = np.empty((len(curves), len(self.context)), dtype=np.float32)
        for number, name in enumerate(self.context):
            context[:, number] = columns[name]
        return Features(light_curve, context, status)


def _span(curves: LightCurves) -> npt.NDArray[np.float64]:
    """(objects,) days from first to last point, 0 without points."""
    span = np.zeros(len(curves))
    filled = curves.points > 0
    span[filled] = curves.time[curves.offsets[1:][filled] - 1] - curves.time[curves.offsets[:-1][filled]]
    return span


def _signal_to_noise(curves: LightCurves) -> npt.NDArray[np.float64]:
    """(objects,) largest |flux| / error of a point, at least 0.001."""
    best = np.full(len(curves), 1e-3)
    np.maximum.at(best, curves.object_of_point, np.abs(curves.flux) / curves.flux_error)
    return best
