"""Ragged light curves: taking objects, dropping points, joining batches, and the empty cases of each."""

import numpy as np
import pytest

from alert_broker.lightcurve import LightCurves, concatenate, concatenate_ranges


def curves(*lengths: int, bands=("g", "r")) -> LightCurves:
    """Return objects in which point n of object m has flux 100 m + n."""
    owner = np.repeat(np.arange(len(lengths)), lengths)
    number = np.concatenate([np.arange(length) for length in lengths] or [np.empty(0)])
    total = len(owner)
    return LightCurves(
        bands,
        np.cumsum([0, *lengths]).astype(np.int64),
        number.astype(np.float64),
        (number % 2).astype(np.int8),
        100.0 * owner + number,
        np.ones(total),
        number % 3 == 0,
    )


def fluxes(batch: LightCurves) -> list[list[float]]:
    return [batch.flux[start:stop].tolist() for start, stop in zip(batch.offsets[:-1], batch.offsets[1:], strict=True)]


def test_objects_and_their_points():
    batch = curves(3, 0, 2)
    assert len(batch) == 3
    assert batch.points.tolist() == [3, 0, 2]
    assert batch.object_of_point.tolist() == [0, 0, 0, 2, 2]
    assert len(curves()) == 0


@pytest.mark.parametrize(
    ("objects", "expected"),
    [
        ([2, 0], [[200, 201], [0, 1, 2]]),
        ([2, 2, 1], [[200, 201], [200, 201], []]),
        ([1], [[]]),
        ([], []),
    ],
)
def test_take_in_any_order_and_repeated(objects, expected):
    taken = curves(3, 0, 2).take(objects)
    assert fluxes(taken) == expected
    assert taken.offsets.dtype == np.int64
    assert taken.band.tolist() == [int(flux) % 100 % 2 for flux in taken.flux]
    assert taken.detected.tolist() == [int(flux) % 100 % 3 == 0 for flux in taken.flux]


def test_where_keeps_objects_that_lose_all_points():
    batch = curves(3, 1, 2)
    kept = batch.where(batch.flux % 100 != 0)
    assert fluxes(kept) == [[1, 2], [], [201]]
    assert fluxes(batch.where(np.zeros(6, np.bool_))) == [[], [], []]
    assert fluxes(curves().where(np.zeros(0, np.bool_))) == []


def test_concatenate_is_take_undone():
    batch = curves(3, 0, 2, 4)
    again = concatenate([batch.take([0, 1]), batch.take([]), batch.take([2, 3])])
    for name in ("offsets", "time", "band", "flux", "flux_error", "detected"):
        first, second = getattr(batch, name), getattr(again, name)
        assert np.array_equal(first, second)
        assert first.dtype == second.dtype


def test_concatenate_needs_one_set_of_bands():
    with pytest.raises(AssertionError):
        concatenate([curves(1), curves(1, bands=("r", "g"))])


def test_ranges():
    starts, stops = np.array([5, 2, 2]), np.array([7, 2, 5])
    assert concatenate_ranges(starts, stops).tolist() == [5, 6, 2, 3, 4]
    assert concatenate_ranges(starts[:0], stops[:0]).tolist() == []
