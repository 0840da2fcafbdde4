"""Dead letters sent again: by whom, how often, and what becomes of those that do not carry their alert."""

import json
import time
from types import SimpleNamespace

import pytest
from confluent_kafka import KafkaError, Producer, TopicPartition

from alert_broker.stream import redrive as module
from alert_broker.stream.clients import open_consumer
from alert_broker.stream.config import DeadLetters
from alert_broker.stream.dead_letters import ATTEMPTS, OMITTED, headers_of
from alert_broker.stream.redrive import Backlog, Originals, Redriven, redrive
from edgekit.errors import EdgekitError
from tests.alert_broker.stream.rig import datum_of
from tests.alert_broker.stream.waiting import wait_for
from tests.brokers import MockCluster, create_topics

BROKEN = b"Obj\x01 and then nothing that Avro knows"
UNKNOWN = b"\x00" + (4711).to_bytes(4, "big")


def test_a_topic_of_dead_letters_that_is_not_there_is_said():
    with MockCluster() as cluster:
        settings = {"bootstrap.servers": cluster.address, "allow.auto.create.topics": False}
        with pytest.raises(EdgekitError, match="not-there cannot be read"):
            redrive(settings, DeadLetters(topic="not-there"), group="g")


def test_another_member_that_holds_all_partitions_is_said(broker):
    """Before, this waited for ever."""
    address, settings = broker
    create_topics(address, {"held": 1})
    kafka = {"bootstrap.servers": address, **settings}
    other = open_consumer({**kafka, "group.id": "held", "partition.assignment.strategy": "cooperative-sticky"})
    try:
        other.subscribe(["held"])
        wait_for(lambda: other.poll(0.1) or other.assignment())
        assert other.assignment() == [TopicPartition("held", 0)]

        deadline = time.monotonic() + 120.0

        def stop():
            other.poll(0.0)  # it stays in the group
            return time.monotonic() > deadline

        with pytest.raises(
            EdgekitError, match="no partition of held was assigned within 3 s, because other members of the group"
        ):
            redrive(kafka, DeadLetters(topic="held"), group="held", stop=stop, join_seconds=3.0)
    finally:
        other.close()
    assert redrive(kafka, DeadLetters(topic="held"), group="held") == Redriven()  # it has gone


def test_letters_come_through_once_the_cause_is_fixed(rig, packets):
    """A schema that nobody knows, until a registry has it."""
    from alert_broker.containers import _container_metadata

    schema = _container_metadata(packets[0])[0]["avro.schema"].decode()
    values = [UNKNOWN + datum_of(packet) for packet in packets[:7]]
    rig.send([*packets[7:12], *values])
    assert rig.consume().ledger.total().dead_lettered == 7
    (rig.folder / "registry").mkdir()
    (rig.folder / "registry" / "4711.avsc").write_text(json.dumps(json.loads(schema)))
    config = rig.config()
    told = []
    done = redrive(config.kafka_settings(), config.dead_letters, group=f"{rig.name}-redrive", progress=told.append)
    assert (done, told[-1]) == (Redriven(sent=7), 7)
    total = rig.consume(registry={"url": f"file:{rig.folder / 'registry'}"}).ledger.total()
    assert (total.consumed, total.published) == (7, 7)
    assert len(rig.read(rig.results)) == 12


def test_what_dies_again_meanwhile_is_for_the_next_run(rig, monkeypatch):
    """The consumer runs while letters are sent, and nothing was fixed. Before, each was sent three times over."""
    monkeypatch.setattr(module, "BATCH", 7)  # so that the end is heard of after they have died again, with them
    rig.send([BROKEN + bytes([number]) for number in range(7)])
    rig.consume()
    config = rig.config()

    told = []

    def progress(count):
        told.append(count)
        assert rig.consume().ledger.total().dead_lettered == 7

    done = redrive(config.kafka_settings(), config.dead_letters, group=f"{rig.name}-redrive", progress=progress)
    assert (done, told) == (Redriven(sent=7), [7])
    again = redrive(config.kafka_settings(), config.dead_letters, group=f"{rig.name}-redrive")
    assert again == Redriven(sent=7)
    died = sorted(int(dict(headers_of(dead_letter))[ATTEMPTS]) for dead_letter in rig.read(rig.dead))
    assert died == [1] * 7 + [2] * 7


