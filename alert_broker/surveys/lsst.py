"""LSST of the Rubin Observatory: alert schemas 3.0 to 11.1, from the files of the `lsst-alert-packet` distribution."""

from __future__ import annotations

import functools
import importlib.resources
import json
import re
from collections.abc import Mapping
from importlib.resources.abc import Traversable
from typing import Any, ClassVar

import numpy as np
from fastavro.schema import parse_schema

from alert_broker.lightcurve import FLUX_ZERO_POINT
from alert_broker.surveys.base import PacketError, Packets, Photometry, Points, Rows, Survey, fluxcal
from edgekit.errors import missing_extra

NANOJANSKY_ZERO_POINT = 31.4  # AB magnitude of 1 nJy
# Time, band, flux and error. Schemas 3 and 4 (and ELAsTiCC) use the second set. Version 5.0 renamed all four fields,
# and later versions kept the names. Version 8 replaced the top-level `alertId` by `diaSourceId`.
# `diaSource.diaSourceId` is the same number in every version, so it is the field that is read.
NAMES = (
    ("midpointMjdTai", "band", "psfFlux", "psfFluxErr"),
    ("midPointTai", "filterName", "psFlux", "psFluxErr"),
)
PHOTOMETRY = (*NAMES[0], *NAMES[1])
NULLABLE = ("band", "psfFlux", "psfFluxErr")  # from version 6.0 on
HISTORIES = ("prvDiaSources", "prvDiaForcedSources")
INNER = ("type", "items", "values", "fields")  # the keys of a schema whose values are schemas


class Lsst(Survey):
    """Alerts of LSST. Their fluxes are those of difference images in nJy: detections in `diaSource` and
    `prvDiaSources`, and forced photometry in `prvDiaForcedSources`.

    If an exposure has both, the point is the detection with the detection's flux. The newest exposure has no forced
    measurement yet, so this rule treats all detections of a packet alike. `prvDiaNondetectionLimits` (up to 7.x) holds
    upper limits. A moving object has no `diaObjectId`; its id is `ss` followed by the `ssObjectId`.
    """

    name: ClassVar = "lsst"
    bands: ClassVar = ("u", "g", "r", "i", "z", "y")
    wavelengths: ClassVar = (3685.0, 4802.0, 6231.0, 7542.0, 8690.0, 9736.0)
    record: ClassVar = "lsst.v0_0.alert"  # a table does not say its version
    fields: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "diaSource": ("diaSourceId", "diaObjectId", "ssObjectId", *PHOTOMETRY),
        "prvDiaSources": PHOTOMETRY,
        "prvDiaForcedSources": PHOTOMETRY,
        "prvDiaNondetectionLimits": (NAMES[0][0], NAMES[1][0]),
    }
    nullable: ClassVar = frozenset(
        {
            *HISTORIES,
            "prvDiaNondetectionLimits",
            "diaSource.diaObjectId",
            "diaSource.ssObjectId",
            *(f"{record}.{name}" for record in ("diaSource", *HISTORIES) for name in NULLABLE),
        }
    )
    zero_point: ClassVar[float] = NANOJANSKY_ZERO_POINT
    labels: ClassVar[tuple[str, ...]] = bands  # the names of the bands in the packets

    def recognises_schema(self, name: str) -> bool:
        return re.fullmatch(r"lsst\.v\d+_\d+\.alert", name) is not None

    def recognises_columns(self, columns: frozenset[str]) -> bool:
        # ELAsTiCC's tables have no programId, and versions 3 and 4 require one
        newer = {"diaSource.diaSourceId", "diaSource.midpointMjdTai"}
        return newer <= columns or {"diaSource.midPointTai", "diaSource.psFlux", "diaSource.programId"} <= columns

    def paths_in(self, columns: frozenset[str]) -> list[str]:
        others = NAMES[1] if "diaSource.midpointMjdTai" in columns else NAMES[0]
        return [path for path in self.paths if path.split(".")[-1] not in others]

    def schema_id(self, name: str) -> int | None:
        found = re.fullmatch(r"lsst\.v(\d+)_(\d+)\.alert", name)
        number = int(found[1]) * 100 + int(found[2]) if found else None
        return number if number in schema_versions() else None

    def extract(self, packets: Packets) -> Photometry:
        source, history = packets.record("diaSource"), packets.lists("prvDiaSources")
        forced = packets.lists("prvDiaForcedSources")
        limits = packets.lists("prvDiaNondetectionLimits", optional=True)
        names = NAMES[0] if NAMES[0][0] in source.columns else NAMES[1]
        parts = [self._points(source, names, detected=True), self._points(history, names, detected=True)]
        parts.append(self._points(forced, names, detected=False))
        identifier = source.columns["diaSourceId"]
        upper_limits = np.bincount(limits.owner, minlength=len(packets))
        return Photometry(identifier, self._object_ids(source, packets), parts, upper_limits)

    def _points(self, rows: Rows, names: tuple[str, str, str, str], *, detected: bool) -> Points:
        time_name, band_name, flux_name, error_name = names
        time, flux, error = (rows.numbers(name) for name in (time_name, flux_name, error_name))
        scale = fluxcal(self.zero_point - FLUX_ZERO_POINT)
        band = rows.positions(band_name, self.labels)
        return Points(rows.owner, time, band, scale * flux, scale * error, detected)

    def _object_ids(self, source: Rows, packets: Packets) -> list[str]:
        names = []
        moving = source.integers("ssObjectId", optional=True)
        for alert, (fixed, solar) in enumerate(
            zip(source.integers("diaObjectId").tolist(), moving.tolist(), strict=True)
        ):
            # 0 and null both mean that the source belongs to no object
            names.append(str(fixed) if fixed else f"ss{solar}")
            if not fixed and not solar:
                number = source.columns["diaSourceId"][alert]
                packets.fail(alert, f"diaSource {number} has neither a diaObjectId nor an ssObjectId")
        return names


