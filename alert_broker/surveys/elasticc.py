"""ELAsTiCC, the DESC simulation of LSST alerts, as brokers store it in Parquet."""

from __future__ import annotations

from typing import ClassVar

from alert_broker.lightcurve import FLUX_ZERO_POINT
from alert_broker.surveys.lsst import Lsst

PHOTOMETRY = {"diaSource.midPointTai", "diaSource.filterName", "diaSource.psFlux", "diaSource.nobs"}


class Elasticc(Lsst):
    """The released set: LSST's old field names, fluxes in nJy (its r-band noise of 190 is a depth of 24.0)."""

    name: ClassVar = "elasticc"
    record: ClassVar = "elasticc.alert"
    labels: ClassVar = ("u", "g", "r", "i", "z", "Y")

    def recognises_schema(self, name: str) -> bool:
        return name == self.record  # seen only as Parquet, and as that replayed

    def recognises_columns(self, columns: frozenset[str]) -> bool:
        return {*PHOTOMETRY, "diaObject.hostgal_zphot_q010"} <= columns


class ElasticcV0(Elasticc):
    """The early test set: zero point 27.5 (its r-band noise of 3.7 is a depth of 24.3), told by redshift columns."""

    name: ClassVar = "elasticc-v0"
    record: ClassVar = "elasticc_v0.alert"
    zero_point: ClassVar = FLUX_ZERO_POINT

    def recognises_columns(self, columns: frozenset[str]) -> bool:
        return {*PHOTOMETRY, "diaObject.hostgal_zphot_q10"} <= columns
