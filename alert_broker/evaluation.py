"""Measure a classifier's answers against true classes: log-loss, ranking of SN Ia, and calibration by number of
detections.

Classes count the same in the log-loss; objects count the same in the calibration error.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import csv

from edgekit.compression.metrics import ClassAveragedLogLoss, ErrorRate, measure
from edgekit.errors import EdgekitError, unknown

Floats = npt.NDArray[np.floating]
Labels = npt.NDArray[np.int64]

SUPERNOVAE = ("SNII", "SNIbc", "SNIa")  # the classes that a broker most needs apart
RANKED = "SNIa"
BINS = 10  # of the calibration error
FEWEST = 20  # alerts: with fewer, a row of the table would be noise
# Numbers of detections with which alerts are counted together: from and to
DETECTIONS = ((1, 1), (2, 2), (3, 3), (4, 4), (5, 6), (7, 10), (11, 20), (21, 10_000))
KEYS = ("alert_id", "object_id")  # by which labels belong to results, most exact first


def calibration_error(probabilities: Floats, labels: Labels) -> float:
    """Return the expected calibration error of the best class's probability, in ten equal bins."""
    best, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    cell = np.minimum((best * BINS).astype(int), BINS - 1)
    apart = np.bincount(cell, weights=right - best, minlength=BINS)
    return float(np.abs(apart).sum() / len(labels))


def area_under_curve(score: Floats, positive: npt.NDArray[np.bool_]) -> float:
    """Return the chance that a positive scores higher than another row; a tie counts as half (Hanley & McNeil 1982)."""
    _, rank, count = np.unique(score, return_inverse=True, return_counts=True)
    middle = np.cumsum(count) - (count - 1) / 2.0  # the mean rank of equal scores, from 1 on
    yes = int(positive.sum())
    above = middle[rank][positive].sum() - yes * (yes + 1) / 2
    return float(above / (yes * (len(positive) - yes)))


def summary(
    probabilities: Floats, labels: Labels, classes: Sequence[str], detections: Labels | None = None
) -> dict[str, Any]:
    """Return the measures of (alerts, classes) probabilities: over all alerts, over supernovae, and by the number of
    detections. A measure without enough alerts is left out."""
    metric, present = ClassAveragedLogLoss(), np.unique(labels)
    found: dict[str, Any] = {
        "alerts": len(labels),
        "classes": {classes[label]: int((labels == label).sum()) for label in present},
        "log_loss": _measured(measure(metric, probabilities, labels)),
        "error_rate": _measured(measure(ErrorRate(), probabilities, labels)),
        "calibration_error": calibration_error(probabilities, labels),
    }
    wanted = [classes.index(name) for name in SUPERNOVAE if name in classes]
    if len(wanted) == len(SUPERNOVAE) and set(wanted) <= set(present.tolist()):
        rows = np.isin(labels, wanted)
        found["supernovae"] = _measured(measure(metric, probabilities[rows], labels[rows])) | {
            "found": {
                classes[label]: float((probabilities[labels == label].argmax(axis=1) == label).mean())
                for label in wanted
            }
        }
    if RANKED in classes and classes.index(RANKED) in present and len(present) > 1:
        number = classes.index(RANKED)
        found["auc_snia"] = area_under_curve(probabilities[:, number], labels == number)
    if detections is not None:
        found["by_detections"] = by_detections(probabilities, labels, detections)
    return found


def by_detections(probabilities: Floats, labels: Labels, detections: Labels) -> list[dict[str, Any]]:
    """Return log-loss, error rate and calibration error of the alerts with each number of detections."""
    rows = []
    for first, last in DETECTIONS:
        chosen = (detections >= first) & (detections <= last)
        if chosen.sum() < FEWEST:
            continue
        part, own = probabilities[chosen], labels[chosen]
        rows.append(
            {
                "from": first,
                "to": last,
                "alerts": int(chosen.sum()),
                "log_loss": ClassAveragedLogLoss().value(part, own),
                "error_rate": ErrorRate().value(part, own),
                "calibration_error": calibration_error(part, own),
            }
        )
    return rows


def _measured(item: Any) -> dict[str, float]:
    return {"value": item.value, "low": item.low, "high": item.high}


def evaluate_table(results: Path, labels: Path) -> dict[str, Any]:
    """Return the summary of a Parquet file that `classify` wrote, with the true classes of a Parquet or CSV file: a
    column `class`, and `alert_id` or `object_id`. Alerts without a class or without probabilities do not count."""
    table, truth = _read(results), _read(labels)
    names = [name.removeprefix("p_") for name in table.column_names if name.startswith("p_")]
    if not names or "n_forced" not in table.column_names:
        raise EdgekitError(f"{results} has no probabilities; expected a table that edgekit alerts classify wrote")
    if "class" not in truth.column_names or not (keys := [key for key in KEYS if key in truth.column_names]):
        raise EdgekitError(
            f"{labels} has the columns {', '.join(truth.column_names[:8])}; expected 'class', and 'alert_id' or "
            "'object_id'"
        )
    class_of = _classes_by_key(truth, keys[0], labels)
    for name in sorted(set(class_of.values())):
        if name not in names:
            raise unknown("class", name, names, where=str(labels))
    keyed = [class_of.get(str(key)) for key in table[keys[0]].to_pylist()]
    classified = np.array(table["p_" + names[0]].is_valid())
    rows = np.flatnonzero(classified & np.array([name is not None for name in keyed]))
    if len(rows) == 0:
        raise EdgekitError(f"no {keys[0]} of {results} is in {labels} and classified; check that they belong together")
    probabilities = np.stack([table[f"p_{name}"].to_numpy()[rows] for name in names], axis=1)
    detections = np.sum(
        [table[name].to_numpy()[rows] for name in table.column_names if name.startswith("n_det_")], axis=0
    )
    truths = np.array([names.index(str(keyed[row])) for row in rows])
    counted = {"unlabelled": int(sum(name is None for name in keyed)), "unclassified": int((~classified).sum())}
    return counted | summary(probabilities, truths, names, detections.astype(np.int64))


def _classes_by_key(truth: pa.Table, key: str, source: Path) -> Mapping[str, str]:
    found: dict[str, str] = {}
    for value, name in zip(truth[key].to_pylist(), truth["class"].to_pylist(), strict=True):
        if name is not None and found.setdefault(str(value), name) != name:
            raise EdgekitError(f"{source}: {key} {value} has the classes {found[str(value)]} and {name}; keep one")
    return found


def _read(path: Path) -> pa.Table:
    if not path.is_file():
        raise EdgekitError(f"{path} does not exist; expected a Parquet or CSV file")
    try:
        return csv.read_csv(path) if path.suffix == ".csv" else pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise EdgekitError(
            f"{path} cannot be read: {error}; expected a Parquet file, or CSV whose name ends in .csv"
        ) from None
