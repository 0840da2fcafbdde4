"""Reach the broker, and say in one line what is wrong if that fails.

This module waits for a broker that is away. A fault that no waiting cures is an error within seconds: a wrong user or
password, a certificate that cannot be verified, or TLS on one side only. librdkafka reports a wrong user or password.
For the other faults it reports only that a connection failed, so this module connects to the broker itself. It reports
such a fault only if the broker's answer shows it: a connection that is closed without an answer may come from a load
balancer whose broker is still starting.
"""

from __future__ import annotations

import logging
import socket
import ssl
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from confluent_kafka import KafkaError, KafkaException
from confluent_kafka.admin import AdminClient

from alert_broker.stream.clients import open_admin, reason_of
from alert_broker.stream.config import Secret, secrets_from_environment
from edgekit.errors import EdgekitError

LOG = logging.getLogger("edgekit.stream")
TRY_SECONDS = 1.0  # for librdkafka to get an answer, before this module looks for the reason
PAUSE_SECONDS = 0.2  # between attempts
PROBE_SECONDS = 3.0  # for a connection of this module's own
SAY_SECONDS = 60.0  # between lines about a broker that is away
PORT = 9092
# Kafka's request ApiVersions, version 0, number 7. Every broker answers it before a client has authenticated itself.
API_VERSIONS = b"\0\0\0\x0a" + b"\0\x12\0\0" + b"\0\0\0\x07" + b"\xff\xff"


def principal(settings: Mapping[str, Secret]) -> str:
    """Return this client as the broker sees it, for error messages. A user from the environment is named."""
    if user := settings.get("sasl.username"):
        return f"the user {secrets_from_environment({'sasl.username': user})['sasl.username']!r}"
    if settings.get("ssl.certificate.location") or settings.get("ssl.keystore.location"):
        return "the owner of the client's certificate"
    return "a client without a name"


def reach(settings: Mapping[str, Secret], stop: Callable[[], bool] = lambda: False) -> AdminClient | None:
    """Wait until the broker answers, and return a client for questions to it; None if `stop` returned true first.
    Raises EdgekitError for a fault that no waiting cures."""
    heard: list[KafkaError] = []
    client = open_admin(settings, heard.append)
    said = -SAY_SECONDS
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
        if time.monotonic() - said >= SAY_SECONDS:
            LOG.warning("the broker does not answer (%s); waiting for it", reason)
            said = time.monotonic()
        heard.clear()
        time.sleep(PAUSE_SECONDS)
    return None


def _transport_fault(settings: Mapping[str, Secret]) -> str:
    """Return the fault between this client and the first broker that accepts a connection, if no waiting cures it;
    empty if no such fault is known."""
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
    address = server.strip().rpartition("://")[2]
    host, _, port = address.rpartition(":")
    return (host.strip("[]"), int(port)) if host and port.isdigit() else (address.strip("[]"), PORT)


def _speaks_plain_text(host: str, port: int) -> bool:
    """Whether the broker answers a request that is not encrypted."""
    try:
        with socket.create_connection((host, port), PROBE_SECONDS) as connection:
            connection.sendall(API_VERSIONS)
            return connection.recv(8)[4:] == API_VERSIONS[8:12]  # the answer begins with its size and this number
    except OSError:
        return False


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
    """Return the reason why TLS with this broker fails; empty if it works, or if the reason is not known."""
    if not _speaks_tls(host, port):
        if not _speaks_plain_text(host, port):
            return ""
        return (
            f"the broker at {host}:{port} does not speak TLS, but security.protocol is "
            f"{str(settings['security.protocol']).upper()}; set it to PLAINTEXT or SASL_PLAINTEXT, or connect to the "
            "broker's TLS port"
        )
    if str(settings.get("enable.ssl.certificate.verification", True)).lower() in ("false", "f", "0"):
        return ""
    authority = settings.get("ssl.ca.location") or ("from ssl.ca.pem" if settings.get("ssl.ca.pem") else "not set")
    try:
        context = _trust(settings)
        with (
            socket.create_connection((host, port), PROBE_SECONDS) as connection,
            context.wrap_socket(connection, server_hostname=host),
        ):
            return ""
    except ssl.SSLCertVerificationError as error:
        return (
            f"the certificate of the broker at {host}:{port} is not accepted: {error.verify_message}; check "
            f"ssl.ca.location ({authority}), and the name and the dates of the certificate"
        )
    except OSError:
        return ""


def _trust(settings: Mapping[str, Secret]) -> ssl.SSLContext:
    """Return a context that trusts the authorities that librdkafka trusts: those of a file, of a folder, of PEM text,
    or by default those of the system. Raises OSError if they cannot be read."""
    location, text = (str(settings.get(name) or "") for name in ("ssl.ca.location", "ssl.ca.pem"))
    location = "" if location == "probe" else location  # "probe" stands for the places where systems store authorities
    folder = bool(location) and Path(location).is_dir()
    text = text.encode("ascii", "ignore").decode()  # Python takes no other text; comments may contain it
    context = ssl.create_default_context(
        cafile=location if location and not folder else None, capath=location if folder else None, cadata=text or None
    )
    context.check_hostname = settings.get("ssl.endpoint.identification.algorithm", "https") != "none"
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT  # Python 3.13 refuses certificates that librdkafka accepts
    return context
