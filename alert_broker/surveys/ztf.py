"""Zwicky Transient Facility: Avro packets with schemas 3.0 to 4.02, and the same layout in Fink's Parquet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from alert_broker.lightcurve import FLUX_ZERO_POINT
from alert_broker.surveys.base import (
    LightCurve,
    PacketError,
    Points,
    Row,
    Survey,
    band_indices,
    curve_of_points,
    fluxcal,
    table,
)

MJD_OF_JD_ZERO = -2_400_000.5
ERROR_OF_MAGNITUDE = 0.4 * np.log(10.0)  # relative flux error of one magnitude of error, to first order
SIGN = {"t": 1.0, "1": 1.0, "f": -1.0, "0": -1.0}  # isdiffpos: science minus reference, or the reverse
FORCED_PHOTOMETRY_OK = "0"  # procstatus; 55, 56 and 61 flag missing or bad pixels, with fluxes of -99999
DETECTION = ("jd", "fid", "magpsf", "sigmapsf", "isdiffpos")
FORCED = ("jd", "fid", "forcediffimflux", "forcediffimfluxunc", "magzpsci", "procstatus")


class Ztf(Survey):
    """Detections are magnitudes of difference images; forced photometry (schema 4.01 on) is in counts of each image.

    A detection wins over forced photometry of the same exposure. Rows of `prv_candidates` without a magnitude are
    exposures in which nothing was found: counted as upper limits, not points. Both histories span 30 days.
    """

    name: ClassVar = "ztf"
    bands: ClassVar = ("g", "r", "i")
    wavelengths: ClassVar = (4804.79, 6436.92, 7968.22)
    fields: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "objectId": (), "candid": (), "candidate": DETECTION, "prv_candidates": DETECTION, "fp_hists": FORCED,
    }  # fmt: skip
    band_of_fid: ClassVar = {1: 0, 2: 1, 3: 2}

    def recognises_schema(self, name: str) -> bool:
        return name == "ztf.alert"

    def recognises_columns(self, columns: frozenset[str]) -> bool:
        return {"objectId", "candid", "candidate.magpsf", "prv_candidates.magpsf"} <= columns

    def extract(self, packet: Row) -> LightCurve:
        if not isinstance(packet["objectId"], str) or not packet["objectId"]:
            raise PacketError(f"objectId is {packet['objectId']!r}; expected the object's name")
        history = packet["prv_candidates"] or []
        found = [row for row in history if row["magpsf"] is not None]
        detections = self._detections([packet["candidate"], *found])
        forced = self._forced(packet.get("fp_hists") or [])  # absent before schema 4.01
        return curve_of_points(packet["candid"], packet["objectId"], [detections, forced], len(history) - len(found))

    def _detections(self, rows: Sequence[Row]) -> Points:
        jd, magnitude, magnitude_error = table(rows, ("jd", "magpsf", "sigmapsf"))
        sign = np.array([SIGN.get(row["isdiffpos"], np.nan) for row in rows])
        with np.errstate(over="ignore"):
            flux = sign * fluxcal(magnitude - FLUX_ZERO_POINT)
            error = np.abs(flux) * ERROR_OF_MAGNITUDE * magnitude_error
        return Points(jd + MJD_OF_JD_ZERO, self._bands(rows), flux, error, detected=True)

    def _forced(self, rows: Sequence[Row]) -> Points:
        jd, counts, counts_error, zero_point = table(rows, ("jd", "forcediffimflux", "forcediffimfluxunc", "magzpsci"))
        ok = np.array([row["procstatus"] == FORCED_PHOTOMETRY_OK for row in rows], dtype=np.bool_)
        with np.errstate(over="ignore", invalid="ignore"):
            scale = fluxcal(zero_point - FLUX_ZERO_POINT)
            flux, error = np.where(ok, counts * scale, np.nan), counts_error * scale
        return Points(jd + MJD_OF_JD_ZERO, self._bands(rows), flux, error, detected=False)

    def _bands(self, rows: Sequence[Row]) -> npt.NDArray[np.int8]:
        return band_indices([row["fid"] for row in rows], self.band_of_fid)
