"""Measure t2 models on several populations, each beside the published weights on the same objects.

    python tools/evaluate_t2.py --data ../shared/data --augmented runs/augmented/test --json t2_populations.json
    python tools/evaluate_t2.py --data DATA --augmented runs/augmented/test --model t2-gr --model new=runs/new.edge

Populations: the test objects of PLAsTiCC's training sample (the author's split), the augmented population that
tools/augment_plasticc.py makes from the same test objects, whole and cut at a random detection, and SPCC, which is
another simulation of another survey. Nothing here was trained on. The published models read light curves that are
scaled by constants of a 5,000-object sample, because their own were never stored; the folder holds these constants.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from alert_broker import plasticc
from alert_broker.augment import files
from alert_broker.degrade import cut_at_detection
from alert_broker.evaluation import summary
from alert_broker.features import LightCurveFeatures
from alert_broker.gaussian_process import GaussianProcess
from alert_broker.lightcurve import LightCurves
from alert_broker.surveys.base import survey_named
from edgekit import machine
from edgekit.bundle.format import Bundle
from edgekit.bundle.store import open_bundle
from edgekit.data.dataset import Dataset
from edgekit.importers.files import resolve
from edgekit.nn.t2_weights import from_published
from edgekit.nn.training import probabilities
from edgekit.session import open_session

CLASSES = tuple(plasticc.CLASSES.values())
PUBLISHED = {"published t2": "weights_t2_GR_noZ.npz", "published tinho": "weights_tinho_GR_noZ.npz"}
SCALED_BANDS = "giruyz"  # the order in which the scaling constants are stored
SPCC_STEP = 4  # every fourth object of SPCC's 21,319
SPCC_TYPES = {"Ia": "SNIa", "II": "SNII", "IIn": "SNII", "IIL": "SNII", "IIP": "SNII"} | dict.fromkeys(
    ("Ib", "Ic", "Ibc"), "SNIbc"
)
DETECTION_SNR = 5.0  # SPCC does not say which points were detected


@dataclass(frozen=True)
class Population:
    """Light curves with labels, and the filters that they were observed in."""

    name: str
    curves: LightCurves
    labels: np.ndarray
    wavelengths: tuple[float, ...]

    @property
    def detections(self) -> np.ndarray:
        return np.bincount(self.curves.object_of_point[self.curves.detected], minlength=len(self.curves))


def populations(data: Path, augmented: Path) -> Iterator[Population]:
    lsst = survey_named("lsst").wavelengths
    sample = plasticc.load(data / "train")
    test = sample.take(np.flatnonzero(sample.split() == 1))
    yield Population("training sample, the author's test objects", test.curves, test.label, lsst)
    new = files.load(augmented)
    if not set(new.object_id) <= set(test.object_id):
        raise SystemExit(f"{augmented} was not made from the test objects; run tools/augment_plasticc.py --split test")
    yield Population("augmented population", new.curves, new.label, lsst)
    own = _in(new.curves, ("g", "r"))
    cut, _ = cut_at_detection(new.curves, np.random.default_rng(5))
    yield Population("augmented population, at a random detection", cut, new.label, lsst)
    seen = np.flatnonzero(np.bincount(own.object_of_point[own.detected], minlength=len(own)) > 0)
    cut, _ = cut_at_detection(own.take(seen), np.random.default_rng(6))
    name = "augmented population, g and r alone, at a random detection"
    yield Population(name, cut, new.label[seen], lsst)
    yield spcc(data / "train")


def _in(curves: LightCurves, bands: tuple[str, ...]) -> LightCurves:
    return curves.where(np.isin(curves.band, [curves.bands.index(band) for band in bands]))


def spcc(folder: Path) -> Population:
    """Return supernovae of the Supernova Photometric Classification Challenge, with DES's filters."""
    points = pq.read_table(folder / "spcc_des_lightcurves.parquet")
    objects = pq.read_table(folder / "spcc_des_metadata.parquet")
    identifiers = np.sort(objects["object_id"].to_numpy())[::SPCC_STEP]
    kind = dict(zip(objects["object_id"].to_pylist(), objects["sim_type"].to_pylist(), strict=True))
    owner, time = points["object_id"].to_numpy(), points["mjd"].to_numpy()
    rows = np.flatnonzero(np.isin(owner, identifiers))
    rows = rows[np.lexsort((time[rows], owner[rows]))]
    flux, error = (points[name].to_numpy()[rows].astype(np.float64) for name in ("flux", "flux_err"))
    decam = survey_named("decam")
    names = points["band"].to_pandas().astype(str).to_numpy()[rows]
    band = np.array([decam.bands.index(name) for name in names], dtype=np.int8)
    offsets = np.searchsorted(owner[rows], identifiers)
    offsets = np.append(offsets, len(rows)).astype(np.int64)
    curves = LightCurves(decam.bands, offsets, time[rows], band, flux, error, flux > DETECTION_SNR * error)
    labels = np.array([CLASSES.index(SPCC_TYPES[kind[int(number)]]) for number in identifiers])
    return Population("SPCC (DES)", curves, labels, decam.wavelengths)


