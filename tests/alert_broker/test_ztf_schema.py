"""ZTF's schema: forms of the fields, fields that may be null, and packets of extreme values that are read back
unchanged."""

import io

import fastavro
import pytest
from fastavro.schema import parse_schema

from alert_broker.surveys.base import survey_named
from alert_broker.ztf_schema import DETECTION, FORCED, HISTORY, NULL_IN_HISTORY, TYPES, VERSION, ztf_schema

LARGEST = {"double": 1.7976931348623157e308, "float": 3.4028234663852886e38, "int": 2**31 - 1, "long": 2**63 - 1}


@pytest.fixture(scope="module")
def schema():
    return parse_schema(ztf_schema())


def named(schema, name):
    return schema["__named_schemas"][f"ztf.alert.{name}"]["fields"]


def is_nullable(field):
    return isinstance(field["type"], list)


@pytest.mark.parametrize("name", ["candidate", "prv_candidate", "fp_hist", "cutout"])
def test_a_field_has_one_name_and_is_of_one_type_or_null(schema, name):
    fields = named(schema, name)
    assert len({field["name"] for field in fields}) == len(fields)
    for field in fields:
        kinds = field["type"] if is_nullable(field) else [field["type"]]
        assert kinds[-1] in (*TYPES.values(), "bytes")
        assert kinds[:-1] == (["null"] if is_nullable(field) else [])
        assert field.get("default", 0) is None if is_nullable(field) else "default" not in field


def test_the_history_has_the_fields_of_a_detection_and_more_of_them_may_be_null(schema):
    candidate = {field["name"]: field for field in named(schema, "candidate")}
    history = {field["name"]: field for field in named(schema, "prv_candidate")}
    assert list(history) == [word.split(":")[0] for word in (DETECTION + " " + HISTORY).split()]
    assert set(history) <= set(candidate)
    differing = {name for name in history if is_nullable(history[name]) != is_nullable(candidate[name])}
    assert differing == set(NULL_IN_HISTORY)
    assert not any(is_nullable(candidate[name]) for name in NULL_IN_HISTORY)
    for name in history:
        kinds = [item[name]["type"] for item in (history, candidate)]
        assert len({kind[-1] if isinstance(kind, list) else kind for kind in kinds}) == 1, name


def test_what_the_survey_reads_is_there(schema):
    inside = {"candidate": "candidate", "prv_candidates": "prv_candidate", "fp_hists": "fp_hist"}
    tops = {field["name"] for field in schema["fields"]}
    for top, names in survey_named("ztf").fields.items():
        assert top in tops
        assert set(names) <= {field["name"] for field in named(schema, inside[top])} if names else top not in inside
    for path in survey_named("ztf").cutouts:
        top, inner = path.split(".")
        assert top in tops
        assert inner in {field["name"] for field in named(schema, "cutout")}


def test_each_record_says_the_version(schema):
    assert schema["version"] == VERSION
    assert {item["version"] for item in schema["__named_schemas"].values()} == {VERSION}
    assert schema["name"] == survey_named("ztf").record


def filled(fields, choose):
    """Return a record in which `choose` gives the value of every field."""
    return {field["name"]: choose(field) for field in fields}


def written(schema, packet):
    stream = io.BytesIO()
    fastavro.schemaless_writer(stream, schema, packet)
    stream.seek(0)
    return fastavro.schemaless_reader(stream, schema, None)


def largest(field):
    kind = field["type"][-1] if is_nullable(field) else field["type"]
    return LARGEST.get(kind, "é☃")


def least(field):
    return None if is_nullable(field) else {"string": ""}.get(field["type"], 0)


@pytest.mark.parametrize("choose", [largest, least])
def test_packets_of_the_extreme_values_come_back(schema, choose):
    records = {name: filled(named(schema, name), choose) for name in ("candidate", "prv_candidate", "fp_hist")}
    packet = {"schemavsn": "", "publisher": "é", "objectId": "x", "candid": -(2**63), "candidate": records["candidate"]}
    packet |= {
        "prv_candidates": [records["prv_candidate"]] * 2,
        "fp_hists": [records["fp_hist"]],
        "cutoutScience": None,
    }
    packet |= {f"cutout{name}": {"fileName": "f", "stampData": b"\0\xff"} for name in ("Template", "Difference")}
    assert written(schema, packet) == packet
    assert len(FORCED.split()) == len(records["fp_hist"])


def test_a_detection_without_its_magnitude_is_refused_where_it_is_the_alert(schema):
    history = filled(named(schema, "prv_candidate"), least) | {"magpsf": None}
    packet = {"schemavsn": "", "publisher": "", "objectId": "x", "candid": 1, "prv_candidates": [history]}
    packet |= {"fp_hists": None, "cutoutScience": None, "cutoutTemplate": None, "cutoutDifference": None}
    candidate = filled(named(schema, "candidate"), least)
    assert fastavro.validate(packet | {"candidate": candidate}, schema, strict=True)
    assert not fastavro.validate(packet | {"candidate": candidate | {"magpsf": None}}, schema, raise_errors=False)


@pytest.mark.realdata
def test_our_ztf_schema_has_the_real_fields(shared_data):
    """Names, order and types equal those that a real 4.02 packet carries, so that its data decodes with our schema."""
    path = shared_data / "alerts" / "ztf" / "v402_2695378462115010012.avro"
    with path.open("rb") as stream:
        reader = fastavro.reader(stream)
        real = parse_schema(reader.writer_schema)
    assert fields(parse_schema(ztf_schema())) == fields(real)


def fields(schema, prefix=""):
    found = []
    for item in schema["fields"]:
        kind = item["type"]
        inner = next((part for part in (kind if isinstance(kind, list) else [kind]) if isinstance(part, dict)), None)
        record = inner["items"] if inner and inner["type"] == "array" else inner
        if isinstance(record, dict) and record["type"] == "record":
            shape = [part if isinstance(part, str) else part["type"] for part in (kind if inner is not kind else [])]
            found += [(prefix + item["name"], str(shape)), *fields(record, f"{prefix}{item['name']}.")]
        else:
            found.append((prefix + item["name"], str(kind)))
    return found
