"""Where rows come from: an .npz, a Parquet table, a folder of images, or an iterable of the user's. Each gives the same
named arrays: the model's inputs, `labels` and `split` (0 = training, 1 = test)."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from edgekit.bundle.bounded import claim
from edgekit.bundle.format import Manifest
from edgekit.bundle.tensors import Arrays, TensorSpec, read_arrays
from edgekit.errors import EdgekitError, missing_extra
from edgekit.plugins import imported

PARTS = {"train": 0, "test": 1}
IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
# the only decoders that may read a file, whatever its name ends in: others start programs, such as Ghostscript for EPS
DECODERS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF")
MOST_PIXELS, PIXEL_BYTES = 100_000_000, 8  # of one image; bytes of a pixel as it is decoded and as it is converted
EXPECTED = "an .npz or .parquet file, a folder with train/CLASS/*.png and test/CLASS/*.png, or package.module:iterable"


def read(source: str | Path, manifest: Manifest) -> Arrays:
    """The arrays of a data source, not yet checked against the model."""
    path, text = Path(source), str(source)
    if path.is_dir():
        return from_images(path, manifest)
    if not path.is_file():
        if ":" in text and "/" not in text:
            return from_iterable(text, manifest)
        raise EdgekitError(f"{path}: no such data file; expected {EXPECTED}")
    if path.suffix == ".parquet":
        return from_parquet(path, manifest)
    return read_arrays(path)


def from_parquet(path: Path, manifest: Manifest) -> Arrays:
    """A column for each input (numbers, or lists of them flattened), `labels` and `split`."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ModuleNotFoundError:
        raise missing_extra("pyarrow", "data", "reading a Parquet table") from None
    from edgekit.data.parquet import declared_bytes

    specs = {spec.name: spec for spec in manifest.inputs}
    wanted = {*specs, "labels", "split"}
    try:
        with path.open("rb") as stream, pq.ParquetFile(stream) as parquet:
            leaves = [parquet.schema.column(index).path for index in range(len(parquet.schema))]
            read = {leaf for leaf in leaves if leaf in wanted or leaf.partition(".")[0] in wanted}
            claim(sum(declared_bytes(stream, parquet.metadata, read)), path.stat().st_size, str(path))
            _check_columns(parquet.schema_arrow, wanted, path)
            table = parquet.read([name for name in parquet.schema_arrow.names if name in wanted])
    except (pa.ArrowException, OSError, ValueError) as error:
        raise EdgekitError(f"{path}: cannot be read as Parquet: {error}") from None
    arrays: Arrays = {}
    for name in table.column_names:
        column = table.column(name).combine_chunks()
        while isinstance(column, (pa.ListArray, pa.LargeListArray, pa.FixedSizeListArray)):
            if column.null_count or len(column.value_lengths().unique()) > 1:
                raise EdgekitError(f"{path}: the lists of column {name!r} differ in length, or some are missing")
            column = column.flatten()
        if column.null_count:
            raise EdgekitError(
                f"{path}: column {name!r} holds {column.type} with {column.null_count} missing; expected numbers, or "
                "lists of them, in every row"
            )
        values = column.to_numpy(zero_copy_only=False)
        arrays[name] = _shaped(values, specs[name], table.num_rows, path) if name in specs else values
    return arrays


def _check_columns(schema: Any, wanted: Collection[str], path: Path) -> None:
    """Raise unless the columns hold numbers, or lists of them: a column of texts would take memory before it is
    refused."""
    import pyarrow as pa

    for field in schema:
        kind = field.type
        while pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
            kind = kind.value_type
        if field.name in wanted and not (pa.types.is_primitive(kind) and not pa.types.is_temporal(kind)):
            raise EdgekitError(
                f"{path}: column {field.name!r} holds {kind}; expected numbers, or lists of them, in every row"
            )


