"""Compare the CPU time per light curve of the compiled Gaussian process and of the published preprocessing, on one
thread each.

    python tools/bench_gp.py --json bench_gp.json

The tool times the reference object by object, as a broker runs it: a pandas frame of the points, george with scipy's
L-BFGS-B, george's mean and variance in every band, filter, pivot_table and vstack, scikit-learn's RobustScaler. This
file writes the reference with pandas throughout; the published code builds astropy tables in between, which is slower.
The core of the reference (george and scipy on numpy arrays, mean only) has a column of its own; each object takes both
in turns, once to warm up and once for the time. edgekit takes all objects of a class in one call (fit, mean and
scaling), and then makes one call for each object. Times are CPU time of this process.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from check_gp_parity import (
    Sample,
    command_line,
    describe_machine,
    fit_george,
    george_process,
    mean_george,
    plasticc,
    ztf,
)
from sklearn.preprocessing import RobustScaler
from threadpoolctl import threadpool_limits

from alert_broker.gaussian_process import GaussianProcess, warm_up
from edgekit.cost.timing import in_turns, timed

CLASSES = (  # survey, fewest points, most points, objects
    ("ZTF", 2, 40, 120),
    ("PLAsTiCC", 2, 29, 60),
    ("PLAsTiCC", 30, 59, 60),
    ("PLAsTiCC", 60, 119, 60),
    ("PLAsTiCC", 120, 250, 60),
    ("PLAsTiCC", 251, 352, 20),
)
REPEATS = 5  # of edgekit's calls, which are too short to time once


def reference(sample: Sample, k: int) -> Any:
    """Return the published features of one object, by the published steps."""
    curves = sample.curves
    rows = slice(curves.offsets[k], curves.offsets[k + 1])
    wavelength_of = dict(zip(curves.bands, sample.wavelengths, strict=True))
    frame = pd.DataFrame(
        {
            "object_id": sample.objects[k],
            "mjd": curves.time[rows],
            "flux": curves.flux[rows],
            "flux_error": curves.flux_error[rows],
            "filter": [curves.bands[band] for band in curves.band[rows]],
        }
    )
    features = []
    for name in frame["object_id"].unique():
        points = frame[frame["object_id"] == name]
        flux = points["flux"].astype(float)
        colour = points["filter"].map(wavelength_of).to_numpy()
        process = george_process(points["mjd"].astype(float), colour, flux, points["flux_error"].astype(float))
        fit_george(process, flux)
        grid = np.linspace(points["mjd"].min(), points["mjd"].max(), 100)
        bands = []
        for band, wavelength in wavelength_of.items():
            at = np.vstack([grid, np.ones(len(grid)) * wavelength]).T
            mean, variance = process.predict(flux, at, return_var=True)
            columns = {"mjd": grid, "flux": mean, "flux_error": np.sqrt(np.maximum(variance, 0.0)), "filter": band}
            bands.append(pd.DataFrame(columns))
        table = pd.concat(bands, ignore_index=True)
        table = pd.pivot_table(table, index="mjd", columns="filter", values="flux").reset_index()
        table["object_id"] = name
        features.append(table)
    stacked = pd.DataFrame(np.vstack(features), columns=features[0].columns)
    stacked[list(curves.bands)] = RobustScaler().fit_transform(stacked[list(curves.bands)])
    return stacked


def core_of_reference(sample: Sample, k: int) -> Any:
    """Return the mean of one object by george and scipy alone."""
    time_, colour, flux, error = sample.points(k)
    process = george_process(time_, colour, flux, error)
    fit_george(process, flux)
    return mean_george(process, time_, flux, sample.wavelengths)


def ours(process: GaussianProcess, sample: Sample) -> Any:
    """Return the features of all objects: the arcsinh of the mean scaled with constants."""
    mean = process.interpolate(sample.curves, threads=1).mean
    return np.arcsinh((mean - 10.0) / 30.0).astype(np.float32)


def cpu_milliseconds(*calls: Callable[[], Any], repeats: int = 1) -> npt.NDArray[np.float64]:
    """Return the CPU milliseconds of the quickest of some runs of each call, made in turns."""
    taken = in_turns([timed(call, time.process_time) for call in calls], least=repeats, most=repeats, warmup=1)
    return taken[:, :, 0].min(axis=0) * 1e3


def measure(sample: Sample, low: int, high: int, most: int) -> dict[str, Any]:
    points = sample.curves.points
    chosen = np.flatnonzero((points >= low) & (points <= high))
    if len(chosen) > most:
        chosen = np.sort(np.random.default_rng(0).choice(chosen, most, replace=False))
    sample = sample.take(chosen)
    process = GaussianProcess(sample.wavelengths)
    singles = [sample.take([k]) for k in range(len(chosen))]
    pairs = (
        cpu_milliseconds(functools.partial(reference, sample, k), functools.partial(core_of_reference, sample, k))
        for k in range(len(chosen))
    )
    theirs, core = np.array(list(pairs)).T
    batch = float(cpu_milliseconds(lambda: ours(process, sample), repeats=REPEATS)[0]) / len(chosen)
    alone = np.concatenate(
        [cpu_milliseconds(functools.partial(ours, process, one), repeats=REPEATS) for one in singles]
    )
    return {
        "survey": sample.name,
        "bands": len(sample.wavelengths),
        "points": [low, high],
        "median_points": float(np.median(sample.curves.points)),
        "objects": len(chosen),
        "reference_ms": summary(theirs),
        "core_of_reference_ms": summary(core),
        "ours_batch_ms": batch,
        "ours_one_by_one_ms": summary(alone),
        "ratio": theirs.mean() / batch,
        "ratio_to_core": core.mean() / batch,
    }


def summary(values: Any) -> dict[str, float]:
    return {"mean": float(values.mean())} | {f"p{q}": float(np.percentile(values, q)) for q in (50, 95)}


def main() -> None:
    options = command_line(__doc__).parse_args()
    machine = describe_machine()
    print(*(f"{name} {value}" for name, value in machine.items()), sep=", ")
    (compile_seconds,) = timed(warm_up, time.process_time)()
    print(f"kernel ready after {compile_seconds:.1f} CPU s (compiled, or loaded from numba's cache)\n")
    samples = {item.name: item for item in (ztf(options.data, bands="gr", parquet=True), plasticc(options.data))}
    print(
        "                         |     reference, ms       | its core | edgekit, batch, ms   | edgekit, one by one\n"
        "survey   points   median |   mean      p50     p95 |     mean |    mean  ratio /core |     p50     p95"
    )
    rows = []
    with threadpool_limits(1):
        for survey, low, high, most in CLASSES:
            row = measure(samples[survey], low, high, most)
            rows.append(row)
            theirs, core, alone = row["reference_ms"], row["core_of_reference_ms"], row["ours_one_by_one_ms"]
            print(
                f"{survey:8s} {low:3d}-{high:<4d} {row['median_points']:6.0f} | "
                f"{theirs['mean']:6.1f} {theirs['p50']:8.1f} {theirs['p95']:7.1f} | {core['mean']:8.1f} | "
                f"{row['ours_batch_ms']:7.4f} {row['ratio']:6.0f} {row['ratio_to_core']:5.0f} | "
                f"{alone['p50']:7.4f} {alone['p95']:7.4f}",
                flush=True,
            )
    print("\nratio: the mean time of the reference, or of its core, divided by edgekit's; same objects, same run")
    if options.json:
        options.json.write_text(json.dumps({"machine": machine, "classes": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
