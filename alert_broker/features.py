"""Light curves to the network's inputs. The one function that training and serving share, so that they cannot drift
apart: its parameters travel in the bundle's `preprocessing`.

Differences from the published preprocessing, on purpose: scaling is one constant per band for all objects (served per
object, amplitude is lost), an arcsinh tames the five decades of flux, and the length of the light curve, which the even
grid hides, is given as a number beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from alert_broker.gaussian_process import GaussianProcess, Status
from alert_broker.lightcurve import LightCurves
from edgekit.errors import EdgekitError, unknown

ID = "light-curve-gp/1"
CONTEXT = ("log_span", "redshift", "redshift_error")
SPAN_UNIT_DAYS = 100.0  # a light curve of this length has log_span about 0


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

    bands: tuple[str, ...]
    wavelengths: tuple[float, ...]  # of `bands`, in angstrom: one survey's filters
    scale: tuple[float, ...]  # FLUXCAL that the arcsinh bends at, per band: twice the training set's median |flux|
    context: tuple[str, ...] = ("log_span",)
    grid_points: int = 100
    margin_days: float = 50.0  # points farther than this from every detection say nothing about the event

    def __post_init__(self) -> None:
        if not len(self.bands) == len(self.wavelengths) == len(self.scale):
            sizes = f"{len(self.wavelengths)} wavelengths and {len(self.scale)} scales"
            raise EdgekitError(f"preprocessing: {sizes} for the bands {', '.join(self.bands)}; expected one of each")
        for name in self.context:
            if name not in CONTEXT:
                raise unknown("context number", name, CONTEXT)

    @classmethod
    def from_bundle(cls, preprocessing: Mapping[str, Any] | None, source: str) -> LightCurveFeatures:
        """The parameters that a bundle's manifest holds."""
        if preprocessing is None or preprocessing.get("id") != ID:
            got = preprocessing and preprocessing.get("id")
            raise EdgekitError(f"{source}: preprocessing {got!r}; classifying alerts needs a bundle with {ID!r}")
        values = {name: tuple(v) if isinstance(v, list) else v for name, v in preprocessing.items() if name != "id"}
        for name in values:
            if name not in (names := [item.name for item in fields(cls)]):
                raise unknown("preprocessing parameter", name, names, where=source)
        return cls(**values)

    def to_bundle(self) -> dict[str, Any]:
        return {"id": ID} | {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self).items()}

    def select(self, curves: LightCurves) -> LightCurves:
        """The points that count: in the model's bands, within the margin of the first and last detection there."""
        index = np.array([self.bands.index(band) if band in self.bands else -1 for band in curves.bands], dtype=np.int8)
        known = curves.where(index[curves.band] >= 0)
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
    ) -> Features:
        """Inputs of the network for every object; redshift: (objects, 2), photometric redshift and its error."""
        chosen = self.select(curves)
        process = GaussianProcess(self.wavelengths, grid_points=self.grid_points)
        result = process.interpolate(chosen, threads=threads)
        light_curve = np.arcsinh(result.mean / np.array(self.scale)).astype(np.float32)
        status = result.fit.status
        light_curve[(status == Status.NO_POINTS) | (status == Status.NO_FLUX)] = 0.0
        columns = {"log_span": np.log10((_span(chosen) + 1.0) / SPAN_UNIT_DAYS)}
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
