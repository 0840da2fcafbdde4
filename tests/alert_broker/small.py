"""Small objects that several tests need: a bundle of t2 with random weights, a PLAsTiCC set of 56 objects, and the
light curve of a packet that is a dict."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from alert_broker import plasticc
from alert_broker.features import LightCurveFeatures
from alert_broker.surveys.base import LightCurve, PacketError, Survey, survey_named
from edgekit.bundle.family import build
from edgekit.bundle.format import Bundle, Manifest, assemble
from edgekit.bundle.tensors import TensorSpec


def features_of(bands=("g", "r"), **changes) -> LightCurveFeatures:
    """Preprocessing with LSST's wavelengths, as in the shipped models."""
    lsst = survey_named("lsst")
    wavelengths = tuple(lsst.wavelengths[lsst.bands.index(band)] for band in bands)
    scale = tuple(20.0 + 3 * number for number in range(len(bands)))  # each band has its own scale
    return LightCurveFeatures(tuple(bands), wavelengths, scale, **({"grid_points": 20} | changes))


def light_curve(survey: Survey, packet) -> LightCurve:
    """Return the light curve that the survey reads in one packet. Raises PacketError if there is none."""
    found = survey.light_curves(pa.RecordBatch.from_pylist([packet]))
    if found.errors:
        raise PacketError(found.errors[0])
    curves = found.curves
    return LightCurve(
        found.alert_id[0],
        found.object_id[0],
        curves.time,
        curves.band,
        curves.flux,
        curves.flux_error,
        curves.detected,
        found.upper_limits[0],
        found.dropped[0],
    )


def small_bundle(bands=("g", "r"), *, name="small", seed=0, features=None, **changes) -> Bundle:
    """Return the bundle, in memory. `changes` are fields of the manifest."""
    import torch

    features = features or features_of(bands)
    torch.manual_seed(seed)
    arguments = {
        "bands": len(features.seen),
        "context": len(features.context),
        "sequence": features.grid_points,
        "embed_dim": 8,
        "heads": 2,
        "ff_dim": 8,
    }
    model = build("t2", arguments)
    weights = {key: value.numpy().copy() for key, value in model.state_dict().items()}
    specs = [TensorSpec("light_curve", ("batch", features.grid_points, len(features.seen)))]
    if features.context:
        specs.append(TensorSpec("context", ("batch", len(features.context))))
    rng = np.random.default_rng(seed)
    inputs = {spec.name: rng.normal(size=(4, *spec.shape[1:])).astype(np.float32) for spec in specs}
    with torch.no_grad():
        outputs = torch.softmax(model(*map(torch.from_numpy, inputs.values())), dim=1).numpy()
    manifest = Manifest(
        name=name,
        family="t2",
        arguments=arguments,
        inputs=tuple(specs),
        outputs=(TensorSpec("probabilities", ("batch", len(plasticc.CLASSES))),),
        classes=tuple(plasticc.CLASSES.values()),
        class_ids=tuple(plasticc.CLASSES),
        preprocessing=features.to_bundle(),
    )
    return assemble(replace(manifest, **changes), weights, {}, (inputs, {"probabilities": outputs}))


def small_plasticc(per_class=4, seed=0) -> tuple[pa.Table, pa.Table]:
    """Return points and objects with the columns of the real files; both are unsorted."""
    rng = np.random.default_rng(seed)
    targets = np.repeat(list(plasticc.CLASSES), per_class)
    ids = rng.permutation(np.arange(100, 100 + 7 * len(targets), 7))
    owner = rng.permutation(np.repeat(ids, rng.integers(12, 30, len(ids))))
    count = len(owner)
    points = {
        "object_id": owner,
        "mjd": np.round(rng.uniform(59_600, 59_900, count), 4),
        "passband": rng.integers(0, 6, count),
        "flux": np.round(rng.normal(0, 60, count), 6),
        "flux_err": np.round(rng.uniform(1, 9, count), 6),
        "detected_bool": (rng.random(count) < 0.4).astype(np.int64),
    }
    redshift = np.round(rng.uniform(0, 1, len(ids)), 3)
    objects = {
        "object_id": ids,
        "target": targets,
        "hostgal_photoz": redshift,
        "hostgal_photoz_err": redshift / 10,
        "hostgal_specz": np.round(1.1 * redshift, 3),
        "ddf_bool": (np.arange(len(ids)) % 3 == 0).astype(np.int64),
        "true_z": redshift,
    }
    return pa.table(points), pa.table(objects)


def write_plasticc(folder: Path, points: pa.Table, objects: pa.Table) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for part, table in (("lightcurves", points), ("metadata", objects)):
        pq.write_table(table, folder / f"plasticc_train_{part}.parquet")
    return folder


def small_cutout_bundle(norm="rows") -> Bundle:
    """Return the bundle, in memory, of a braai with few units and random weights."""
    import torch

    from alert_broker.cutouts.braai import Braai, BraaiConfig
    from alert_broker.cutouts.bundle import braai_bundle

    torch.manual_seed(3)
    return braai_bundle(Braai(BraaiConfig(filters=(2, 2, 3, 3), hidden=4)).eval(), "small-braai", norm)


def fits(image, cards=None) -> bytes:
    """Return a FITS file with one primary image, as surveys write it. cards: further values of the header."""
    image = np.asarray(image)
    stored = image.astype(image.dtype.newbyteorder(">")).tobytes()
    bitpix = (8 if image.dtype.kind in "iu" else -8) * image.dtype.itemsize
    values = {"SIMPLE": "T", "BITPIX": bitpix, "NAXIS": 2, "NAXIS1": image.shape[1], "NAXIS2": image.shape[0]}
    text = "".join(f"{name:<8}= {value!s:>20}".ljust(80) for name, value in {**values, **(cards or {})}.items())
    text += "END".ljust(80)
    return text.ljust(-(-len(text) // 2880) * 2880).encode() + stored + b"\0" * (-len(stored) % 2880)