def _shaped(values: np.ndarray[Any, Any], spec: TensorSpec, rows: int, path: Path) -> np.ndarray[Any, Any]:
    axes = [axis for axis in spec.shape[1:] if isinstance(axis, int)]
    if len(axes) != len(spec.shape) - 1 or values.size != rows * int(np.prod(axes)):
        raise EdgekitError(
            f"{path}: column {spec.name!r} has {values.size} numbers in {rows} rows; expected {spec.shape_text}"
        )
    return values.reshape(rows, *axes).astype(spec.dtype)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep Pillow from printing lines of its own about a file: its size is checked here, and an error has one line."""
    log = logging.getLogger("PIL")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        log.setLevel(level)


def from_images(folder: Path, manifest: Manifest) -> Arrays:
    """Images as the manifest's preprocessing says: {"id": "image/1", "mean": [...], "std": [...]}, per channel, of
    pixels from 0 to 1. Each is scaled so that its shorter side fits, then cut at the centre."""
    try:
        from PIL import Image, ImageOps
    except ModuleNotFoundError:
        raise missing_extra("pillow", "data", "reading images") from None
    spec = manifest.inputs[0]
    settings = manifest.preprocessing or {}
    if len(manifest.inputs) != 1 or len(spec.shape) != 4 or spec.shape[1] not in (1, 3):
        raise EdgekitError(f"{folder}: images need a model with one input (batch, 1 or 3 channels, height, width)")
    if settings.get("id") != "image/1" or not {"mean", "std"} <= set(settings):
        raise EdgekitError(
            f"{folder}: how pixels become {spec.name!r} is not known, and a guess would cost accuracy; import the "
            """model with --preprocessing '{"id": "image/1", "mean": [...], "std": [...]}'"""
        )
    _, channels, height, width = spec.shape
    assert isinstance(channels, int)
    assert isinstance(height, int)
    assert isinstance(width, int)
    found = [
        (path, path.parent.name, part)
        for name, part in PARTS.items()
        for path in sorted((folder / name).glob("*/*"))
        if path.suffix.lower() in IMAGES
    ]
    classes = list(manifest.classes) or sorted({label for _, label, _ in found})
    if strange := {label for _, label, _ in found} - set(classes):
        raise EdgekitError(f"{folder}: class {min(strange)!r} is not one of the model's: {', '.join(classes)}")
    if not found:
        raise EdgekitError(f"{folder}: holds no images as train/CLASS/* and test/CLASS/*; expected {EXPECTED}")
    mean, std = (np.array(settings[key], np.float32).reshape(-1, 1, 1) for key in ("mean", "std"))
    pixels = np.empty((len(found), channels, height, width), np.float32)
    for row, (path, _, _) in enumerate(found):
        try:
            with _quiet(), Image.open(path, formats=DECODERS) as image:
                if image.width * image.height > MOST_PIXELS:
                    raise ValueError(f"{image.width} x {image.height} pixels; edgekit reads up to {MOST_PIXELS:,}")
                claim(PIXEL_BYTES * image.width * image.height, path.stat().st_size, str(path))
                fitted = ImageOps.fit(
                    image.convert("L" if channels == 1 else "RGB"), (width, height), Image.Resampling.BICUBIC
                )
        except EdgekitError:
            raise
        except Exception as error:  # the decoders raise many types for damaged files
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise EdgekitError(f"{path}: not a readable image ({reason}); remove or replace it") from None
        values = np.asarray(fitted, np.float32).reshape(height, width, -1).transpose(2, 0, 1) / 255
        pixels[row] = (values - mean) / std
    labels = np.array([classes.index(label) for _, label, _ in found], np.int64)
    return {spec.name: pixels, "labels": labels, "split": np.array([part for *_, part in found], np.int8)}


def from_iterable(text: str, manifest: Manifest) -> Arrays:
    """Rows of an iterable, or of a function that gives one: each a mapping of the inputs, `labels` and `split`."""
    try:
        return _stacked(text, imported(text, "data"), manifest)
    except EdgekitError:
        raise
    except Exception as error:  # anyone's code: whatever it raises is the user's to see
        raise EdgekitError(f"data {text!r}: {type(error).__name__}: {error}") from error


def _stacked(text: str, rows: Any, manifest: Manifest) -> Arrays:
    if callable(rows):
        rows = rows()
    if isinstance(rows, Mapping) or not isinstance(rows, Iterable):
        raise EdgekitError(f"{text}: gives a {type(rows).__name__}; expected an iterable of rows, each a mapping")
    columns: dict[str, list[Any]] = {}
    for number, row in enumerate(rows):
        if not isinstance(row, Mapping) or (columns and set(row) != set(columns)):
            raise EdgekitError(
                f"{text}: row {number} holds {sorted(row) if isinstance(row, Mapping) else type(row).__name__}; "
                f"expected a mapping of {', '.join(spec.name for spec in manifest.inputs)}, labels and split"
            )
        for name, value in row.items():
            columns.setdefault(name, []).append(np.asarray(value))
    try:
        return {name: np.stack(values) for name, values in columns.items()}
    except ValueError as error:
        raise EdgekitError(f"{text}: rows differ in shape: {error}") from None
