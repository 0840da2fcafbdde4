"""What is said about a broker that cannot be reached: one line for a fault that no waiting cures, else patience."""

import dataclasses
import logging
import socket
import ssl
import threading
import time

import pytest

from alert_broker.stream import connect, rights
from alert_broker.stream.clients import KAFKA_LOG, OnceAMinute
from alert_broker.stream.config import load
from alert_broker.stream.connect import principal, reach
from edgekit.errors import EdgekitError
from tests.brokers import MockCluster, free_port
from tests.certificates import Authority


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
    started = time.monotonic()
    dotted = {name.replace("_", "."): value for name, value in settings.items()}
    with pytest.raises(EdgekitError) as caught:
        reach({"bootstrap.servers": f"127.0.0.1:{port}", **dotted})
    assert time.monotonic() - started < 10.0
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_plain_text_against_tls(server, tmp_path):
    port = server(Authority(tmp_path))
    assert f"the broker at 127.0.0.1:{port} speaks TLS, but security.protocol is PLAINTEXT" in fault(port)
    assert "set it to SASL_SSL" in fault(port, security_protocol="sasl_plaintext", sasl_mechanism="PLAIN",
                                         sasl_username="u", sasl_password="p")  # fmt: skip


def test_tls_against_plain_text(server):
    port = server()
    assert f"the broker at 127.0.0.1:{port} does not speak TLS, but security.protocol is SSL" in fault(
        port, security_protocol="ssl"
    )


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
    """The twin: with the same server and the right authority, we wait for a broker that speaks Kafka."""
    authority = Authority(tmp_path)
    settings = {"security.protocol": "ssl", "ssl.ca.location": str(authority.file)}
    assert connect._certificate_fault("127.0.0.1", server(authority), settings) == ""


def test_a_broker_that_is_away_is_waited_for_and_that_is_said_once_a_minute(caplog):
    started, asked = time.monotonic(), []

    def stop():
        asked.append(1)
        return time.monotonic() - started > 4.0

    port = free_port()
    with caplog.at_level(logging.WARNING):
        assert reach({"bootstrap.servers": f"127.0.0.1:{port}"}, stop) is None
    assert len(asked) > 2
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


@pytest.mark.parametrize(
    ("text", "address"),
    [("a:1", ("a", 1)), ("SSL://a:1", ("a", 1)), ("a", ("a", 9092)), (" [::1]:9093", ("::1", 9093))],
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


def test_a_cluster_without_a_controller_can_be_read_and_an_absent_topic_is_named(monkeypatch):
    """The mock cluster has no controller, like a real one that is choosing it, and so describes no topic."""
    monkeypatch.setattr(rights, "ANSWER_SECONDS", 0.5)
    with MockCluster() as cluster:
        for name in ("ztf", "results", "dead"):
            cluster.create_topic(name, 1)
        changes = {"source": {"topics": ["ztf"]}, "dead_letters": {"topic": "dead"}}
        changes |= {"kafka": {"bootstrap.servers": cluster.address}, "output": [{"topic": "results"}]}
        config = load(None, changes)
        client = reach(config.kafka_settings())
        rights.require_topics(client, config)
        absent = dataclasses.replace(config, output=(dataclasses.replace(config.output[0], topic="elsewhere"),))
        with pytest.raises(EdgekitError, match="the topic 'elsewhere' is not there"):
            rights.require_topics(client, absent)
