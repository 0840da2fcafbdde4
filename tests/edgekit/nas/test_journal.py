"""The journal: what is on disk counts, what is unfinished is cut off, what was changed is noticed."""

from contextlib import closing

import pytest

from edgekit.errors import EdgekitError
from edgekit.nas.journal import Journal

EVENTS = [{"event": "study", "id": "x"}, {"event": "trial", "score": 0.1}, {"event": "trial", "score": 2.5e-7}]


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "journal.jsonl"
    with closing(Journal(path)) as journal:
        for event in EVENTS:
            journal.append(event)
    return path


def test_a_second_process_reads_what_the_first_wrote(path):
    with closing(Journal(path)) as journal:
        assert journal.events == EVENTS
        journal.append({"event": "end"})
        digest = journal.digest
    with closing(Journal(path)) as journal:
        assert journal.events[-1] == {"event": "end"}
        assert journal.digest == digest


@pytest.mark.parametrize("cut", range(1, 60, 7))
def test_an_unfinished_line_is_cut_off(path, cut):
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    with closing(Journal(path)) as journal:
        assert journal.events == EVENTS[:2]
        journal.append(EVENTS[2])
    assert path.read_bytes() == whole


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        (b'"id": "x"', b'"id": "y"', 1),
        (b'"score": 0.1', b'"score": 0.9', 2),
        (b'"score": 2.5e-07', b'"score": 2.6e-07', 3),
        (b'{"event"', b'["event"', 1),
        (b'"event": "trial", ', b"", 2),
    ],
)
def test_a_changed_line_is_noticed(path, old, new, line):
    path.write_bytes(path.read_bytes().replace(old, new, 1))
    with pytest.raises(EdgekitError, match=f"line {line} .*the file was changed"):
        Journal(path)


def test_one_process_at_a_time(path):
    with closing(Journal(path)), pytest.raises(EdgekitError, match="another process runs this study"):
        Journal(path)
