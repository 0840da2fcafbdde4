"""Observe a variable of our Galaxy again: at another distance, with fewer visits and the noise of another history.

Its variation can be faster than the visits, so a Gaussian process cannot tell its flux between them. The measured
points therefore stay where they are (Boone 2019, section 3.2).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from alert_broker.augment.visits import History
from alert_broker.lightcurve import LightCurves

Floats = npt.NDArray[np.float64]

FAINTER = (-0.5, 2.0)  # magnitudes: most stars of a survey are fainter than those of a spectroscopic sample
KEPT = (0.5, 1.0)  # share of the visits
BLOCK_CHANCE, BLOCK_SHARE = 0.5, 0.4  # a season can be missing, up to this share of the time


def observe_again(
    one: LightCurves, history: History, rng: np.random.Generator
) -> tuple[Floats, npt.NDArray[np.int8], Floats, Floats, Floats]:
    """Return times, positions of the history's bands, fluxes and errors of the points that are kept of one source, and
    the fluxes without the noise that was added."""
    factor = 10.0 ** (-0.4 * rng.uniform(*FAINTER))
    position = np.array([history.bands.index(name) if name in history.bands else -1 for name in one.bands])[one.band]
    most = min(1.0, 1.2 * len(history.time) / max(len(one.time), 1))  # as many visits as the new field has
    kept = (rng.random(len(one.time)) < rng.uniform(*KEPT) * most) & (position >= 0)
    if rng.random() < BLOCK_CHANCE:
        span = np.ptp(one.time)
        start = one.time[0] + rng.uniform(-BLOCK_SHARE, 1.0) * span
        kept &= (one.time < start) | (one.time > start + BLOCK_SHARE * span)
    band = position[kept].astype(np.int8)
    sky, electrons = noise_of_bands(history, band, rng)
    flux, error = one.flux[kept] * factor, one.flux_error[kept] * factor
    added = np.sqrt(np.maximum(sky**2 + np.abs(flux) / electrons - error**2, 0.0))
    return one.time[kept], band, flux + added * rng.standard_normal(len(flux)), np.hypot(error, added), flux


def noise_of_bands(history: History, band: npt.NDArray[np.int8], rng: np.random.Generator) -> tuple[Floats, Floats]:
    """Return (points,) the sky's noise and the electrons of a random visit in the same band, or of any visit if the
    history has none in it."""
    visit = rng.integers(len(history.time), size=len(band))
    for number in np.unique(band):
        rows, own = np.flatnonzero(band == number), np.flatnonzero(history.band == number)
        if len(own):
            visit[rows] = rng.choice(own, size=len(rows))
    return history.sky[visit], history.electrons[visit]
