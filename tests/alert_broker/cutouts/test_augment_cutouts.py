"""Changed copies of triplets for the training of cutout-rb, and that none has anything of another fold's objects."""

import importlib

import numpy as np
import pytest

from tests.conftest import ROOT

SIZE = 63


@pytest.fixture
def augment(monkeypatch):
    pytest.importorskip("scipy")
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    return importlib.import_module("augment_cutouts")


@pytest.fixture
def train(augment):
    return importlib.import_module("train_cutout_rb")


def sky(rows=1, seed=0):
    return np.random.default_rng(seed).normal(100, 5, (rows, 3, SIZE, SIZE))


def test_each_change_is_finite_repeatable_and_leaves_its_input(augment):
    for change in augment.CHANGES:
        for seed in range(5):
            images, second = sky(2, seed)
            before = images.copy()
            found = change(images, second, np.random.default_rng(seed))
            assert found.shape == images.shape, change.__name__
            assert np.isfinite(found).all(), change.__name__
            assert not np.array_equal(found, images), change.__name__
            assert np.array_equal(images, before), change.__name__
            assert np.array_equal(found, change(images, second, np.random.default_rng(seed))), change.__name__


def test_pixels_without_a_value_keep_what_they_hold(augment):
    images, second = sky(2)
    images[1, 5:9, 7:20] = np.nan
    images[2, 40:, 3] = 1e31
    for seed in range(20):
        found = augment.changed(images, second, np.random.default_rng(seed))
        assert np.isnan(found[1, 5:9, 7:20]).all()
        kept = found[2, 40:, 3]
        assert (np.isnan(kept) | (kept == np.float32(1e31)) | (kept == 0)).all()  # or taken away with an edge


def test_a_simulated_triplet_is_an_image_of_a_sky(augment):
    for seed in range(5):
        found = augment.simulated(np.random.default_rng(seed))
        assert found.shape == (3, SIZE, SIZE)
        assert found.dtype == np.float32
        assert np.isfinite(found).all()
        assert np.array_equal(found, augment.simulated(np.random.default_rng(seed)))


def leaks(found):
    """Which rows hold something of the bright objects."""
    return np.abs(found).max(axis=(1, 2, 3)) > 1e5


def test_variants_and_copies_have_nothing_of_another_fold(augment, train):
    """The objects of fold 1 are a million times brighter, so that any part of one would show."""
    images = sky(24).astype(np.float32)
    fold = np.arange(24) % 2
    images[fold == 1, :, 20:30, 20:30] *= 1e6
    for seed in range(8):
        rng = np.random.default_rng(seed)
        partners = train.within_folds(fold, rng)
        assert not leaks(augment.varied(images, partners, rng))[fold == 0].any()
    assert leaks(augment.varied(images, np.roll(np.arange(24), 1), rng))[fold == 0].any()  # planted: from other folds
    known = train.Triplets(images, np.ones(24), fold)
    wrong = train.Triplets(images, np.ones(24), np.zeros(24, np.int64))  # planted: one fold for all
    copies, planted = (np.stack([train.make_copy(of, 0, copy) for copy in range(40)]) for of in (known, wrong))
    assert not leaks(np.nan_to_num(copies)).any()
    assert leaks(np.nan_to_num(planted)).any()
