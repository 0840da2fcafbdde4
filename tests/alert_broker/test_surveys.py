"""Fluxes against magnitudes worked out by hand, history rules, and every LSST schema version's field names."""

import io
import math
import os
from pathlib import Path

import fastavro
import numpy as np
import pyarrow as pa
import pytest

from alert_broker.surveys import lsst
from alert_broker.surveys.base import PacketError, join, survey_named, surveys
from edgekit.errors import EdgekitError
from tests.alert_broker.small import light_curve

SHARED = Path(os.environ.get("EDGEKIT_SHARED_DATA", Path(__file__).resolve().parents[2].parent / "shared" / "data"))
realdata = pytest.mark.realdata
ZTF, LSST = survey_named("ztf"), survey_named("lsst")


def real(*names: str) -> Path:
    path = SHARED.joinpath("alerts", *names)
    if not path.exists():
        pytest.skip(f"no real alerts at {path}; set EDGEKIT_SHARED_DATA")
    return path


def ztf_row(jd=2_459_000.5, fid=1, magpsf=20.0, sigmapsf=0.1, isdiffpos="t"):
    return {"jd": jd, "fid": fid, "magpsf": magpsf, "sigmapsf": sigmapsf, "isdiffpos": isdiffpos}


def ztf_forced(jd=2_459_001.5, fid=1, flux=100.0, error=10.0, zero_point=26.0, status="0"):
    return {
        "jd": jd,
        "fid": fid,
        "forcediffimflux": flux,
        "forcediffimfluxunc": error,
        "magzpsci": zero_point,
        "procstatus": status,
    }


def ztf(candidate=None, history=(), **extra):
    return {
        "objectId": "ZTF24aaaaaaa",
        "candid": 123,
        "candidate": candidate or ztf_row(),
        "prv_candidates": list(history),
    } | extra


def lsst_row(time=61_000.0, band="r", flux=1000.0, error=50.0, **extra):
    return {"midpointMjdTai": time, "band": band, "psfFlux": flux, "psfFluxErr": error} | extra


def lsst_packet(history=(), forced=(), **source):
    ids = {"diaSourceId": 7, "diaObjectId": 5, "ssObjectId": 0}
    return {
        "diaSource": lsst_row(**(ids | source)),
        "prvDiaSources": list(history),
        "prvDiaForcedSources": list(forced),
    }


def flux_of_magnitude(magnitude):
    """By definition: m = 27.5 - 2.5 log10 f, solved in another form than the module's."""
    return math.exp((27.5 - magnitude) / 2.5 * math.log(10))


def test_ztf_magnitudes_become_fluxes():
    curve = light_curve(ZTF, ztf(ztf_row(magpsf=20.0, sigmapsf=0.1), [ztf_row(2_458_999.5, 2, 18.5, 0.02, "f")]))
    assert curve.flux == pytest.approx([-flux_of_magnitude(18.5), 1000.0], rel=1e-12)  # 20 is 7.5 above zero point
    assert curve.flux_error == pytest.approx([0.01842068 * 3981.0717, 92.1034], rel=1e-6)
    assert curve.time.tolist() == [58_999.0, 59_000.0]
    assert curve.band.tolist() == [1, 0]
    assert curve.detected.all()
    for planted in (flux_of_magnitude(18.5), -(10 ** (-0.4 * (18.5 - 25.0)))):  # sign forgotten; zero point 25
        assert curve.flux[0] != pytest.approx(planted, rel=1e-3)


@pytest.mark.parametrize(("flag", "sign"), [("t", 1), ("1", 1), ("f", -1), ("0", -1)])
def test_ztf_sign_flags(flag, sign):
    assert np.sign(light_curve(ZTF, ztf(ztf_row(isdiffpos=flag))).flux).tolist() == [sign]


def test_ztf_forced_photometry_fills_exposures_without_a_detection():
    forced = [ztf_forced(2_459_000.5, flux=5.0), ztf_forced(2_458_995.5, flux=-40.0, error=8.0, zero_point=26.3)]
    curve = light_curve(ZTF, ztf(fp_hists=forced))
    counts = 10 ** (0.4 * (27.5 - 26.3))  # FLUXCAL of one count
    assert curve.flux == pytest.approx([-40 * counts, 1000.0])
    assert curve.flux_error[0] == pytest.approx(8 * counts)
    assert curve.detected.tolist() == [False, True]
    assert light_curve(ZTF, ztf()).flux.tolist() == pytest.approx([1000.0])  # schemas before 4.01 have no fp_hists


