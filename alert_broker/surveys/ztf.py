"""The Zwicky Transient Facility: Avro packets with schemas 3.0 to 4.02, and Fink's Parquet, which has the same
layout."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import numpy as np

from alert_broker.lightcurve import FLUX_ZERO_POINT
from alert_broker.surveys.base import Packets, Photometry, Points, Rows, Survey, fluxcal

MJD_OF_JD_ZERO = -2_400_000.5
ERROR_OF_MAGNITUDE = 0.4 * np.log(10.0)  # relative flux error for an error of one magnitude, to first order
# isdiffpos says whether the difference is science minus reference or the reverse. The last sign is for any other value.
LABELS_OF_SIGN, SIGNS = ("t", "1", "f", "0"), np.array([1.0, 1.0, -1.0, -1.0, np.nan])
FIDS = (1, 2, 3)  # g, r, i
FORCED_PHOTOMETRY_OK = "0"  # procstatus; 55, 56 and 61 flag missing or bad pixels, whose fluxes are -99999
DETECTION = ("jd", "fid", "magpsf", "sigmapsf", "isdiffpos")
FORCED = ("jd", "fid", "forcediffimflux", "forcediffimfluxunc", "magzpsci", "procstatus")


class Ztf(Survey):
    """Alerts of ZTF. Detections are magnitudes of difference images; forced photometry (schema 4.01 and later) is in
    counts, and each image has its own zero point.

    If an exposure has both, the point is the detection. A row of `prv_candidates` without a magnitude is an exposure in
    which nothing was found; it counts as an upper limit and gives no point. Both histories span 30 days.
    """

    name: ClassVar = "ztf"
    bands: ClassVar = ("g", "r", "i")
    wavelengths: ClassVar = (4804.79, 6436.92, 7968.22)
    record: ClassVar = "ztf.alert"
    fields: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "objectId": (),
        "candid": (),
        "candidate": DETECTION,
        "prv_candidates": DETECTION,
        "fp_hists": FORCED,
    }
    nullable: ClassVar = frozenset(
        {
            "prv_candidates",
            "fp_hists",
            *(f"prv_candidates.{name}" for name in ("magpsf", "sigmapsf", "isdiffpos")),
            *(f"fp_hists.{name}" for name in FORCED if name not in ("jd", "fid")),
        }
    )
    cutouts: ClassVar = ("cutoutScience.stampData", "cutoutTemplate.stampData", "cutoutDifference.stampData")

    def recognises_schema(self, name: str) -> bool:
        return name == self.record

    def recognises_columns(self, columns: frozenset[str]) -> bool:
        return {"objectId", "candid", "candidate.magpsf", "candidate.fid"} <= columns

    def extract(self, packets: Packets) -> Photometry:
        names = packets.column("objectId").to_pylist()
        for alert, name in enumerate(names):
            if not isinstance(name, str) or not name:
                packets.fail(alert, f"objectId is {name!r}; expected an object name")
        candidates, history = packets.record("candidate"), packets.lists("prv_candidates")
        found, upper_limits = history, np.zeros(len(packets), np.int64)
        if len(history.owner):
            detected = history.column("magpsf").is_valid().to_numpy(zero_copy_only=False)
            found = history.where(detected)
            upper_limits = np.bincount(history.owner[~detected], minlength=len(packets))
        forced = packets.lists("fp_hists", optional=True)  # schemas before 4.01 do not have it
        parts = [self._detections(candidates), self._detections(found), self._forced(forced)]
        return Photometry(packets.column("candid"), names, parts, upper_limits)

    def _detections(self, rows: Rows) -> Points:
        jd, magnitude, magnitude_error = (rows.numbers(name) for name in ("jd", "magpsf", "sigmapsf"))
        sign = SIGNS[rows.positions("isdiffpos", LABELS_OF_SIGN)]
        with np.errstate(over="ignore"):
            flux = sign * fluxcal(magnitude - FLUX_ZERO_POINT)
            error = np.abs(flux) * ERROR_OF_MAGNITUDE * magnitude_error
        return Points(rows.owner, jd + MJD_OF_JD_ZERO, rows.positions("fid", FIDS), flux, error, detected=True)

    def _forced(self, rows: Rows) -> Points:
        counts, counts_error = rows.numbers("forcediffimflux"), rows.numbers("forcediffimfluxunc")
        ok = rows.positions("procstatus", (FORCED_PHOTOMETRY_OK,)) == 0
        with np.errstate(over="ignore", invalid="ignore"):
            scale = fluxcal(rows.numbers("magzpsci") - FLUX_ZERO_POINT)
            flux, error = np.where(ok, counts * scale, np.nan), counts_error * scale
        time = rows.numbers("jd") + MJD_OF_JD_ZERO
        return Points(rows.owner, time, rows.positions("fid", FIDS), flux, error, detected=False)
