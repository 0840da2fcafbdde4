"""Plans: the fewest bytes of a datum are counted in a second way; few operations skip an alert; limits are exact."""

import numpy as np
import pytest
from fastavro.schema import parse_schema

from alert_broker.avro import plan as plans
from alert_broker.avro import walk
from alert_broker.avro.columns import Columns
from alert_broker.avro.plan import MAX_DEPTH, MAX_FIXED_BYTES, Array, Leaf, Record, SchemaError, compile_plan
from alert_broker.surveys import lsst
from alert_broker.surveys.base import survey_named
from alert_broker.ztf_schema import ztf_schema
from tests.alert_broker.avro.maker import Maker


def record(**fields):
    return {"type": "record", "name": "r", "fields": [{"name": name, "type": kind} for name, kind in fields.items()]}


def array(items):
    return {"type": "array", "items": items}


def operations(plan):
    return plan.program[:, 0].tolist()


def fewest(schema, named=None):
    """The bytes of the shortest datum by the specification, counted without compiling anything."""
    named = {} if named is None else named
    if isinstance(schema, list):
        return 1 + min(fewest(branch, named) for branch in schema)
    if isinstance(schema, str) and schema in named:
        return fewest(named[schema], named)
    kind = schema["type"] if isinstance(schema, dict) else schema
    if isinstance(schema, dict) and "name" in schema:
        named[schema["name"]] = schema
    if kind == "record":
        return sum(fewest(item["type"], named) for item in schema["fields"])
    if kind in ("array", "map"):
        fewest(schema["items" if kind == "array" else "values"], named)  # this records the types that it names
    if kind == "fixed":
        return schema["size"]
    return {"null": 0, "float": 4, "double": 8}.get(kind, 1)


@pytest.mark.parametrize("seed", range(40))
def test_the_fewest_bytes_of_a_datum(seed):
    make = Maker(seed)
    raw = make.record(3)
    plan = compile_plan(parse_schema(raw), [raw["fields"][-1]["name"]])
    assert plan.min_bytes == fewest(raw)
    assert len(make.encode(raw)) >= plan.min_bytes


def test_a_record_of_the_fewest_bytes_is_read_and_one_byte_less_is_not():
    raw = record(
        a=["null", "double"], b=array("int"), c="float", d={"type": "fixed", "name": "f", "size": 3}, e="string"
    )
    plan = compile_plan(parse_schema(raw), ["a", "b", "c", "d", "e"])
    assert plan.min_bytes == 1 + 1 + 4 + 3 + 1
    columns = Columns(plan)
    assert columns.read(bytes(plan.min_bytes), 1)[1] is None
    assert columns.read(bytes(plan.min_bytes - 1), 1)[1] is not None
    assert columns.take().to_pylist() == [{"a": None, "b": [], "c": 0.0, "d": bytes(3), "e": ""}]


def test_what_is_not_wanted_is_skipped_in_one_operation():
    fixed = {f"f{k}": ("float", "double")[k % 2] for k in range(50)}
    assert operations(compile_plan(parse_schema(record(**fixed, x="int")), ["x"])) == [walk.SKIP, walk.NUMBER, walk.END]
    optional = {f"o{k}": ["null", ("float", "boolean")[k % 2]] for k in range(50)}
    plan = compile_plan(parse_schema(record(**optional, x="int")), ["x"])
    assert operations(plan) == [walk.RUN, walk.NUMBER, walk.END]
    assert len(plan.items) == 50
    mixed = compile_plan(parse_schema(record(**(fixed | optional), x="int")), ["x"])
    assert operations(mixed) == [walk.RUN, walk.NUMBER, walk.END]
    assert mixed.items[0, 0] == 25 * (4 + 8)  # the bytes before the first tag


def test_skipped_fields_on_two_sides_of_an_array_are_not_merged():
    """An empty array jumps over its items. A skip that begins among the items and continues after the array would be
    left out with them."""
    plan = compile_plan(parse_schema(record(rows=array("double"), after="double", x="int")), ["x"])
    assert operations(plan) == [walk.BEGIN, walk.SKIP, walk.NEXT, walk.SKIP, walk.NUMBER, walk.END]
    columns = Columns(plan)
    assert columns.read(b"\0" + bytes(8) + b"\x0a", 1)[1] is None
    assert columns.take().to_pylist() == [{"x": 5}]


@pytest.mark.parametrize("survey", ["ztf", "lsst"])
def test_an_alert_has_more_fields_than_its_plan_has_operations(survey):
    schema = parse_schema(ztf_schema()) if survey == "ztf" else lsst.schema(max(lsst.schema_versions()))
    records = [item for item in schema["__named_schemas"].values() if item["type"] == "record"]
    plan = compile_plan(schema, survey_named(survey).paths)
    assert 3 * len(plan.program) < 2 * sum(len(item["fields"]) for item in records)


