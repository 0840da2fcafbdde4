"""What librdkafka is told: what a file may change, what it may not, and which errors are worth waiting for."""

import logging
import subprocess
import sys
from types import SimpleNamespace

import pytest
from confluent_kafka import KafkaError, KafkaException, TopicPartition

from alert_broker.stream import clients
from alert_broker.stream.clients import (
    HOPELESS,
    REBALANCED,
    client_errors,
    consumer_settings,
    names,
    note_error,
    of_producer,
    open_admin,
    open_consumer,
    partitions_of,
    producer_settings,
    reason_of,
)
from alert_broker.stream.config import OURS, parse
from edgekit.errors import EdgekitError

SECRET = "hunter2"
NOWHERE = {"bootstrap.servers": "127.0.0.1:1", "log_level": 0}


def config(kafka=None, **source):
    tables = {"source": {"topics": ["a"], "group": "night", **source}, "kafka": {**NOWHERE, **(kafka or {})}}
    return parse(tables, "test")


@pytest.fixture
def config_of(monkeypatch):
    """A configuration whose [kafka] is not checked, as if the check of its names had a hole."""
    monkeypatch.setattr("alert_broker.stream.config._kafka", lambda table, where: dict(table))
    return config


SAFE = {
    "enable.auto.commit": False,
    "enable.auto.offset.store": False,
    "enable.partition.eof": True,
    "isolation.level": "read_committed",
    "partition.assignment.strategy": "cooperative-sticky",
    "group.id": "night",
    "auto.offset.reset": "error",
}
SAFE_TO_SEND = {"enable.idempotence": True, "acks": "all"}


@pytest.mark.parametrize(
    ("settings", "expected"), [(consumer_settings, SAFE), (producer_settings, SAFE_TO_SEND)], ids=["read", "send"]
)
def test_nothing_in_the_file_goes_over_what_keeps_alerts_safe(config_of, settings, expected):
    assert set(expected) <= OURS, "and the file is refused if it tries"
    contrary = dict.fromkeys(expected, "contrary")
    found = settings(config_of(contrary))
    assert {name: found[name] for name in expected} == expected


@pytest.mark.parametrize("name", clients.consumer_defaults())
def test_what_the_file_may_change_it_does_change(name):
    assert consumer_settings(config())[name] == clients.consumer_defaults()[name]
    assert consumer_settings(config({name: 1_000_000}))[name] == 1_000_000


def test_read_ahead_holds_more_than_one_answer_of_the_broker():
    defaults = clients.consumer_defaults()
    assert defaults["fetch.message.max.bytes"] <= defaults["fetch.max.bytes"]
    assert defaults["fetch.max.bytes"] <= 1024 * defaults["queued.max.messages.kbytes"]


@pytest.mark.parametrize("start_at", ["latest", "earliest", "2026-01-01", "0=1"])
def test_the_client_never_chooses_a_position(start_at):
    """It would pass over what retention deleted in silence."""
    assert consumer_settings(config(start_at=start_at))["auto.offset.reset"] == "error"


@pytest.mark.parametrize(
    ("protocol", "strategy"),
    [({}, True), ({"group.protocol": "classic"}, True), ({"group.protocol": "consumer"}, False)],
)
def test_who_assigns_partitions_is_told_to_the_client_only_if_it_is_the_client(protocol, strategy):
    settings = consumer_settings(config(protocol))
    assert ("partition.assignment.strategy" in settings) == strategy
    open_consumer({**settings, "log_level": 0}).close()


def test_a_member_has_a_name_only_if_it_was_given_one():
    assert "group.instance.id" not in consumer_settings(config())
    assert consumer_settings(config(instance="left"))["group.instance.id"] == "left"


def test_a_producer_is_told_nothing_of_a_consumer():
    mixed = {**clients.consumer_defaults(), "session.timeout.ms": 1, "fetch.wait.max.ms": 2, "group.instance.id": "i"}
    assert of_producer({**NOWHERE, **mixed, "linger.ms": 7, "sasl.username": "u"}) == {
        "bootstrap.servers": "127.0.0.1:1",
        "log_level": 0,
        "linger.ms": 7,
        "sasl.username": "u",
    }
    settings = producer_settings(config({"fetch.wait.max.ms": 2, "linger.ms": 7}))
    assert settings["linger.ms"] == 7
    assert "fetch.wait.max.ms" not in settings


@pytest.mark.parametrize("open_client", [open_consumer, open_admin])
@pytest.mark.parametrize(
    "wrong",
    [
        {"no.such.setting": SECRET},
        {"security.protocol": "plain", "sasl.password": SECRET},
        {"security.protocol": SECRET},
        {"ssl.endpoint.identification.algorithm": SECRET},
        {"socket.timeout.ms": "soon"},
        {"socket.timeout.ms": 10**12},
        {"ssl.ca.location": "/nowhere/ca.pem", "security.protocol": "ssl", "ssl.key.password": SECRET},
    ],
    ids=lambda wrong: next(iter(wrong)),
)
def test_settings_that_cannot_be_are_one_line_without_a_secret(open_client, wrong):
    with pytest.raises(EdgekitError, match=r"the (consumer|broker) cannot be (configured|asked): ") as caught:
        open_client({**NOWHERE, "group.id": "g", **wrong})
    assert "\n" not in str(caught.value)
    assert SECRET not in str(caught.value)


