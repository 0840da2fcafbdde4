"""Build the survey's packet from a simulated light curve: ZTF schema 4.02, LSST's newest installed schema, and their
stamps."""

from __future__ import annotations

import datetime
import functools
import gzip
import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fastavro
import numpy as np
import numpy.typing as npt
from fastavro.schema import parse_schema

from alert_broker.containers import WIRE_HEADER
from alert_broker.lightcurve import FLUX_ZERO_POINT
from alert_broker.surveys import lsst
from alert_broker.surveys.base import LightCurve, fluxcal
from alert_broker.surveys.ztf import ERROR_OF_MAGNITUDE, MJD_OF_JD_ZERO
from alert_broker.ztf_schema import VERSION, ztf_schema

Floats = npt.NDArray[np.float64]

ZTF_HISTORY_DAYS = 30.0
ZTF_COUNTS_ZERO_POINT = 26.3  # magzpsci: AB magnitude of one count of a 30 s exposure
ZTF_BAD_FORCED = 0.1  # share of forced measurements on bad pixels, which are flagged and have no flux
ZTF_NAMES = 26**7
LSST_PRECOVERY_DAYS = 30.0  # forced photometry begins this long before the first detection
FITS_BLOCK = 2880


@dataclass(frozen=True, slots=True)
class Observations:
    """Every exposure of one source, (exposures,) each, ascending in time; flux in FLUXCAL, limit in magnitudes."""

    time: Floats
    band: npt.NDArray[np.int64]
    flux: Floats
    flux_error: Floats
    limit: Floats
    detected: npt.NDArray[np.bool_]

    def until(self, last: int) -> Observations:
        """Return the exposures up to and including this one."""
        return self.take(np.arange(last + 1))

    def take(self, rows: npt.NDArray[Any]) -> Observations:
        """Return the exposures at these positions, or those for which this mask is true."""
        return Observations(
            self.time[rows],
            self.band[rows],
            self.flux[rows],
            self.flux_error[rows],
            self.limit[rows],
            self.detected[rows],
        )

    def curve(self, alert_id: int, object_id: str, upper_limits: int, dropped: int) -> LightCurve:
        """Return these exposures as the light curve that a reader should find."""
        return LightCurve(
            alert_id,
            object_id,
            self.time,
            self.band.astype(np.int8),
            self.flux,
            self.flux_error,
            self.detected,
            upper_limits,
            dropped,
        )