def test_levels_are_those_of_the_arrays_around_a_column():
    rows = {
        "type": "record",
        "name": "q",
        "fields": [{"name": "t", "type": array("int")}, {"name": "u", "type": "int"}],
    }
    plan = compile_plan(parse_schema(record(x="int", rows=array(rows), y="int")), ["x", "y", "rows.t", "rows.u"])
    outer = plan.root.fields["rows"]
    assert isinstance(plan.root, Record)
    assert isinstance(outer, Array)
    inner = outer.items.fields["t"]
    assert (outer.level, inner.level, plan.levels, plan.depth) == (1, 2, 3, 2)
    of = plan.level_of
    assert [of[node.column] for node in (plan.root.fields["x"], plan.root.fields["y"], outer)] == [0, 0, 0]
    assert [of[inner.column], of[outer.items.fields["u"].column], of[inner.items.column]] == [1, 1, 2]
    assert sorted(leaf.column for leaf in plan.root.fields.values() if isinstance(leaf, Leaf)) == [0, len(of) - 1]


def test_the_order_of_what_is_wanted_does_not_matter():
    raw = record(x="int", y="double", z=["null", "string"])
    first, second = (compile_plan(parse_schema(raw), wanted) for wanted in (["x", "z", "y"], ["y", "x", "z", "x"]))
    assert first.layout == second.layout
    assert np.array_equal(first.program, second.program)
    assert first.layout != compile_plan(parse_schema(raw), ["x", "y"]).layout


def test_a_type_that_is_first_named_in_a_skipped_field_can_be_read_later():
    inner = {"type": "record", "name": "q", "fields": [{"name": "i", "type": "int"}, {"name": "f", "type": "float"}]}
    plan = compile_plan(parse_schema(record(skipped=["null", inner], x="q")), ["x.i"])
    columns = Columns(plan)
    assert columns.read(b"\0" + b"\x08" + bytes(4), 1)[1] is None
    assert columns.take().to_pylist() == [{"x": {"i": 4}}]


def test_each_operation_names_its_field():
    rows = {"type": "record", "name": "q", "fields": [{"name": "i", "type": "int"}]}
    plan = compile_plan(parse_schema(record(a="string", rows=array(rows))), ["a", "rows.i"])
    assert plan.paths == ("a", "rows", "rows.i", "rows", "the end")


# --- limits


def nested(depth):
    """Return an int inside this many arrays."""
    return "int" if depth == 0 else array(nested(depth - 1))


def test_values_inside_each_other_up_to_the_limit():
    def compiled(depth):
        return compile_plan(record(x=nested(depth)), ["x"])

    assert compiled(MAX_DEPTH - 1).depth == MAX_DEPTH - 1
    with pytest.raises(SchemaError, match=f"nests them more than {MAX_DEPTH} deep"):
        compiled(MAX_DEPTH)


def test_values_up_to_the_limit(monkeypatch):
    monkeypatch.setattr(plans, "MAX_VALUES", 4)  # the record and its fields
    assert compile_plan(record(a="int", b="int", c="int"), ["a"]).min_bytes == 3
    with pytest.raises(SchemaError, match="more than 4 values"):
        compile_plan(record(a="int", b="int", c="int", d="int"), ["a"])


@pytest.mark.parametrize("wanted", ["x", "y"])
@pytest.mark.parametrize("size", [MAX_FIXED_BYTES + 1, -1, True, 2.0, "3"])
def test_a_fixed_of_no_sane_size_is_refused_read_or_skipped(size, wanted):
    """fastavro does not check the size."""
    with pytest.raises(SchemaError, match=f"a fixed type of {size!r} bytes; expected 0 to {MAX_FIXED_BYTES}"):
        compile_plan(record(y="int", x={"type": "fixed", "name": "f", "size": size}), [wanted])


def test_the_largest_fixed_is_skipped_without_a_number_that_wraps():
    kinds = {f"f{k}": {"type": "fixed", "name": f"f{k}", "size": MAX_FIXED_BYTES} for k in range(5)}
    plan = compile_plan(record(**kinds, x="int"), ["x"])
    assert plan.min_bytes == 5 * MAX_FIXED_BYTES + 1
    assert plan.program[operations(plan).index(walk.SKIP), walk.FIRST] <= 2 * MAX_FIXED_BYTES
    assert Columns(plan).read(bytes(100), 1)[1].reason == walk.REASONS[walk.ENDS]


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("decimal", "unknown type 'decimal'"),
        ({"type": "enum", "name": "e", "symbols": []}, "an enum without symbols"),
        (["null"], "the union x has no type but null"),
        ([], "the union x has no type but null"),
        (array({"type": "fixed", "name": "f", "size": 0}), "the items of the array x take no bytes"),
    ],
)
def test_types_without_a_meaning_are_refused_also_if_they_are_skipped(kind, reason):
    for wanted in ("x", "y"):
        with pytest.raises(SchemaError, match=reason):
            compile_plan(record(y="int", x=kind), [wanted])


def test_a_record_without_fields_is_refused_also_if_it_is_skipped():
    schema = record(y="int", x={"type": "record", "name": "q", "fields": []})
    with pytest.raises(SchemaError, match="x is a record; name the fields wanted in it"):
        compile_plan(schema, ["x"])
    with pytest.raises(SchemaError, match="the record q takes no bytes"):
        compile_plan(schema, ["y"])
