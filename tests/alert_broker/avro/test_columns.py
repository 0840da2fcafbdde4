"""The compiled Avro reader is compared with fastavro: on random schemas, hostile bytes, truncated data, and every real
packet."""

import io
import os
import subprocess
import sys
from pathlib import Path

import fastavro
import numpy as np
import pytest
from fastavro.schema import parse_schema

from alert_broker.avro import columns as avro_columns
from alert_broker.avro import walk
from alert_broker.avro.columns import Columns
from alert_broker.avro.plan import SchemaError, compile_plan
from alert_broker.simulate import simulate, write
from alert_broker.surveys import lsst
from alert_broker.surveys.base import survey_named
from alert_broker.ztf_schema import ztf_schema
from tests.alert_broker.avro.maker import Maker, zigzag

ROOT = Path(__file__).resolve().parents[3]
LOGICAL = {"int": "date", "long": "timestamp-micros", "bytes": "decimal", "string": "uuid"}
HOSTILE_NUMBERS = (0, 1, 3, 127, 128, 2**31, 2**62, 2**63 - 1, -1, -(2**63))


# --- random schemas and data: bytes are made here, and fastavro says what they mean


def paths_of(schema, named=None):
    """Yield every path of the schema that can be a column, except dates, because fastavro converts numbers to dates."""
    named = {} if named is None else named
    if isinstance(schema, list):
        paths = [paths_of(branch, named) for branch in schema if branch != "null"]
        numbers = set(map(str, schema)) <= {"null", "int", "long", "float", "double"}
        return paths[0] if len(paths) == 1 else [""] if numbers and paths else []
    schema = named.get(schema, schema) if isinstance(schema, str) else schema
    kind = schema["type"] if isinstance(schema, dict) else schema
    if isinstance(schema, dict) and "name" in schema:
        named[schema["name"]] = schema
    if kind == "record":
        inner = {item["name"]: paths_of(item["type"], named) for item in schema["fields"]}
        return [f"{name}.{path}".rstrip(".") for name, paths in inner.items() for path in paths]
    if kind in ("array", "map"):
        paths = paths_of(schema["items" if kind == "array" else "values"], named)
        return paths if kind == "array" else []
    return [] if isinstance(schema, dict) and "logicalType" in schema else [""]


def project(value, wanted):
    """Return the wanted paths of the value that fastavro read."""
    if isinstance(value, list):
        return [project(item, wanted) for item in value]
    if value is None or not any(wanted):
        return value
    tops = dict.fromkeys(path.split(".")[0] for path in wanted)
    return {top: project(value[top], [p.partition(".")[2] for p in wanted if p.split(".")[0] == top]) for top in tops}


def in_order(value):
    """Return the value without the order of a record's fields, which differs between schema and paths. NaN becomes
    equal to itself."""
    if isinstance(value, dict):
        return {key: in_order(value[key]) for key in sorted(value)}
    if isinstance(value, list):
        return [in_order(item) for item in value]
    return value if value == value else "NaN"


def by_fastavro(data, schema, count):
    stream = io.BytesIO(data)
    values = [fastavro.schemaless_reader(stream, schema, None) for _ in range(count)]
    assert stream.tell() == len(data)
    return values


def decoded(data, schema, wanted, count=1):
    columns = Columns(compile_plan(schema, wanted))
    ends, fault = columns.read(data, count)
    assert fault is None, fault
    assert len(ends) == count
    assert ends[-1] == len(data)
    batch = columns.take()
    batch.validate(full=True)
    return batch


@pytest.mark.parametrize("seed", range(120))
def test_random_schemas_and_data_agree_with_fastavro(seed):
    make = Maker(seed)
    raw = make.record(3)
    schema, paths = parse_schema(raw), paths_of(raw)
    wanted = [path for path in paths if make.rng.random() < make.one_of(0.2, 0.9)] or paths[-1:]
    count = int(make.rng.integers(1, 30))
    data = b"".join(make.encode(raw) for _ in range(count))
    values = by_fastavro(data, schema, count)
    assert in_order(decoded(data, schema, wanted, count).to_pylist()) == in_order(project(values, wanted))

    stream = io.BytesIO()
    for value in values:
        fastavro.schemaless_writer(stream, schema, value)
    again = by_fastavro(stream.getvalue(), schema, count)
    assert in_order(decoded(stream.getvalue(), schema, wanted, count).to_pylist()) == in_order(project(again, wanted))


