"""Reach the broker, and say in one line what is wrong if that fails.

A broker that is away is waited for. A fault that no waiting cures is an error within seconds: a wrong user or password,
a certificate that cannot be verified, TLS where the broker speaks plain text or the reverse. librdkafka tells of the
first; for the others it says no more than that a connection failed, so we connect once ourselves and look.
"""

from __future__ import annotations

import logging
import socket
import ssl
import time
from collections.abc import Callable, Mapping

from confluent_kafka import KafkaError, KafkaException
from confluent_kafka.admin import AdminClient

from alert_broker.stream.clients import open_admin, reason_of
from alert_broker.stream.config import Secret
from edgekit.errors import EdgekitError

LOG = logging.getLogger("edgekit.stream")
TRY_SECONDS = 1.0  # for an answer, before we look for the reason
PAUSE_SECONDS = 0.2  # between attempts
PROBE_SECONDS = 3.0  # for a connection of our own
SAY_SECONDS = 60.0  # between lines about a broker that is away
PORT = 9092


def principal(settings: Mapping[str, Secret]) -> str:
    """Who we are to the broker, for error messages."""
    if user := settings.get("sasl.username"):
        return f"the user {user!r}"
    if settings.get("ssl.certificate.location") or settings.get("ssl.keystore.location"):
        return "the owner of the client's certificate"
    return "a client without a name"


def reach(settings: Mapping[str, Secret], stop: Callable[[], bool] = lambda: False) -> AdminClient | None:
    """Wait until the broker answers; None if `stop` came first; EdgekitError for a fault that no waiting cures."""
    heard: list[KafkaError] = []
    client = open_admin(settings, heard.append)
    told = -SAY_SECONDS
    while not stop():
        try:
            client.list_topics(timeout=TRY_SECONDS)
            return client
        except KafkaException as error:
            reason = reason_of(error)
        client.poll(0.0)
        for fault in heard:
            if fault.code() in (KafkaError._AUTHENTICATION, KafkaError.SASL_AUTHENTICATION_FAILED):
                text = fault.str().partition(" (after")[0].rpartition("bootstrap: ")[2]
                raise EdgekitError(
                    f"the broker refuses {principal(settings)}: {text}; check sasl.username, sasl.password and "
                    "sasl.mechanism in [kafka]"
                )
        if problem := _transport_fault(settings):
            raise EdgekitError(problem)
        reason = next((fault.str() for fault in heard if fault.code() != KafkaError._ALL_BROKERS_DOWN), reason)
        if time.monotonic() - told >= SAY_SECONDS:
            LOG.warning("the broker does not answer (%s); waiting for it", reason)
            told = time.monotonic()
        heard.clear()
        time.sleep(PAUSE_SECONDS)
    return None


def _transport_fault(settings: Mapping[str, Secret]) -> str:
    """What no waiting cures between us and the first broker that accepts a connection; empty if nothing is known."""
    protocol = str(settings.get("security.protocol", "plaintext")).upper()
    for server in str(settings.get("bootstrap.servers", "")).split(","):
        host, port = _address(server)
        try:
            socket.create_connection((host, port), PROBE_SECONDS).close()
        except OSError:
            continue
        if protocol.endswith("SSL"):
            return _certificate_fault(host, port, settings)
        if _speaks_tls(host, port):
            return (
                f"the broker at {host}:{port} speaks TLS, but security.protocol is {protocol}; set it to "
                f"{'SASL_SSL' if protocol.startswith('SASL') else 'SSL or SASL_SSL'}"
            )
        return ""
    return ""


def _address(server: str) -> tuple[str, int]:
    host, _, port = server.strip().rpartition("://")[2].rpartition(":")
    return (host.strip("[]"), int(port)) if host and port.isdigit() else (port, PORT)


def _speaks_tls(host: str, port: int) -> bool:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        with (
            socket.create_connection((host, port), PROBE_SECONDS) as connection,
            context.wrap_socket(connection, server_hostname=host),
        ):
            return True
    except OSError as error:
        return isinstance(error, ssl.SSLError) and "CERTIFICATE_REQUIRED" in str(error)


def _certificate_fault(host: str, port: int, settings: Mapping[str, Secret]) -> str:
    """Why the broker's certificate is not accepted; empty if it is, or if we cannot tell."""
    if not _speaks_tls(host, port):
        return (
            f"the broker at {host}:{port} does not speak TLS, but security.protocol is "
            f"{str(settings['security.protocol']).upper()}; set it to PLAINTEXT or SASL_PLAINTEXT, or connect to the "
            "broker's TLS port"
        )
    authority = settings.get("ssl.ca.location")
    context = ssl.create_default_context(cafile=str(authority) if authority else None)
    context.check_hostname = settings.get("ssl.endpoint.identification.algorithm", "https") != "none"
    try:
        with (
            socket.create_connection((host, port), PROBE_SECONDS) as connection,
            context.wrap_socket(connection, server_hostname=host),
        ):
            return ""
    except ssl.SSLCertVerificationError as error:
        return (
            f"the certificate of the broker at {host}:{port} is not accepted: {error.verify_message}; check "
            f"ssl.ca.location ({authority or 'not set'}), and the name and the dates of the certificate"
        )
    except OSError:
        return ""
