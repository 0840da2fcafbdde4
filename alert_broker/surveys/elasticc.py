"""ELAsTiCC, the simulation of LSST alerts by DESC, in the Parquet form in which brokers store it."""

from __future__ import annotations

from typing import ClassVar

from alert_broker.lightcurve import FLUX_ZERO_POINT
from alert_broker.surveys.lsst import Lsst

PHOTOMETRY = {"diaSource.midPointTai", "diaSource.filterName", "diaSource.psFlux", "diaSource.nobs"}


class Elasticc(Lsst):
    """The released set: it has LSST's old field names, and fluxes in nJy (its r-band noise of 190 corresponds to a
    depth of 24.0)."""

    name: ClassVar = "elasticc"
    record: ClassVar = "elasticc.alert"
    labels: ClassVar = ("u", "g", "r", "i", "z", "Y")

    def recognises_schema(self, name: str) -> bool:
        return name == self.record  # known only as Parquet, and as Avro that was replayed from it

    def recognises_columns(self, columns: frozenset[str]) -> bool:
        return {*PHOTOMETRY, "diaObject.hostgal_zphot_q010"} <= columns


class ElasticcV0(Elasticc):
    """The early test set: its zero point is 27.5 (its r-band noise of 3.7 corresponds to a depth of 24.3). The names of
    its redshift columns distinguish it."""

    name: ClassVar = "elasticc-v0"
    record: ClassVar = "elasticc_v0.alert"
    zero_point: ClassVar = FLUX_ZERO_POINT

    def recognises_columns(self, columns: frozenset[str]) -> bool:
        return {*PHOTOMETRY, "diaObject.hostgal_zphot_q10"} <= columns
