"""No content of a message may end the consumer: each hostile message has one outcome, a result or a dead letter."""

import importlib
import random
from collections import Counter

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from alert_broker.stream import config as configuration
from alert_broker.stream import dead_letters, outcome
from alert_broker.stream.config import DeadLetters
from alert_broker.stream.dead_letters import (
    ATTEMPTS,
    OMITTED,
    REASON,
    DeadLetterLimits,
    UnreadableHeadersError,
    headers_of,
)
from alert_broker.stream.redrive import restored
from edgekit.errors import EdgekitError
from tests.alert_broker.stream.hostile import (
    HOSTILE_COUNTS,
    NOT_UTF_8,
    FakeMessage,
    Hostile,
    InMemory,
    RawProducer,
    hostile,
)
from tests.conftest import ROOT

BROKEN = b"Obj\x01 and then nothing that Avro knows"


@pytest.fixture(scope="module")
def stages(bundle):
    tables = {
        "source": {"topics": ["source"]},
        "model": {"bundle": str(bundle), "reuse": "off"},
        "output": [{"topic": "results", "format": "json", "attach": "packet"}, {"topic": "avro"}],
        "dead_letters": {"topic": "dead", "max_ratio": 1.0, "max_consecutive": 10**9},
        "kafka": {"bootstrap.servers": "127.0.0.1:1"},
    }
    with pytest.MonkeyPatch.context() as monkeypatch:
        yield InMemory(configuration.parse(tables, "test").check(), monkeypatch)


def outcomes(stages, messages):
    """How many messages have results, and how many are dead letters; each is one of the two, in both outputs."""
    found = Counter(stages.run(messages))
    assert set(found.values()) <= {1}
    dead = {offset for topic, offset in found if topic == "dead"}
    results = {offset for topic, offset in found if topic == "results"}
    assert results == {offset for topic, offset in found if topic == "avro"}
    assert not dead & results
    assert dead | results == set(range(len(messages)))
    return len(results), len(dead)


@pytest.mark.parametrize("count", HOSTILE_COUNTS)
def test_a_count_of_attempts_may_be_anything(stages, count):
    assert outcomes(stages, [Hostile(BROKEN, headers=((ATTEMPTS.encode(), count.encode()),))]) == (0, 1)
    assert dict(stages.sent[0].headers)[ATTEMPTS] == b"1"


def test_a_header_whose_name_is_not_utf_8_leaves_a_dead_letter_with_the_position(stages, packets):
    bad = Hostile(BROKEN, b"key", ((NOT_UTF_8, b"x"),))
    assert outcomes(stages, [Hostile(packets[0]), bad, Hostile(packets[1])]) == (2, 1)
    (letter,) = [message for message in stages.sent if message.topic == "dead"]
    headers = dict(letter.headers)
    assert (letter.value, letter.key, headers["edgekit.offset"]) == (None, None, b"1")
    assert b"header" in headers[REASON]
    assert b"cannot be copied (UnreadableHeadersError: UnicodeDecodeError" in headers[OMITTED]
    # nobody asks for the headers of an alert that is classified
    assert outcomes(stages, [Hostile(packets[0], headers=((NOT_UTF_8, b"x"),))]) == (1, 0)


def test_planted_without_the_catch_all_it_ends_the_consumer(stages, monkeypatch):
    monkeypatch.setattr(outcome, "outgoing", dead_letters._whole)
    with pytest.raises(UnreadableHeadersError):
        stages.run([Hostile(BROKEN, headers=((NOT_UTF_8, b"x"),))])
    stages.stats.ledger.revoke(("source", 0))


def test_a_row_that_cannot_be_written_takes_no_other_along(stages, packets, monkeypatch):
    real, broken = stages.pipeline.stages._writer._router, []

    def router(rows, *arguments):
        if (broken or rows["alert_id"].to_pylist())[0] in rows["alert_id"].to_pylist():
            broken[:] = broken or rows["alert_id"].to_pylist()[:1]
            raise ZeroDivisionError("of the test")
        return real(rows, *arguments)

    monkeypatch.setattr(stages.pipeline.stages._writer, "_router", router)
    assert outcomes(stages, [Hostile(packet) for packet in packets[:5]]) == (4, 1)
    assert b"cannot be written (ZeroDivisionError: of the test)" in dict(stages.sent[-1].headers)[REASON]


