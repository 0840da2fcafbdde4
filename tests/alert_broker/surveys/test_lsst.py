"""LSST's fluxes and names. In every schema, the same measurements give a bitwise equal light curve."""

import copy
import io

import fastavro
import numpy as np
import pyarrow.parquet as pq
import pytest
from fastavro.schema import parse_schema

from alert_broker.containers import WIRE_HEADER, split
from alert_broker.packets import batches, read_blocks
from alert_broker.simulate import simulate
from alert_broker.surveys import lsst
from alert_broker.surveys.base import PacketError, survey_named
from tests.alert_broker.small import light_curve
from tests.alert_broker.surveys.rows import flux_of_magnitude, lsst_packet, lsst_row

VERSIONS = [identifier for identifier in lsst.schema_versions() if identifier >= 700]
ZERO = {"string": "", "double": 0.0, "float": 0.0, "boolean": False}
LSST = survey_named("lsst")
CURVE = ("time", "band", "flux", "flux_error", "detected")


def translated(values, schema, named):
    """Return a record of a schema with the values of the fields that both versions have; other fields are null or
    zero."""
    schema = named.get(schema, schema) if isinstance(schema, str) else schema
    if isinstance(schema, list):
        return None if values is None else translated(values, next(kind for kind in schema if kind != "null"), named)
    if isinstance(schema, dict) and schema["type"] == "record":
        values = values or {}
        return {item["name"]: translated(values.get(item["name"]), item["type"], named) for item in schema["fields"]}
    if isinstance(schema, dict) and schema["type"] == "array":
        return [translated(value, schema["items"], named) for value in values or []]
    kind = schema["type"] if isinstance(schema, dict) else schema
    return ZERO.get(kind, 0) if values is None else values


def message(packet, identifier):
    """Return a packet of some version as a message of this version."""
    schema = lsst.schema(identifier)
    body = io.BytesIO()
    values = {"alertId": packet["diaSource"]["diaSourceId"]} | packet
    fastavro.schemaless_writer(body, schema, translated(values, schema, schema["__named_schemas"]))
    return WIRE_HEADER.pack(0, identifier) + body.getvalue()


def read(data):
    (batch,) = batches(split(data, "message"))
    return batch


def assert_same(found, expected):
    for name in CURVE:
        assert np.array_equal(getattr(found.curves, name), getattr(expected.curves, name)), name
    for name in ("alert_id", "object_id", "n_detections", "n_forced", "n_dropped"):
        assert found.alerts[name].equals(expected.alerts[name]), name


@pytest.fixture(scope="module")
def packets():
    return [alert.packet for alert in simulate("lsst", 5, 11, cutouts=False)]


@pytest.mark.parametrize("identifier", VERSIONS)
def test_every_version_gives_the_light_curve_of_the_newest(packets, identifier):
    for packet in packets:
        newest = read(message(packet, max(VERSIONS)))
        assert newest.curves.points[0] > 1
        assert_same(read(message(packet, identifier)), newest)


def test_the_versions_do_differ_and_the_comparison_sees_a_change(packets):
    assert len({message(packets[0], identifier)[5:] for identifier in VERSIONS}) >= 6
    changed = copy.deepcopy(packets[0])
    changed["diaSource"]["psfFlux"] *= 1.001
    with pytest.raises(AssertionError, match="flux"):
        assert_same(read(message(changed, 700)), read(message(packets[0], 1101)))


@pytest.mark.parametrize("identifier", [i for i in VERSIONS if i < 800])
def test_nondetection_limits_of_version_7_are_counted(packets, identifier):
    limit = {"ccdVisitId": 1, "midpointMjdTai": 60_000.0, "band": "g", "diaNoise": 3.0}
    batch = read(message(packets[0] | {"prvDiaNondetectionLimits": [limit] * 3}, identifier))
    assert batch.alerts["n_upper_limits"].to_pylist() == [3]


def test_a_rename_that_is_not_in_the_table_is_named(packets):
    """The twin of the mapping: a future rename must raise an error with the field's name, and must not give an empty
    light curve."""
    newest = max(VERSIONS)
    old = {key: value for key, value in lsst.schema(newest).items() if not key.startswith("__")}
    renamed = parse_schema(_renamed(old, "psfFlux", "pointSourceFlux"))
    body = io.BytesIO()
    values = translated({"diaSource": packets[0]["diaSource"]}, renamed, renamed["__named_schemas"])
    fastavro.writer(body, renamed, [values])
    (bad,) = batches(split(body.getvalue(), "file"))
    assert bad.reason == "the lsst packet has no field 'psfFlux'"