def test_the_comparison_has_teeth():
    """A value that differs in one bit, and a column of the wrong field, make the comparison fail."""
    raw = {"type": "record", "name": "r", "fields": [{"name": name, "type": "double"} for name in "ab"]}
    schema, data = parse_schema(raw), np.array([1.5, 2.5], "<f8").tobytes()
    expected = project(by_fastavro(data, schema, 1), ["a"])
    assert decoded(data, schema, ["a"]).to_pylist() == expected
    damaged = bytes([data[0] ^ 1]) + data[1:]
    assert decoded(damaged, schema, ["a"]).to_pylist() != expected
    shifted = {**raw, "fields": raw["fields"][::-1]}
    assert decoded(data, parse_schema(shifted), ["a"]).to_pylist() != expected


def test_types_are_the_schemas_own_and_logical_types_what_is_beneath():
    fields = [{"name": kind, "type": {"type": kind, "logicalType": name}} for kind, name in LOGICAL.items()]
    fields[2]["type"] |= {"precision": 4, "scale": 2}
    fields += [{"name": "e", "type": {"type": "enum", "name": "e", "symbols": ["A", "B"]}}]
    fields += [{"name": "n", "type": ["null", "float", "int"]}, {"name": "w", "type": ["int", "long"]}]
    schema = parse_schema({"type": "record", "name": "r", "fields": fields})
    data = zigzag(-7) + zigzag(2**62) + b"\x04\x01\x02" + b"\x02x" + b"\x02" + b"\x04\x0a" + b"\x02" + zigzag(2**40)
    batch = decoded(data, schema, [*LOGICAL, "e", "n", "w"])
    row = {"int": -7, "long": 2**62, "bytes": b"\x01\x02", "string": "x", "e": "B", "n": 5.0, "w": 2**40}
    assert batch.to_pylist() == [row]
    kinds = ["int32", "int64", "large_binary", "large_string", "dictionary<values=string, indices=int32, ordered=0>"]
    assert [str(item.type) for item in batch.schema] == [*kinds, "double", "int64"]


def test_columns_grow_and_start_again():
    raw = {"type": "record", "name": "r", "fields": [{"name": "t", "type": {"type": "array", "items": "string"}}]}
    columns = Columns(compile_plan(parse_schema(raw), ["t"]))
    texts = [f"{number:05}" for number in range(5000)]
    data = zigzag(5000) + b"".join(zigzag(5) + text.encode() for text in texts) + b"\0"
    for repeats in (1, 7):
        for _ in range(repeats):
            assert columns.read(data, 1)[1] is None
        assert len(columns) == repeats
        assert columns.take()["t"].to_pylist() == [texts] * repeats
        assert len(columns) == 0


# --- what the bytes may claim

