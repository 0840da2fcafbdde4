"""Draw light curves of the population that a survey sends, from those of a bright sample with known redshifts.

For each new light curve of an extragalactic class, a redshift is drawn from the class's rate and a peak magnitude from
its luminosity function. A source of the sample that is near in both is moved there, observed with a history of visits,
and kept if the survey would have detected it. If the sample has no such source, another redshift is drawn. So faint and
distant sources are as frequent as the survey finds them, and not as they are in the sample. Every light curve has a
random generator of its own: seed, class and number decide all.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from alert_broker.augment.cosmology import FIDUCIAL
from alert_broker.augment.galactic import observe_again
from alert_broker.augment.photometric_redshift import PhotometricRedshifts
from alert_broker.augment.population import TARGETS, Target
from alert_broker.augment.redshift import Move
from alert_broker.augment.surface import Surface
from alert_broker.augment.visits import Histories, History, measured_efficiency
from alert_broker.degrade import first_detection
from alert_broker.gaussian_process import GaussianProcess, Status
from alert_broker.lightcurve import FLUX_ZERO_POINT, LightCurves
from alert_broker.plasticc import CLASSES, Plasticc

Floats = npt.NDArray[np.float64]

NEAREST, FARTHEST = 0.9, 1.5  # a source moves to a redshift of at least 0.9 z0, and to 1 + z of at most 1.5 (1 + z0)
NEAR_MAGNITUDES = 0.3  # a source stands for luminosities this near to its own
MARGIN_DAYS = 60.0  # a transient has no flux this long before its first and after its last detection
DARK_DAYS = 20.0  # a transient was dark outside its points if they reach this far beyond its detections
MOST_UNKNOWN = 0.3  # points are left out at which the process knows less than this share of its own spread
FAINTEST = 3.0  # a source whose peak is below this many errors of the median visit in every band is not detected
TWO_DETECTIONS_DAYS = 1.0 / 48.0  # PLAsTiCC: two detections, more than 30 minutes apart
MOST_ATTEMPTS = 20_000
FACTORED = 256  # processes that stay in memory, some 0.2 MB each
STEADY = frozenset({16, 53, 65, 88, 92})  # classes that vary all the time, or too fast for a Gaussian process
RE_OBSERVED = frozenset({16, 53, 65, 92})  # galactic ones among them, whose points stay where they are
BLUE_ANGSTROM = 4400.0  # B, in which the luminosity functions are given


@dataclass(frozen=True, slots=True)
class Augmented:
    """curves, (objects,) each with its label and photometric redshift as in `Plasticc`; redshift: the true one;
    source: position of the original in the catalogue; object_id: of the original."""

    curves: LightCurves
    label: npt.NDArray[np.int64]
    photometric: Floats
    redshift: Floats
    source: npt.NDArray[np.int64]
    object_id: npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Catalogue:
    """Sources that can be moved: light curves without a transient's empty seasons, and what the fit says of them.

    peak_time: (sources,) of the brightest point of the process; peak_flux: (sources, bands); magnitude: absolute, in B,
    or NaN if it is unknown or the source is in our Galaxy; dark: (sources, 2) whether the points show that a transient
    was dark before its first and after its last detection, and not only that the season began or ended.
    """

    curves: LightCurves
    wavelengths: tuple[float, ...]
    label: npt.NDArray[np.int64]
    redshift: Floats
    object_id: npt.NDArray[np.int64]
    log_amplitude: Floats
    log_metric: Floats
    peak_time: Floats
    peak_flux: Floats
    magnitude: Floats
    dark: npt.NDArray[np.bool_]
    hosts: PhotometricRedshifts
    _surfaces: dict[int, Surface] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, data: Plasticc, wavelengths: tuple[float, ...], threads: int | None = None) -> Catalogue:
        curves = _near_detections(data.curves, np.isin(data.label, _labels(STEADY)))
        found = GaussianProcess(wavelengths).interpolate(curves, threads=threads)
        mean, last = found.mean, np.maximum(curves.offsets[1:] - 1, 0)
        when = mean.max(axis=2).argmax(axis=1)
        first_time, last_time = curves.time[curves.offsets[:-1]], curves.time[last]
        peak_time = first_time + (last_time - first_time) * when / (mean.shape[1] - 1)
        log_amplitude = np.where(found.fit.status == Status.OK, found.fit.log_amplitude, np.nan)
        magnitude = _absolute_magnitudes(mean, wavelengths, data.spectroscopic)
        return cls(
            curves,
            wavelengths,
            data.label,
            data.spectroscopic,
            data.object_id,
            log_amplitude,
            found.fit.log_metric,
            peak_time,
            mean.max(axis=1),
            magnitude,
            _dark(curves),
            PhotometricRedshifts.of(data.spectroscopic, data.redshift),
        )

    def efficiency(self, most: int = 400) -> tuple[Floats, Floats]:
        """Return noise-free |flux| / error, and the share of the survey's points that were detected there: from the
        process of the best measured transients. PLAsTiCC decides on the noise-free flux: of 352 points without a source
        that noise lifts to 3 to 4 errors, none is a detection."""
        owner = self.curves.object_of_point
        found = np.bincount(owner[self.curves.detected], minlength=len(self.curves))
        moving = ~np.isin(self.label, _labels(STEADY)) & np.isfinite(self.log_amplitude)
        chosen = np.argsort(np.where(moving, -found, 0), kind="stable")[:most]
        parts = []
        for source in chosen[moving[chosen]]:
            surface = self.surface(int(source))
            mean, _ = surface(surface.time, surface.wavelength)
            parts.append(np.abs(mean) / surface.flux_error)
        points = self.curves.take(chosen[moving[chosen]])
        return measured_efficiency(np.concatenate(parts), points.detected)

    def surface(self, source: int) -> Surface:
        """Return the process of a source; the last ones stay factored, because a rare class has few sources."""
        if source not in self._surfaces:
            if len(self._surfaces) >= FACTORED:
                self._surfaces.clear()
            self._surfaces[source] = self._new_surface(source)
        return self._surfaces[source]

    def _new_surface(self, source: int) -> Surface:
        rows = slice(self.curves.offsets[source], self.curves.offsets[source + 1])
        return Surface(
            self.curves.time[rows],
            np.array(self.wavelengths)[self.curves.band[rows]],
            self.curves.flux[rows],
            self.curves.flux_error[rows],
            float(self.log_amplitude[source]),
            float(self.log_metric[source]),
        )


class Sources:
    """The sources of one class, in order of redshift, from which new light curves are drawn."""

    def __init__(self, catalogue: Catalogue, label: int) -> None:
        self.identifier = sorted(CLASSES)[label]
        usable = np.flatnonzero((catalogue.label == label) & np.isfinite(catalogue.log_amplitude))
        self.target: Target | None = TARGETS.get(self.identifier)
        if self.target is not None:
            usable = usable[np.isfinite(catalogue.magnitude[usable])]
        self.rows = usable[np.argsort(catalogue.redshift[usable], kind="stable")]
        self.redshift, self.magnitude = catalogue.redshift[self.rows], catalogue.magnitude[self.rows]
        self.whole = np.asarray(catalogue.dark[self.rows].all(axis=1))
        if self.target is not None and len(self.rows):
            self.table = self.target.distribution(FARTHEST * (1 + self.redshift[-1]) - 1)

    def draw(self, rng: np.random.Generator) -> tuple[int, float] | None:
        """Return a source and its new redshift; None if no source is near what was drawn."""
        if self.target is None:
            return int(rng.choice(self.rows)), 0.0
        redshift = float(np.interp(rng.random(), *self.table))
        magnitude = self.target.magnitude(rng)
        if magnitude is None:
            magnitude = float(rng.choice(self.magnitude))
        low, high = np.searchsorted(self.redshift, [(1 + redshift) / FARTHEST - 1, redshift / NEAREST])
        near = np.flatnonzero(np.abs(self.magnitude[low:high] - magnitude) <= NEAR_MAGNITUDES)
        whole = near[self.whole[low:high][near]]  # the season of a source can end while it is bright
        near = whole if len(whole) else near
        return (int(self.rows[low + rng.choice(near)]), redshift) if len(near) else None


def augmented(
    catalogue: Catalogue, histories: Histories, sources: Sources, number: int, seed: int
) -> tuple[Augmented, int] | None:
    """Return the light curve with this number of a class, and the number of attempts that it took; None if no attempt
    was detected."""
    identifier, label = sources.identifier, sorted(CLASSES).index(sources.identifier)
    rng = np.random.Generator(np.random.Philox(key=[seed, (label << 40) + number]))
    for attempt in range(1, MOST_ATTEMPTS + 1 if len(sources.rows) else 1):
        drawn = sources.draw(rng)
        if drawn is None:
            continue
        source, redshift = drawn
        history = histories.draw(rng)
        move = Move(float(catalogue.redshift[source]), redshift)
        if not _is_bright(catalogue, source, move, history):
            continue
        if identifier in RE_OBSERVED:
            one, signal = _observe_star(catalogue, source, history, rng)
        else:
            one, signal = observe(catalogue, source, move, history, rng, steady=identifier in STEADY)
        found = detected(one, signal, histories, rng)
        if found is not None:
            host = catalogue.hosts.draw(redshift, rng) if redshift > 0 else (0.0, 0.0)
            numbers = np.array([label]), np.array([host]), np.array([redshift]), np.array([source])
            return Augmented(found, *numbers, catalogue.object_id[[source]]), attempt
    return None


def observe(
    catalogue: Catalogue,
    source: int,
    move: Move,
    history: History,
    rng: np.random.Generator,
    *,
    steady: bool = False,
    peak_time: float | None = None,
) -> tuple[LightCurves, Floats]:
    """Return the source as the history's visits see it after the move, without detections, and (points,) its noise-free
    |flux| / error. peak_time: of the new observer; by default it is drawn from the time of the visits."""
    surface = catalogue.surface(source)
    first, last = surface.time[0], surface.time[-1]
    old_peak = float(catalogue.peak_time[source])
    if peak_time is None:
        peak_time = float(rng.uniform(history.time[0], history.time[-1]))
    when = move.old_time(history.time, peak_time, old_peak)
    seen = (when >= first) & (when <= last)
    flux, unknown = np.zeros(len(when)), np.zeros(len(when))
    colour = move.old_wavelength(history.wavelengths[history.band])
    if seen.any():
        flux[seen], unknown[seen] = surface(when[seen], colour[seen])
    before, after = (False, False) if steady else catalogue.dark[source]
    kept = (unknown <= MOST_UNKNOWN * np.sqrt(surface.variance)) & (
        seen | ((when < first) & before) | ((when > last) & after)
    )
    flux, unknown, sky = move.flux * flux[kept], move.flux * unknown[kept], history.sky[kept]
    noise = np.sqrt(sky**2 + np.maximum(flux, 0.0) / history.electrons[kept])
    measured = flux + noise * rng.standard_normal(len(flux))
    one = _one(history.bands, history.time[kept], history.band[kept], measured, np.hypot(noise, unknown))
    return one, np.abs(flux) / one.flux_error


def _observe_star(
    catalogue: Catalogue, source: int, history: History, rng: np.random.Generator
) -> tuple[LightCurves, Floats]:
    time, band, flux, error, before = observe_again(catalogue.curves.take([source]), history, rng)
    return _one(history.bands, time, band, flux, error), np.abs(before) / error


def _one(bands: tuple[str, ...], time: Floats, band: npt.NDArray[np.int8], flux: Floats, error: Floats) -> LightCurves:
    nothing = np.zeros(len(time), np.bool_)
    return LightCurves(bands, np.array([0, len(time)]), time, band, flux, error, nothing)


def detected(one: LightCurves, signal: Floats, histories: Histories, rng: np.random.Generator) -> LightCurves | None:
    """Return the light curve with its detections, or None if the survey would not have found the source. signal:
    (points,) the noise-free |flux| / error."""
    chance = histories.detection(signal)
    found = rng.random(len(chance)) < chance
    if not found.any() or np.ptp(one.time[found]) < TWO_DETECTIONS_DAYS:
        return None
    return LightCurves(one.bands, one.offsets, one.time, one.band, one.flux, one.flux_error, found)


def _is_bright(catalogue: Catalogue, source: int, move: Move, history: History) -> bool:
    """Return whether the source's peak reaches `FAINTEST` in a median visit of some band, judged in the sample's band
    whose light comes nearest to it."""
    for number, wavelength in enumerate(move.old_wavelength(history.wavelengths)):
        sky = history.sky[history.band == number]
        nearest = int(np.argmin(np.abs(np.array(catalogue.wavelengths) - wavelength)))
        if len(sky) and catalogue.peak_flux[source, nearest] * move.flux >= FAINTEST * float(np.median(sky)):
            return True
    return False


def _labels(identifiers: frozenset[int] | set[int]) -> list[int]:
    return [number for number, identifier in enumerate(sorted(CLASSES)) if identifier in identifiers]


def _near_detections(curves: LightCurves, steady: npt.NDArray[np.bool_]) -> LightCurves:
    """Return the points of transients within `MARGIN_DAYS` of their detections, and all points of other sources."""
    owner = curves.object_of_point
    first, last = first_detection(curves), np.full(len(curves), -np.inf)
    np.maximum.at(last, owner[curves.detected], curves.time[curves.detected])
    last = np.maximum(last, first)
    inside = (curves.time >= (first - MARGIN_DAYS)[owner]) & (curves.time <= (last + MARGIN_DAYS)[owner])
    return curves.where(inside | steady[owner])


def _dark(curves: LightCurves) -> npt.NDArray[np.bool_]:
    owner, first = curves.object_of_point, first_detection(curves)
    last = np.full(len(curves), -np.inf)
    np.maximum.at(last, owner[curves.detected], curves.time[curves.detected])
    starts, ends = curves.time[curves.offsets[:-1]], curves.time[np.maximum(curves.offsets[1:] - 1, 0)]
    return np.stack([first - starts >= DARK_DAYS, ends - last >= DARK_DAYS], axis=1)


def _absolute_magnitudes(mean: Floats, wavelengths: tuple[float, ...], redshift: Floats) -> Floats:
    """Return (objects,) the peak's absolute magnitude in the filter that is nearest to B in the source's frame."""
    rest = np.abs(np.array(wavelengths) / (1 + redshift[:, None]) - BLUE_ANGSTROM)
    nearest = rest.argmin(axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        peak = mean.max(axis=1)[np.arange(len(mean)), nearest]
        apparent = FLUX_ZERO_POINT - 2.5 * np.log10(peak)
        return np.asarray(apparent - FIDUCIAL.distance_modulus(redshift) + 2.5 * np.log10(1 + redshift))
