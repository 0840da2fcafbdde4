"""The preprocessing against its definition in float64, and its parameters in a bundle."""

import numpy as np
import pytest

from alert_broker.cutouts.tensors import CutoutTensors
from edgekit.errors import EdgekitError


def naive(image, norm, size, pad_value):
    """NumPy in float64: NaN to 0, divide by the norm, pad below and to the right."""
    values = np.where(np.isnan(image), 0, image).astype(np.float64)
    total = np.sqrt((values**2).sum(axis=1, keepdims=True) if norm == "rows" else (values**2).sum())
    values = values / np.where(total == 0, 1, total)
    padding = [(0, size - length) for length in values.shape]
    return np.pad(values, padding, constant_values=pad_value)


@pytest.mark.parametrize("norm", ["rows", "image"])
@pytest.mark.parametrize("shape", [(8, 8), (8, 7), (5, 8), (1, 1)])
def test_definition(norm, shape):
    rng = np.random.default_rng(1)
    images = rng.normal(100, 50, (3, *shape)).astype(np.float32)
    images[1, 0] = np.nan  # a row without pixels
    images[2, -1, -1] = np.nan
    tensors = CutoutTensors(8, norm, 0.5)
    out = tensors(images[None])
    assert out.shape == (1, 8, 8, 3)
    assert out.dtype == np.float32
    for index, image in enumerate(images):
        assert out[0, :, :, index] == pytest.approx(naive(image, norm, 8, 0.5), abs=2e-7)
    other = CutoutTensors(8, "image" if norm == "rows" else "rows", 0.5)(images[None])
    assert (np.abs(other - out).max() > 1e-3) == (shape[0] > 1)  # the twin: the other norm, equal for a single row
    first = CutoutTensors(8, norm, 0.5, "first")(images[None])
    assert (first == out.transpose(0, 3, 1, 2)).all()


@pytest.mark.parametrize("value", [-3.4028235e38, 3e38, np.inf, -np.inf])
def test_a_sum_of_squares_beyond_float32_makes_the_row_or_the_image_zero(value):
    image = np.ones((2, 4), np.float32)
    image[0, 1] = value
    with np.errstate(over="ignore", invalid="ignore"):
        norms = np.sqrt((image * image).sum(axis=1, keepdims=True))  # numpy's float32, as where the scores come from
    assert np.isinf(norms[0, 0])
    rows, whole = (CutoutTensors(4, norm)(np.stack([image] * 3)[None])[0, ..., 0] for norm in ("rows", "image"))
    assert rows.tolist()[:2] == [[0, 0, 0, 0], [0.5, 0.5, 0.5, 0.5]]
    assert (whole[:2] == 0).all()
    assert (rows[2:] == np.float32(1e-9)).all()


def test_large_pixels_whose_squares_fit_are_kept():
    image = np.full((1, 4), 9e18, np.float32)
    assert CutoutTensors(4)(np.stack([image] * 3)[None])[0, 0, :, 0] == pytest.approx(np.full(4, 0.5))


@pytest.mark.parametrize("norm", ["rows", "image"])
def test_the_central_part_is_cut_out_behind_the_division(norm):
    images = np.random.default_rng(3).normal(100, 50, (2, 3, 9, 8)).astype(np.float32)
    for channels in ("last", "first"):
        part = CutoutTensors(9, norm, 0.5, channels, 4)(images)
        whole = CutoutTensors(9, norm, 0.5, channels)(images)
        cut = whole[:, 2:6, 2:6] if channels == "last" else whole[:, :, 2:6, 2:6]
        assert (part == cut).all()
    before = CutoutTensors(4, norm, 0.5, "first")(images[:, :, 2:6, 2:6])  # the twin divides the part alone
    assert np.abs(before - part).max() > 1e-3


GOOD = CutoutTensors().to_bundle()


def test_a_bundle_gives_the_parameters_back():
    other = CutoutTensors(30, "image", 0.0, "first")
    assert CutoutTensors.from_bundle(other.to_bundle(), "x") == other
    part = CutoutTensors(30, "rows", crop=16)
    assert CutoutTensors.from_bundle(part.to_bundle(), "x") == part
    assert "crop" not in GOOD


@pytest.mark.parametrize(
    ("preprocessing", "message"),
    [
        (None, "x: its preprocessing is 'None'; a model of cutouts has 'cutouts'"),
        ({"id": "light_curve"}, "'light_curve'"),
        (GOOD | {"more": 1}, "more"),
        ({"id": "cutouts", "size": 63}, "expected channels, norm, pad_value, size"),
        (GOOD | {"crop": 64}, "crop = 64; expected a whole number up to 63"),
        (GOOD | {"crop": 1.0}, "crop = 1.0"),
        (GOOD | {"size": 0}, "size = 0"),
        (GOOD | {"size": 1 << 40}, "up to 1024"),
        (GOOD | {"size": "63"}, "size = '63'"),
        (GOOD | {"norm": "row"}, "did you mean 'rows'"),
        (GOOD | {"channels": "none"}, "channels"),
        (GOOD | {"pad_value": float("nan")}, "finite"),
        (GOOD | {"pad_value": True}, "finite"),
    ],
)
def test_other_preprocessing_is_refused(preprocessing, message):
    with pytest.raises(EdgekitError, match=message):
        CutoutTensors.from_bundle(preprocessing, "x")