MANY = {"type": "array", "items": "long"}
HOSTILE = [
    ("int", b"\xff\xff\xff\xff\x1f", walk.LONG, 0),
    ("int", b"\x80\x80\x80\x80\x80\x00", walk.LONG, 0),
    ("long", b"\xff" * 10, walk.LONG, 0),
    ("long", b"\xff" * 9 + b"\x02", walk.LONG, 0),
    ("long", b"\xff" * 4, walk.ENDS, 0),
    ("boolean", b"\x02", walk.BOOL, 0),
    ("float", b"\0\0\0", walk.ENDS, 0),
    ("double", b"\0" * 7, walk.ENDS, 0),
    ("string", zigzag(-1), walk.NEGATIVE, 0),
    ("string", zigzag(2) + b"a", walk.BEYOND, 0),
    ("bytes", zigzag(2**63 - 1), walk.BEYOND, 0),
    ({"type": "fixed", "name": "f", "size": 3}, b"ab", walk.ENDS, 0),
    ({"type": "enum", "name": "e", "symbols": ["A", "B"]}, zigzag(2), walk.SYMBOL, 0),
    ({"type": "enum", "name": "e", "symbols": ["A", "B"]}, zigzag(-1), walk.SYMBOL, 0),
    (["null", "float"], zigzag(2), walk.BRANCH, 0),
    (["null", "float"], zigzag(-1), walk.BRANCH, 0),
    (["null", "float"], b"\x82\x00", walk.BRANCH, 0),
    (["null", "boolean"], b"\x02\x02", walk.BOOL, 1),
    (["null", "int"], b"", walk.ENDS, 0),
    (["int", "double", "null"], zigzag(3), walk.BRANCH, 0),
    (MANY, zigzag(9) + b"\0" * 4, walk.COUNT, 0),
    (MANY, zigzag(2**63 - 1), walk.COUNT, 0),
    (MANY, zigzag(-(2**63)) + zigzag(1) + b"\0\0", walk.COUNT, 0),
    (MANY, zigzag(-2) + zigzag(99) + b"\0\0", walk.BEYOND, 0),
    (MANY, zigzag(-2) + zigzag(-1) + b"\0\0", walk.NEGATIVE, 0),
    (MANY, zigzag(-2) + zigzag(1) + b"\0\0\0", walk.COUNT, 0),
    (MANY, zigzag(1) + b"\0", walk.ENDS, 2),
]


@pytest.mark.parametrize(("kind", "data", "code", "at"), HOSTILE)
@pytest.mark.parametrize("wanted", [True, False])
def test_claims_that_cannot_be_are_refused_where_they_stand(kind, data, code, at, wanted):
    """The fault is the same for a field that is read and for one that is skipped. Earlier datums stay, and the failed
    one leaves nothing."""
    fields = [{"name": "first", "type": "int"}, {"name": "value", "type": kind}]
    schema = parse_schema({"type": "record", "name": "r", "fields": fields})
    columns = Columns(compile_plan(schema, ["first", "value"] if wanted else ["first"]))
    fine = zigzag(7) + Maker(1).encode(fields[1]["type"])
    ends, fault = columns.read(fine + zigzag(8) + data, 2)
    assert ends.tolist() == [len(fine)]
    assert (fault.datum, fault.start, fault.field) == (1, len(fine), "value")
    assert fault.reason == walk.REASONS[code]
    assert fault.at in (len(fine) + 1 + at, len(fine) + 2 + at)
    assert [row["first"] for row in columns.take().to_pylist()] == [7]


def versions(*kinds):
    """Return plans of a record whose first field, `unread`, has these types."""
    fields = [{"name": "text", "type": "string"}, {"name": "rows", "type": {"type": "array", "items": ["null", "int"]}}]
    for kind in kinds:
        raw = {"type": "record", "name": "r", "fields": [{"name": "unread", "type": kind}, *fields]}
        yield compile_plan(parse_schema(raw), ["text", "rows"])


def test_schemas_that_differ_in_what_is_skipped_fill_the_same_columns():
    old, new = versions("int", "double")
    assert old.layout == new.layout
    columns = Columns(old)
    rest = b"\x02a" + zigzag(2) + b"\x02" + zigzag(5) + b"\x00\x00", b"\x04bc" + zigzag(0)
    assert columns.read(zigzag(300) + rest[0], 1)[1] is None
    assert columns.read(bytes(8) + rest[1], 1, new)[1] is None
    fault = columns.read(bytes(8) + b"\x04b", 1, new)[1]
    assert (fault.field, fault.at) == ("text", 8)
    assert columns.read(zigzag(-1) + rest[0], 1)[1] is None
    expected = [{"text": "a", "rows": [5, None]}, {"text": "bc", "rows": []}, {"text": "a", "rows": [5, None]}]
    assert columns.take().to_pylist() == expected


