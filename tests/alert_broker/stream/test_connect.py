"""What is said about a broker that cannot be reached: one line for a fault that no waiting cures, else patience."""

import dataclasses
import logging
import socket
import ssl
import threading
from concurrent.futures import Future
from types import SimpleNamespace

import pytest
from confluent_kafka import OFFSET_INVALID, KafkaError, KafkaException, TopicPartition

from alert_broker.stream import connect, rights
from alert_broker.stream.clients import KAFKA_LOG, OnceAMinute, open_consumer
from alert_broker.stream.config import load
from alert_broker.stream.connect import principal, reach
from edgekit.errors import EdgekitError
from tests.alert_broker.stream.waiting import Stopwatch
from tests.brokers import MockCluster, free_port
from tests.certificates import Authority

READ = {"source": {"topics": ["ztf"]}, "output": [{"topic": "results"}]}


@pytest.fixture
def server(tmp_path):
    """server(authority=None): the port of a server that speaks TLS, or nothing at all, and never Kafka."""
    sockets = []

    def start(authority=None):
        listener = socket.create_server(("127.0.0.1", 0))
        sockets.append(listener)
        context = None
        if authority is not None:
            authority.sign(tmp_path / "server.pem")
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(tmp_path / "server.pem")

        def serve():
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                try:
                    if context is not None:
                        connection = context.wrap_socket(connection, server_side=True)
                    connection.recv(1)
                except OSError:
                    pass
                connection.close()

        threading.Thread(target=serve, daemon=True).start()
        return listener.getsockname()[1]

    yield start
    for listener in sockets:
        listener.close()


def fault(port, **settings) -> str:
    """What is wrong, which is said within ten seconds."""
    stopwatch = Stopwatch()
    dotted = {name.replace("_", "."): value for name, value in settings.items()}
    with pytest.raises(EdgekitError) as caught:
        reach({"bootstrap.servers": f"127.0.0.1:{port}", **dotted})
    assert stopwatch.seconds() < 10.0
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_plain_text_against_tls(server, tmp_path):
    port = server(Authority(tmp_path))
    assert f"the broker at 127.0.0.1:{port} speaks TLS, but security.protocol is PLAINTEXT" in fault(port)
    assert "set it to SASL_SSL" in fault(port, security_protocol="sasl_plaintext", sasl_mechanism="PLAIN",
                                         sasl_username="u", sasl_password="p")  # fmt: skip


def test_tls_against_plain_text():
    with MockCluster() as cluster:
        port = int(cluster.address.rpartition(":")[2])
        assert f"the broker at 127.0.0.1:{port} does not speak TLS, but security.protocol is SSL" in fault(
            port, security_protocol="ssl"
        )


def test_a_server_that_closes_connections_is_waited_for(server, monkeypatch):
    """A load balancer does so while its broker starts. It does not show whether the broker speaks TLS."""
    monkeypatch.setattr(connect, "TRY_SECONDS", 0.2)
    asked = []

    def stop():
        asked.append(1)
        return len(asked) > 3

    assert reach({"bootstrap.servers": f"127.0.0.1:{server()}", "security.protocol": "ssl"}, stop) is None
    assert len(asked) == 4


@pytest.mark.parametrize(
    ("options", "trusted", "said"),
    [
        ({}, "other", "self-signed certificate in certificate chain"),
        ({"expired": True}, "own", "certificate has expired"),
        ({"host": "elsewhere.example"}, "own", "IP address mismatch, certificate is not valid for '127.0.0.1'"),
    ],
    ids=["unknown authority", "expired", "another name"],
)
def test_a_certificate_that_is_not_accepted(server, tmp_path, options, trusted, said):
    own, other = Authority(tmp_path / "own", **options), Authority(tmp_path / "other")
    authority = {"own": own, "other": other}[trusted].file
    text = fault(server(own), security_protocol="ssl", ssl_ca_location=str(authority))
    assert "the certificate of the broker at 127.0.0.1" in text
    assert said in text
    assert str(authority) in text