@functools.cache
def schema_versions() -> Mapping[int, Traversable]:
    """Return the folder of each alert schema in the installed lsst-alert-packet, by id (major x 100 + minor),
    sorted."""
    try:
        # This is the namespace package. An import of lsst.alert.packet would also import lsst.utils and lsst.resources.
        root = importlib.resources.files("lsst.alert") / "packet" / "schema"
        majors = [folder for folder in root.iterdir() if folder.name.isdigit()]
    except (ModuleNotFoundError, FileNotFoundError, NotADirectoryError) as error:
        raise missing_extra("lsst-alert-packet", "alerts", "reading Rubin's alert schemas") from error
    found = {
        int(major.name) * 100 + int(minor.name): minor
        for major in majors
        for minor in major.iterdir()
        if minor.name.isdigit()
    }
    return dict(sorted(found.items()))


@functools.cache
def schema(identifier: int) -> dict[str, Any]:
    """Return the parsed alert schema of a Confluent schema id. Raises PacketError for an id that is not installed."""
    versions = schema_versions()
    if identifier not in versions:
        raise PacketError(
            f"unknown LSST schema id {identifier}: version {identifier // 100}.{identifier % 100} is not installed; "
            f"known: {', '.join(map(str, versions))}; if the schema is newer, run: "
            "pip install --upgrade lsst-alert-packet"
        )
    records: dict[str, Any] = {}
    for item in versions[identifier].iterdir():
        if item.name.endswith(".avsc"):
            record = json.loads(item.read_text(encoding="utf-8"))
            records[f"{record['namespace']}.{record['name']}"] = record
    alert = next(name for name in records if name.endswith(".alert"))
    parsed = parse_schema(_inline(alert, records))
    assert isinstance(parsed, dict)
    return parsed


def _inline(node: Any, records: dict[str, Any]) -> Any:
    """Return the schema with each record written out at its first use, as a single file requires. This empties
    `records`."""
    if isinstance(node, str):
        return _inline(records.pop(node), records) if node in records else node
    if isinstance(node, list):
        return [_inline(item, records) for item in node]
    if isinstance(node, dict):
        return {key: _inline(value, records) if key in INNER else value for key, value in node.items()}
    return node