def test_planted_plan_of_another_version_is_seen():
    """Planted: the columns are equal, but each packet needs the plan of its own schema."""
    old, new = versions("int", "double")
    data = bytes(8) + b"\x04bc" + zigzag(0)
    assert Columns(old).read(data, 1)[1] is not None
    assert Columns(old).read(data, 1, new)[1] is None


def test_schemas_that_differ_in_what_is_read_have_columns_of_their_own():
    (plan,) = versions("int")
    fields = [
        {"name": "text", "type": ["null", "string"]},
        {"name": "rows", "type": {"type": "array", "items": "long"}},
    ]
    other = compile_plan(parse_schema({"type": "record", "name": "r", "fields": fields}), ["text", "rows"])
    assert plan.layout != other.layout
    with pytest.raises(AssertionError):
        Columns(plan).read(b"\0\0", 1, other)


def test_a_block_with_a_size_must_have_it():
    schema = parse_schema({"type": "record", "name": "r", "fields": [{"name": "value", "type": MANY}]})
    columns = Columns(compile_plan(schema, ["value"]))
    body = zigzag(1) + zigzag(2)
    assert columns.read(zigzag(-2) + zigzag(2) + body + b"\0", 1)[1] is None
    assert columns.read(zigzag(-2) + zigzag(3) + body + b"\0", 1)[1].reason == walk.REASONS[walk.SIZE]
    assert columns.take()["value"].to_pylist() == [[1, 2]]


@pytest.mark.parametrize("kind", [MANY, {"type": "map", "values": "long"}], ids=["array", "map"])
def test_a_block_with_a_size_must_have_it_also_if_it_is_skipped(kind):
    """Otherwise the next value would be read from another byte than the end of the items."""
    fields = [{"name": "value", "type": kind}, {"name": "after", "type": "int"}]
    columns = Columns(compile_plan(parse_schema({"type": "record", "name": "r", "fields": fields}), ["after"]))
    key = zigzag(1) + b"k" if kind["type"] == "map" else b""
    body = key + zigzag(1) + key + zigzag(2)
    for size in (0, 1, -1):
        data = zigzag(-2) + zigzag(len(body) + size) + body + b"\0" + zigzag(5) + b"\0"[: max(size, 0)]
        fault = columns.read(data, 1)[1]
        # the second reason: the block is too short for its items
        refused = {walk.REASONS[walk.SIZE], walk.REASONS[walk.COUNT]}
        assert (fault is None) if size == 0 else (fault.reason in refused)
    # the block holds no valid items
    assert columns.read(zigzag(-1) + zigzag(11) + b"\xff" * 11 + b"\0" + zigzag(5), 1)[1] is not None
    assert columns.take()["after"].to_pylist() == [5]


@pytest.mark.parametrize(
    "text",
    [
        "é",
        "☃",
        "𝄞",
        "\x7f",
        "퟿",
        "\U0010ffff",
        b"\x80",
        b"\xc3",
        b"\xc1\x80",
        b"\xe0\x9f\x80",
        b"\xed\xa0\x80",
        b"\xf4\x90\x80\x80",
        b"\xf0\x8f\xbf\xbf",
        b"\xf5\x80\x80\x80",
        b"\xe2\x28\xa1",
        b"a\xff",
    ],
)
def test_text_is_utf8_exactly_where_python_says_so(text):
    data = text if isinstance(text, bytes) else text.encode()
    schema = parse_schema({"type": "record", "name": "r", "fields": [{"name": "value", "type": "string"}]})
    fault = Columns(compile_plan(schema, ["value"])).read(zigzag(len(data)) + data, 1)[1]
    assert (fault is None) == isinstance(text, str)


def test_a_byte_flipped_in_a_length_is_reported():
    schema = parse_schema({"type": "record", "name": "r", "fields": [{"name": n, "type": "string"} for n in "ab"]})
    data = zigzag(3) + b"abc" + zigzag(2) + b"de"
    for at in (0, 4):
        for bit in range(8):
            damaged = bytearray(data)
            damaged[at] ^= 1 << bit
            ends, fault = Columns(compile_plan(schema, ["a", "b"])).read(bytes(damaged), 1)
            assert fault is not None
            assert len(ends) == 0