LIMIT = 40_000


@pytest.fixture
def large(rig, packets):
    """A rig whose producers take 40 kB at most, with three alerts that are larger among ten that are not."""
    small = [packet for packet in packets if len(packet) < LIMIT - 5000][:10]
    assert len(small) == 10
    rig.values = [BROKEN + bytes([number]) * 60_000 for number in range(3)]
    rig.send([*small[:5], *rig.values, *small[5:]], headers=[("survey", b"here")])
    rig.limited = {"kafka": {"message.max.bytes": LIMIT}}
    return rig


def test_a_dead_letter_that_is_too_large_stops_nothing(large):
    """Before, the consumer stopped at it at every start."""
    stats = large.consume(**large.limited)
    total = stats.ledger.total()
    assert (total.consumed, total.published, total.dead_lettered) == (13, 10, 3)
    done = large.outcome(13)
    assert (done.lost, done.duplicates, done.results, done.dead) == (0, 0, 10, 3)
    assert sum(stats.reasons.values()) == 3
    for dead_letter in done.dead_messages:
        headers = dict(headers_of(dead_letter))
        assert dead_letter.value() is None
        assert b"survey" not in headers
        assert headers[OMITTED].startswith(b"60037 bytes, because the broker refuses the dead letter with them: ")
    assert large.consume(**large.limited).ledger.total().consumed == 0  # all was committed


def test_a_letter_without_its_bytes_is_sent_with_them(large):
    large.consume(**large.limited)
    config = large.config()
    done = redrive(config.kafka_settings(), config.dead_letters, group=f"{large.name}-redrive")
    assert done == Redriven(sent=3)
    sent = [message for message in large.read(large.source) if ATTEMPTS in dict(headers_of(message))]
    assert sorted(message.value() for message in sent) == large.values
    for message in sent:
        assert dict(headers_of(message))["survey"] == b"here"
        assert OMITTED not in dict(headers_of(message))
    total = large.consume().ledger.total()  # with room for them
    assert (total.consumed, total.dead_lettered) == (3, 3)
    whole = [message for message in large.read(large.dead) if message.value() is not None]
    assert sorted(message.value() for message in whole) == large.values


def test_a_letter_whose_alert_is_gone_is_told(large, caplog, monkeypatch):
    large.consume(**large.limited)
    config = large.config()
    asked = []
    monkeypatch.setattr(module.Originals, "read", lambda self, *where: asked.append(where))
    done = redrive(config.kafka_settings(), config.dead_letters, group=f"{large.name}-redrive")
    assert done == Redriven(gone=3)
    assert {topic for topic, _, _ in asked} == {large.source}
    assert caplog.text.count("has no payload, and its alert is gone from") == 3


@pytest.mark.parametrize(
    ("code", "found"),
    [
        (KafkaError._BAD_COMPRESSION, None),
        (KafkaError._BAD_MSG, None),
        (KafkaError.INVALID_MSG, None),
        (KafkaError._TRANSPORT, EdgekitError),  # the twin: this error says nothing about the message
    ],
)
def test_an_original_that_cannot_be_read_is_gone(monkeypatch, code, found):
    """The consumer skipped it for the same error, and redrive must not stop at its dead letter for ever."""
    monkeypatch.setattr(module, "READ_SECONDS", 0.05)
    event = SimpleNamespace(error=lambda: KafkaError(code))
    consumer = SimpleNamespace(assign=lambda partitions: None, consume=lambda count, seconds: [event])
    monkeypatch.setattr(module, "open_consumer", lambda settings: consumer)
    if found is None:
        assert Originals({}).read("t", 0, 7) is None
    else:
        with pytest.raises(EdgekitError, match="did not send the message at offset 7"):
            Originals({}).read("t", 0, 7)


