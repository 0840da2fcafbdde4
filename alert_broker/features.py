"""Compute the network's inputs from light curves. Training and serving call the same function, so their features cannot
differ; the function's parameters are stored in the bundle's `preprocessing`.

It differs from the published preprocessing on purpose. The scale is one constant per band for all objects, because a
scale per object loses the amplitude. An arcsinh compresses the five decades of flux. And the context numbers tell what
the even time grid hides: how long the light curve is, how significant its best point is, and how fast it varies.
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
# typical values, at which the logarithms are 0, so that the network sees numbers of order one
SPAN_DAYS, SIGNAL_TO_NOISE, TIME_SCALE_DAYS = 100.0, 10.0, 10.0


@dataclass(frozen=True, slots=True)
class Features:
    """light_curve: (objects, grid_points, bands) float32; context: (objects, numbers) float32, without columns if the
    model takes none; status: (objects,) of `gaussian_process.Status`. If nothing was fitted (NO_POINTS, NO_FLUX,
    OVERFLOW, OVER_TIME), the object's light curve is zeros."""

    light_curve: npt.NDArray[np.float32]
    context: npt.NDArray[np.float32]
    status: npt.NDArray[np.int64]

    def inputs(self) -> dict[str, npt.NDArray[np.float32]]:
        """Return the arrays by the names of the model's inputs."""
        return {"light_curve": self.light_curve} | ({"context": self.context} if self.context.shape[1] else {})


@dataclass(frozen=True, slots=True)
class LightCurveFeatures:
    """The parameters that turn light curves into the network's inputs."""

    bands: tuple[str, ...]  # the Gaussian process is fitted to the points of these bands
    wavelengths: tuple[float, ...]  # of `bands`, in angstrom: the filters of one survey
    # per channel, the FLUXCAL at which the arcsinh bends: twice the training set's median |flux|
    scale: tuple[float, ...]
    context: tuple[str, ...] = ("log_span",)
    grid_points: int = 100
    margin_days: float = 50.0  # a point farther than this from every detection says nothing about the event
    channels: tuple[str, ...] = ()  # bands that the network sees; () for all bands

    def __post_init__(self) -> None:
        if len(self.wavelengths) != len(self.bands):
            raise EdgekitError(
                f"preprocessing: got {len(self.wavelengths)} wavelengths for the bands {', '.join(self.bands)}; "
                "expected one for each band"
            )
        for name in self.channels:
            if name not in self.bands:
                raise unknown("channel", name, self.bands)
        if len(self.scale) != len(self.seen):
            raise EdgekitError(
                f"preprocessing: got {len(self.scale)} scales for the channels {', '.join(self.seen)}; "
                "expected one for each channel"
            )
        for name in self.context:
            if name not in CONTEXT:
                raise unknown("context number", name, CONTEXT)

    @property
    def seen(self) -> tuple[str, ...]:
        """The bands that the network sees, in its order."""
        return self.channels or self.bands

    @classmethod
    def from_bundle(cls, preprocessing: Mapping[str, Any] | None, source: str) -> LightCurveFeatures:
        """Return the parameters that a bundle's manifest holds. Raises EdgekitError if the manifest has other
        preprocessing."""
        if preprocessing is None or preprocessing.get("id") != ID:
            got = preprocessing and preprocessing.get("id")
            raise EdgekitError(
                f"{source}: the preprocessing is {got!r}; alerts need a bundle whose preprocessing is {ID!r}"
            )
        given = {name: value for name, value in preprocessing.items() if name != "id"}
        values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in given.items()}
        for name in values:
            if name not in (names := [item.name for item in fields(cls)]):
                raise unknown("preprocessing parameter", name, names, where=source)
        return cls(**values)

    def to_bundle(self) -> dict[str, Any]:
        return {"id": ID} | {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self).items()}

    def select(self, curves: LightCurves) -> LightCurves:
        """Return the usable points: measurements in the model's bands, from `margin_days` before the first detection in
        any band to `margin_days` after the last one. Points that are not finite, or that have no positive error, are
        left out, so that they do not stretch the time that the grid covers."""
        index = np.array([self.bands.index(band) if band in self.bands else -1 for band in curves.bands], dtype=np.int8)
        measured = np.isfinite(curves.time) & np.isfinite(curves.flux) & np.isfinite(curves.flux_error)
        known = curves.where(measured & (curves.flux_error > 0) & (index[curves.band] >= 0))
        chosen = LightCurves(
            self.bands, known.offsets, known.time, index[known.band], known.flux, known.flux_error, known.detected
        )
        first = np.full(len(chosen), np.inf)
        last = np.full(len(chosen), -np.inf)
        owner = chosen.object_of_point
        np.minimum.at(first, owner[chosen.detected], chosen.time[chosen.detected])
        np.maximum.at(last, owner[chosen.detected], chosen.time[chosen.detected])
        undetected = first > last  # a light curve of forced photometry alone is not cut
        low = np.where(undetected, -np.inf, first - self.margin_days)[owner]
        high = np.where(undetected, np.inf, last + self.margin_days)[owner]
        return chosen.where((chosen.time >= low) & (chosen.time <= high))

    def __call__(
        self,
        curves: LightCurves,
        *,
        redshift: npt.NDArray[np.floating] | None = None,
        threads: int | None = None,
        budget: Budget | None = None,
    ) -> Features:
        """Return the network's inputs for every object. redshift: (objects, 2), photometric redshift and its error;
        budget: limits the time of the Gaussian process."""
        chosen = self.select(curves)
        process = GaussianProcess(self.wavelengths, grid_points=self.grid_points)
        seen = [self.bands.index(band) for band in self.seen]
        result = process.interpolate(chosen, bands=seen, threads=threads, budget=budget)
        light_curve = np.arcsinh(result.mean / np.array(self.scale)).astype(np.float32)
        status = result.fit.status
        visible = np.isin(chosen.band, seen)
        # Without a point in any channel, the light curve would be a guess from the other bands.
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
                    f"the model needs {name}, which these light curves do not have; use a model without redshift"
                )
        context = np.empty((len(curves), len(self.context)), dtype=np.float32)
        for number, name in enumerate(self.context):
            context[:, number] = columns[name]
        return Features(light_curve, context, status)


def _span(curves: LightCurves) -> npt.NDArray[np.float64]:
    """Return (objects,) the days from the first to the last point, 0 without points."""
    span = np.zeros(len(curves))
    filled = curves.points > 0
    span[filled] = curves.time[curves.offsets[1:][filled] - 1] - curves.time[curves.offsets[:-1][filled]]
    return span


def _signal_to_noise(curves: LightCurves) -> npt.NDArray[np.float64]:
    """Return (objects,) the largest |flux| / error of a point, at least 0.001."""
    best = np.full(len(curves), 1e-3)
    np.maximum.at(best, curves.object_of_point, np.abs(curves.flux) / curves.flux_error)
    return best
