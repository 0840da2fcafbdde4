"""fastavro and json read the messages back, value by value, and the comparison notices planted faults."""

import base64
import io
import json
import math
import time

import fastavro
import numpy as np
import pyarrow as pa
import pytest
from fastavro.schema import parse_schema
from hypothesis import given, settings
from hypothesis import strategies as st

from alert_broker.plasticc import CLASSES
from alert_broker.stream import outputs
from alert_broker.stream.outputs import AvroEncoder, avro_name, avro_schema, encoder, fingerprint
from alert_broker.stream.registry import open_registry
from alert_broker.stream.reuse import output_schema
from edgekit.errors import EdgekitError

TYPES = {
    "flag": pa.bool_(), "tiny": pa.int8(), "short": pa.int16(), "number": pa.int32(), "id": pa.int64(),
    "p_SLSN-I": pa.float32(), "double": pa.float64(), "name": pa.string(), "long name": pa.large_string(),
    "raw": pa.binary(), "image": pa.large_binary(),
}  # fmt: skip
SCHEMA = pa.schema(list(TYPES.items()))
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=9)
FLOATS = st.floats(width=32), st.floats()
VALUES = {
    "flag": st.booleans(), "tiny": st.integers(-128, 127), "short": st.integers(-(2**15), 2**15 - 1),
    "number": st.integers(-(2**31), 2**31 - 1), "id": st.integers(-(2**63), 2**63 - 1), "p_SLSN-I": FLOATS[0],
    "double": FLOATS[1], "name": TEXT, "long name": TEXT, "raw": st.binary(max_size=9), "image": st.binary(max_size=99),
}  # fmt: skip
ROWS = st.lists(st.fixed_dictionaries({name: st.none() | value for name, value in VALUES.items()}), max_size=7)


def batch(rows, schema=SCHEMA):
    return pa.RecordBatch.from_pylist(rows, schema=schema)


def by_fastavro(messages, schema, identifier):
    """Return the values in messages. Each message must end where its datum ends."""
    parsed, values = parse_schema(json.loads(schema)), []
    for message in messages:
        assert message[:5] == b"\0" + identifier.to_bytes(4, "big")
        stream = io.BytesIO(message[5:])
        values.append(fastavro.schemaless_reader(stream, parsed, None))
        assert stream.read() == b""
    return values


def assert_same(found, expected):
    """Assert bitwise equality; NaN equals NaN."""
    assert repr(found) == repr(expected)


@settings(deadline=None, max_examples=150)
@given(ROWS, st.integers(0, 3))
def test_avro_reads_back_value_by_value(rows, skipped):
    encode = encoder("avro", SCHEMA)
    rows = rows[skipped:] if len(rows) > skipped else rows
    whole = batch([dict.fromkeys(TYPES)] * skipped + rows).slice(skipped)  # a slice, whose offsets do not begin at 0
    expected = [{avro_name(name): value for name, value in row.items()} for row in whole.to_pylist()]
    assert_same(by_fastavro(encode.encode(whole), avro_schema(SCHEMA), encode.identifier), expected)