def test_settings_that_can_be_open_a_client():
    open_consumer({**NOWHERE, "group.id": "g"}).close()
    open_admin(dict(NOWHERE))


def test_errors_are_noted_where_they_are_not_asked_for(caplog):
    with caplog.at_level(logging.WARNING, "edgekit.stream"):
        note_error(KafkaError(KafkaError._TRANSPORT, "the line is cut"))
    assert [record.getMessage() for record in caplog.records] == ["the line is cut"]


def test_an_error_of_the_client_is_one_line():
    with pytest.raises(EdgekitError, match=r"the Kafka client failed: .*; check the broker, and"), client_errors():
        raise KafkaException(KafkaError(KafkaError._TRANSPORT))
    with pytest.raises(ZeroDivisionError), client_errors():
        raise ZeroDivisionError


def test_no_error_both_ends_the_consumer_and_is_a_rebalance():
    """Rebalances come and go with every member; none of them may end one."""
    assert not HOPELESS & REBALANCED
    passing = {KafkaError._TRANSPORT, KafkaError._ALL_BROKERS_DOWN, KafkaError._TIMED_OUT, KafkaError._PARTITION_EOF}
    passing |= {KafkaError.LEADER_NOT_AVAILABLE, KafkaError.NOT_COORDINATOR, KafkaError.COORDINATOR_LOAD_IN_PROGRESS}
    assert not HOPELESS & passing, "librdkafka cures these by itself"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (KafkaException(KafkaError(KafkaError._TIMED_OUT, "too slow")), "too slow"),
        (ValueError("no such thing"), "no such thing"),
        (TypeError(), ""),
        (KafkaException(KafkaError(KafkaError._INVALID_ARG, "out of\nrange\n")), "out of range"),
    ],
)
def test_what_an_error_says(error, said):
    assert reason_of(error) == said


def test_names_of_partitions():
    assert names([TopicPartition("a", 0), TopicPartition("b", 12)]) == "a[0], b[12]"
    assert names([]) == "nothing"


# --- partitions


def client(answer):
    """A client that knows these topics, or raises."""

    def list_topics(topic, timeout):
        if isinstance(answer, Exception):
            raise answer
        return SimpleNamespace(topics=answer)

    return SimpleNamespace(list_topics=list_topics)


def topic(partitions=(), error=None):
    return SimpleNamespace(partitions=dict.fromkeys(partitions), error=error)


def test_partitions_are_in_order():
    assert partitions_of(client({"a": topic([2, 0, 1]), "b": topic([5])}), "a") == [0, 1, 2]


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ({}, "the topic 'a' is not there; create it or name another one"),
        ({"a": topic(error=KafkaError(KafkaError.UNKNOWN_TOPIC_OR_PART))}, "the topic 'a' is not there"),
        (
            {"a": topic(error=KafkaError(KafkaError.TOPIC_AUTHORIZATION_FAILED, "not allowed"))},
            "the topic 'a' cannot be read: not allowed; run `edgekit alerts check`",
        ),
        (
            KafkaException(KafkaError(KafkaError._TRANSPORT, "down")),
            "the broker does not answer: down; check bootstrap",
        ),
    ],
)
def test_partitions_that_cannot_be_known(answer, said):
    with pytest.raises(EdgekitError, match=said):
        partitions_of(client(answer), "a")


FREED_IN_ITS_OWN_THREAD = """
import gc, threading
from confluent_kafka.admin import AdminClient, NewTopic
from alert_broker.stream.clients import Admin

def begin(kind, settings):
    client = kind(settings)
    future = client.create_topics([NewTopic("x", 1, 1)], request_timeout=0.5)["x"]
    cycle = [client]
    cycle.append(cycle)  # only the garbage collector frees it
    return future

gc.disable()
settings = {"bootstrap.servers": "127.0.0.1:1", "log_level": 0}
done = threading.Event()
begin(CLASS, settings).add_done_callback(lambda future: (gc.collect(), done.set()))
assert done.wait(20)
assert len(CLASS._kept) == 1
CLASS(settings)  # frees it
assert CLASS._kept == []
"""


@pytest.mark.parametrize(("kind", "status"), [("Admin", 0), ("AdminClient", -6)])
def test_a_client_may_be_freed_in_its_own_thread(kind, status):
    """The twin is librdkafka's own client: it aborts the process."""
    command = [sys.executable, "-c", FREED_IN_ITS_OWN_THREAD.replace("CLASS", kind)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == status, ended.stderr
    assert ("librdkafka owned thread is prohibited" in ended.stderr) == bool(status)