def test_a_good_certificate_is_no_fault(server, tmp_path):
    """The twin: with the same server and the right authority, `reach` waits for a broker that speaks Kafka."""
    authority, other = Authority(tmp_path), Authority(tmp_path / "other")
    port = server(authority)

    def certificate_fault(**settings):
        dotted = {name.replace("_", "."): value for name, value in settings.items()}
        return connect._certificate_fault("127.0.0.1", port, {"security.protocol": "ssl", **dotted})

    assert certificate_fault(ssl_ca_location=str(authority.file)) == ""
    assert certificate_fault(ssl_ca_pem=authority.file.read_text()) == ""
    assert certificate_fault(ssl_ca_pem="Autorité\n" + authority.file.read_text()) == ""  # PEM may have comments
    assert "ssl.ca.location (from ssl.ca.pem)" in certificate_fault(ssl_ca_pem=other.file.read_text())
    # the client does not check the certificate
    verify = {"enable.ssl.certificate.verification": False}
    wrong = {"security.protocol": "ssl", "ssl.ca.location": str(other.file)}
    assert connect._certificate_fault("127.0.0.1", port, wrong) != ""
    assert connect._certificate_fault("127.0.0.1", port, wrong | verify) == ""


def test_a_certificate_that_only_a_newer_python_refuses_is_no_fault(server, tmp_path, monkeypatch):
    """By default Python 3.13 requires extensions that these certificates do not have."""
    real = ssl.create_default_context

    def strict(**options):
        context = real(**options)
        context.verify_flags |= ssl.VERIFY_X509_STRICT
        return context

    monkeypatch.setattr(ssl, "create_default_context", strict)
    authority = Authority(tmp_path)
    settings = {"security.protocol": "ssl", "ssl.ca.location": str(authority.file)}
    assert connect._certificate_fault("127.0.0.1", server(authority), settings) == ""


def test_authorities_in_a_folder_are_looked_up_there(server, tmp_path):
    """OpenSSL finds a certificate in a folder by the hash of its subject, so it finds none under another name."""
    authority = Authority(tmp_path)
    settings = {"security.protocol": "ssl", "ssl.ca.location": str(tmp_path)}
    assert f"ssl.ca.location ({tmp_path})" in connect._certificate_fault("127.0.0.1", server(authority), settings)


def test_a_broker_that_is_away_is_waited_for_and_that_is_said_once_a_minute(caplog):
    asked = []

    def stop():
        asked.append(1)
        return len(asked) > 4

    port = free_port()
    with caplog.at_level(logging.WARNING):
        assert reach({"bootstrap.servers": f"127.0.0.1:{port}"}, stop) is None
    assert len(asked) == 5
    ours = [record.getMessage() for record in caplog.records if record.name == "edgekit.stream"]
    assert len(ours) == 1
    assert "the broker does not answer" in ours[0]
    assert f"127.0.0.1:{port}" in ours[0]


def test_a_broker_that_comes_back_is_reached():
    with MockCluster() as cluster:
        cluster.set_up(False)
        timer = threading.Timer(1.5, cluster.set_up, (True,))
        timer.start()
        assert reach({"bootstrap.servers": cluster.address}) is not None
        assert not timer.is_alive()


@pytest.mark.parametrize(
    ("settings", "who"),
    [
        ({"sasl.username": "alice"}, "the user 'alice'"),
        ({"ssl.certificate.location": "me.pem"}, "the owner of the client's certificate"),
        ({}, "a client without a name"),
    ],
)
def test_who_we_are(settings, who):
    assert principal(settings) == who


def test_a_user_from_the_environment_is_named_and_not_the_variable(monkeypatch):
    monkeypatch.setenv("NIGHTLY", "alice")
    assert principal({"sasl.username": "env:NIGHTLY"}) == "the user 'alice'"


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("a:1", ("a", 1)),
        ("SSL://a:1", ("a", 1)),
        ("a", ("a", 9092)),
        (" [::1]:9093", ("::1", 9093)),
        ("[::1]", ("::1", 9092)),
    ],
)
def test_addresses(text, address):
    assert connect._address(text) == address


def test_librdkafkas_messages_pass_once_a_minute(monkeypatch):
    once, now = OnceAMinute(), [1000.0]
    monkeypatch.setattr("alert_broker.stream.clients.time.monotonic", lambda: now[0])

    def passes(text):
        return once.filter(KAFKA_LOG.makeRecord("x", logging.WARNING, "f", 1, text, (), None))

    assert passes("Connection refused (after 3ms in state CONNECT)")
    assert not passes("Connection refused (after 0ms in state CONNECT, 7 identical error(s) suppressed)")
    assert passes("another")
    now[0] += 61.0
    assert passes("Connection refused (after 1ms in state CONNECT)")
    assert all(passes(f"different {number}") for number in range(500))
    assert len(once._passed) <= 100


