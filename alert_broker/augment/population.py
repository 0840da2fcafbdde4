"""The population that a survey meets: how often sources of a class occur at each redshift, and how luminous they are.

A spectroscopic sample has too many near and too many luminous sources. The targets here are volumetric rates and
bias-corrected luminosity functions from the literature. Only their shapes matter, because every class gets its own
number of light curves.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from alert_broker.augment.cosmology import FIDUCIAL, Cosmology

Floats = npt.NDArray[np.float64]
Rate = Callable[[Floats], Floats]  # events by comoving volume and time in the source's frame, at these redshifts

LOWEST_REDSHIFT, REDSHIFTS = 0.003, 4_000


def star_formation(redshift: Floats) -> Floats:
    """Madau & Dickinson 2014, eq. 15: the history that core-collapse supernovae follow."""
    return np.asarray((1 + redshift) ** 2.7 / (1 + ((1 + redshift) / 2.9) ** 5.6))


def thermonuclear(redshift: Floats) -> Floats:
    """Dilday+ 2008 below redshift 1, Hounsell+ 2018 above, as in PLAsTiCC (Kessler+ 2019, table 2)."""
    return np.asarray(np.where(redshift < 1, 2.5e-5 * (1 + redshift) ** 1.5, 9.7e-5 / np.sqrt(1 + redshift)))


def disruptions(redshift: Floats) -> Floats:
    """Kochanek 2016: tidal disruptions become rarer by a factor of 10 within 1.2 in redshift."""
    return np.asarray(10.0 ** (-5.0 * redshift / 6.0))


def constant(redshift: Floats) -> Floats:
    return np.ones_like(redshift)


@dataclass(frozen=True, slots=True)
class Target:
    """rate: by redshift; highest: the redshift beyond which a survey of LSST's depth finds no source of the class, with
    room to spare; luminosity: normal components (share, mean, standard deviation) of the peak's absolute
    magnitude in B; empty if the sample's own luminosities are kept."""

    rate: Rate
    highest: float
    luminosity: tuple[tuple[float, float, float], ...] = ()

    def distribution(self, highest: float, cosmology: Cosmology = FIDUCIAL) -> tuple[Floats, Floats]:
        """Return the cumulative distribution and its redshifts, up to `highest` or to the target's own limit: rate
        times volume over 1 + z, which is the dilation of the survey's time."""
        redshift = np.linspace(LOWEST_REDSHIFT, max(min(highest, self.highest), 2 * LOWEST_REDSHIFT), REDSHIFTS)
        density = self.rate(redshift) * cosmology.volume_element(redshift) / (1 + redshift)
        total = np.concatenate([[0.0], np.cumsum(0.5 * (density[1:] + density[:-1]))])
        return total / total[-1], redshift

    def magnitude(self, rng: np.random.Generator) -> float | None:
        """Return a peak magnitude; None if the sample's own are kept."""
        if not self.luminosity:
            return None
        shares = [share for share, _, _ in self.luminosity]
        _, mean, width = self.luminosity[rng.choice(len(shares), p=shares)]
        return float(rng.normal(mean, width))


# Peak magnitudes, as observed behind their hosts' dust: Li+ 2011 (LOSS), tables 6 and 7, for core collapse: II-P, II-L,
# IIb and IIn with their shares within SN II, and Ib and Ic; Kessler+ 2019 for Ia (SALT2 with its scatter and colours);
# Jha 2017 for Iax, Taubenberger 2017 for 91bg. By PLAsTiCC's class id; a class that is absent is galactic.
TARGETS = {
    90: Target(thermonuclear, 1.3, ((1.0, -19.05, 0.45),)),
    67: Target(thermonuclear, 0.9, ((1.0, -17.2, 0.6),)),
    52: Target(star_formation, 1.0, ((1.0, -16.8, 1.2),)),
    42: Target(
        star_formation,
        1.5,
        ((0.70, -15.66, 1.23), (0.10, -17.44, 0.64), (0.12, -16.65, 1.30), (0.08, -16.86, 1.61)),
    ),
    62: Target(star_formation, 1.1, ((0.37, -17.01, 0.41), (0.63, -16.04, 1.28))),
    95: Target(star_formation, 3.0),
    15: Target(disruptions, 2.0),
    64: Target(constant, 0.3),
    88: Target(constant, 3.0),  # the sample's luminosities are kept, so their evolution is left out
}
