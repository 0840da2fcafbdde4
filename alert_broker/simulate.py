"""Simulate alerts: transients and variables at a survey's cadence and depth, as packets of that survey.

They are for demonstrations, load tests and tests of the whole path. The light curves are sketches of their classes,
drawn from a few textbook shapes; nobody should train or score a classifier of real alerts with them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from alert_broker import simulated_packets
from alert_broker.lightcurve import FLUX_ZERO_POINT
from alert_broker.packets import TRUTH_KEY
from alert_broker.surveys.base import LightCurve, fluxcal, survey_named
from edgekit.errors import EdgekitError, unknown

Floats = npt.NDArray[np.float64]
Shape = Callable[[np.random.Generator, Floats, Floats, float], Floats]

SEASON_DAYS = 180.0  # days for which a field stays in the night sky
DETECTION_SNR = 5.0
R_BAND = 6231.0  # angstrom; the shapes below are normalized at this wavelength
HC_OVER_K = 1.4388e8  # angstrom kelvin


@dataclass(frozen=True, slots=True)
class Cadence:
    """How often a survey visits one field, and how deep: enough for plausible light curves, but no observing
    simulation."""

    nights: tuple[int, ...]  # gaps between visits in days, drawn with equal probability
    visits: int  # per night
    band_weight: tuple[float, ...]  # per band of the survey
    depth: tuple[float, ...]  # median 5 sigma limit of one visit, AB magnitude
    scatter: float  # of the limit, in magnitudes: moon, air mass, seeing
    electrons: float  # per unit of FLUXCAL in one visit, for photon noise
    first_mjd: float


# ZTF's public survey visits a field in g and r on two nights in three; the depths are those of its 30 s exposures
# (Bellm+ 2019). Rubin visits a field twice in a night, and seldom again within three days; the depths are those of the
# LSST overview (Ivezic+ 2019).
CADENCES = {
    "ztf": Cadence((1, 2, 2, 3, 3, 4), 2, (0.47, 0.53, 0.0), (20.8, 20.6, 19.9), 0.35, 2.0, 60_400.0),
    "lsst": Cadence(
        (2, 3, 3, 4, 5, 7),
        2,
        (0.07, 0.10, 0.22, 0.22, 0.20, 0.19),
        (23.9, 25.0, 24.7, 24.0, 23.3, 22.1),
        0.25,
        66.0,
        61_100.0,
    ),
}


@dataclass(frozen=True, slots=True)
class AlertClass:
    """A class of sources. shape: a function that returns the difference flux, (points,), of a source with flux 1 at its
    reference in r."""

    name: str
    identifier: int  # as in PLAsTiCC
    weight: float
    brightness: tuple[float, float]  # magnitudes above the survey's r-band depth
    shape: Shape


@dataclass(frozen=True, slots=True)
class SimulatedAlert:
    """A packet, its true class, and the light curve that a reader must find in it (before rounding to float32)."""

    survey: str
    packet: dict[str, Any]
    class_name: str
    class_id: int
    curve: LightCurve


def simulate(survey: str, count: int, seed: int, cutouts: bool = True) -> Iterator[SimulatedAlert]:
    """Yield `count` alerts of different objects, the same ones for the same seed. Without cutouts the stamps are
    null."""
    if survey not in CADENCES:
        raise unknown("survey", survey, CADENCES)
    if count < 1 or seed < 0:
        raise EdgekitError(
            f"cannot simulate {count} alerts with seed {seed}; expected 1 alert or more, and a seed of 0 or more"
        )
    return (_simulate_one(survey, seed, index, cutouts) for index in range(count))


def write(directory: str | Path, alerts: Iterable[SimulatedAlert], packets_per_file: int = 100) -> list[Path]:
    """Write packets to a new folder, and their true classes to `truth.parquet` in it. Return the packet files.

    The files are Avro containers of `packets_per_file` packets. With 1, they are as the survey sends them: one
    container per alert for ZTF, one message in Confluent wire format (.bin) for LSST.
    """
    directory = Path(directory)
    if packets_per_file < 1:
        raise EdgekitError(f"packets per file is {packets_per_file}; expected 1 or more")
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise EdgekitError(f"{directory} exists and is not an empty folder; give a new one")
    directory.mkdir(parents=True, exist_ok=True)
    files: list[Path] = []
    truth: list[tuple[int, str, str, int]] = []
    source = iter(alerts)
    while chunk := list(islice(source, packets_per_file)):
        survey = chunk[0].survey
        if any(alert.survey != survey for alert in chunk):
            raise EdgekitError("one folder cannot hold alerts of two surveys; write each survey to a folder of its own")
        packets = [alert.packet for alert in chunk]
        files.append(simulated_packets.write_file(directory, survey, len(files), packets, single=packets_per_file == 1))
        truth += [(a.curve.alert_id, a.curve.object_id, a.class_name, a.class_id) for a in chunk]
    schema = pa.schema(
        [("alert_id", pa.int64()), ("object_id", pa.string()), ("class", pa.string()), ("class_id", pa.int32())],
        metadata={TRUTH_KEY: b"1"},
    )
    columns = [list(column) for column in zip(*truth, strict=True)] or [[] for _ in schema]
    pq.write_table(pa.table(columns, schema=schema), directory / "truth.parquet")
    return files


def _simulate_one(survey: str, seed: int, index: int, cutouts: bool) -> SimulatedAlert:
    rng = np.random.default_rng([seed, index])  # one generator per alert: the n-th alert is the same for every count
    cadence = CADENCES[survey]
    weights = np.array([item.weight for item in CLASSES])
    alert_class = CLASSES[rng.choice(len(CLASSES), p=weights / weights.sum())]
    for _ in range(1000):  # a faint or fast source can pass undetected, and another one is drawn
        observed = _observe(rng, survey, cadence, alert_class)
        if observed.detected.any():
            break
    else:
        raise AssertionError(f"{alert_class.name} is never detected")
    build = simulated_packets.ztf_packet if survey == "ztf" else simulated_packets.lsst_packet
    last = int(rng.choice(np.flatnonzero(observed.detected)))  # the exposure that raises this alert
    packet, curve = build(rng, observed.until(last), index, seed, cutouts)
    return SimulatedAlert(survey, packet, alert_class.name, alert_class.identifier, curve)


def _observe(
    rng: np.random.Generator, survey: str, cadence: Cadence, alert_class: AlertClass
) -> simulated_packets.Observations:
    wavelengths = np.array(survey_named(survey).wavelengths)
    time, band = visits(rng, cadence)
    depth = np.array(cadence.depth)
    limit = depth[band] + cadence.scatter * rng.standard_normal(len(time))
    r_band = survey_named(survey).bands.index("r")
    reference = fluxcal(depth[r_band] - rng.uniform(*alert_class.brightness) - FLUX_ZERO_POINT)
    flux = reference * alert_class.shape(rng, time, wavelengths[band], float(time[0]))
    sky = fluxcal(limit - FLUX_ZERO_POINT) / DETECTION_SNR
    # The photon noise comes from the light in the aperture of the difference: the change itself, and the steady source
    # below it.
    noise = np.sqrt(sky**2 + (np.abs(flux) + 0.2 * reference) / cadence.electrons)
    measured = flux + noise * rng.standard_normal(len(time))
    return simulated_packets.Observations(time, band, measured, noise, limit, np.abs(measured) >= DETECTION_SNR * noise)


def visits(rng: np.random.Generator, cadence: Cadence) -> tuple[Floats, npt.NDArray[np.int64]]:
    """Return times (MJD, ascending) and bands of one season, with two spells of bad weather."""
    start = cadence.first_mjd + rng.integers(0, 365)
    nights = np.cumsum(rng.choice(cadence.nights, size=int(SEASON_DAYS)))
    nights = nights[nights < SEASON_DAYS]
    for spell in rng.uniform(0, SEASON_DAYS, 2):
        nights = nights[(nights < spell) | (nights > spell + rng.uniform(3, 9))]
    hour = rng.uniform(0.15, 0.30, size=(len(nights), 1)) + rng.uniform(0.02, 0.05) * np.arange(cadence.visits)
    time = (start + nights[:, None] + hour).ravel()
    return time, rng.choice(len(cadence.band_weight), size=len(time), p=cadence.band_weight)


def _colour(wavelength: Floats, temperature: Floats | float) -> Floats:
    """Return the black-body f_nu at these wavelengths, relative to r."""
    ratio = np.expm1(HC_OVER_K / (R_BAND * temperature)) / np.expm1(HC_OVER_K / (wavelength * temperature))
    return np.asarray(ratio * (R_BAND / wavelength) ** 3)


def _supernova(rise: float, fall: float, hot: float, cool: float, plateau: float = 0.0) -> Shape:
    """Return a shape with an exponential rise and fall (Bazin+ 2009), optionally over a plateau, while the photosphere
    cools."""

    def shape(rng: np.random.Generator, time: Floats, wavelength: Floats, start: float) -> Floats:
        stretch = rng.uniform(0.85, 1.35)  # intrinsic width and time dilation
        phase = (time - start - rng.uniform(15, 120)) / stretch
        fading = np.exp(-np.clip(phase - plateau, 0, None) / fall)
        curve = fading / (1 + np.exp(-np.clip(phase / (rise / 4), -60, 60)))
        temperature = cool + (hot - cool) * np.exp(-np.clip(phase, 0, None) / 15)
        return np.asarray(curve * _colour(wavelength, temperature))

    return shape


def _tidal_disruption(rng: np.random.Generator, time: Floats, wavelength: Floats, start: float) -> Floats:
    """Return a Gaussian rise followed by the t^-5/3 decline of the fallback rate; the source stays hot."""
    phase = time - start - rng.uniform(25, 100)
    fallback = rng.uniform(25, 60)
    rise = np.exp(-0.5 * (np.clip(phase, None, 0) / rng.uniform(8, 16)) ** 2)
    decay = (1 + np.clip(phase, 0, None) / fallback) ** (-5 / 3)
    return np.asarray(rise * decay * _colour(wavelength, rng.uniform(15_000, 35_000)))


def _kilonova(rng: np.random.Generator, time: Floats, wavelength: Floats, start: float) -> Floats:
    """Return a flux that rises within hours and falls within days, and changes from blue to red."""
    phase = time - start - rng.uniform(10, 140)
    after = np.clip(phase, 0, None)
    curve = np.where(phase > 0, (1 - np.exp(-after / 0.3)) * np.exp(-after / rng.uniform(1.8, 3.5)), 0.0)
    return np.asarray(curve * _colour(wavelength, 2_500 + 6_000 * np.exp(-after / 1.5)))


def _active_nucleus(rng: np.random.Generator, time: Floats, wavelength: Floats, start: float) -> Floats:
    """Return a damped random walk in magnitude (Kelly+ 2009), stronger in the blue, against a reference of mean
    brightness."""
    memory = np.exp(-np.diff(time, prepend=-np.inf) / rng.uniform(40, 300))  # the first exposure has no memory
    steps = zip(memory.tolist(), (np.sqrt(1 - memory**2) * rng.standard_normal(len(time))).tolist(), strict=True)
    walk = rng.uniform(0.15, 0.5) * np.array(list(accumulate(steps, _walk_on, initial=0.0))[1:])
    steady = (wavelength / R_BAND) ** 0.4
    return np.asarray(steady * (fluxcal(walk * (wavelength / R_BAND) ** -0.5) - 1))


def _walk_on(value: float, step: tuple[float, float]) -> float:
    kept, added = step
    return kept * value + added


def _rr_lyrae(rng: np.random.Generator, time: Floats, wavelength: Floats, start: float) -> Floats:
    """Return a rounded saw tooth in magnitude: a fast rise and a slow decline, whose amplitude shrinks to the red."""
    phase = (time - start) / rng.uniform(0.4, 0.8) + rng.uniform()
    order = np.arange(1, 6)
    tooth = (np.sin(2 * np.pi * phase[:, None] * order) / order).sum(axis=1) / np.pi
    amplitude = rng.uniform(0.5, 1.2) * (wavelength / 4800) ** -0.8
    return np.asarray(_colour(wavelength, 6_800) * (fluxcal(-amplitude * tooth) - 1))


def _eclipsing_binary(rng: np.random.Generator, time: Floats, wavelength: Floats, start: float) -> Floats:
    """Return two dips per period, below a reference that is taken outside eclipse."""
    phase = ((time - start) / rng.uniform(0.4, 5.0) + rng.uniform()) % 1.0
    width = rng.uniform(0.03, 0.08)
    deep = rng.uniform(0.25, 0.7)
    first = deep * np.exp(-0.5 * ((phase - 0.25) / width) ** 2)
    second = deep * rng.uniform(0.2, 0.9) * np.exp(-0.5 * ((phase - 0.75) / width) ** 2)
    return np.asarray(-(first + second) * _colour(wavelength, rng.uniform(4_500, 8_500)))


CLASSES: Sequence[AlertClass] = (
    AlertClass("SNIa", 90, 0.22, (1.0, 4.0), _supernova(18, 20, 12_000, 5_500)),
    AlertClass("SNII", 42, 0.14, (1.0, 4.0), _supernova(8, 12, 14_000, 5_800, plateau=80)),
    AlertClass("SNIbc", 62, 0.10, (1.0, 4.0), _supernova(14, 14, 9_000, 4_800)),
    AlertClass("TDE", 15, 0.07, (1.0, 4.0), _tidal_disruption),
    AlertClass("KN", 64, 0.05, (0.5, 3.0), _kilonova),
    AlertClass("AGN", 88, 0.18, (1.5, 4.5), _active_nucleus),
    AlertClass("RRL", 92, 0.12, (2.0, 5.0), _rr_lyrae),
    AlertClass("EB", 16, 0.12, (2.0, 5.0), _eclipsing_binary),
)
