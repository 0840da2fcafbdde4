"""The archive holds every row once, after any crashes, replays and batch boundaries, and a full disk loses no row."""

import datetime
import errno
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alert_broker.stream import archive
from alert_broker.stream.archive import SEGMENT, Archive, Positions, read
from edgekit.errors import EdgekitError

ROOT = Path(__file__).resolve().parents[3]
SCHEMA = pa.schema([("alert_id", pa.int64()), ("best_class", pa.string()), ("p", pa.float32())])
EVENING = 1_764_111_600_000  # 2025-11-25 23:00 UTC
HOUR = 3_600_000


def rows_of(offsets, partition=0, version=0):
    """Return the rows that classifying these messages gives, which are the same every time."""
    return pa.RecordBatch.from_pylist(
        [{"alert_id": 10**6 * partition + k, "best_class": "KN" if k % 3 else None, "p": k + version} for k in offsets],
        schema=SCHEMA,
    )


def positions_of(offsets, partition=0, topic="alerts", timestamp=None):
    offsets = np.asarray(offsets, np.int64)
    time = np.full(len(offsets), EVENING) if timestamp is None else np.asarray(timestamp, np.int64)
    return Positions([topic] * len(offsets), np.full(len(offsets), partition), offsets, time)


def content(folder):
    """Return the rows by partition and offset."""
    table = read(folder).to_table().sort_by([("stream_partition", "ascending"), ("stream_offset", "ascending")])
    return table.select(SCHEMA.names), table["stream_offset"].to_pylist()


def test_it_reads_back_exactly(tmp_path):
    store = Archive(tmp_path, SCHEMA)
    offsets = list(range(SEGMENT - 30, SEGMENT + 50))
    files = store.write(rows_of(offsets), positions_of(offsets))
    assert [str(path.relative_to(tmp_path)) for path in files] == [
        "night=2025-11-25/alerts-0-000000000000.parquet",
        "night=2025-11-25/alerts-0-000000004096.parquet",
    ]
    found, order = content(tmp_path)
    assert order == offsets
    assert found.equals(pa.Table.from_batches([rows_of(offsets)]))
    # the comparison notices different values
    assert not found.equals(pa.Table.from_batches([rows_of(offsets, version=1)]))
    assert set(read(tmp_path).to_table()["night"].to_pylist()) == {"2025-11-25"}


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_any_replay_leaves_every_row_once(tmp_path_factory, data):
    """A consumer writes batches of any size, and crashes set it back to any offset that it has reached."""
    folder = tmp_path_factory.mktemp("replay")
    store, end, start, reached = Archive(folder, SCHEMA), 3 * SEGMENT // 2, SEGMENT - 60, SEGMENT - 60
    first = start
    for _ in range(data.draw(st.integers(1, 8))):
        count = data.draw(st.integers(1, 200))
        offsets = range(start, min(start + count, end))
        store.write(rows_of(offsets), positions_of(offsets))
        reached = max(reached, offsets.stop)
        # the next batch begins at its end, or earlier after a crash
        start = data.draw(st.integers(first, offsets.stop))
        start = start if data.draw(st.booleans()) else offsets.stop
    found, order = content(folder)
    # every row that was ever written occurs once, and in order
    assert order == sorted(set(order))
    assert set(order) <= set(range(first, reached))
    assert found.equals(pa.Table.from_batches([rows_of(order)]))
    assert reached - 1 in order
    assert first in order


def test_names_of_the_batches_range_would_have_doubled_rows(tmp_path):
    """The twin: if files were named after their range of offsets, as in other sinks, another boundary after the crash
    would double rows."""
    for start, stop in ((0, 100), (50, 150)):
        pq.write_table(pa.Table.from_batches([rows_of(range(start, stop))]), tmp_path / f"{start}-{stop}.parquet")
    store = Archive(tmp_path / "ours", SCHEMA)
    for start, stop in ((0, 100), (50, 150)):
        store.write(rows_of(range(start, stop)), positions_of(range(start, stop)))
    assert (pq.read_table(tmp_path).num_rows, content(tmp_path / "ours")[0].num_rows) == (350, 150)


def test_a_replay_after_a_fix_replaces_rows(tmp_path):
    store = Archive(tmp_path, SCHEMA)
    store.write(rows_of(range(10)), positions_of(range(10)))
    store.write(rows_of(range(4, 6), version=5), positions_of(range(4, 6)))
    assert content(tmp_path)[0]["p"].to_pylist() == [0, 1, 2, 3, 9, 10, 6, 7, 8, 9]


