"""Draw the photometric redshift of a host at a new redshift: the error of another host at nearly that redshift.

So outliers and biases of the survey's estimator stay as they are (Boone 2019, section 3.2).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
NEIGHBOURS = 100  # hosts nearest in redshift, of which one is drawn


@dataclass(frozen=True, slots=True)
class PhotometricRedshifts:
    """Hosts with a spectroscopic redshift, ascending; their photometric redshifts and errors, (hosts,) each."""

    spectroscopic: Floats
    photometric: Floats
    error: Floats

    @classmethod
    def of(cls, spectroscopic: Floats, photometric: Floats) -> PhotometricRedshifts:
        """photometric: (objects, 2) redshift and error; objects at redshift 0 are in our Galaxy and have no host."""
        rows = np.flatnonzero((spectroscopic > 0) & (photometric[:, 0] > 0))
        rows = rows[np.argsort(spectroscopic[rows], kind="stable")]
        return cls(spectroscopic[rows], photometric[rows, 0], photometric[rows, 1])

    def draw(self, redshift: float, rng: np.random.Generator) -> tuple[float, float]:
        """Return a photometric redshift and its error."""
        middle = int(np.searchsorted(self.spectroscopic, redshift))
        first = min(max(middle - NEIGHBOURS // 2, 0), max(len(self.spectroscopic) - NEIGHBOURS, 0))
        host = int(rng.integers(first, min(first + NEIGHBOURS, len(self.spectroscopic))))
        stretch = (1 + redshift) / (1 + self.spectroscopic[host])  # errors of photometric redshifts grow with 1 + z
        off = (self.photometric[host] - self.spectroscopic[host]) * stretch
        return max(redshift + off, 0.001), float(self.error[host] * stretch)
