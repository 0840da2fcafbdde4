"""Distances in a flat universe of matter and a cosmological constant (Hogg 1999, astro-ph/9905116)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

LIGHT_SPEED = 299_792.458  # km/s
HIGHEST_REDSHIFT, GRID = 12.0, 20_001  # steps of 1.3e-4 in ln(1 + z): the trapezoidal rule errs by 1e-8 there


@dataclass(frozen=True)
class Cosmology:
    """hubble: km/s/Mpc; matter: its density relative to the critical one. The defaults are those of PLAsTiCC."""

    hubble: float = 70.0
    matter: float = 0.3

    def expansion(self, redshift: npt.ArrayLike) -> Floats:
        """Return H(z) / H(0)."""
        grown = 1.0 + np.asarray(redshift, dtype=np.float64)
        return np.asarray(np.sqrt(self.matter * grown**3 + 1.0 - self.matter))

    @cached_property
    def _table(self) -> tuple[Floats, Floats]:
        log_grown = np.linspace(0.0, np.log1p(HIGHEST_REDSHIFT), GRID)
        redshift = np.expm1(log_grown)
        slope = np.exp(log_grown) / self.expansion(redshift)  # dz / E(z), by ln(1 + z)
        steps = 0.5 * (slope[1:] + slope[:-1]) * np.diff(log_grown)
        return log_grown, np.concatenate([[0.0], np.cumsum(steps)]) * LIGHT_SPEED / self.hubble

    def comoving_distance(self, redshift: npt.ArrayLike) -> Floats:
        """Return Mpc."""
        log_grown, distance = self._table
        return np.asarray(np.interp(np.log1p(np.asarray(redshift, dtype=np.float64)), log_grown, distance))

    def luminosity_distance(self, redshift: npt.ArrayLike) -> Floats:
        """Return Mpc."""
        return np.asarray((1.0 + np.asarray(redshift, dtype=np.float64)) * self.comoving_distance(redshift))

    def distance_modulus(self, redshift: npt.ArrayLike) -> Floats:
        """Return the difference of apparent and absolute magnitude, without K-correction."""
        return np.asarray(5.0 * np.log10(self.luminosity_distance(redshift)) + 25.0)

    def volume_element(self, redshift: npt.ArrayLike) -> Floats:
        """Return the comoving volume by redshift and solid angle, Mpc^3."""
        distance = self.comoving_distance(redshift)
        return np.asarray(LIGHT_SPEED / self.hubble * distance**2 / self.expansion(redshift))


FIDUCIAL = Cosmology()
