"""Compare alert_broker's Gaussian process with george and scipy, the published preprocessing, on real light curves.

    python tools/check_gp_parity.py --json parity.json

The tool answers three questions. Is the mean the same at the same parameters? Is the likelihood that our optimizer
finds, as george evaluates it, as high as the one that scipy's L-BFGS-B finds? Which of 7,848 published feature vectors
differ, and why?
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import fastavro
import george
import numpy as np
import pyarrow.parquet as pq
import scipy.optimize
from threadpoolctl import threadpool_limits

from alert_broker.gaussian_process import GaussianProcess, Status, warm_up
from alert_broker.lightcurve import LightCurves
from alert_broker.plasticc import load

ZTF = {"g": 4804.79, "r": 6436.92, "i": 7968.22}  # angstrom
LSST = {"u": 3685.0, "g": 4802.0, "r": 6231.0, "i": 7542.0, "z": 8690.0, "y": 9736.0}
PUBLISHED_BANDS = "giruyz"  # channel order of the published features
MARGIN_DAYS = 50.0  # the published trim: points must be strictly closer than this to the first and last detection
WORSE = 1e-6  # relative log-likelihood
DIFFERENT = 0.01  # share of the object's largest |flux|


@dataclass(frozen=True)
class Sample:
    """Named light curves and the wavelengths of their bands."""

    name: str
    objects: list[str]
    curves: LightCurves
    wavelengths: tuple[float, ...]

    def take(self, chosen: Any) -> Sample:
        objects = [self.objects[k] for k in chosen]
        return Sample(self.name, objects, self.curves.take(np.asarray(chosen)), self.wavelengths)

    def points(self, k: int) -> tuple[Any, Any, Any, Any]:
        """Return time, wavelength, flux and flux error of object k."""
        rows = slice(self.curves.offsets[k], self.curves.offsets[k + 1])
        colour = np.array(self.wavelengths)[self.curves.band[rows]]
        return self.curves.time[rows], colour, self.curves.flux[rows], self.curves.flux_error[rows]


def plasticc(data: Path) -> Sample:
    """Read the PLAsTiCC training set, trimmed as published, with times from 0."""
    source = load(data / "train")
    curves = source.curves
    owner, time_, detected = curves.object_of_point, curves.time, curves.detected
    first, last = np.full(len(curves), np.inf), np.full(len(curves), -np.inf)
    np.minimum.at(first, owner[detected], time_[detected])
    np.maximum.at(last, owner[detected], time_[detected])
    kept = curves.where((time_ > first[owner] - MARGIN_DAYS) & (time_ < last[owner] + MARGIN_DAYS))
    shifted = kept.time - kept.time[kept.offsets[:-1]][kept.object_of_point]
    kept = LightCurves(kept.bands, kept.offsets, shifted, kept.band, kept.flux, kept.flux_error, kept.detected)
    return Sample("PLAsTiCC", [str(k) for k in source.object_id], kept, tuple(LSST[band] for band in kept.bands))


def ztf(data: Path, bands: str = "gri", parquet: bool = False) -> Sample:
    """Read the detections of every ZTF alert that has two or more, from Avro and optionally from Fink's Parquet
    files."""
    found: dict[str, list[tuple[float, int, float, float]]] = {}
    for alert in _ztf_alerts(data, parquet):
        rows = set()
        for row in [alert["candidate"], *(alert["prv_candidates"] or [])]:
            if row["magpsf"] is None or math.isnan(row["magpsf"]) or row["fid"] > len(bands):
                continue
            sign = 1.0 if row["isdiffpos"] in ("t", "1") else -1.0
            flux = sign * 10.0 ** (-0.4 * (row["magpsf"] - 27.5))
            error = abs(flux) * 0.4 * math.log(10.0) * row["sigmapsf"]
            rows.add((row["jd"] - 2400000.5, int(row["fid"]) - 1, flux, error))
        if len(rows) >= 2:
            found[f"{alert['objectId']}/{alert['candid']}"] = sorted(rows)
    table = np.array([row for rows in found.values() for row in rows])
    offsets = np.concatenate([[0], np.cumsum([len(rows) for rows in found.values()])])
    curves = LightCurves(
        tuple(bands),
        offsets,
        table[:, 0],
        table[:, 1].astype(np.int8),
        table[:, 2],
        table[:, 3],
        np.ones(len(table), dtype=np.bool_),
    )
    return Sample("ZTF", list(found), curves, tuple(ZTF[band] for band in bands))


def _ztf_alerts(data: Path, parquet: bool) -> Iterator[dict[str, Any]]:
    for path in sorted((data / "alerts").glob("ztf*/*.avro")):
        with path.open("rb") as stream:
            yield from fastavro.reader(stream)
    if parquet:
        for path in sorted((data / "alerts" / "parquet").glob("fink_*.parquet")):
            columns = ["objectId", "candid", "candidate", "prv_candidates"]
            yield from pq.read_table(path, columns=columns).to_pylist()


def george_process(time_: Any, colour: Any, flux: Any, error: Any) -> Any:
    """Return the published model of one object, computed at its starting parameters."""
    significance = np.abs(flux) / np.sqrt(error**2 + (0.01 * np.max(flux)) ** 2)
    scale = np.abs(flux[significance.argmax()])
    kernel = (0.5 * scale) ** 2 * george.kernels.Matern32Kernel([20.0**2, 6000.0**2], ndim=2)
    kernel.freeze_parameter("k2:metric:log_M_1_1")
    process = george.GP(kernel)
    process.compute(np.vstack([time_, colour]).T, error)
    return process


def negative_log_likelihood(process: Any, flux: Any) -> Callable[[Any], float]:
    def objective(parameters: Any) -> float:
        process.set_parameter_vector(parameters)
        value = process.log_likelihood(flux, quiet=True)
        return -value if np.isfinite(value) else 1e25

    return objective


def fit_george(process: Any, flux: Any) -> Any:
    """Fit with scipy and return its result. The process keeps the optimum, or the starting parameters if scipy reports
    a failure."""

    def gradient(parameters: Any) -> Any:
        process.set_parameter_vector(parameters)
        return -process.grad_log_likelihood(flux, quiet=True)

    start = process.get_parameter_vector()
    result = scipy.optimize.minimize(
        negative_log_likelihood(process, flux),
        start,
        jac=gradient,
        method="L-BFGS-B",
        tol=1e-6,
        bounds=[(start[0] - 10.0, start[0] + 10.0), (0.0, math.log(1000.0**2))],
    )
    process.set_parameter_vector(result.x if result.success else start)
    return result


def mean_george(process: Any, time_: Any, flux: Any, wavelengths: tuple[float, ...], grid_points: int = 100) -> Any:
    """Return the mean, (grid_points, bands)."""
    grid = np.linspace(time_.min(), time_.max(), grid_points)
    columns = [
        process.predict(flux, np.vstack([grid, np.full(grid_points, wavelength)]).T, return_cov=False)
        for wavelength in wavelengths
    ]
    return np.stack(columns, axis=1)


def compare(sample: Sample) -> dict[str, Any]:
    """Compare the means at george's optimum, and the likelihoods of both optima as george computes them."""
    process = GaussianProcess(sample.wavelengths)
    fit = process.fit(sample.curves, threads=1)
    optimum = np.empty((len(sample.objects), 2))
    means, evaluations, failures, rows = [], [], 0, []
    for k, name in enumerate(sample.objects):
        time_, colour, flux, error = sample.points(k)
        reference = george_process(time_, colour, flux, error)
        result = fit_george(reference, flux)
        failures += not result.success
        evaluations.append(result.nfev)
        optimum[k] = reference.get_parameter_vector()
        means.append(mean_george(reference, time_, flux, sample.wavelengths))
        value = negative_log_likelihood(reference, flux)
        theirs, ours = value(optimum[k]), value([fit.log_amplitude[k], fit.log_metric[k]])
        rows.append(
            {
                "object": name,
                "points": len(flux),
                "excess": (ours - theirs) / max(abs(theirs), 1.0),
                "negative_log_likelihood": ours,
                "george_negative_log_likelihood": theirs,
                "days": math.exp(0.5 * fit.log_metric[k]),
                "george_days": math.exp(0.5 * optimum[k, 1]),
            }
        )
    predicted = process.predict(sample.curves, optimum[:, 0], optimum[:, 1], threads=1).mean
    expected = np.array(means)
    error_of_mean = np.abs(predicted - expected).max(axis=(1, 2)) / np.abs(expected).max(axis=(1, 2))
    excess = np.array([row["excess"] for row in rows])
    return {
        "sample": sample.name,
        "objects": len(rows),
        "status": {Status(code).name: count for code, count in sorted(Counter(fit.status.tolist()).items())},
        "evaluations": float(fit.evaluations.mean()),
        "george_evaluations": float(np.mean(evaluations)),
        "george_failures": failures,
        "largest_relative_error_of_mean": float(error_of_mean.max()),
        "not_worse": float((excess <= WORSE).mean()),
        "better": float((excess < -WORSE).mean()),
        "worse": [row for row in rows if row["excess"] > WORSE],
    }


