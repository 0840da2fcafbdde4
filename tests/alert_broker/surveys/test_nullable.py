"""Tables without columns that are null everywhere: a nullable field that is absent is null, a required one is named."""

import fastavro
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from alert_broker.containers import BadPacket
from alert_broker.packets import batches, leaves, read_blocks, survey_of
from alert_broker.stream.tables import table_packets
from alert_broker.surveys import lsst
from alert_broker.surveys.base import survey_named, surveys
from alert_broker.ztf_schema import ztf_schema
from edgekit.errors import EdgekitError
from tests.alert_broker.surveys.rows import lsst_packet, lsst_row, ztf, ztf_forced, ztf_row

OLD = dict(zip(lsst.NAMES[0], lsst.NAMES[1], strict=True))


def renamed(record):
    """Return a record with the field names of LSST's versions 3 and 4, and of ELAsTiCC."""
    return {OLD.get(name, name): value for name, value in record.items()}


def tables():
    """Return a packet of each survey in which every nullable field has a value."""
    newer = lsst_packet([lsst_row(60_990.0)], [lsst_row(60_980.0, flux=-3.0)], ssObjectId=9)
    newer |= {"prvDiaNondetectionLimits": [{"midpointMjdTai": 60_970.0}]}
    older = {
        name: renamed(value) if isinstance(value, dict) else [renamed(row) for row in value]
        for name, value in newer.items()
    }
    older["diaSource"] |= {"programId": 1}
    simulated = older | {"diaSource": older["diaSource"] | {"nobs": 2.0}}
    point = {"mjd": 60_000.0, "band": "g", "psfFlux": 100.0, "psfFluxErr": 5.0}
    return {
        "ztf": [ztf(history=[ztf_row(2_458_999.5)], fp_hists=[ztf_forced(2_458_990.5)])],
        "lsst": [newer, older],
        "elasticc": [simulated | {"diaObject": {"hostgal_zphot_q010": 0.1}}],
        "elasticc-v0": [simulated | {"diaObject": {"hostgal_zphot_q10": 0.1}}],
        "decam": [{"objectId": "a", "candid": 1, "candidate": point, "fp_hists": [point | {"mjd": 59_990.0}]}],
    }


PACKETS = [(name, number) for name, packets in tables().items() for number in range(len(packets))]


def without(packet, path):
    """Return the packet without a field, as a column that is absent from every row."""
    top, _, inner = path.partition(".")
    if not inner:
        return {name: value for name, value in packet.items() if name != top}

    def lacking(record):
        return {name: value for name, value in record.items() if name != inner}

    value = packet[top]
    return packet | {top: [lacking(row) for row in value] if isinstance(value, list) else lacking(value)}


def as_null(packet, path, dtype):
    """Return the packet as a table in which the field has its type and is null."""
    top, _, inner = path.partition(".")
    if not inner:
        packet = packet | {top: None}
    else:
        rows = packet[top]
        packet = packet | {
            top: [row | {inner: None} for row in rows] if isinstance(rows, list) else rows | {inner: None}
        }
    return pa.Table.from_pylist([packet], schema=dtype)


def read(path, table):
    """Return what `classify` reads from the table as a file."""
    pq.write_table(table, path)
    (found,) = batches(read_blocks([path]))
    return found


def absent_or_null(survey, number):
    packet = tables()[survey][number]
    columns = frozenset(leaves(pa.Table.from_pylist([packet]).schema))
    item = survey_named(survey)
    chosen = item.paths_in(columns)
    return [path for path in (*chosen, *item.fields) if path in item.nullable and (path in columns or path in packet)]


CASES = [(name, number, path) for name, number in PACKETS for path in absent_or_null(name, number)]


@pytest.mark.parametrize(("survey", "number", "path"), CASES)
def test_an_absent_nullable_field_is_null(survey, number, path, tmp_path):
    """The table without the column gives what the table with nulls in it gives, as a file and replayed as Avro."""
    packet = tables()[survey][number]
    whole = pa.Table.from_pylist([packet])
    nulls = read(tmp_path / "null.parquet", as_null(packet, path, whole.schema))
    lacking = pa.Table.from_pylist([without(packet, path)])
    assert len(leaves(lacking.schema)) < len(leaves(whole.schema))
    found = read(tmp_path / "absent.parquet", lacking)
    (sent,) = table_packets((tmp_path / "absent.parquet").read_bytes(), "absent")
    (tmp_path / "sent.avro").write_bytes(sent)
    (replayed,) = batches(read_blocks([tmp_path / "sent.avro"]))
    for other in (found, replayed):
        if isinstance(nulls, BadPacket):
            assert other.reason == nulls.reason
            continue
        assert other.survey.name == survey
        assert other.alerts.drop_columns(["file", "offset"]).equals(nulls.alerts.drop_columns(["file", "offset"]))
        assert other.curves.time.tolist() == nulls.curves.time.tolist()
        assert other.curves.flux.tolist() == nulls.curves.flux.tolist()
    full = read(tmp_path / "whole.parquet", whole)
    same = not isinstance(found, BadPacket) and found.alerts.drop_columns(["file", "offset"]).equals(
        full.alerts.drop_columns(["file", "offset"])
    )
    # The nulls are seen: the packet reads differently, except for an id that another id outranks.
    assert same == (path == "diaSource.ssObjectId")