def errors(*codes):
    return [KafkaError(code) for code in codes]


@pytest.mark.parametrize(
    ("heard", "answers", "said"),
    [
        ((), (), ""),
        ((), (KafkaError.UNKNOWN_TOPIC_OR_PART,), ""),
        ((), (KafkaError.UNKNOWN_MEMBER_ID,), ""),  # the group has members
        ((), (KafkaError.FENCED_INSTANCE_ID,), ""),  # one of them has our group.instance.id
        ((KafkaError._TRANSPORT,), (KafkaError.UNKNOWN_TOPIC_OR_PART,), ""),  # one of several nodes is away
        ((KafkaError.GROUP_AUTHORIZATION_FAILED,), (), "alice has no right to Read on the group 'g'"),
        ((), (KafkaError._WAIT_COORD,), "alice has no right to Read on the group 'g'"),
        ((), (KafkaError._TIMED_OUT,), "the right on the group 'g' cannot be checked: "),
        ((), (KafkaError.COORDINATOR_NOT_AVAILABLE,), "the right on the group 'g' cannot be checked: "),
    ],
)
def test_a_right_on_the_group_that_cannot_be_checked_is_not_taken_for_good(heard, answers, said):
    problem = rights._group_problem("group 'g'", "alice", errors(*heard), errors(*answers))
    assert problem.startswith(said)
    assert bool(problem) == bool(said)


def test_a_group_is_checked_without_a_commit():
    with MockCluster() as cluster:
        config = load(None, {**READ, "kafka": {"bootstrap.servers": cluster.address}})
        assert rights.group(config) == rights.Finding("group 'edgekit'", "Read")
        consumer = open_consumer({"bootstrap.servers": cluster.address, "group.id": "edgekit"})
        try:
            (found,) = consumer.committed([TopicPartition("ztf", 0)], 10)
        finally:
            consumer.close()
        assert found.offset == OFFSET_INVALID


def test_a_transactional_producer_that_cannot_be_configured_is_one_line():
    config = load(None, {**READ, "kafka": {"bootstrap.servers": "127.0.0.1:1", "batch.size": "soon"}})
    with pytest.raises(EdgekitError, match=r"the producer cannot be configured: .*batch\.size"):
        rights.transactional_id(config)


def test_a_user_from_the_environment_is_named(monkeypatch):
    monkeypatch.setenv("NIGHTLY", "alice")
    config = load(None, {**READ, "kafka": {"bootstrap.servers": "x:1", "sasl.username": "env:NIGHTLY"}})
    refused = KafkaException(KafkaError(KafkaError.TOPIC_AUTHORIZATION_FAILED))

    def describe_topics(topics, **options):
        futures = {name: Future() for name in ("ztf", "results", "edgekit-dead-letters")}
        for future in futures.values():
            future.set_exception(refused)
        return futures

    found = rights.topics(SimpleNamespace(describe_topics=describe_topics), config)
    assert [finding.problem.split(" has")[0] for finding in found] == ["the user 'alice'"] * 3


def test_a_cluster_without_a_controller_can_be_read_and_an_absent_topic_is_named(monkeypatch):
    """The mock cluster has no controller, like a real one that is choosing it, and so describes no topic."""
    monkeypatch.setattr(rights, "ANSWER_SECONDS", 0.5)
    with MockCluster() as cluster:
        for name in ("ztf", "results", "dead"):
            cluster.create_topic(name, 1)
        changes = {"kafka": {"bootstrap.servers": cluster.address}, "dead_letters": {"topic": "dead"}}
        config = load(None, READ | changes)
        client = reach(config.kafka_settings())
        rights.require_topics(client, config)
        absent = dataclasses.replace(config, output=(dataclasses.replace(config.output[0], topic="elsewhere"),))
        with pytest.raises(EdgekitError, match="the topic 'elsewhere' is not there"):
            rights.require_topics(client, absent)
