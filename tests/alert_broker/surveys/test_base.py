"""Rules that all surveys share: points are compared with a slow count by the same rules, one bad packet costs no other,
and the registry finds every survey."""

import math

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alert_broker.surveys.base import SAME_EPOCH_DAYS, PacketError, Rows, fluxcal, join, survey_named, surveys
from edgekit.errors import EdgekitError
from tests.alert_broker.small import light_curve
from tests.alert_broker.surveys.rows import lsst_packet, lsst_row, ztf, ztf_forced, ztf_row

ZTF, LSST = survey_named("ztf"), survey_named("lsst")


def test_one_exposure_gives_one_point_and_the_alert_itself_wins():
    history = [ztf_row(magpsf=19.0), ztf_row(2_459_000.50005, magpsf=19.5), ztf_row(fid=2, magpsf=19.7)]
    curve = light_curve(ZTF, ztf(ztf_row(magpsf=20.0), history))
    assert sorted(curve.band.tolist()) == [0, 1]
    assert curve.flux[curve.band == 0] == pytest.approx([1000.0])


@pytest.mark.parametrize(
    "row",
    [
        ztf_row(magpsf=math.nan), ztf_row(sigmapsf=math.inf), ztf_row(sigmapsf=None), ztf_row(sigmapsf=0.0),
        ztf_row(magpsf=-999.0), ztf_row(fid=4), ztf_row(isdiffpos=None), ztf_row(jd=1e300), ztf_row(jd=math.nan),
    ],
)  # fmt: skip
def test_rows_that_are_not_measurements_are_dropped_and_counted(row):
    curve = light_curve(ZTF, ztf(row))
    assert (len(curve.time), curve.dropped) == (0, 1)


def test_points_are_sorted_by_time():
    history = [ztf_row(2_459_000.5 - day, 1 + day % 2) for day in (3, 9, 1, 7)]
    curve = light_curve(ZTF, ztf(history=history))
    assert np.all(np.diff(curve.time) > 0)


@pytest.mark.parametrize(
    ("packet", "reason"),
    [
        ({}, "no field 'objectId'"),
        (ztf() | {"objectId": None}, "objectId is None"),
        (ztf() | {"candid": None}, "id is None"),
        (ztf() | {"candid": 1.5}, "id is of type double; expected a 64-bit integer"),
        (ztf() | {"candidate": None}, "malformed"),
        (ztf() | {"candidate": {"jd": 1.0}}, "no field 'magpsf'"),
        (ztf() | {"candidate": ztf_row(magpsf="bright")}, "malformed"),
        (ztf() | {"prv_candidates": [3]}, "malformed"),
    ],
)
def test_a_packet_without_a_light_curve_says_why(packet, reason):
    with pytest.raises(PacketError, match=reason):
        light_curve(ZTF, packet)


def test_one_bad_packet_does_not_cost_its_neighbours():
    rows = [ztf(), ztf() | {"objectId": ""}, ztf() | {"candidate": None}, ztf(), ztf(history=[ztf_row(jd=2_458_999.5)])]
    rows[3] |= {"prv_candidates": [None]}
    columns = pa.RecordBatch.from_pylist(rows)
    numbers = pa.array([1, 2, 3, 4, 2**63], pa.uint64())
    found = ZTF.light_curves(columns.set_column(columns.schema.names.index("candid"), "candid", numbers))
    assert found.errors == {
        1: "objectId is ''; expected an object name",
        2: "candidate or a row in it is null",
        3: "prv_candidates or a row in it is null",
        4: "the alert's id is 9223372036854775808; expected a 64-bit integer",
    }
    assert found.alert_id[0] == 1
    assert found.curves.take([0]).flux == pytest.approx([1000.0])
    assert found.curves.points[4] == 2


def test_a_batch_gives_what_its_packets_give_alone():
    """The batches include an exposure that is in two neighbouring alerts, null lists, and sliced lists."""
    rows = [
        ztf(history=[ztf_row(fid=2), ztf_row(2_458_999.5, magpsf=None)]),
        ztf(),
        ztf(history=[ztf_row(2_458_990.5 + k, 1 + k % 3, 20 + k) for k in range(5)], fp_hists=[ztf_forced()]),
        ztf() | {"prv_candidates": None},
        ztf(fp_hists=[ztf_forced(2_459_000.5), ztf_forced(fid=2, status="61")]),
    ]
    together = pa.RecordBatch.from_pylist([{"fp_hists": None} | row for row in [rows[1], *rows, rows[2]]]).slice(1, 5)
    found = ZTF.light_curves(together)
    for number, row in enumerate(rows):
        alone, curve = light_curve(ZTF, row), found.curves.take([number])
        for name in ("time", "band", "flux", "flux_error", "detected"):
            assert np.array_equal(getattr(alone, name), getattr(curve, name))
        assert (alone.upper_limits, alone.dropped) == (found.upper_limits[number], found.dropped[number])
    assert found.curves.points.tolist() == [2, 1, 7, 1, 1]


def test_survey_registry():
    assert set(surveys()) == {"ztf", "lsst", "elasticc", "elasticc-v0", "decam"}
    for survey in surveys().values():
        assert len(survey.bands) == len(survey.wavelengths) == len(set(survey.bands))
    with pytest.raises(EdgekitError, match="did you mean 'lsst'"):
        survey_named("lst")


def test_join_keeps_order_and_empty_curves():
    curves = [light_curve(ZTF, ztf()), light_curve(ZTF, ztf(ztf_row(magpsf=None))), light_curve(ZTF, ztf())]
    joined = join(curves, ZTF.bands)
    assert joined.points.tolist() == [1, 0, 1]
    assert joined.flux == pytest.approx([1000.0, 1000.0])
    assert len(join([], ZTF.bands)) == 0