REQUIRED = [
    ("lsst", 0, "prvDiaSources.midpointMjdTai"), ("lsst", 1, "prvDiaForcedSources.midPointTai"),
    ("lsst", 1, "diaSource.diaSourceId"), ("ztf", 0, "candidate.jd"), ("ztf", 0, "fp_hists.fid"),
    ("elasticc", 0, "prvDiaSources.midPointTai"), ("decam", 0, "fp_hists"), ("decam", 0, "fp_hists.band"),
]  # fmt: skip


@pytest.mark.parametrize(("survey", "number", "path"), REQUIRED)
def test_an_absent_required_field_is_named(survey, number, path, tmp_path):
    file = tmp_path / "table.parquet"
    found = read(file, pa.Table.from_pylist([without(tables()[survey][number], path)]))
    named = f"the {survey} table has no field '{path}"
    assert isinstance(found, BadPacket)
    assert found.packets == 1
    assert found.reason.startswith(named)
    with pytest.raises(EdgekitError, match=named):
        list(table_packets(file.read_bytes(), "table"))


def nullable_paths(schema, survey):
    """Return the fields of an Avro schema that the survey reads: path to whether it may be null."""
    named, found = schema.get("__named_schemas", {}), {}

    def record_of(avro_type):
        kinds = [kind for kind in (avro_type if isinstance(avro_type, list) else [avro_type]) if kind != "null"]
        kind = kinds[0]["items"] if isinstance(kinds[0], dict) and kinds[0]["type"] == "array" else kinds[0]
        return named.get(kind, kind) if isinstance(kind, str) else kind

    for item in schema["fields"]:
        if item["name"] not in survey.fields:
            continue
        found[item["name"]] = isinstance(item["type"], list)
        record = record_of(item["type"])
        for inner in record["fields"] if isinstance(record, dict) and "fields" in record else ():
            if inner["name"] in survey.fields[item["name"]]:
                found[f"{item['name']}.{inner['name']}"] = isinstance(inner["type"], list)
    return found


def test_nullable_fields_are_those_of_the_schemas():
    """A field is nullable here if and only if some version of the survey's schema has it nullable."""
    versions = [nullable_paths(lsst.schema(number), survey_named("lsst")) for number in lsst.schema_versions()]
    ztf_schemas = [nullable_paths(fastavro.parse_schema(ztf_schema()), survey_named("ztf"))]
    for survey, schemas in (("lsst", versions), ("ztf", ztf_schemas)):
        allowed = {path for schema in schemas for path, null in schema.items() if null}
        assert survey_named(survey).nullable == allowed
        assert {path for schema in schemas for path, null in schema.items() if not null} - allowed


@pytest.mark.parametrize("identifier", lsst.schema_versions())
def test_a_table_of_every_version_is_recognised_without_its_nullable_fields(identifier):
    schema = lsst.schema(identifier)
    named = schema["__named_schemas"]
    (source,) = (item["type"] for item in schema["fields"] if item["name"] == "diaSource")
    source = named[source] if isinstance(source, str) else source
    required = {f"diaSource.{item['name']}" for item in source["fields"] if not isinstance(item["type"], list)}
    assert survey_of(required).name == "lsst"
    assert survey_named("lsst").missing(frozenset(required)) == []
    for path in ("diaSource.midPointTai", "diaSource.midpointMjdTai"):
        assert survey_of(required - {path}) is None or path not in required


@pytest.mark.realdata
@pytest.mark.parametrize("name", ["or4_lsst7.1_50", "fink_datatest_part2_67"])
def test_real_tables_without_their_null_columns(name, shared_data, tmp_path):
    """Real rows without a column of histories read as the same rows with null there."""
    table = pq.read_table(shared_data / "alerts" / "parquet" / f"{name}.parquet")
    history = "prvDiaForcedSources" if "lsst" in name else "prv_candidates"
    position = table.schema.names.index(history)
    nulls = table.set_column(position, history, pa.nulls(len(table), table.schema.field(history).type))
    (expected,) = batches(read_blocks([written(tmp_path / "nulls.parquet", nulls)]))
    (found,) = batches(read_blocks([written(tmp_path / "lacking.parquet", table.drop_columns([history]))]))
    assert len(found.curves) == len(expected.curves) == len(table)
    assert found.curves.flux.tolist() == expected.curves.flux.tolist()
    (whole,) = batches(read_blocks([written(tmp_path / "whole.parquet", table)]))
    if history == "prv_candidates":  # the forced photometry of the Rubin rows is at the times of their detections
        assert len(whole.curves.time) > len(found.curves.time)


def written(path, table):
    pq.write_table(table, path)
    return path


def test_every_survey_has_a_table_here():
    assert set(tables()) == set(surveys())
