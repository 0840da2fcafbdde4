"""Measure the error that merging the points of long light curves makes, against the full solution, and the time.

    python tools/check_gp_merging.py --json benchmarks/gp_long.json

Simulated light curves (supernovae and damped random walks, at an even cadence and in nights of many visits) have 600
to 2,000 points in six bands and are merged to the shipped limit, and so are real alerts that have more points than it.
Shorter light curves, of real alerts and of PLAsTiCC, are merged to a half and to a quarter of their points. Real alerts
are read as the broker reads them.

The error is the largest difference of the means on the grid, relative to the largest mean of the full solution. "every
k-th" is the error of a reduction that takes as many points evenly instead of merging.
"""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from check_gp_parity import LSST, Sample, command_line, describe_machine, plasticc

from alert_broker.containers import BadPacket
from alert_broker.gaussian_process import MAX_POINTS, GaussianProcess, Interpolation, Status, warm_up
from alert_broker.lightcurve import LightCurves
from alert_broker.packets import batches, read_blocks
from alert_broker.surveys.base import Survey

REAL = ("ztf", "ztf_kowalski", "lsst_wire", "parquet", "other")  # folders of real alerts
FEWEST, MOST_OBJECTS = 64, 60  # points of a real light curve; objects of a sample
SPAN_DAYS = 365.0  # of a simulated light curve: the history that an LSST alert holds
CLASSES = ("supernova", "random walk")
CADENCES = ("even", "nights")
VISITS = 20  # of one field in a night of a deep-drilling survey
SIZES = ((600, 12), (1000, 8), (1500, 4), (2000, 2))  # points, and objects of each class and cadence


