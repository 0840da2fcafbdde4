"""The Gaussian process of one light curve at any time and wavelength, with its uncertainty.

The compiled fit finds the kernel's parameters; this module evaluates the process between the filters of the survey,
which a source at another redshift needs (Boone 2019, section 3.1).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
from scipy.linalg import cho_factor, cho_solve, solve_triangular

from alert_broker.gaussian_process import KERNEL_DIMENSIONS, GaussianProcess

Floats = npt.NDArray[np.float64]

LENGTH_SCALE_ANGSTROM = GaussianProcess((0.0,)).length_scale_angstrom
FLOOR = 1e-10  # variance that every point has, relative to the kernel's: repeated points keep the matrix regular


@dataclass(frozen=True)
class Surface:
    """Points of one object, (points,) each, and the kernel's parameters as `gaussian_process.Fit` has them."""

    time: Floats
    wavelength: Floats
    flux: Floats
    flux_error: Floats
    log_amplitude: float
    log_metric: float

    @property
    def variance(self) -> float:
        """The variance of the process far from every point."""
        return float(KERNEL_DIMENSIONS * np.exp(self.log_amplitude))

    def _covariance(self, time: Floats, wavelength: Floats, other_time: Floats, other_wavelength: Floats) -> Floats:
        """Return the Matern-3/2 kernel (Rasmussen & Williams 2006, eq. 4.17)."""
        square = (time[:, None] - other_time) ** 2 * np.exp(-self.log_metric)
        square += ((wavelength[:, None] - other_wavelength) / LENGTH_SCALE_ANGSTROM) ** 2
        distance = np.sqrt(3.0 * square)
        return np.asarray(self.variance * (1.0 + distance) * np.exp(-distance))

    @cached_property
    def _factor(self) -> tuple[tuple[Floats, bool], Floats]:
        covariance = self._covariance(self.time, self.wavelength, self.time, self.wavelength)
        covariance[np.diag_indices_from(covariance)] += self.flux_error**2 + FLOOR * self.variance
        factor = cho_factor(covariance, lower=True, check_finite=False)
        return factor, cho_solve(factor, self.flux, check_finite=False)

    def __call__(self, time: Floats, wavelength: Floats) -> tuple[Floats, Floats]:
        """Return the mean and the standard deviation at (points,) times and wavelengths."""
        (lower, _), weights = self._factor
        across = self._covariance(self.time, self.wavelength, time, wavelength)
        known = solve_triangular(lower, across, lower=True, check_finite=False)
        left = self.variance - np.einsum("ij,ij->j", known, known)
        return across.T @ weights, np.sqrt(np.maximum(left, 0.0))