def ztf_packet(
    rng: np.random.Generator, seen: Observations, index: int, seed: int, cutouts: bool
) -> tuple[dict[str, Any], LightCurve]:
    """Return the alert that the last exposure raises, with 30 days of detections, upper limits and forced
    photometry."""
    seen = seen.take(seen.time > seen.time[-1] - ZTF_HISTORY_DAYS)
    ra, dec = rng.uniform(0, 360), rng.uniform(-28, 80)
    bad = ~seen.detected & (rng.random(len(seen.time)) < ZTF_BAD_FORCED)
    object_id = f"ZTF24{_letters((seed * 1_000_003 + index) % ZTF_NAMES)}"
    jd = (seen.time - MJD_OF_JD_ZERO).tolist()
    pid = [int((day - 2_457_754.5) * 1e6) * 1000 + 115 for day in jd]  # night and time, then the image quadrant
    candid = [number * 1_000_000 + index % 1_000_000 for number in pid]
    magnitude = (FLUX_ZERO_POINT - 2.5 * np.log10(np.abs(seen.flux))).tolist()
    magnitude_error = (seen.flux_error / np.abs(seen.flux) / ERROR_OF_MAGNITUDE).tolist()
    positive = (seen.flux > 0).tolist()
    limit, detected = seen.limit.tolist(), seen.detected.tolist()
    fid = (seen.band + 1).tolist()

    def detection(row: int) -> dict[str, Any]:
        measured = {
            "candid": candid[row], "isdiffpos": "t" if positive[row] else "f", "ra": ra, "dec": dec,
            "magpsf": magnitude[row], "sigmapsf": magnitude_error[row], "ranr": ra, "decnr": dec,
            "rb": 0.9, "fwhm": 2.1, "nbad": 0, "classtar": 0.98,
        }  # fmt: skip
        exposure = {
            "jd": jd[row], "fid": fid[row], "pid": pid[row], "diffmaglim": limit[row], "programid": 1,
            "nid": pid[row] // 10**9, "rcid": 21, "field": 386, "magzpsci": ZTF_COUNTS_ZERO_POINT,
        }  # fmt: skip
        return exposure | (measured if detected[row] else {})

    forced_counts = seen.flux / fluxcal(ZTF_COUNTS_ZERO_POINT - FLUX_ZERO_POINT)
    forced_error = seen.flux_error / fluxcal(ZTF_COUNTS_ZERO_POINT - FLUX_ZERO_POINT)
    forced = [
        _ztf_templates()["fp_hist"]
        | {
            "field": 386,
            "rcid": 21,
            "fid": fid[row],
            "pid": pid[row],
            "rfid": 386120121,
            "programid": 1,
            "jd": jd[row],
            "magzpsci": ZTF_COUNTS_ZERO_POINT,
            "exptime": 30.0,
            "diffmaglim": limit[row],
            "forcediffimflux": -99999.0 if bad[row] else float(forced_counts[row]),
            "forcediffimfluxunc": -99999.0 if bad[row] else float(forced_error[row]),
            "procstatus": "61" if bad[row] else "0",
            "ranr": ra,
            "decnr": dec,
        }
        for row in range(len(jd) - 1)
    ]
    history = [
        _ztf_templates()["prv_candidate"] | detection(row) | {"rbversion": "t17_f5_c3"} for row in range(len(jd) - 1)
    ]
    found = [day for day, flag in zip(jd, detected, strict=True) if flag]
    candidate = (
        _ztf_templates()["candidate"]
        | detection(len(jd) - 1)
        | {
            "ndethist": len(found),
            "ncovhist": len(jd),
            "jdstarthist": found[0],
            "jdendhist": found[-1],
            "scorr": float(abs(seen.flux[-1]) / seen.flux_error[-1]),
            "drb": 0.98,
            "exptime": 30.0,
            "rfid": 386120121,
            "jdstartref": 2_458_246.9,
            "jdendref": 2_458_430.6,
            "nframesref": 30,
            "rbversion": "t17_f5_c3",
            "drbversion": "d6_m7",
        }
    )
    packet: dict[str, Any] = {
        "schemavsn": VERSION, "publisher": "edgekit simulator", "objectId": object_id, "candid": candid[-1],
        "candidate": candidate, "prv_candidates": history, "fp_hists": forced,
    }  # fmt: skip
    stamps = _stamps(rng, seen, 63, 1.0) if cutouts else {}
    for name in ("cutoutScience", "cutoutTemplate", "cutoutDifference"):
        image = stamps.get(name)
        packet[name] = (
            None
            if image is None
            else {
                "fileName": f"candid{candid[-1]}_{name[6:].lower()}.fits.gz",
                "stampData": gzip.compress(fits([("", image)]), 1, mtime=0),
            }
        )
    kept = seen.take(~bad)
    return packet, kept.curve(candid[-1], object_id, detected.count(False), int(bad.sum()))