def compare_features(sample: Sample, published: Any) -> dict[str, Any]:
    """Compare our means of all objects with the published ones. If they differ, repeat george's fit to find the
    reason."""
    order = np.searchsorted(published["object_id"], np.array(sample.objects, dtype=np.int64))
    channels = [PUBLISHED_BANDS.index(band) for band in sample.curves.bands]
    theirs = published["X"][order][:, :, channels].astype(np.float64)
    result = GaussianProcess(sample.wavelengths).interpolate(sample.curves)
    largest = np.maximum.reduceat(np.abs(sample.curves.flux), sample.curves.offsets[:-1])
    difference = np.abs(result.mean - theirs).max(axis=(1, 2)) / largest
    rows = []
    for k in np.flatnonzero(difference > DIFFERENT):
        time_, colour, flux, error = sample.points(int(k))
        reference = george_process(time_, colour, flux, error)
        start = reference.get_parameter_vector()
        scipys = fit_george(reference, flux)
        at_george = reference.get_parameter_vector()
        at_ours = np.array([result.fit.log_amplitude[k], result.fit.log_metric[k]])
        repeated = mean_george(reference, time_, flux, sample.wavelengths)
        if not scipys.success:
            why = "scipy failed: starting parameters"
        elif np.abs(repeated - theirs[k]).max() > DIFFERENT * largest[k]:
            why = "george here does not repeat the published features"
        else:
            why = explain(sample.take([k]), start, at_ours, at_george)
        rows.append(
            {
                "object": sample.objects[k],
                "points": len(flux),
                "difference": float(difference[k]),
                "why": why,
                "days": math.exp(0.5 * at_ours[1]),
                "george_days": math.exp(0.5 * at_george[1]),
            }
        )
    return {
        "objects": len(sample.objects),
        "differ": len(rows) / len(sample.objects),
        "difference_percentiles": {str(q): float(np.percentile(difference, q)) for q in (50, 90, 95, 99)},
        "why": dict(Counter(row["why"] for row in rows).most_common()),
        "rows_by_reason": {
            why: describe([row for row in rows if row["why"] == why])
            for why, _ in Counter(row["why"] for row in rows).most_common()
        },
    }