def _renamed(node, old, new):
    if isinstance(node, list):
        return [_renamed(item, old, new) for item in node]
    if isinstance(node, dict):
        return {
            key: new if key == "name" and value == old else _renamed(value, old, new) for key, value in node.items()
        }
    return node


def test_lsst_nanojansky_become_fluxcal():
    magnitude_22 = 10 ** (0.4 * (31.4 - 22.0))  # in nJy
    curve = light_curve(LSST, lsst_packet(flux=magnitude_22, error=10.0))
    assert curve.flux == pytest.approx([flux_of_magnitude(22.0)], rel=1e-12)
    assert curve.flux_error == pytest.approx([10 * 10 ** (-0.4 * 3.9)])
    # the AB magnitude of 1 nJy is 31.4, not 31.5
    assert curve.flux[0] != pytest.approx(flux_of_magnitude(22.0) * 10**0.04, rel=1e-3)


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
    """Return a record with null or zero in every field."""
    named = schema.get("__named_schemas", {})
    zero = {"string": "", "double": 0.0, "float": 0.0, "boolean": False}
    record = {}
    for item in schema["fields"]:
        kind = item["type"]
        if isinstance(kind, dict) and kind["type"] == "long":  # schema 8.0 has a timestamp
            kind = "long"
        if isinstance(kind, list):
            record[item["name"]] = None
        elif isinstance(kind, dict):
            record[item["name"]] = minimal(kind)
        else:
            record[item["name"]] = minimal(named[kind]) if kind in named else zero.get(kind, 0)
    return record


def test_an_unknown_lsst_schema_names_the_known_ones_and_the_remedy():
    with pytest.raises(PacketError, match=r"id 4711: .*47\.11.*known: 300, .*pip install --upgrade lsst-alert-packet"):
        lsst.schema(4711)


# --- real packets


@pytest.mark.realdata
def test_real_packets_in_every_later_version(shared_data):
    """Real packets (v9.0 as sent, and v10.0) give the same light curve when they are written with a later version."""
    paths = sorted((shared_data / "alerts" / "lsst_wire").glob("*.bin"))
    chosen = [path for path in paths if "deep_00" in path.name or "v9" in path.name] + paths[5:8]
    assert len(chosen) == 5
    for path in chosen:
        data = path.read_bytes()
        identifier = WIRE_HEADER.unpack(data[:5])[1]
        packet = fastavro.schemaless_reader(io.BytesIO(data[5:]), lsst.schema(identifier), None)
        for other in VERSIONS:
            assert_same(read(message(packet, other)), read(data))


@pytest.mark.realdata
def test_real_parquet_of_version_7_1_is_what_its_packets_are(shared_data):
    path = shared_data / "alerts" / "parquet" / "or4_lsst7.1_50.parquet"
    rows = pq.read_table(path).to_pylist()
    found = {item.survey.name: item for item in batches(read_blocks([path]))}["lsst"]
    assert len(rows) == len(found.curves) == 50
    for number, row in enumerate(rows):
        batch = read(message(row, 701))
        alone = found.curves.take([number])
        for name in CURVE:
            assert np.array_equal(getattr(batch.curves, name), getattr(alone, name)), (number, name)
        assert batch.alerts["alert_id"][0] == found.alerts["alert_id"][number]
        assert batch.alerts["n_upper_limits"][0] == found.alerts["n_upper_limits"][number]


@pytest.mark.realdata
def test_real_lsst_history_is_whole(shared_data):
    data = (shared_data / "alerts" / "lsst_wire" / "v10_0_deep_00.bin").read_bytes()
    packet = fastavro.schemaless_reader(io.BytesIO(data[5:]), lsst.schema(1000), None)
    curve = light_curve(LSST, packet)
    detections = 1 + len(packet["prvDiaSources"])
    visits = {row["visit"] for row in packet["prvDiaSources"]} | {packet["diaSource"]["visit"]}
    forced = {row["visit"] for row in packet["prvDiaForcedSources"]}
    assert curve.detected.sum() == len(visits) == detections
    assert (~curve.detected).sum() == len(forced - visits)  # this test compares visits, and the module compares times
    newest = packet["diaSource"]["psfFlux"]
    assert curve.flux[-1] == pytest.approx(newest * 10 ** (-0.4 * 3.9))
