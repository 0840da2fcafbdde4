"""Run the fuzzer `tools/fuzz_decode.py` on a few thousand packets, and plant one failure of each category that it must
find."""

import faulthandler
import importlib.util
import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from alert_broker.avro import walk
from alert_broker.avro.columns import Columns

TOOLS = Path(__file__).resolve().parents[2] / "tools"


@pytest.fixture(scope="module")
def fuzz():
    """Return the tool as a module."""
    sys.path.insert(0, str(TOOLS))
    try:
        spec = importlib.util.spec_from_file_location("fuzz_decode", TOOLS / "fuzz_decode.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules["fuzz_decode"] = module  # dataclasses look up annotations in sys.modules
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(TOOLS))
        sys.modules.pop("fuzz_decode", None)


@pytest.fixture(scope="module")
def corpus(fuzz):
    return fuzz.seeds(None, 2)


def test_thousands_of_damaged_packets_do_no_harm(fuzz, corpus):
    fuzzer = fuzz.Fuzzer(corpus)
    for seed in range(3):
        fuzzer.run(seed, 3000)
    tally = fuzzer.tally
    assert tally.disagreements == {}
    assert tally.packets == 9000 == tally.accepted + tally.reasons.total()
    assert tally.accepted > 200  # damage to a number of the photometry is accepted
    assert tally.compared > 50
    assert len(tally.reasons) >= 8  # nearly all of the reader's reasons occur


def test_the_same_seed_makes_the_same_damage(fuzz, corpus):
    first, again = (list(fuzz.damaged(corpus, 7, 200)) for _ in range(2))
    assert [item[2] for item in first] == [item[2] for item in again]
    assert len({item[2] for item in first}) > 190


@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_edits_that_hypothesis_draws_do_no_harm(fuzz, corpus, data):
    item = data.draw(st.sampled_from(corpus), label="packet")
    datums = data.draw(st.integers(1, 2))
    packet = bytearray(item.data * datums)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.sampled_from(item.structure) | st.integers(0, len(packet)), label="at")
        lie = st.integers(-(2**63), 2**63 - 1).map(fuzz.number) | st.binary(max_size=12)
        packet[at : at + data.draw(st.integers(0, 12))] = data.draw(lie, label="bytes")
    damaged = bytes(packet) or b"\0"
    fuzzer = fuzz.Fuzzer([item])
    for at_end in (True, False):
        fault = fuzzer.feed(item, datums, damaged, at_end=at_end)
    fuzzer.compare(item, datums, damaged, fault, "this")
    assert fuzzer.tally.disagreements == {}


def died_of(action):
    """Run the action in a child process. Return the signal that ended the process, or 0."""
    child = os.fork()
    if child == 0:
        try:
            faulthandler.disable()
            action()
        finally:
            os._exit(0)
    status = os.waitpid(child, 0)[1]
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


@pytest.mark.parametrize("before", [False, True], ids=["a byte behind the packet", "a byte before it"])
def test_a_read_out_of_bounds_kills(fuzz, corpus, before):
    """The compiled functions read one byte beyond either end of the data, which kills the process."""
    fuzzer = fuzz.Fuzzer(corpus)
    memory = np.frombuffer(fuzzer._memory, np.uint8)
    last = fuzz.ROOM - 1
    walk._byte(memory, last)  # compiled before the fork
    assert died_of(lambda: walk._byte(memory, 0 if before else last)) == 0
    assert died_of(lambda: walk._byte(memory, np.int64(-1) if before else last + 1)) in (signal.SIGSEGV, signal.SIGBUS)


def test_a_reader_that_believes_in_a_longer_packet_kills(fuzz, corpus):
    """Planted in the fuzzer's own loop: `read` is told that the packet has sixteen more bytes, as if it lacked the
    check of the end."""

    class Believer(Columns):
        def _walk(self, data, count, ends, report):
            return walk.walk(
                data,
                len(data) + 16,
                count,
                self.plan.program,
                self.plan.items,
                self._cells,
                self._valid,
                self._text,
                self._columns,
                self._levels,
                self._stack,
                self._scratch,
                ends,
                report,
            )

    def run():
        fuzzer = fuzz.Fuzzer(corpus, lambda columns, data, count: believer(columns).read(data, count))
        fuzzer.run(0, 3000)

    def believer(columns):
        return beliefs.setdefault(columns.plan, Believer(columns.plan))

    beliefs = {}
    assert died_of(run) in (signal.SIGSEGV, signal.SIGBUS)


def test_a_write_out_of_bounds_kills(fuzz, corpus):
    columns = fuzz.GuardedColumns(corpus[0].plan)

    def beyond():
        wild = np.lib.stride_tricks.as_strided(columns._cells, (len(columns._cells) + 1,), (8,))
        wild[len(columns._cells)] = 1

    assert columns.read(corpus[0].data, 1)[1] is None
    assert died_of(lambda: columns._cells.__setitem__(-1, 1)) == 0
    assert died_of(beyond) in (signal.SIGSEGV, signal.SIGBUS)


def test_other_values_than_fastavros_are_seen(fuzz, corpus):
    """Planted: a time differs in its last bit."""

    def off_by_a_bit(columns, data, count):
        ends, fault = columns.read(data, count)
        if fault is None:
            top, name = (
                ("candidate", "jd") if "candidate" in columns.plan.root.fields else ("diaSource", "midpointMjdTai")
            )
            column = columns.plan.root.fields[top].fields[name].column
            columns._cells[columns._columns[column, walk.BASE]] ^= 1
        return ends, fault

    fuzzer = fuzz.Fuzzer(corpus, off_by_a_bit)
    fuzzer.run(0, 3000)
    assert set(fuzzer.tally.disagreements) == {"other values than fastavro's"}


def test_a_reader_that_takes_what_is_no_packet_is_seen(fuzz, corpus):
    """Planted: a reader that ignores bytes left over."""

    def forgiving(columns, data, count):
        ends, fault = columns.read(data, count)
        if fault is not None and not fault.field:
            ends, fault = columns.read(data[: fault.at], count)
        return ends, fault

    fuzzer = fuzz.Fuzzer(corpus, forgiving)
    fuzzer.run(0, 6000)
    assert set(fuzzer.tally.disagreements) == {"accepted, but not by fastavro"}


def test_a_reader_that_refuses_sound_packets_is_seen(fuzz, corpus):
    def timid(columns, data, count):
        if sum(data) & 1:
            return columns.read(data, count)
        return np.empty(0, np.int64), fuzz.Fault(0, 0, 0, "field", walk.REASONS[walk.ENDS])

    fuzzer = fuzz.Fuzzer(corpus, timid)
    fuzzer.run(0, 6000)
    assert set(fuzzer.tally.disagreements) == {f"fastavro reads what is refused: {walk.REASONS[walk.ENDS]}"}