def test_partitions_topics_and_gaps_are_kept_apart(tmp_path):
    store = Archive(tmp_path, SCHEMA)
    for partition, topic in ((0, "a"), (1, "a"), (1, "b")):
        store.write(rows_of([3, 9], partition), positions_of([3, 9], partition, topic))
    mixed = pa.Table.from_batches([rows_of([5], 0), rows_of([5], 1)]).combine_chunks().to_batches()[0]
    store.write(mixed, Positions(["a", "a"], np.array([0, 1]), np.array([5, 5]), np.array([EVENING] * 2)))
    table = read(tmp_path).to_table()
    keys = zip(*(table[f"stream_{name}"].to_pylist() for name in ("topic", "partition", "offset")), strict=True)
    assert sorted(keys) == [("a", p, k) for p in (0, 1) for k in (3, 5, 9)] + [("b", 1, 3), ("b", 1, 9)]


@pytest.mark.parametrize("topic", ["_alerts", ".alerts", "a-1", "a.b_c-0-000000000000"])
def test_rows_of_any_topic_are_read(tmp_path, topic):
    Archive(tmp_path, SCHEMA).write(rows_of([3, 9]), positions_of([3, 9], topic=topic))
    table = read(tmp_path).to_table()
    assert table["stream_topic"].to_pylist() == [topic] * 2


def test_several_rows_of_one_message_stay_together(tmp_path):
    store = Archive(tmp_path, SCHEMA)
    for _ in range(2):
        store.write(rows_of([1, 2, 3]), positions_of([7, 7, 8]))
    assert content(tmp_path)[1] == [7, 7, 8]


@pytest.mark.parametrize(
    ("utc", "night"),
    [
        ("2025-11-25T23:00", "2025-11-25"), ("2025-11-26T09:30", "2025-11-25"),  # Chile, from dusk to dawn
        ("2025-11-26T02:00", "2025-11-25"), ("2025-11-26T14:00", "2025-11-25"),  # California
        ("2025-11-26T15:59", "2025-11-25"), ("2025-11-26T16:00", "2025-11-26"),
    ],
)  # fmt: skip
def test_nights_are_named_after_their_evening(tmp_path, utc, night):
    moment = datetime.datetime.fromisoformat(utc).replace(tzinfo=datetime.UTC)
    (path,) = Archive(tmp_path, SCHEMA).write(rows_of([1]), positions_of([1], timestamp=[moment.timestamp() * 1000]))
    assert path.parent.name == f"night={night}"


@pytest.mark.parametrize("timestamp", [-1, 0, 2**62, -(2**63), 2**63 - 1])
def test_a_time_that_cannot_be_costs_no_row(tmp_path, timestamp):
    """The sender of a message writes its time, which may be any number; -1 means no time."""
    store = Archive(tmp_path, SCHEMA)
    (path,) = store.write(rows_of([1]), positions_of([1], timestamp=[timestamp]))
    assert path.parent.name == "night=unknown"
    assert content(tmp_path)[1] == [1]


def test_one_segment_of_two_nights(tmp_path):
    store = Archive(tmp_path, SCHEMA)
    time = [EVENING + k * HOUR for k in range(48)]
    for _ in range(2):
        files = store.write(rows_of(range(48)), positions_of(range(48), timestamp=time))
    assert len(files) == 3
    assert content(tmp_path)[1] == list(range(48))


# --- failures