def simulated(source: str, cadence: str, points: int, seed: int) -> LightCurves:
    """Return one light curve of this many points in LSST's bands."""
    rng = np.random.default_rng([CLASSES.index(source), CADENCES.index(cadence), points, seed])
    if cadence == "even":
        when = np.sort(rng.uniform(0.0, SPAN_DAYS, points))
    else:
        nights = np.sort(rng.choice(int(SPAN_DAYS), -(-points // VISITS), replace=False))
        when = np.sort(np.repeat(nights, VISITS)[:points] + rng.uniform(0.0, 0.3, points))
    band = rng.integers(0, len(LSST), points)
    if source == "supernova":
        phase = when - rng.uniform(60.0, 250.0)
        shape = np.exp(-0.5 * (phase / np.where(phase < 0.0, 10.0, 25.0)) ** 2) * (1.0 + 0.1 * band)
    else:  # a damped random walk with a time scale of 30 days, the same in all bands but for its amplitude
        step = np.exp(-np.diff(when, prepend=when[0]) / 30.0)
        shape, value = np.empty(points), 0.0
        for k in range(points):
            value = step[k] * value + np.sqrt(1.0 - step[k] ** 2) * rng.normal()
            shape[k] = value
        shape *= 1.0 - 0.1 * band
    error = rng.uniform(2.0, 12.0, points)
    flux = 10 ** rng.uniform(1.5, 3.0) * shape + error * rng.normal(size=points)
    offsets = np.array([0, points], np.int64)
    return LightCurves(tuple(LSST), offsets, 59_000.0 + when, band.astype(np.int8), flux, error, flux > 5.0 * error)


def decimated(one: LightCurves, most: int) -> LightCurves:
    chosen = np.zeros(len(one.time), np.bool_)
    chosen[np.linspace(0, len(one.time) - 1, most).round().astype(int)] = True
    return one.where(chosen)


def error_of(found: Interpolation, full: Interpolation) -> float:
    return float(np.abs(found.mean - full.mean).max() / np.abs(full.mean).max())


def measure(process: GaussianProcess, curves: list[LightCurves], most: Any, name: str) -> dict[str, Any]:
    """Compare merged light curves with the full solution. most: gives the limit for a light curve of so many points."""
    errors, others, times, full_times = [], [], [], []
    for one in curves:
        points = len(one.time)
        limit = most(points)
        began = time.process_time()
        full = replace(process, max_points=points).interpolate(one, threads=1)
        middle = time.process_time()
        merged = replace(process, max_points=limit).interpolate(one, threads=1)
        times.append(time.process_time() - middle)
        full_times.append(middle - began)
        if full.fit.status[0] != Status.OK:
            continue
        errors.append(error_of(merged, full))
        others.append(error_of(replace(process, max_points=limit).interpolate(decimated(one, limit), threads=1), full))
    row = {
        "sample": name,
        "objects": len(errors),
        "points": float(np.median([len(one.time) for one in curves])),
        "limit": float(np.median([most(len(one.time)) for one in curves])),
        "error": percentiles(errors),
        "error_of_every_kth": percentiles(others),
        "milliseconds": 1e3 * float(np.median(times)),
        "full_milliseconds": 1e3 * float(np.median(full_times)),
    }
    print(
        f"{name:32s} {row['objects']:4d} objects {row['points']:5.0f} to {row['limit']:4.0f} points | error p50 "
        f"{row['error']['50']:.1e} p90 {row['error']['90']:.1e} max {row['error']['100']:.1e} | every k-th p50 "
        f"{row['error_of_every_kth']['50']:.1e} max {row['error_of_every_kth']['100']:.1e} | "
        f"{row['milliseconds']:7.1f} ms, full {row['full_milliseconds']:8.1f} ms",
        flush=True,
    )
    return row


def percentiles(values: list[float]) -> dict[str, float]:
    return {str(q): float(np.percentile(values, q)) for q in (50, 90, 100)}


def real_alerts(data: Path, low: int) -> dict[Survey, list[LightCurves]]:
    """Light curves of real alerts with at least `low` points, as the broker reads them: the longest of each object, at
    most `MOST_OBJECTS` of a survey."""
    longest: dict[tuple[str, str], tuple[int, Survey, LightCurves]] = {}
    for batch in batches(read_blocks(data / "alerts" / name for name in REAL)):
        if isinstance(batch, BadPacket):
            continue
        for k, name in enumerate(batch.alerts["object_id"].to_pylist()):
            key, points = (batch.survey.name, name), int(batch.curves.points[k])
            if points >= low and points > longest.get(key, (0,))[0]:
                longest[key] = points, batch.survey, batch.curves.take([k])
    found: dict[Survey, list[LightCurves]] = {}
    for _, survey, one in sorted(longest.values(), key=lambda item: item[0], reverse=True):
        if len(found.setdefault(survey, [])) < MOST_OBJECTS:
            found[survey].append(one)
    return found


def longest(sample: Sample, low: int, most: int) -> list[LightCurves]:
    """Choose up to `most` of the objects with at least `low` points."""
    chosen = np.flatnonzero(sample.curves.points >= low)
    chosen = np.random.default_rng(0).permutation(chosen)[:most]
    return [sample.curves.take([int(k)]) for k in chosen]


def main() -> None:
    options = command_line(__doc__).parse_args()
    machine = describe_machine()
    print(*(f"{name} {value}" for name, value in machine.items()), sep=", ")
    warm_up()
    rows = []
    lsst = GaussianProcess(tuple(LSST.values()))
    rubin = plasticc(options.data)
    samples = [("PLAsTiCC", rubin.wavelengths, longest(rubin, 251, MOST_OBJECTS))]
    for survey, curves in real_alerts(options.data, FEWEST).items():
        samples.append((f"{survey.name} alerts", survey.wavelengths, curves))
        if over := [one for one in curves if len(one.time) > MAX_POINTS]:
            name = f"{survey.name} alerts, to {MAX_POINTS} points"
            rows.append(measure(GaussianProcess(survey.wavelengths), over, lambda _: MAX_POINTS, name))
    for share in (2, 4):
        for name, wavelengths, curves in samples:
            process = GaussianProcess(wavelengths)
            text = f"{name}, to 1/{share} of the points"
            rows.append(measure(process, curves, lambda points, k=share: points // k, text))
    for source in CLASSES:
        for cadence in CADENCES:
            for points, objects in SIZES:
                curves = [simulated(source, cadence, points, seed) for seed in range(objects)]
                rows.append(measure(lsst, curves, lambda _: MAX_POINTS, f"{source}, {cadence}"))
    hostile = [simulated(source, "even", 10_000, 0) for source in CLASSES]
    began = time.process_time()
    for one in hostile:
        lsst.interpolate(one, threads=1)
    seconds = (time.process_time() - began) / len(hostile)
    print(f"10,000 points: {1e3 * seconds:.0f} ms of CPU for one light curve")
    if options.json:
        report = {"machine": machine, "rows": rows, "seconds_for_10000_points": seconds}
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