def test_a_datum_that_ends_early_is_caught_only_by_the_check_of_its_end():
    schema = parse_schema({"type": "record", "name": "r", "fields": [{"name": "a", "type": "string"}]})
    columns = Columns(compile_plan(schema, ["a"]))
    assert columns.read(zigzag(2) + b"xy", 1)[1] is None
    data = zigzag(2) + b"abc"
    ends, fault = columns.read(data, 1)
    assert (len(ends), len(columns), fault.at, fault.reason) == (0, 1, 3, "1 bytes left over")
    assert columns.read(2 * data[:3] + b"\0", 2)[1].reason == "1 bytes left over"
    assert columns.read(data[:3], 1)[1] is None  # the data has no other fault
    assert columns.take()["a"].to_pylist() == ["xy", "ab"]


@pytest.mark.parametrize(
    ("fields", "wanted", "reason"),
    [
        ([("x", "int"), ("again", ["null", "r"])], ["x"], "recursive: r contains itself"),
        ([("x", {"type": "array", "items": "null"})], ["x"], "the items of the array x take no bytes"),
        ([("x", "null")], ["x"], "takes no bytes"),
        ([("x", "int")], ["y", "z.a"], "none of the fields y, z"),
        ([("x", {"type": "map", "values": "int"})], ["x.y"], "x is a map"),
        ([("x", ["null", "int", "string"])], ["x"], "x is a union of null, int, string; a column can hold"),
        ([("x", {"type": "record", "name": "q", "fields": [{"name": "i", "type": "int"}]})], ["x"], "x is a record"),
        ([("x", "int")], ["x.y"], "x is of type 'int'; it has no field 'y'"),
    ],
)
def test_schemas_and_wishes_that_are_refused(fields, wanted, reason):
    raw = {"type": "record", "name": "r", "fields": [{"name": name, "type": kind} for name, kind in fields]}
    with pytest.raises(SchemaError, match=reason):
        compile_plan(parse_schema(raw), wanted)


def test_a_schema_that_doubles_with_every_line_is_refused():
    fields = [{"name": "x", "type": {"type": "record", "name": "r0", "fields": [{"name": "i", "type": "int"}]}}]
    for k in range(1, 40):
        inner = [{"name": "a", "type": f"r{k - 1}"}, {"name": "b", "type": f"r{k - 1}"}]
        fields.append({"name": f"f{k}", "type": {"type": "record", "name": f"r{k}", "fields": inner}})
    with pytest.raises(SchemaError, match="more than 20000 values"):
        compile_plan(parse_schema({"type": "record", "name": "r", "fields": fields}), ["x.i"])


def test_paths_that_a_schema_lacks_are_left_out():
    raw = {"type": "record", "name": "r", "fields": [{"name": "x", "type": "int"}, {"name": "a", "type": MANY}]}
    rows = {"type": "record", "name": "q", "fields": [{"name": "i", "type": "int"}]}
    raw["fields"].append({"name": "rows", "type": ["null", {"type": "array", "items": rows}]})
    data = zigzag(3) + zigzag(1) + zigzag(5) + b"\0" + zigzag(1) + zigzag(1) + zigzag(9) + b"\0"
    assert decoded(data, parse_schema(raw), ["x", "y", "rows.j"]).to_pylist() == [{"x": 3}]


# --- packets


def wanted_of(survey):
    fields = survey_named(survey).fields
    return [f"{top}.{name}" for top, inner in fields.items() for name in inner] + [
        t for t, i in fields.items() if not i
    ]