def names(folder):
    return sorted(path.name for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock")


@pytest.mark.parametrize("where", ["write", "fsync", "replace"])
def test_a_full_disk_is_one_clear_error_and_leaves_the_old_file(tmp_path, monkeypatch, where):
    store = Archive(tmp_path, SCHEMA)
    store.write(rows_of(range(10)), positions_of(range(10)))
    before = names(tmp_path)

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as planted:
        if where == "write":
            real = pq.write_table

            def half(table, stream, **options):
                real(table, sink := pa.BufferOutputStream(), **options)
                stream.write(sink.getvalue().to_pybytes()[:100])
                full()

            planted.setattr(archive.pq, "write_table", half)
        elif where == "fsync":
            planted.setattr(archive.os, "fsync", full)
        else:
            planted.setattr(Path, "replace", full)
        with pytest.raises(EdgekitError, match=r"cannot write .*alerts-0-0.*No space left on device; free some space"):
            store.write(rows_of(range(5, 20)), positions_of(range(5, 20)))
    assert names(tmp_path) == before
    assert content(tmp_path)[1] == list(range(10))
    store.write(rows_of(range(5, 20)), positions_of(range(5, 20)))  # the disk has space again
    assert content(tmp_path)[1] == list(range(20))


FULL_DISK = """
import contextlib, sys
from pathlib import Path
from tests.alert_broker.stream.test_archive import *
disk = Path(sys.argv[1])
store = Archive(disk / "archive", SCHEMA)
store.write(rows_of(range(10)), positions_of(range(10)))
filler, block = disk / "filler", bytes(4096)
with filler.open("wb", buffering=0) as stream, contextlib.suppress(OSError):
    while True:
        stream.write(block)
try:
    store.write(rows_of(range(2000)), positions_of(range(2000)))
except EdgekitError as error:
    print(error)
print(content(disk / "archive")[1] == list(range(10)), names(disk / "archive"))
filler.unlink()
store.write(rows_of(range(2000)), positions_of(range(2000)))
print(content(disk / "archive")[1] == list(range(2000)), names(disk / "archive"))
"""


def test_a_disk_that_is_full_for_real(tmp_path):
    """The archive is on a file system of 128 kB in memory, in its own mount namespace."""
    command = f"mount -t tmpfs -o size=128k none {tmp_path}"
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-rm", "sh", "-c", command]).returncode:
        pytest.skip("no file system can be mounted here: unshare -rm mount -t tmpfs fails")
    run = f"{command} && exec {sys.executable} -c {shlex.quote(FULL_DISK)} {tmp_path}"
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", run],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    error, full, after = done.stdout.splitlines()
    assert "No space left on device; free some space and start again" in error, done.stderr
    assert full == after == "True ['alerts-0-000000000000.parquet']"


def test_a_new_night_is_on_disk_with_its_folder(tmp_path, monkeypatch):
    """The entry of a file is in its folder, and the entry of that folder is in the folder of the archive."""
    store, synced = Archive(tmp_path, SCHEMA), []
    monkeypatch.setattr(archive, "_sync", synced.append)
    for _ in range(2):
        store.write(rows_of([1]), positions_of([1]))
    night = tmp_path / "night=2025-11-25"
    assert synced == [tmp_path, night, night]


@pytest.mark.parametrize("step", range(3))
def test_a_killed_writer_leaves_the_old_file_or_the_new_one(tmp_path, step):
    """SIGKILL comes before the rename, after it, or in the middle of a file; the next writer removes the leftover
    file."""
    store = Archive(tmp_path, SCHEMA)
    store.write(rows_of(range(10)), positions_of(range(10)))
    child = os.fork()
    if child == 0:  # pragma: no cover

        def die(*_, **__):
            os.kill(os.getpid(), signal.SIGKILL)

        def half(table, stream, **_):
            stream.write(b"PAR1 and then")
            stream.flush()
            die()

        if step == 0:
            archive.pq.write_table = half
        elif step == 1:
            archive.os.fsync = die
        else:
            archive._sync = die
        try:
            store.write(rows_of(range(5, 20)), positions_of(range(5, 20)))
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert content(tmp_path)[1] == list(range(20 if step == 2 else 10))
    store.write(rows_of(range(5, 20)), positions_of(range(5, 20)))
    assert content(tmp_path)[1] == list(range(20))
    assert names(tmp_path) == ["alerts-0-000000000000.parquet"]


def test_two_writers_of_one_segment_do_not_undo_each_other(tmp_path):
    """This happens when a consumer has lost its partition and does not know it yet."""

    def write(start):
        store = Archive(tmp_path, SCHEMA)
        for offset in range(start, 60, 2):
            store.write(rows_of([offset]), positions_of([offset]))

    threads = [threading.Thread(target=write, args=[start]) for start in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert content(tmp_path)[1] == list(range(60))


def test_another_models_columns_need_another_folder(tmp_path):
    Archive(tmp_path, SCHEMA).write(rows_of([1]), positions_of([1]))
    other = pa.schema([("alert_id", pa.int64())])
    with pytest.raises(EdgekitError, match=r"has other columns: it was written with another model .*a new folder"):
        Archive(tmp_path, other).write(pa.RecordBatch.from_pylist([{"alert_id": 2}], schema=other), positions_of([2]))


def test_what_cannot_be_an_archive(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(EdgekitError, match=r"the archive cannot write .*file: File exists"):
        Archive(tmp_path / "file", SCHEMA)
    with pytest.raises(EdgekitError, match="a column 'night'"):
        Archive(tmp_path, pa.schema([("night", pa.string())]))
    with pytest.raises(EdgekitError, match="a column 'stream_offset'"):
        Archive(tmp_path, pa.schema([("stream_offset", pa.int64())]))
    with pytest.raises(EdgekitError, match="2 rows with the positions of 1"):
        Archive(tmp_path, SCHEMA).write(rows_of([1, 2]), positions_of([1]))
    assert Archive(tmp_path, SCHEMA).write(rows_of([]), positions_of([])) == []