def ours(bundle: Bundle, population: Population) -> np.ndarray:
    """Return a model's probabilities, as `classify` computes them."""
    features = LightCurveFeatures.from_bundle(bundle.manifest.preprocessing, bundle.manifest.name)
    known = dict(zip(population.curves.bands, population.wavelengths, strict=True))
    bands = tuple(band for band in features.bands if band in known)
    features = replace(features, bands=bands, wavelengths=tuple(known[band] for band in bands))
    inputs = features(population.curves).inputs()
    return open_session(bundle, "onnxruntime").run(inputs)[bundle.manifest.outputs[0].name]


def published(weights: Path, scaling: dict[str, np.ndarray], population: Population) -> np.ndarray:
    """Return the probabilities of published weights behind the published preprocessing: the Gaussian process's mean in
    g and r, scaled by constants of each band."""
    with np.load(weights) as saved:
        model = from_published(dict(saved), context=0, source=str(weights))
    bands = population.curves.bands
    trimmed = LightCurveFeatures(bands, population.wavelengths, (1.0,) * len(bands)).select(population.curves)
    shown = [bands.index(band) for band in "gr"]
    mean = GaussianProcess(population.wavelengths).interpolate(trimmed, bands=shown).mean
    stored = [SCALED_BANDS.index(band) for band in "gr"]
    scaled = (mean - scaling["center"][stored]) / scaling["scale"][stored]
    data = Dataset({"light_curve": scaled.astype(np.float32)}, np.zeros(len(scaled), np.int64))
    return probabilities(model, data)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with train/ and t2_reference/")
    parser.add_argument("--augmented", type=Path, required=True, help="set of tools/augment_plasticc.py, split test")
    parser.add_argument("--model", action="append", default=[], help="model, or NAME=BUNDLE [default: t2-gr]")
    parser.add_argument("--json", type=Path, help="file for the numbers")
    options = parser.parse_args()
    chosen = [text.partition("=") for text in options.model or ["t2-gr"]]
    bundles = {name: open_bundle(Path(path)) if path else resolve(name) for name, _, path in chosen}
    with np.load(options.data / "t2_reference" / "reference_io.npz") as saved:
        scaling = {
            "center": saved["scaler_center_ugrizy_order_g_i_r_u_y_z"].astype(np.float64),
            "scale": saved["scaler_scale"].astype(np.float64),
        }
    result: dict[str, Any] = {"machine": machine.describe(), "populations": {}}
    result["models"] = {name: bundle.digest for name, bundle in bundles.items()}
    print(f"{'population':60s} {'model':18s} {'log-loss':>8s} {'II/Ibc/Ia':>9s} {'AUC Ia':>6s} {'ECE':>6s}")
    for population in populations(options.data, options.augmented):
        rows = {name: ours(bundle, population) for name, bundle in bundles.items()}
        for name, file in PUBLISHED.items():
            rows[name] = published(options.data / "t2_reference" / file, scaling, population)
        found = {}
        for name, answer in rows.items():
            found[name] = summary(answer, population.labels, CLASSES, population.detections)
            _print_row(population.name, name, found[name])
        result["populations"][population.name] = {
            "objects": len(population.labels),
            "models": {name: _stored(item) for name, item in found.items()},
        }
    if options.json:
        options.json.write_text(json.dumps(result, separators=(",", ": ")) + "\n")


def _print_row(population: str, model: str, found: dict[str, Any]) -> None:
    supernovae = found.get("supernovae", {"value": np.nan})["value"]
    numbers = (found["log_loss"]["value"], supernovae, found.get("auc_snia", np.nan), found["calibration_error"])
    print(
        f"{population:60s} {model:18s} " + " ".join(f"{n:{w}.3f}" for n, w in zip(numbers, (8, 9, 6, 6), strict=True))
    )


def _stored(found: dict[str, Any]) -> dict[str, Any]:
    """Return the measures that are kept; by_detections: from, alerts, log-loss and calibration error of each row."""
    kept = {name: found[name] for name in ("log_loss", "calibration_error", "auc_snia")}
    kept["error_rate"] = found["error_rate"]["value"]
    kept["supernovae"] = {name: found["supernovae"][name] for name in ("value", "low", "high")}
    names = ("from", "alerts", "log_loss", "calibration_error")
    kept["by_detections"] = [[row[name] for name in names] for row in found["by_detections"]]
    return dict(_rounded(kept))


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return round(value, 4) if isinstance(value, float) else value


if __name__ == "__main__":
    main()