def test_results_that_brokers_refuse_count_as_dead_letters(stages, packets, monkeypatch):
    """Each of them is well, but the topic takes none. Planted: if all are taken, the consumer goes on."""
    limits = DeadLetterLimits(DeadLetters(max_consecutive=15))
    monkeypatch.setattr(stages.pipeline.stages, "_refusal_limits", limits)
    messages = [Hostile(packet) for packet in packets[:10]]
    stages.run(messages)
    stages.run(messages)

    def publish(publication):
        publication.instead([(message, "too large") for message in publication.messages])
        publication.account(np.ones(len(publication.batch), np.bool_))

    monkeypatch.setattr(stages, "publish", publish)
    stages.run(messages)
    with pytest.raises(EdgekitError, match=r"15 alerts in a row are dead letters .* cannot be sent: too large"):
        stages.run(messages)


names = st.one_of(st.binary(max_size=6), st.sampled_from([ATTEMPTS.encode(), NOT_UTF_8, b"edgekit.topic", b""]))
contents = st.one_of(st.none(), st.binary(max_size=40), st.sampled_from([item.encode() for item in HOSTILE_COUNTS]))


@hypothesis.given(
    seeds=st.lists(st.integers(0, 2**32), min_size=1, max_size=6),
    headers=st.lists(st.tuples(names, contents), max_size=4),
    key=st.one_of(st.none(), st.binary(max_size=30)),
    timestamp=st.integers(-(2**63), 2**63 - 1),
)
@hypothesis.settings(
    deadline=None, max_examples=100, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)
def test_any_message_has_one_outcome(stages, packets, seeds, headers, key, timestamp):
    rngs = [random.Random(seed) for seed in seeds]
    messages = [hostile(rng, rng.choice(packets)) for rng in rngs]
    messages[0] = Hostile(messages[0].value, key, tuple(headers), timestamp)
    outcomes(stages, messages)


@pytest.mark.parametrize("position", ["-1", "²", "9" * 5000, "x"])
def test_redrive_passes_over_a_payload_that_is_nowhere(position):
    headers = [("edgekit.topic", b"t"), ("edgekit.partition", b"0"), ("edgekit.offset", position.encode())]
    letter = FakeMessage(Hostile(None), 3)
    assert restored(letter, [*headers, (OMITTED, b"9 bytes")], 0, None, "", "run") is None


def test_many_messages_with_such_headers_do_not_crash_the_process(rig, packets):
    """The interpreter calls a method that it has called often without looking for an error that the method has left
    behind; it then goes on with a null pointer."""
    producer, names = RawProducer(rig.address), [NOT_UTF_8 + bytes([65 + k % 26]) for k in range(300)]
    for k, name in enumerate(names):
        producer.send(rig.source, k % rig.partitions, Hostile(BROKEN, b"key", ((b"good", b"x"), (name, b"y"))))
        producer.send(rig.source, k % rig.partitions, Hostile(packets[k % 40], None, ((name, None),)))
    producer.flush()
    producer.close()
    status, report, log = rig.start(dead_letters={"max_consecutive": 10**9, "max_ratio": 1.0}).wait()
    assert status == 0, log[-2000:]
    total = report["ledger"]["total"]
    assert (total["published"], total["dead_lettered"]) == (300, 300)
    for letter in rig.read(rig.dead):
        headers = dict(headers_of(letter))
        assert b"cannot be copied (UnreadableHeadersError" in headers[OMITTED]


def test_the_fuzzer_finds_a_message_without_an_outcome(stages, packets, monkeypatch):
    """Planted: every tenth message that is sent is dropped; and an error ends the consumer."""
    monkeypatch.syspath_prepend(ROOT / "tools")
    fuzzer = importlib.import_module("fuzz_stream")
    fuzzer.run_batch(stages, packets, 1)
    real = stages.run
    monkeypatch.setattr(stages, "run", lambda messages: real(messages)[::10])
    with pytest.raises(AssertionError, match="a message has no outcome"):
        fuzzer.run_batch(stages, packets, 1)
    monkeypatch.setattr(stages, "run", lambda messages: configuration.Config().check())
    with pytest.raises(AssertionError, match="the consumer ends: no topic to read"):
        fuzzer.run_batch(stages, packets, 1)
