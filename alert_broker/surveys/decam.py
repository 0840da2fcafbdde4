"""The Dark Energy Camera: alerts of the DESIRT programme, whose schema is called `desirt.alert`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import numpy as np

from alert_broker.lightcurve import FLUX_ZERO_POINT
from alert_broker.surveys.base import Packets, Photometry, Points, Rows, Survey, fluxcal
from alert_broker.surveys.lsst import NANOJANSKY_ZERO_POINT

MEASUREMENT = ("mjd", "band", "psfFlux", "psfFluxErr")


class Decam(Survey):
    """Alerts of DECam. Their fluxes are signed, forced fluxes of difference images in nJy (`psfFlux`; `forcediffimflux`
    holds the same in microjansky). `candidate` is the detection. `fp_hists` is the history, which contains the
    candidate's exposure again."""

    name: ClassVar = "decam"
    bands: ClassVar = ("g", "r", "i", "z")
    wavelengths: ClassVar = (4771.0, 6392.0, 7789.0, 9149.0)
    record: ClassVar = "desirt.alert"
    fields: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "objectId": (),
        "candid": (),
        "candidate": MEASUREMENT,
        "fp_hists": MEASUREMENT,
    }

    def recognises_schema(self, name: str) -> bool:
        return name == self.record

    def recognises_columns(self, columns: frozenset[str]) -> bool:
        return {"objectId", "candid", "candidate.mjd", "candidate.psfFlux"} <= columns

    def extract(self, packets: Packets) -> Photometry:
        names = packets.column("objectId").to_pylist()
        for alert, name in enumerate(names):
            if not isinstance(name, str) or not name:
                packets.fail(alert, f"objectId is {name!r}; expected an object name")
        parts = [
            self._points(packets.record("candidate"), detected=True),
            self._points(packets.lists("fp_hists"), detected=False),
        ]
        return Photometry(packets.column("candid"), names, parts, np.zeros(len(packets), np.int64))

    def _points(self, rows: Rows, *, detected: bool) -> Points:
        scale = fluxcal(NANOJANSKY_ZERO_POINT - FLUX_ZERO_POINT)
        time, flux, error = (rows.numbers(name) for name in ("mjd", "psfFlux", "psfFluxErr"))
        return Points(rows.owner, time, rows.positions("band", self.bands), scale * flux, scale * error, detected)
