"""The account of all packets, rows with the columns that are given, and files in row groups."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alert_broker import results
from alert_broker.containers import BadPacket
from alert_broker.results import (
    CLASSIFIED,
    METADATA,
    Account,
    ResultTable,
    all_bands,
    fill,
    repeat,
    result_schema,
    texts,
)
from alert_broker.surveys.base import surveys
from edgekit.errors import EdgekitError

ROWS = pa.schema([("status", pa.string()), ("best_class", pa.string()), ("survey", pa.string())])
NUMBERS = pa.schema([("number", pa.int64())])
FATES = st.sampled_from([CLASSIFIED, "no points in g, r", "skipped: no model"])


def rows_of(fates):
    listed = [{"status": fate, "best_class": "KN" if fate == CLASSIFIED else None, "survey": "ztf"} for fate in fates]
    return pa.RecordBatch.from_pylist(listed, schema=ROWS)


BAD = st.tuples(
    st.sampled_from(["unsupported survey: a", "unsupported survey: b", "cut short"]),
    st.sampled_from(["error", "skipped"]),
    st.integers(0, 5),
)


def accounted(items):
    account = Account()
    for item in items:
        (account.add_bad if isinstance(item, BadPacket) else account.add_rows)(item)
        account.packets += item.packets if isinstance(item, BadPacket) else item.num_rows
    return account


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(FATES, max_size=6) | BAD, max_size=8))
def test_every_packet_is_in_one_part_of_the_account(drawn):
    """Batches of rows and bad packets, in any order."""
    items = [rows_of(item) if isinstance(item, list) else BadPacket("file", 0, *item) for item in drawn]
    account = accounted(items)
    rows = sum(item.num_rows for item in items if not isinstance(item, BadPacket))
    account.check(rows)
    told = account.to_json()
    assert told["in"] == told["classified"] + told["skipped"] + told["corrupt"]
    assert told["skipped"] == sum(told["reasons"].values())
    assert told["classified"] == sum(told["classes"].values())
    assert told["corrupt"] == sum(item.packets for item in items if getattr(item, "status", "") == "error")
    with pytest.raises(EdgekitError, match=f"{rows} alerts were read, but {rows + 1} rows were written; this is a bug"):
        account.check(rows + 1)
    account.packets += 1
    with pytest.raises(EdgekitError, match="the account does not add up"):
        account.check(rows)


def test_reasons_are_counted_by_what_stands_before_their_details():
    account = accounted([BadPacket("f", 0, f"unsupported survey: {name}", "skipped", 2) for name in "abc"])
    assert account.skipped == {"unsupported survey": 6}


def test_the_bands_go_from_blue_to_red():
    longest = {
        band: w for survey in surveys().values() for band, w in zip(survey.bands, survey.wavelengths, strict=True)
    }
    assert set(all_bands()) == {band for survey in surveys().values() for band in survey.bands}
    assert [longest[band] for band in all_bands()] == sorted(longest[band] for band in all_bands())


def test_columns_do_not_depend_on_the_survey_and_follow_the_classes():
    names = result_schema(("b", "a")).names
    assert [name for name in names if name.startswith("p_")] == ["p_b", "p_a"]
    assert [name for name in names if name.startswith("n_det_")] == [f"n_det_{band}" for band in all_bands()]
    assert len(set(names)) == len(names)
    assert len(names) == len(result_schema(()).names) + 2


def test_columns_that_are_not_there_are_null_and_others_are_left_out():
    schema = pa.schema([("a", pa.int32()), ("b", pa.string())])
    rows = fill({"a": pa.array([1, 2], pa.int32()), "c": pa.array([3, 4])}, schema, 2)
    assert rows.to_pylist() == [{"a": 1, "b": None}, {"a": 2, "b": None}]
    assert rows.schema.equals(schema)


@given(st.lists(st.tuples(st.integers(0, 2), st.booleans())))
def test_codes_become_their_texts(pairs):
    codes, null = (np.array([pair[k] for pair in pairs], dtype) for k, dtype in ((0, np.int64), (1, np.bool_)))
    values = ["a", "", "é"]
    expected = [None if missing else values[code] for code, missing in pairs]
    assert texts(codes, values, null).to_pylist() == expected
    assert texts(codes, values).to_pylist() == [values[code] for code, _ in pairs]


@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_text_for_every_row(count):
    assert repeat("x", count).to_pylist() == ["x"] * count
    assert repeat("x", count).type == pa.string()


# --- files


def numbers(start, stop):
    return pa.RecordBatch.from_pylist([{"number": number} for number in range(start, stop)], schema=NUMBERS)


@pytest.mark.parametrize("step", [1, 4, 10, 25])
def test_rows_of_many_batches_are_in_order_in_groups_of_some_size(tmp_path, monkeypatch, step):
    monkeypatch.setattr(results, "ROW_GROUP", 10)
    with ResultTable(tmp_path / "t.parquet", NUMBERS) as table:
        for start in range(0, 25, step):
            table.add(numbers(start, min(start + step, 25)))
        table.describe({"é": [1]})
        assert table.rows == 25
    with pq.ParquetFile(tmp_path / "t.parquet") as file:
        groups = [file.metadata.row_group(k).num_rows for k in range(file.num_row_groups)]
        assert file.read()["number"].to_pylist() == list(range(25))
        assert file.metadata.metadata[METADATA] == b'{"\\u00e9": [1]}'
    assert sum(groups) == 25
    assert max(groups) <= 10


def test_nothing_is_there_under_its_name_before_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "ROW_GROUP", 2)
    path = tmp_path / "folder" / "t.parquet"
    with ResultTable(path, NUMBERS) as table:
        table.add(numbers(0, 5))
        assert not path.exists()
        assert len(list(path.parent.iterdir())) == 1, "it grows beside it"
    assert [item.name for item in path.parent.iterdir()] == ["t.parquet"]


def test_rows_with_other_columns_are_refused_and_leave_no_file(tmp_path):
    with pytest.raises(pa.ArrowInvalid), ResultTable(tmp_path / "t.parquet", NUMBERS) as table:
        table.add(pa.RecordBatch.from_pylist([{"other": 1}]))
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(EdgekitError, match=r"file/t\.parquet cannot be written: .*choose another"):
        ResultTable(tmp_path / "file" / "t.parquet", NUMBERS).__enter__()