@pytest.fixture
def backlog(monkeypatch):
    """A backlog whose consumer returns `events`, and answers a commit with `answer` for each partition."""
    consumer = SimpleNamespace(subscribe=lambda topics, **callbacks: None, events=[], answer=None)
    consumer.consume = lambda count, seconds: consumer.events
    consumer.commit = lambda offsets, asynchronous: [SimpleNamespace(error=consumer.answer) for _ in offsets]
    monkeypatch.setattr(module, "open_consumer", lambda settings: consumer)
    backlog = Backlog({"group.id": "g"}, "dead", "run", 60.0)
    backlog._consumer = consumer
    return backlog


def test_a_batch_of_dead_letters_that_cannot_be_read_ends_redrive(backlog):
    """librdkafka reports it again and again, and never the end of the partition."""
    bad = KafkaError(KafkaError._BAD_COMPRESSION)
    backlog._consumer.events = [SimpleNamespace(error=lambda: bad, partition=lambda: 2, offset=lambda: 17)]
    with pytest.raises(EdgekitError, match=r"dead\[2\] cannot be read at offset 17: .*receive\.message\.max\.bytes"):
        backlog.read()
    lost = KafkaError(KafkaError._TRANSPORT)  # the twin: librdkafka connects again by itself
    backlog._consumer.events = [SimpleNamespace(error=lambda: lost)]
    assert backlog.read() == []


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (KafkaError.GROUP_AUTHORIZATION_FAILED, "offsets cannot be committed"),
        (KafkaError.ILLEGAL_GENERATION, ""),
        (None, ""),
    ],
)
def test_an_offset_that_is_not_committed_is_said(backlog, caplog, code, said):
    """The answer to a commit can be an error for one partition, without an exception of the client."""
    backlog._after, backlog._consumer.answer = {("dead", 0): 5}, None if code is None else KafkaError(code)
    if said:
        with pytest.raises(EdgekitError, match=said):
            backlog.commit()
    else:
        backlog.commit()
    assert ("rebalanced" in caplog.text) == (code == KafkaError.ILLEGAL_GENERATION)


@pytest.mark.parametrize("protocol", ["classic", "consumer"])
def test_both_protocols_of_groups_are_accepted(monkeypatch, protocol):
    """With `group.protocol` "consumer", librdkafka refuses a strategy for the assignment."""
    consumers = []

    def open_and_remember(settings):
        consumers.append(open_consumer({**settings, "log_level": 0}))
        return consumers[-1]

    monkeypatch.setattr(module, "open_consumer", open_and_remember)
    settings = {"bootstrap.servers": "127.0.0.1:1", "log_level": 0, "group.protocol": protocol}
    assert redrive(settings, DeadLetters(topic="dead"), group="g", stop=lambda: True) == Redriven()
    assert len(consumers) == 1


def test_originals_beyond_the_end_of_the_log_are_none():
    """Against librdkafka's mock cluster: the embedded broker has no answer for such an offset."""
    with MockCluster() as cluster:
        cluster.create_topic("t", 2)
        producer = Producer({"bootstrap.servers": cluster.address})
        for number in range(4):
            producer.produce("t", b"%d" % number, partition=number % 2)
        assert producer.flush(10) == 0
        originals = Originals({"bootstrap.servers": cluster.address, "enable.partition.eof": True})
        try:
            assert originals.read("t", 1, 0).value() == b"1"
            assert originals.read("t", 1, 700) is None
            assert originals.read("t", 1, 2) is None  # the end itself
            assert originals.read("t", 0, 1).value() == b"2"
        finally:
            originals.close()