# --- points


# chains of rows that are close in time
EPOCHS = st.integers(0, 8).map(lambda step: 61_000 + step * 0.8 * SAME_EPOCH_DAYS)
ROWS = st.tuples(
    EPOCHS, st.sampled_from("gr"), st.sampled_from([None, 1.0, 2.0, math.inf]), st.sampled_from([1.0, 0.0])
)


def by_rules(source, history, forced):
    """Return (time, band, flux, detected) of each point, and the number of dropped rows. It goes row by row, most
    trusted first."""
    rows = [(row, detected) for part, detected in ((source, True), (history, True), (forced, False)) for row in part]
    good = [(*row[:3], detected) for row, detected in rows if row[2] not in (None, math.inf) and row[3] > 0]
    points = []
    for band in "gr":
        group = []
        for time in [*sorted({row[0] for row in good if row[1] == band}), math.inf]:
            if group and time - group[-1] > SAME_EPOCH_DAYS:
                points.append(next(row for row in good if row[1] == band and row[0] in group))
                group = []
            group.append(time)
    return sorted(points), len(rows) - len(good)


@settings(max_examples=60, deadline=None)
@given(source=ROWS, history=st.lists(ROWS, max_size=6), forced=st.lists(ROWS, max_size=6))
def test_points_are_those_of_the_rules_row_by_row(source, history, forced):
    def rows_of(part):
        return [lsst_row(*row) for row in part]

    curve = light_curve(LSST, lsst_packet(rows_of(history), rows_of(forced), **lsst_row(*source)))
    points, dropped = by_rules([source], history, forced)
    scale = 10 ** (-0.4 * 3.9)
    found = zip(curve.time, curve.band, curve.flux / scale, curve.detected, strict=True)
    assert sorted((time, "ugrizy"[band], round(flux, 9), bool(d)) for time, band, flux, d in found) == points
    assert curve.dropped == dropped
    assert (np.diff(curve.time) >= 0).all()


def test_the_rules_have_teeth():
    """The rows include two of one exposure, two of different exposures that are close, and one that only a third row
    joins to the first."""
    step = 0.8 * SAME_EPOCH_DAYS
    near = [(61_000.0, "g", 1.0, 1.0), (61_000.0 + step, "g", 2.0, 1.0), (61_000.0 + 2 * step, "g", 2.0, 1.0)]
    assert by_rules(near[:1], near[1:], []) == ([(61_000.0, "g", 1.0, True)], 0)
    assert len(by_rules(near[:1], near[2:], [])[0]) == 2
    assert by_rules([], [], near[1:2])[0] == [(61_000.0 + step, "g", 2.0, False)]


# --- rows as columns


def rows(**columns):
    return Rows(np.arange(len(next(iter(columns.values())))), columns)


@pytest.mark.parametrize("dtype", [pa.float32(), pa.float64(), pa.int32(), pa.int64(), pa.null()])
def test_numbers_of_any_type_are_doubles_with_nan_for_null(dtype):
    values = [None, None] if dtype == pa.null() else [3, None]
    found = rows(x=pa.array(values, dtype)).numbers("x")
    assert found.dtype == np.float64
    assert np.array_equal(found, np.array([math.nan if v is None else v for v in values]), equal_nan=True)


@pytest.mark.parametrize("encode", [lambda column: column, lambda column: column.dictionary_encode()])
def test_positions_among_labels(encode):
    column = encode(pa.array(["r", None, "g", "z", "r"]))
    assert rows(band=column).positions("band", ("g", "r")).tolist() == [1, -1, 0, -1, 1]
    assert rows(band=pa.nulls(2)).positions("band", ("g", "r")).tolist() == [-1, -1]


def test_positions_are_looked_up_in_the_columns_own_type():
    for dtype in (pa.int8(), pa.int32(), pa.int64(), pa.float64()):
        assert rows(fid=pa.array([2, 7, None, 1], dtype)).positions("fid", (1, 2)).tolist() == [1, -1, -1, 0]


def test_integers_are_0_where_there_is_none():
    assert rows(i=pa.array([2**62, None], pa.int64())).integers("i").tolist() == [2**62, 0]
    assert rows(i=pa.array([1, 2])).integers("j", optional=True).tolist() == [0, 0]
    with pytest.raises(KeyError):
        rows(i=pa.array([1, 2])).integers("j")


def test_rows_where_something_is_true_keep_their_owners():
    found = Rows(np.array([0, 0, 3]), {"x": pa.array([1, 2, None])}).where(np.array([False, True, True]))
    assert found.owner.tolist() == [0, 3]
    assert found.columns["x"].to_pylist() == [2, None]


def test_no_rows_have_no_fields_to_know():
    empty = Rows(np.empty(0, np.int64), {})
    assert empty.numbers("x").tolist() == empty.positions("x", "gr").tolist() == []


@pytest.mark.parametrize("magnitudes", [0, 2.5, 5, -2.5])
def test_five_magnitudes_are_a_factor_of_100(magnitudes):
    assert fluxcal(magnitudes) == pytest.approx(100 ** (-magnitudes / 5))


def test_surveys_are_told_apart():
    """No schema and no table belongs to two surveys."""
    for survey in surveys().values():
        assert [other.name for other in surveys().values() if other.recognises_schema(survey.record)] == [survey.name]
        columns = frozenset(survey.paths)
        assert sum(other.recognises_columns(columns) for other in surveys().values()) <= 1


def test_paths_are_the_fields_that_are_read():
    assert [path for path in ZTF.paths if "." not in path] == ["objectId", "candid"]
    for survey in surveys().values():
        assert len(survey.paths) == len(set(survey.paths))
        assert {path.split(".")[0] for path in survey.paths} == set(survey.fields)