def describe(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the number of objects, and the 0th, 5th, 50th, 95th and 100th percentile of their figures."""
    return {"objects": len(rows)} | {
        f"{name}_percentiles": {
            str(q): float(np.percentile([row[name] for row in rows], q)) for q in (0, 5, 50, 95, 100)
        }
        for name in ("points", "difference", "days", "george_days")
    }


def explain(one: Sample, start: Any, at_ours: Any, at_george: Any) -> str:
    """Say whether two sets of parameters lie below the same maximum: climb from both in steps too small to leave it."""
    process = GaussianProcess(one.wavelengths, grid_points=1)

    def objective(parameters: Any) -> float:
        fit = process.predict(one.curves, parameters[:1], parameters[1:], threads=1).fit
        return -float(fit.log_likelihood[0])

    def climb(parameters: Any) -> Any:
        simplex = parameters + np.array([[0.0, 0.0], [0.02, 0.0], [0.0, 0.02]])
        bounds = [(start[0] - 10.0, start[0] + 10.0), (0.0, math.log(1000.0**2))]
        options = {"initial_simplex": simplex, "xatol": 1e-4, "fatol": 1e-9, "maxfev": 1000}
        return scipy.optimize.minimize(objective, parameters, method="Nelder-Mead", bounds=bounds, options=options).x

    ours, theirs = objective(at_ours), objective(at_george)
    higher = "higher" if ours < theirs else "lower"
    if np.abs(climb(at_ours) - climb(at_george)).max() > 0.05:
        return f"another maximum, {higher} than george's"
    return "the same maximum, " + ("which scipy stopped short of" if ours < theirs else "which ours stopped short of")


def describe_machine() -> dict[str, str]:
    """Return the facts on which a number depends."""
    root = Path(__file__).resolve().parents[1]
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"]
    commit = subprocess.run(command, capture_output=True, text=True, check=False)
    packages = ("numba", "numpy", "scipy", "george", "pandas", "scikit-learn")
    return {
        "cpu": names[0] if names else platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "commit": commit.stdout.strip() or "unknown",
    } | {package: version(package) for package in packages}


def command_line(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options that all tools for the Gaussian process have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    parser.add_argument("--data", type=data_folder, default=str(default), help="folder with alerts/ and train/")
    parser.add_argument("--json", type=Path, help="write the numbers here")
    return parser


def data_folder(text: str) -> Path:
    if not (Path(text) / "train").is_dir():
        raise argparse.ArgumentTypeError(f"{text} has no folder train; pass --data FOLDER")
    return Path(text)


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--objects", type=int, default=500, help="PLAsTiCC objects to fit with george too")
    options = parser.parse_args()
    began = time.time()
    report: dict[str, Any] = {"machine": describe_machine()}
    print(*(f"{name} {value}" for name, value in report["machine"].items()), sep=", ")
    warm_up()
    everything = plasticc(options.data)
    chosen = np.random.default_rng(0).choice(len(everything.objects), options.objects, replace=False)
    with threadpool_limits(1):
        report["fits"] = [compare(ztf(options.data, parquet=True)), compare(everything.take(chosen))]
        for part in report["fits"]:
            print(
                f"\n{part['sample']}: {part['objects']} objects, status {part['status']}, george failed on "
                f"{part['george_failures']}\n  mean at george's optimum: largest relative error "
                f"{part['largest_relative_error_of_mean']:.1e}\n  evaluations {part['evaluations']:.1f}, george "
                f"{part['george_evaluations']:.1f}\n  likelihood not worse than george's by {WORSE:.0e}: "
                f"{part['not_worse']:.2%}; better by more: {part['better']:.2%}"
            )
            for row in part["worse"]:
                print(
                    "  worse:", *(f"{name} {value:.6g}" if name != "object" else value for name, value in row.items())
                )
        published = np.load(options.data / "train" / "plasticc_train_gp100_original.npz")
        features = report["features"] = compare_features(everything, published)
    print(f"\npublished features of {features['objects']} objects: {features['differ']:.2%} differ by more than 1 % of")
    print("the largest |flux|; percentiles of the difference", features["difference_percentiles"])
    for why, count in features["why"].items():
        print(f"  {count:4d}  {why}")
    report["seconds"] = round(time.time() - began, 1)
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
