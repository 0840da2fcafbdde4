"""Synthetic inputs look like what a model takes: pictures have structure, tokens fill the vocabulary, masks have
padding."""

import numpy as np
import pytest

from edgekit.bundle.synthetic import LARGEST, TOKENS, candidates, synthetic_inputs
from edgekit.bundle.tensors import TensorSpec, golden_inputs

TEXT = (
    TensorSpec("input_ids", ("batch", "tokens"), "int64"),
    TensorSpec("attention_mask", ("batch", "tokens"), "int64"),
    TensorSpec("token_type_ids", ("batch", "tokens"), "int64"),
    TensorSpec("position_ids", ("batch", "tokens"), "int64"),
)


def test_text_has_padding_segments_positions_and_the_whole_vocabulary():
    rows = synthetic_inputs(TEXT, 8, {"tokens": 48}, {"input_ids": 30_522, "token_type_ids": 2})
    mask = rows["attention_mask"]
    lengths = mask.sum(axis=1)
    assert lengths[0] == 48
    assert lengths[-1] < 24
    assert (np.diff(mask, axis=1) <= 0).all(), "padding comes last"
    assert not rows["input_ids"][mask == 0].any()
    ids = rows["input_ids"][mask == 1]
    assert ids.min() >= 0
    assert ids.max() < 30_522
    assert np.histogram(ids, bins=10, range=(0, 30_522))[0].min() > 5, "spread over the vocabulary"
    assert rows["token_type_ids"][0].tolist() == [0] * 24 + [1] * 24
    assert rows["position_ids"][3].tolist() == list(range(48))


def test_without_a_mask_nothing_is_padding():
    rows = synthetic_inputs(TEXT[:1], 8, {"tokens": 48}, {"input_ids": 1000})
    assert (rows["input_ids"] > 0).mean() > 0.99


@pytest.mark.parametrize("dtype", ["bool", "float32", "int64"])
def test_a_padding_mask_is_true_at_the_padding(dtype):
    spec = TensorSpec("src_key_padding_mask", ("batch", 10), dtype)
    rows = synthetic_inputs((spec,), 4, {}, {})["src_key_padding_mask"]
    assert rows[0].sum() == 0
    assert rows[-1].tolist() == [0] * 4 + [1] * 6
    assert str(rows.dtype) == dtype


@pytest.mark.parametrize(
    ("shape", "dtype", "axes"),
    [((("batch", 3, "h", "w")), "float32", (2, 3)), (("batch", 64, 80, 3), "uint8", (1, 2))],
)
def test_pictures_have_edges_and_areas(shape, dtype, axes):
    spec = TensorSpec("image", shape, dtype)
    image = synthetic_inputs((spec,), 2, {"h": 64, "w": 80}, {})["image"].astype(np.float64)
    steps = np.abs(np.diff(image, axis=axes[1])) / np.ptp(image)
    assert np.quantile(steps, 0.5) < 0.1, "areas are smooth"
    assert np.quantile(steps, 0.97) > 0.2, "and have edges"
    assert not np.array_equal(image[0], image[1])
    noise = np.random.default_rng(0).normal(size=image.shape)
    assert np.quantile(np.abs(np.diff(noise, axis=axes[1])) / np.ptp(noise), 0.5) > 0.1, "noise has no areas"
    assert (-2.0 <= image.min() < image.max() <= 2.0) if dtype == "float32" else (0 <= image.min() < 30 < 200 < 255)


def test_sequences_are_smooth_and_waveforms_oscillate():
    steps = synthetic_inputs((TensorSpec("x", ("batch", 100, 6)),), 4, {}, {})["x"]
    assert np.abs(np.diff(steps, axis=1)).mean() < 0.6 * np.abs(steps - np.roll(steps, 50, axis=1)).mean()
    wave = synthetic_inputs((TensorSpec("audio", ("batch", "samples")),), 4, {"samples": 512}, {})["audio"]
    assert (np.diff(np.sign(wave), axis=1) != 0).sum(axis=1).min() > 4
    assert np.abs(wave).max() < 1


def test_proposals_fall_to_the_smallest_and_respect_multiples():
    spec = TensorSpec("faces", ("batch", "9*faces", 3))
    lengths = [rows["faces"].shape[1] for rows in candidates((spec,), 8, {})]
    assert lengths == [63, 27, 9, 9, 18]
    last = list(candidates(TEXT, 8, {}))[-1]
    for name, array in golden_inputs(TEXT, 8).items():
        np.testing.assert_array_equal(last[name], array)
    assert [rows["input_ids"].shape[1] for rows in candidates(TEXT, 8, {})][:-1] == list(TOKENS)


def test_large_rows_are_fewer():
    spec = TensorSpec("image", ("batch", 3, 1024, 1024))
    rows = next(candidates((spec,), 8, {}))["image"]
    assert len(rows) == 4
    assert LARGEST / 8 < 3 * 1024 * 1024 * 4
    assert len(next(candidates((TensorSpec("x", ("batch", 3)),), 8, {}))["x"]) == 8


def test_the_same_in_every_call():
    for one, other in zip(candidates(TEXT, 8, {"input_ids": 99}), candidates(TEXT, 8, {"input_ids": 99}), strict=True):
        for name, array in one.items():
            np.testing.assert_array_equal(array, other[name])
