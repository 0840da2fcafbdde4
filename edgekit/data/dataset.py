"""Labelled data for recovery training and for quality: an .npz with the model's inputs, `labels` and `split`."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import platformdirs

from edgekit.bundle.files import write_file
from edgekit.bundle.format import Manifest
from edgekit.bundle.tensors import Arrays, arrays_to_bytes
from edgekit.data.sources import EXPECTED, read
from edgekit.errors import EdgekitError
from edgekit.session import check_inputs

TRAIN, TEST = 0, 1
UNKNOWN = -1  # label of a row that has none


@dataclass(frozen=True, slots=True)
class Dataset:
    """inputs: arrays by name, (samples, ...); labels: (samples,) int64, index of the class, or UNKNOWN; for regression
    (samples, ...) floats."""

    inputs: Mapping[str, npt.NDArray[Any]]
    labels: npt.NDArray[Any]

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: npt.NDArray[np.integer]) -> Dataset:
        return Dataset({name: array[rows] for name, array in self.inputs.items()}, self.labels[rows])


def is_labelled(data: Dataset) -> bool:
    """Return whether labels were given."""
    return data.labels.dtype.kind == "f" or bool((data.labels != UNKNOWN).any())


def folder() -> Path:
    """Return the folder of prepared data sets: $EDGEKIT_DATA, or edgekit's folder in the user's data directory."""
    given = os.environ.get("EDGEKIT_DATA")
    return Path(given) if given else platformdirs.user_data_path("edgekit")


def locate(manifest: Manifest, given: str | None) -> str | Path:
    """Return the data to use: what was given, else the prepared file that the bundle names."""
    if given is not None:
        return given
    if manifest.data is None:
        raise EdgekitError(
            f"{manifest.name} names no data set of its own; pass --data with the inputs, labels and split: {EXPECTED}"
        )
    path = folder() / f"{manifest.data}.npz"
    if not path.is_file():
        raise EdgekitError(
            f"{manifest.name} is measured on the data set {manifest.data!r}, which is not prepared: no {path}; "
            f"run: edgekit data {manifest.data}, or pass --data FILE.npz (inputs, labels, split)"
        )
    return path


def load(path: str | Path, manifest: Manifest, *, labelled: bool = True) -> tuple[Dataset, Dataset]:
    """Return the training and test part of a data source, checked against what the model takes. Labels may be missing
    if nobody needs them (`labelled` is False)."""
    return checked(read(path, manifest), manifest, path, labelled=labelled)


def checked(
    rows: Arrays, manifest: Manifest, path: str | Path = "data", *, labelled: bool = True
) -> tuple[Dataset, Dataset]:
    """Return the training and test part of named arrays, checked against what the model takes. path: where they come
    from."""
    arrays = dict(rows)
    if "labels" not in arrays and not labelled and arrays:
        arrays["labels"] = np.full(len(next(iter(arrays.values()))), UNKNOWN)
    wanted = {spec.name for spec in manifest.inputs}
    missing = (wanted | {"labels", "split"}) - set(arrays)
    if missing:
        raise EdgekitError(
            f"{path}: no array {min(missing)!r}; {manifest.name} needs {', '.join(sorted(wanted))}, labels and split "
            f"(0 = training, 1 = test), the file has {', '.join(sorted(arrays))}"
        )
    made_for = arrays["preprocessing"].tolist() if "preprocessing" in arrays else None
    if made_for not in (None, [json.dumps(manifest.preprocessing, sort_keys=True)]):
        raise EdgekitError(
            f"{path}: made with another preprocessing than {manifest.name} has; "
            f"run: edgekit data {manifest.data} --force, or pass --data FILE.npz"
        )
    inputs = {spec.name: arrays[spec.name] for spec in manifest.inputs}  # in the order in which the network takes them
    check_inputs(manifest.inputs, inputs)
    for name in ("labels", "split"):
        numbers = name == "labels" and not manifest.classes and arrays[name].dtype.kind == "f"  # regression
        if not numbers and ((got := arrays[name]).ndim != 1 or got.dtype.kind not in "iu"):
            raise EdgekitError(
                f"{path}: {name} has shape {got.shape} and dtype {got.dtype}; expected whole numbers, (samples,)"
            )
    labels, split = arrays["labels"], arrays["split"]
    labels = labels.astype(np.float32 if labels.dtype.kind == "f" else np.int64)
    if not np.isfinite(labels).all():
        raise EdgekitError(f"{path}: labels hold NaN or infinite values; leave those rows out")
    if not len(labels) == len(split) == len(next(iter(inputs.values()))):
        raise EdgekitError(f"{path}: {len(labels)} labels and {len(split)} split values for other numbers of inputs")
    if strange := set(np.unique(split)) - {TRAIN, TEST}:
        raise EdgekitError(f"{path}: split holds {min(strange)}; expected {TRAIN} (training) or {TEST} (test)")
    given = len(labels) and manifest.classes and (labelled or (labels != UNKNOWN).any())
    if given and not (labels.min() >= 0 and labels.max() < len(manifest.classes)):
        raise EdgekitError(
            f"{path}: labels span {labels.min()} to {labels.max()}; expected 0 to {len(manifest.classes) - 1}"
        )
    whole = Dataset(inputs, labels)
    parts = whole.take(np.flatnonzero(split == TRAIN)), whole.take(np.flatnonzero(split == TEST))
    if not all(map(len, parts)):
        raise EdgekitError(f"{path}: {len(parts[0])} training and {len(parts[1])} test samples; both must be there")
    return parts


def save(path: Path, inputs: Arrays, labels: npt.NDArray[np.integer], split: npt.NDArray[np.integer]) -> None:
    """Write a data file in one step."""
    write_file(path, arrays_to_bytes({**inputs, "labels": labels.astype(np.int32), "split": split.astype(np.int8)}))