def lsst_packet(
    rng: np.random.Generator, seen: Observations, index: int, seed: int, cutouts: bool
) -> tuple[dict[str, Any], LightCurve]:
    """Return the alert that the last visit raises, with earlier detections, and forced photometry from 30 days before
    the first one."""
    first = seen.time[np.flatnonzero(seen.detected)[0]]
    seen = seen.take(seen.time >= first - LSST_PRECOVERY_DAYS)
    ra, dec = rng.uniform(0, 360), rng.uniform(-70, 5)
    nanojansky = fluxcal(FLUX_ZERO_POINT - lsst.NANOJANSKY_ZERO_POINT)
    flux, error = (seen.flux * nanojansky).tolist(), (seen.flux_error * nanojansky).tolist()
    bands = [lsst.Lsst.bands[band] for band in seen.band]
    time, detected = seen.time.tolist(), seen.detected.tolist()
    visit = [_visit(day) for day in time]
    serial = (seed * 1_000_003 + index) % 10**5
    source_id = [number * 10**5 + serial for number in visit]
    object_id = source_id[detected.index(True)]  # an object has the name of its first source
    templates = _lsst_templates(max(lsst.schema_versions()))

    def exposure(row: int) -> dict[str, Any]:
        return {
            "diaObjectId": object_id,
            "visit": visit[row],
            "detector": 94,
            "midpointMjdTai": time[row],
            "ra": ra,
            "dec": dec,
            "psfFlux": flux[row],
            "psfFluxErr": error[row],
            "band": bands[row],
            "timeProcessedMjdTai": time[row] + 60 / 86_400,
        }

    def source(row: int) -> dict[str, Any]:
        return (
            templates["diaSource"]
            | exposure(row)
            | {
                "diaSourceId": source_id[row],
                "ssObjectId": 0,
                "parentDiaSourceId": 0,
                "x": 2036.0,
                "y": 2000.0,
                "snr": abs(flux[row]) / error[row],
                "reliability": 0.95,
                "isNegative": flux[row] < 0,
                "psfNdata": 1681,
                "psfFlux_flag": False,
                "centroid_flag": False,
                "pixelFlags": False,
            }
        )

    rows = range(len(time) - 1)
    forced = [templates["diaForcedSource"] | exposure(row) | {"diaForcedSourceId": source_id[row]} for row in rows]
    packet = templates["alert"] | {
        "diaSourceId": source_id[-1],
        "diaSource": source(len(time) - 1),
        "prvDiaSources": [source(row) for row in rows if detected[row]],
        "prvDiaForcedSources": forced,
        "diaObject": templates["diaObject"]
        | {
            "diaObjectId": object_id,
            "ra": ra,
            "dec": dec,
            "nDiaSources": detected.count(True),
            "validityStartMjdTai": time[-1],
        },
    }
    if cutouts:
        uncertainty = np.ones((30, 30), ">f4")
        for name, image in _stamps(rng, seen, 30, 2.0).items():
            # Rubin sends the image, its uncertainty, and the point-spread function.
            packet[name] = fits([("", image), ("UNCERT", uncertainty), ("PSFIMAGE", _psf(41, 2.0).astype(">f8"))])
    return packet, seen.curve(source_id[-1], str(object_id), 0, 0)


def write_file(directory: Path, survey: str, number: int, packets: Sequence[dict[str, Any]], *, single: bool) -> Path:
    """Write one file of packets: an Avro container, or one LSST message in Confluent wire format."""
    if single:
        first = packets[0]
        lsst_name, ztf_name = f"{first.get('diaSourceId')}.bin", f"{first.get('objectId')}.{first.get('candid')}.avro"
        path = directory / (lsst_name if survey == "lsst" else ztf_name)
        path.write_bytes(message(survey, first))
    else:
        path = directory / f"{survey}_{number:05}.avro"
        path.write_bytes(_container(survey, packets, path.name))
    return path


def message(survey: str, packet: dict[str, Any]) -> bytes:
    """Return one packet as the survey sends it: a container with its schema (ZTF), or Confluent wire format (LSST)."""
    if survey == "ztf":
        return _container(survey, [packet], f"{packet['objectId']}.{packet['candid']}.avro")
    identifier = max(lsst.schema_versions())
    body = io.BytesIO()
    fastavro.schemaless_writer(body, lsst.schema(identifier), packet)
    return WIRE_HEADER.pack(0, identifier) + body.getvalue()


def _container(survey: str, packets: Sequence[dict[str, Any]], name: str) -> bytes:
    # Each block holds one packet, so that damage to one costs no other. The marker is fixed, so that a seed fixes every
    # byte.
    marker = hashlib.md5(name.encode(), usedforsecurity=False).digest()
    schema = _ztf_parsed() if survey == "ztf" else lsst.schema(max(lsst.schema_versions()))
    stream = io.BytesIO()
    fastavro.writer(stream, schema, packets, sync_interval=1, sync_marker=marker)
    return stream.getvalue()


