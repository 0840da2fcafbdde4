"""What only a real Apache Kafka shows. The tests without a marker take less than a minute together and are part of
`make test` if EDGEKIT_KAFKA_HOME names a Kafka; those marked `kafka` are part of `make test-kafka`."""

from uuid import UUID

import pytest
from confluent_kafka import Producer
from confluent_kafka.admin import AclOperation, ResourceType

from edgekit.errors import EdgekitError
from tests.alert_broker.conftest import REAL
from tests.alert_broker.stream.rig import Rig, repeat
from tests.apache_kafka import ApacheKafka, cluster_id, missing
from tests.brokers import create_topics

needs_kafka = pytest.mark.skipif(bool(missing()), reason=missing() or "-")


@pytest.fixture
def real(apache_kafka, bundle, tmp_path):
    """A rig on the real Kafka, whichever broker the other tests use."""
    return Rig(apache_kafka.address, REAL, tmp_path, bundle)


@pytest.fixture
def exactly():
    return {"mode": "exactly-once", "transactional_id": "edgekit-test", "seconds": 30.0}


def produce(settings, topic: str) -> list[str]:
    """Send a message; the names of the errors, if it was refused."""
    errors: list[str] = []
    producer = Producer({"message.timeout.ms": 5000, **settings, "log_level": 0})
    producer.produce(topic, b"x", on_delivery=lambda error, _: errors.append(error.name()) if error else None)
    assert producer.flush(60) == 0
    return errors


@pytest.mark.parametrize("mode", ["at-least-once", "exactly-once"])
def test_every_alert_comes_out_once(real, packets, exactly, mode):
    sent = real.send(repeat(packets, 300))
    total = real.consume(publish=exactly | {"mode": mode}).ledger.total()
    done = real.outcome(sent)
    assert (done.lost, done.duplicates, done.results) == (0, 0, sent)
    assert (total.consumed, total.published, total.in_flight) == (sent, sent, 0)


@pytest.mark.kafka
@needs_kafka
def test_three_nodes_keep_their_data(tmp_path):
    with ApacheKafka(tmp_path / "three", nodes=3) as cluster:
        create_topics(cluster.address, {"kept": 1}, copies=3)
        patient = {**cluster.settings(), "message.timeout.ms": 40_000}
        assert produce(patient, "kept") == []
        first = cluster.leader("kept")
        cluster.kill(first)
        assert produce(patient, "kept") == []
        assert cluster.leader("kept") != first
        cluster.kill()
        cluster.start()
        rig = Rig(cluster.address, REAL, tmp_path, tmp_path)
        assert [message.value() for message in rig.read("kept")] == [b"x", b"x"]


@pytest.mark.kafka
@needs_kafka
def test_a_secured_node_grants_what_was_allowed_and_no_more(tmp_path):
    with ApacheKafka(tmp_path / "secured", users={"alice": "wonder99"}) as cluster:
        create_topics(cluster.internal, {"open": 1, "closed": 1})
        cluster.allow("alice", ResourceType.TOPIC, "open", AclOperation.WRITE)
        assert produce(cluster.settings("alice"), "open") == []
        assert produce(cluster.settings("alice"), "closed") == ["TOPIC_AUTHORIZATION_FAILED"]
        assert produce(cluster.settings("alice") | {"sasl.password": "wrong"}, "open") == ["_MSG_TIMED_OUT"]


def test_an_id_of_a_cluster_never_looks_like_an_option(monkeypatch):
    values = iter([UUID(int=0xF8 << 120), UUID(int=1)])  # the first one begins with a dash
    monkeypatch.setattr("tests.apache_kafka.uuid.uuid4", lambda: next(values))
    assert cluster_id() == "AAAAAAAAAAAAAAAAAAAAAQ"
    assert next(values, None) is None


def test_a_folder_without_kafka_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("EDGEKIT_KAFKA_HOME", str(tmp_path))
    with pytest.raises(EdgekitError, match=r"which has no libs/kafka\*\.jar"):
        ApacheKafka(tmp_path / "none")