def test_ztf_forced_photometry_on_bad_pixels_is_dropped():
    bad = [ztf_forced(flux=-99999.0, error=-99999.0, status="61"), ztf_forced(flux=3.0, status="56")]
    bad += [ztf_forced(flux=None), ztf_forced(zero_point=None), ztf_forced(error=0.0)]
    curve = light_curve(ZTF, ztf(fp_hists=bad))
    assert len(curve.time) == 1
    assert curve.dropped == 5


def test_ztf_upper_limits_are_counted_not_points():
    limit = dict.fromkeys(ztf_row(), None) | {"jd": 2_458_990.5, "fid": 1}
    curve = light_curve(ZTF, ztf(history=[limit, limit]))
    assert (len(curve.time), curve.upper_limits, curve.dropped) == (1, 2, 0)
    assert light_curve(ZTF, ztf() | {"prv_candidates": None}).upper_limits == 0


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
    """Also where an exposure of one alert is also one of its neighbour, and where lists are null or cut out."""
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


def test_lsst_nanojansky_become_fluxcal():
    magnitude_22 = 10 ** (0.4 * (31.4 - 22.0))  # in nJy
    curve = light_curve(LSST, lsst_packet(flux=magnitude_22, error=10.0))
    assert curve.flux == pytest.approx([flux_of_magnitude(22.0)], rel=1e-12)
    assert curve.flux_error == pytest.approx([10 * 10 ** (-0.4 * 3.9)])
    assert curve.flux[0] != pytest.approx(flux_of_magnitude(22.0) * 10**0.04, rel=1e-3)  # AB of 1 nJy is 31.4, not 31.5


def test_lsst_detections_win_over_forced_photometry_of_the_same_visit():
    history = [lsst_row(60_990.0, flux=700.0)]
    forced = [lsst_row(60_990.0, flux=650.0), lsst_row(60_990.0, "g", flux=-3.0), lsst_row(60_980.0, flux=None)]
    curve = light_curve(LSST, lsst_packet(history, forced))
    assert curve.time.tolist() == [60_990.0, 60_990.0, 61_000.0]
    scale = 10 ** (-0.4 * 3.9)
    assert sorted(curve.flux / scale) == pytest.approx([-3.0, 700.0, 1000.0])
    assert sorted(curve.detected.tolist()) == [False, True, True]
    assert curve.dropped == 1


@pytest.mark.parametrize(
    ("ids", "name"),
    [
        ({"diaObjectId": 5}, "5"),
        ({"diaObjectId": 0, "ssObjectId": 9}, "ss9"),
        ({"diaObjectId": None, "ssObjectId": 9}, "ss9"),
    ],
)
def test_lsst_object_names(ids, name):
    assert light_curve(LSST, lsst_packet(**ids)).object_id == name
    with pytest.raises(PacketError, match="neither"):
        light_curve(LSST, lsst_packet(diaObjectId=None, ssObjectId=None))


@pytest.mark.parametrize("identifier", lsst.schema_versions())
def test_every_lsst_schema_version_is_read(identifier):
    schema = lsst.schema(identifier)
    packet = minimal(schema)
    source = packet["diaSource"]
    names = next(names for names in lsst.NAMES if names[0] in source)
    history = source | dict(zip(names, (60_990.0, "g", 200.0, 20.0), strict=True))
    source |= dict(zip(names, (61_000.0, "r", 1000.0, 50.0), strict=True)) | {"diaSourceId": 7, "diaObjectId": 5}
    forced = minimal(schema["__named_schemas"][schema["name"].replace(".alert", ".diaForcedSource")])
    forced |= dict(zip(names, (60_980.0, "y", -30.0, 20.0), strict=True))
    packet |= {"prvDiaSources": [history], "prvDiaForcedSources": [forced]}
    body = io.BytesIO()
    fastavro.schemaless_writer(body, schema, packet)
    body.seek(0)
    curve = light_curve(LSST, fastavro.schemaless_reader(body, schema, None))
    assert (curve.alert_id, curve.object_id) == (7, "5")
    assert curve.band.tolist() == [5, 1, 2]
    assert curve.detected.tolist() == [False, True, True]
    assert curve.flux == pytest.approx(np.array([-30.0, 200.0, 1000.0]) * 10 ** (-0.4 * 3.9))


