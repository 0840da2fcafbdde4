"""Move a source to another redshift: what happens to its times, wavelengths and fluxes.

The flux density that an observer measures is f(nu) = (1 + z) L(nu (1 + z)) / (4 pi d^2) with the luminosity distance d
(Hogg 1999, eq. 22). So the light that the source at redshift z sends to a filter at wavelength w reached a filter at
w (1 + z0) / (1 + z) when the source was at z0.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from alert_broker.augment.cosmology import FIDUCIAL, Cosmology

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Move:
    """From a redshift to another; both are above 0, or both are 0 for a source in our Galaxy."""

    old: float
    new: float
    cosmology: Cosmology = FIDUCIAL

    @property
    def stretch(self) -> float:
        """The factor from the new observer's days, or angstrom, to the old observer's."""
        return (1.0 + self.old) / (1.0 + self.new)

    @property
    def flux(self) -> float:
        """The factor from old to new flux density, between the two wavelengths that belong together."""
        if self.old == self.new:
            return 1.0
        near, far = self.cosmology.luminosity_distance([self.old, self.new])
        return float((near / far) ** 2 / self.stretch)

    def old_time(self, time: Floats, new_reference: float, old_reference: float) -> Floats:
        """Return when the old observer saw the light that the new one sees at `time`; the references belong
        together."""
        return old_reference + (time - new_reference) * self.stretch

    def old_wavelength(self, wavelength: Floats) -> Floats:
        return wavelength * self.stretch
