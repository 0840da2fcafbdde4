"""From schema 7.0 to 11.1 the same measurements give the same light curve, to the bit, through the compiled reader."""

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

VERSIONS = [identifier for identifier in lsst.schema_versions() if identifier >= 700]
ZERO = {"string": "", "double": 0.0, "float": 0.0, "boolean": False}
CURVE = ("time", "band", "flux", "flux_error", "detected")


def translated(values, schema, named):
    """A record of a schema with the values that it shares with another version, null or zero elsewhere."""
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
    """A packet of some version as one of this version, as it is sent."""
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
    """The twin of the mapping: the next rename must be an error with the field's name, never an empty light curve."""
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


# --- real packets


@pytest.mark.realdata
def test_real_packets_in_every_later_version(shared_data):
    """v9.0 as sent and v10.0: the light curve that is read from them stays the same when they are written anew."""
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