@settings(deadline=None, max_examples=150)
@given(ROWS)
def test_json_reads_back_value_by_value(rows):
    def plain(value):
        if isinstance(value, bytes):
            return base64.b64encode(value).decode()
        return None if isinstance(value, float) and not math.isfinite(value) else value

    for message, row in zip(encoder("json", SCHEMA).encode(batch(rows)), batch(rows).to_pylist(), strict=True):
        assert b"\n" not in message
        found = json.loads(message, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
        assert list(found) == list(TYPES)
        if found["p_SLSN-I"] is not None:  # JSON has the shortest decimals of a float32
            found["p_SLSN-I"] = float(np.float32(found["p_SLSN-I"]))
        assert found == {name: plain(value) for name, value in row.items()}


def test_the_comparison_has_teeth(monkeypatch):
    """A zigzag number without its sign, the id of another schema, a missing byte and a wrong branch make the comparison
    fail."""
    rows = [{**dict.fromkeys(TYPES), "id": -5, "name": "abc"}]
    encode = encoder("avro", SCHEMA)
    (message,) = encode.encode(batch(rows))
    expected = [{avro_name(name): value for name, value in row.items()} for row in batch(rows).to_pylist()]
    assert_same(by_fastavro([message], avro_schema(SCHEMA), encode.identifier), expected)
    at = message.index(b"\x02\x09", 5)  # a value, and -5 in zigzag
    for planted in (
        message[: at + 1] + b"\x0a" + message[at + 2 :],
        message[:-1],
        message + b"\0",
        message[:at] + b"\0" + message[at + 1 :],
        b"\0\0\0\0\7" + message[5:],
    ):
        with pytest.raises((AssertionError, EOFError, IndexError, UnicodeDecodeError)):
            assert_same(by_fastavro([planted], avro_schema(SCHEMA), encode.identifier), expected)


def test_columns_that_cannot_be_null_have_no_branch():
    schema = pa.schema([pa.field("id", pa.int64(), nullable=False)])
    rows = pa.RecordBatch.from_arrays([pa.array([1, 2**40])], schema=schema)
    assert json.loads(avro_schema(schema))["fields"] == [{"name": "id", "type": "long"}]
    encode = encoder("avro", schema)
    assert by_fastavro(encode.encode(rows), avro_schema(schema), encode.identifier) == [{"id": 1}, {"id": 2**40}]
    with pytest.raises(EdgekitError, match="'id' has a null, which its schema does not allow"):
        encode.encode(pa.RecordBatch.from_arrays([pa.array([1, None])], schema=schema))


def test_the_schema_of_results_is_valid_avro_and_says_where_names_come_from():
    text = avro_schema(output_schema(tuple(CLASSES.values())))
    parse_schema(json.loads(text))
    fields = {item["name"]: item for item in json.loads(text)["fields"]}
    assert fields["p_SLSN_I"]["column"] == "p_SLSN-I"
    assert "column" not in fields["p_SNIa"]
    assert fields["reused_from"]["type"] == ["null", "long"]
    assert all(item["default"] is None for item in fields.values())


def test_ids_come_from_the_registry_or_the_schema():
    registry = open_registry("mock://outputs")
    first = encoder("avro", SCHEMA, registry, "topic-value")
    assert json.loads(registry.schema(first.identifier)) == json.loads(avro_schema(SCHEMA))
    other = pa.schema([("id", pa.int64())])
    assert encoder("avro", other, registry).identifier != first.identifier
    assert encoder("avro", SCHEMA, registry, "another-value").identifier == first.identifier
    assert encoder("avro", SCHEMA).identifier == fingerprint(avro_schema(SCHEMA)) != fingerprint(avro_schema(other))
    assert 0 <= fingerprint("") < 2**31


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        (pa.schema([("a-b", pa.int32()), ("a_b", pa.int32())]), "'a-b' and 'a_b' are both 'a_b' in Avro"),
        (pa.schema([("x", pa.list_(pa.int32()))]), "'x' is of type list"),
        (pa.schema([("x", pa.uint64())]), "'x' is of type uint64"),
    ],
)
def test_columns_that_have_no_place_in_a_message(schema, reason):
    with pytest.raises(EdgekitError, match=reason):
        encoder("avro", schema)


def test_rows_of_another_schema_and_unknown_formats():
    with pytest.raises(EdgekitError, match=r"expected .* with the encoder"):
        encoder("avro", SCHEMA).encode(batch([], pa.schema([("id", pa.int64())])))
    with pytest.raises(EdgekitError, match="unknown format 'afro' in an output; expected one of: avro, json; did you"):
        encoder("afro", SCHEMA)


@pytest.mark.parametrize("name", outputs.FORMATS)
def test_no_rows_and_rows_of_nulls(name):
    encode = encoder(name, SCHEMA)
    assert encode.encode(batch([])) == []
    first, second = encode.encode(batch([dict.fromkeys(TYPES)] * 2))
    assert first == second


def test_thousands_of_rows_take_no_python_each():
    """The time is far below that of a row-by-row writer: fastavro needs some 20 microseconds for such a row."""
    schema = output_schema(tuple(CLASSES.values()))
    count = 4096
    numbers, texts = pa.array(np.arange(count)), pa.array(["SNIa"] * count)
    columns = [texts if pa.types.is_string(item.type) else numbers.cast(item.type, safe=False) for item in schema]
    rows = pa.RecordBatch.from_arrays(columns, schema=schema)
    encode = AvroEncoder(schema, 1)
    encode.encode(rows)
    seconds = []
    for _ in range(5):
        started = time.process_time()
        assert len(encode.encode(rows)) == count
        seconds.append(time.process_time() - started)
    assert min(seconds) / count < 10e-6