def minimal(schema):
    """A record with null or zero in every field."""
    named = schema.get("__named_schemas", {})
    zero = {"string": "", "double": 0.0, "float": 0.0, "boolean": False}
    record = {}
    for item in schema["fields"]:
        kind = item["type"]
        if isinstance(kind, dict) and kind["type"] == "long":  # 8.0 has a timestamp
            kind = "long"
        if isinstance(kind, list):
            record[item["name"]] = None
        elif isinstance(kind, dict):
            record[item["name"]] = minimal(kind)
        else:
            record[item["name"]] = minimal(named[kind]) if kind in named else zero.get(kind, 0)
    return record


def test_an_unknown_lsst_schema_names_the_known_ones_and_the_remedy():
    with pytest.raises(PacketError, match=r"id 4711 .*47\.11.*known: 300, .*pip install --upgrade lsst-alert-packet"):
        lsst.schema(4711)


def test_survey_registry():
    assert set(surveys()) == {"ztf", "lsst", "elasticc", "elasticc-v0", "decam"}
    for survey in surveys().values():
        assert len(survey.bands) == len(survey.wavelengths) == len(set(survey.bands))
    with pytest.raises(EdgekitError, match="did you mean 'lsst'"):
        survey_named("lst")


def test_elasticc_releases_differ_in_zero_point():
    names = lsst.NAMES[1]
    packet = {"diaSource": dict(zip(names, (61_000.0, "Y", 100.0, 5.0), strict=True)), "prvDiaSources": None}
    packet["diaSource"] |= {"diaSourceId": 7, "diaObjectId": 5}
    packet["prvDiaForcedSources"] = None
    released, early = (light_curve(survey_named(name), packet) for name in ("elasticc", "elasticc-v0"))
    assert released.band.tolist() == early.band.tolist() == [5]
    assert early.flux.tolist() == [100.0]
    assert released.flux == pytest.approx([100.0 * 10 ** (-0.4 * 3.9)])


def test_join_keeps_order_and_empty_curves():
    curves = [light_curve(ZTF, ztf()), light_curve(ZTF, ztf(ztf_row(magpsf=None))), light_curve(ZTF, ztf())]
    joined = join(curves, ZTF.bands)
    assert joined.points.tolist() == [1, 0, 1]
    assert joined.flux == pytest.approx([1000.0, 1000.0])
    assert len(join([], ZTF.bands)) == 0


@realdata
def test_real_ztf_forced_photometry_agrees_with_the_detections():
    """The two come by different roads (counts and a zero point; a magnitude), so a wrong unit or sign would show."""
    ratios = []
    for path in real("ztf_kowalski").glob("*.avro"):
        with path.open("rb") as stream:
            (packet,) = fastavro.reader(stream)
        rows = [packet["candidate"], *packet["prv_candidates"]]
        for forced in packet["fp_hists"] or []:
            twins = [row for row in rows if (row["jd"], row["fid"]) == (forced["jd"], forced["fid"]) and row["magpsf"]]
            if twins and forced["procstatus"] == "0" and twins[0]["pid"] == forced["pid"]:
                measured = light_curve(ZTF, ztf(ztf_row(3e6)) | {"candidate": twins[0]}).flux[0]
                alone = light_curve(ZTF, ztf(ztf_row(fid=9), fp_hists=[forced])).flux[0]
                ratios.append(alone / measured)
    assert len(ratios) >= 20
    assert np.median(ratios) == pytest.approx(1.0, abs=0.03)


@realdata
def test_real_lsst_history_is_whole():
    data = real("lsst_wire", "v10_0_deep_00.bin").read_bytes()
    packet = fastavro.schemaless_reader(io.BytesIO(data[5:]), lsst.schema(1000), None)
    curve = light_curve(LSST, packet)
    detections = 1 + len(packet["prvDiaSources"])
    visits = {row["visit"] for row in packet["prvDiaSources"]} | {packet["diaSource"]["visit"]}
    forced = {row["visit"] for row in packet["prvDiaForcedSources"]}
    assert curve.detected.sum() == len(visits) == detections
    assert (~curve.detected).sum() == len(forced - visits)  # told apart by visit here, by time in the module
    newest = packet["diaSource"]["psfFlux"]
    assert curve.flux[-1] == pytest.approx(newest * 10 ** (-0.4 * 3.9))