@pytest.fixture(scope="module", params=["ztf", "lsst"])
def packet(request):
    """A simulated packet of medium length: its bytes, its plan, and the values that fastavro reads."""
    schema = parse_schema(ztf_schema()) if request.param == "ztf" else lsst.schema(max(lsst.schema_versions()))
    packets = [alert.packet for alert in simulate(request.param, 12, 3, cutouts=False)]
    bodies = []
    for value in packets:
        stream = io.BytesIO()
        fastavro.schemaless_writer(stream, schema, value)
        bodies.append(stream.getvalue())
    data = sorted(bodies, key=len)[4]
    return data, compile_plan(schema, wanted_of(request.param)), by_fastavro(data, schema, 1)


def test_simulated_packets_agree_with_fastavro(packet):
    data, plan, (value,) = packet
    columns = Columns(plan)
    assert columns.read(data, 1)[1] is None
    (row,) = columns.take().to_pylist()
    assert in_order(row) == in_order(project(value, [p for p in wanted_of(survey_of(row)) if has(value, p)]))


def survey_of(row):
    return "ztf" if "candid" in row else "lsst"


def has(value, path):
    top, _, inner = path.partition(".")
    inside = value.get(top, value) if isinstance(value, dict) else value
    inside = inside[0] if isinstance(inside, list) and inside else inside
    return isinstance(value, dict) and top in value and (not inner or (isinstance(inside, dict) and inner in inside))


def test_truncation_at_every_byte_is_an_error(packet):
    data, plan, _ = packet
    columns = Columns(plan)
    for size in range(1, len(data)):
        ends, fault = columns.read(data[:size], 1)
        assert fault is not None, size
        assert (len(ends), len(columns)) == (0, 0)
        assert 0 <= fault.at <= size
    assert columns.read(data, 1)[1] is None


def mutated(data, rng):
    """Return damaged bytes: random bytes (mostly lengths and tags near the start), a part cut out or doubled, or a
    number replaced by a wrong one."""
    damaged = bytearray(data)
    for _ in range(rng.integers(1, 5)):
        damaged = damaged or bytearray(1)
        at = int(rng.integers(len(damaged)))
        match rng.integers(4):
            case 0:
                damaged[at] = rng.integers(256)
            case 1:
                damaged[at] ^= 1 << int(rng.integers(8))
            case 2:
                number = zigzag(HOSTILE_NUMBERS[rng.integers(len(HOSTILE_NUMBERS))])
                damaged[at : at + len(number)] = number
            case _:
                del damaged[at : at + int(rng.integers(1, 9))]
    return bytes(damaged) or b"\0"


def test_ten_thousand_mutations_of_each_packet_do_no_harm(packet):
    """The bytes around the data must not matter either: with other bytes there, the result is the same."""
    data, plan, _ = packet
    rng = np.random.default_rng(5)
    columns, twin = Columns(plan), Columns(plan)
    faults = 0
    for number in range(10_000):
        damaged = mutated(data, rng)
        before = len(columns)
        ends, fault = columns.read(damaged, 1)
        faults += fault is not None
        assert len(columns) - before == len(ends) == (fault is None)
        assert fault is None or 0 <= fault.at <= len(damaged)
        if number % 20 == 0:
            around = memoryview(b"\xff" * 16 + damaged + b"\x80" * 16)[16:-16]
            twin.read(around, 1)
            columns.take().validate(full=True)
            assert columns.read(damaged, 1)[1] == fault
            assert repr(columns.take().to_pylist()) == repr(twin.take().to_pylist())
    assert 2_000 < faults < 10_000  # a flip in a number of the photometry is accepted; most others are not