def fits(images: Sequence[tuple[str, npt.NDArray[Any]]]) -> bytes:
    """Return a FITS file of (extension name, 2-D big-endian float image) pairs. The first image is the primary array
    (FITS 4.0)."""
    parts = []
    for number, (name, image) in enumerate(images):
        height, width = image.shape
        first = f"{'SIMPLE':8}= {'T':>20}" if number == 0 else f"{'XTENSION':8}= {'IMAGE   '!r:20}"
        numbers = {"BITPIX": -8 * image.dtype.itemsize, "NAXIS": 2, "NAXIS1": width, "NAXIS2": height}
        if number:
            numbers |= {"PCOUNT": 0, "GCOUNT": 1}
        cards = [first, *(f"{key:8}= {value:>20}" for key, value in numbers.items())]
        cards += [f"{'EXTNAME':8}= {f'{name:8}'!r:20}"] if name else []
        header = "".join(f"{card:80}" for card in [*cards, "END"]).encode("ascii")
        parts += [_padded(header, b" "), _padded(image.tobytes(), b"\0")]
    return b"".join(parts)


def _padded(data: bytes, fill: bytes) -> bytes:
    return data + fill * (-len(data) % FITS_BLOCK)


def _stamps(rng: np.random.Generator, seen: Observations, size: int, sigma: float) -> dict[str, npt.NDArray[Any]]:
    """Return science, template and difference images around the source, in units of the sky noise."""
    psf = _psf(size, sigma)
    # the matched-filter S/N of the source is that of its flux
    source = seen.flux[-1] / seen.flux_error[-1] * psf / np.sqrt((psf**2).sum())
    host = 30 * _psf(size, 3 * sigma) / _psf(size, 3 * sigma).max()
    noise = rng.standard_normal((2, size, size), np.float32)
    template = host + 0.2 * noise[0]
    science = host + source + noise[1]
    images = {"cutoutScience": science, "cutoutTemplate": template, "cutoutDifference": science - template}
    return {name: image.astype(">f4") for name, image in images.items()}


@functools.cache
def _psf(size: int, sigma: float) -> Floats:
    axis = np.arange(size) - (size - 1) / 2
    image = np.exp(-0.5 * (axis[:, None] ** 2 + axis[None, :] ** 2) / sigma**2)
    return np.asarray(image / image.sum())


@functools.cache
def _ztf_parsed() -> Any:
    return parse_schema(ztf_schema())


@functools.cache
def _ztf_templates() -> dict[str, dict[str, Any]]:
    return _templates(_ztf_parsed())


@functools.cache
def _lsst_templates(identifier: int) -> dict[str, dict[str, Any]]:
    return _templates(lsst.schema(identifier))


def _templates(schema: Any) -> dict[str, dict[str, Any]]:
    """Return, for each record of a schema, by short name, its fields: null if the field may be null, else zero or an
    empty string."""
    zero = {"int": 0, "long": 0, "float": 0.0, "double": 0.0, "string": "", "boolean": False}
    templates = {}
    for name, record in schema["__named_schemas"].items():
        templates[name.rpartition(".")[2]] = {
            item["name"]: None if isinstance(item["type"], list) else zero.get(str(item["type"]))
            for item in record["fields"]
        }
    return templates


def _visit(mjd: float) -> int:
    """Return a visit number. Rubin numbers visits by day and, within the day, in order; this function counts steps of 2
    seconds."""
    day = datetime.date(1858, 11, 17) + datetime.timedelta(days=int(mjd))
    return int(f"{day:%Y%m%d}") * 100_000 + int(mjd % 1 * 43_200)


def _letters(number: int) -> str:
    letters = ""
    for _ in range(7):
        number, digit = divmod(number, 26)
        letters = chr(ord("a") + digit) + letters
    return letters