def test_no_index_leaves_its_array():
    """The same loop runs without the compiler, on arrays that check each index, for hundreds of damaged packets."""
    script = (
        "import numpy as np, tests.alert_broker.avro.test_columns as t, warnings\n"
        "warnings.simplefilter('ignore', RuntimeWarning)\n"  # numbers wrap at 64 bits, as in compiled code
        "assert not hasattr(t.walk.walk, 'signatures')\n"
        "for seed in range(25):\n"
        "    make = t.Maker(seed)\n"
        "    raw = make.record(2)\n"
        "    plan = t.compile_plan(t.parse_schema(raw), t.paths_of(raw))\n"
        "    data = make.encode(raw) + make.encode(raw)\n"
        "    for _ in range(12):\n"
        "        t.Columns(plan).read(t.mutated(data, make.rng), 2)\n"
    )
    environment = os.environ | {"NUMBA_DISABLE_JIT": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_loop_is_compiled_on_request():
    avro_columns.warm_up()
    assert avro_columns.is_compiled()


@pytest.mark.realdata
@pytest.mark.parametrize("every", [False, True], ids=["wanted", "every field"])
def test_real_packets_agree_with_fastavro(every, shared_data):
    folder = shared_data / "alerts"
    count = 0
    for path in [*folder.glob("ztf*/*.avro"), *folder.glob("other/*.avro"), *folder.glob("lsst_wire/*.bin")]:
        data = path.read_bytes()
        if path.suffix == ".bin":
            schema = lsst.schema(int.from_bytes(data[1:5], "big"))
            blocks = [(data[5:], 1, by_fastavro(data[5:], schema, 1))]
            name = "lsst"
        else:
            with path.open("rb") as stream:
                reader = fastavro.block_reader(stream)
                schema, name = parse_schema(reader.writer_schema), "ztf"
                blocks = [
                    (b.bytes_.getvalue(), b.num_records, by_fastavro(b.bytes_.getvalue(), schema, b.num_records))
                    for b in reader
                ]
        paths = paths_of(schema)
        for body, number, values in blocks:
            wanted = paths if every else [path for path in wanted_of(name) if path in paths]
            rows = decoded(body, schema, wanted, number).to_pylist()
            assert in_order(rows) == in_order(project(values, wanted))
            count += number
    assert count == 61 + 24 + 2 + 24


@pytest.mark.parametrize("survey", ["ztf", "lsst"])
def test_places_are_where_the_bytes_are(survey, tmp_path):
    """The plan with places reads the same columns as the plan without, and the images where fastavro finds them."""
    from alert_broker.avro.columns import places
    from alert_broker.containers import Block, split
    from alert_broker.stream.cutouts import cutouts

    alerts = list(simulate(survey, 3, 4))
    for path in write(tmp_path, alerts, packets_per_file=1):
        data = path.read_bytes()
        (block,) = split(data, "")
        assert isinstance(block, Block)
        plain, placed = Columns(block.schema.plan), Columns(block.schema.with_places)
        assert plain.read(block.data, 1)[1] is placed.read(block.data, 1)[1] is None
        known, found = plain.take(), placed.take()
        assert found.select(known.schema.names).equals(known)
        for name, expected in zip(block.schema.survey.cutouts, cutouts([data]), strict=True):
            top, *inner = name.split(".")
            column = found[top].field(0) if inner else found[top]
            (start,), (size,) = (array.tolist() for array in places(column))
            assert bytes(block.data[start : start + size]) == expected[0].as_py()


def test_only_bytes_have_places():
    schema = parse_schema({"type": "record", "name": "r", "fields": [{"name": "x", "type": ["null", "string"]}]})
    with pytest.raises(SchemaError, match="x is of type 'string'"):
        compile_plan(schema, [], ["x"])


def test_a_null_and_a_value_over_the_limit_have_a_place():
    from alert_broker.avro.columns import places
    from alert_broker.avro.walk import LARGEST_PLACED

    schema = parse_schema({"type": "record", "name": "r", "fields": [{"name": "x", "type": ["null", "bytes"]}]})
    columns = Columns(compile_plan(schema, [], ["x"]))
    size = LARGEST_PLACED + 10
    stream = io.BytesIO()
    for value in (None, b"abc", b"", bytes(size)):
        fastavro.schemaless_writer(stream, schema, {"x": value})
    data = stream.getvalue()
    assert columns.read(data, 4)[1] is None
    column = columns.take()["x"]
    assert column.is_null().to_pylist() == [True, False, False, False]
    starts, sizes = places(column)
    assert sizes.tolist() == [0, 3, 0, LARGEST_PLACED]
    assert data[starts[1] : starts[1] + 3] == b"abc"
    assert starts[3] == len(data) - size
