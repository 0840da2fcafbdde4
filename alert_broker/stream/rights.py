"""Which rights this client has at the broker, asked without reading, writing or committing an alert.

The broker tells for each topic what we may do with it. For the group we commit an offset of a topic that does not
exist: the broker looks at the right first and refuses the topic then. For the transactional id we start a producer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from confluent_kafka import KafkaError, KafkaException, Producer, TopicCollection, TopicPartition
from confluent_kafka.admin import AclOperation, AdminClient  # type: ignore[attr-defined]

from alert_broker.stream.clients import KAFKA_LOG, consumer_settings, open_consumer, producer_settings, reason_of
from alert_broker.stream.config import Config
from alert_broker.stream.connect import principal
from edgekit.errors import EdgekitError

ANSWER_SECONDS = 8.0
NO_TOPIC = "edgekit.check"  # a topic that nobody has
UNAUTHORIZED = {
    KafkaError.TOPIC_AUTHORIZATION_FAILED,
    KafkaError.GROUP_AUTHORIZATION_FAILED,
    KafkaError.CLUSTER_AUTHORIZATION_FAILED,
    KafkaError.TRANSACTIONAL_ID_AUTHORIZATION_FAILED,
}
ABSENT = {KafkaError.UNKNOWN_TOPIC_OR_PART, KafkaError._UNKNOWN_TOPIC}


@dataclass(frozen=True, slots=True)
class Finding:
    """A thing, such as "topic ztf", the right that we need on it, and what is wrong; empty if nothing is."""

    thing: str
    right: str
    problem: str = ""


def missing_right(who: str, right: str, thing: str) -> str:
    return f"{who} has no right to {right} on the {thing}; add an access rule for it at the broker"


def topics(client: AdminClient, config: Config) -> list[Finding]:
    """The topics that are read and written: whether they are there, and whether we may."""
    who = principal(config.kafka)
    wanted = dict.fromkeys(config.source.topics, AclOperation.READ)
    wanted |= {item.topic: AclOperation.WRITE for item in config.output}
    wanted[config.dead_letters.topic] = AclOperation.WRITE
    asked = client.describe_topics(
        TopicCollection(list(wanted)), include_authorized_operations=True, request_timeout=ANSWER_SECONDS
    )
    findings = []
    for name, future in asked.items():
        thing, right = f"topic {name!r}", wanted[name].name.capitalize()
        try:
            allowed = future.result().authorized_operations
        except KafkaException as error:
            findings.append(Finding(thing, right, _topic_problem(client, name, error, who)))
            continue
        denied = bool(allowed) and wanted[name] not in allowed  # brokers without access rules may tell nothing
        findings.append(Finding(thing, right, missing_right(who, right, thing) if denied else ""))
    return findings


def _topic_problem(client: AdminClient, name: str, error: KafkaException, who: str) -> str:
    """What is wrong with a topic that the broker does not describe. While a cluster chooses a controller, and at
    brokers that cannot describe topics, we learn from the metadata that the topic is there, and nothing of rights."""
    thing, code = f"topic {name!r}", error.args[0].code()
    if code not in (*UNAUTHORIZED, *ABSENT):
        try:
            there = client.list_topics(timeout=ANSWER_SECONDS).topics  # to ask for one by its name may create it
        except KafkaException as failure:
            return f"the broker does not describe the {thing}: {reason_of(failure)}"
        if name in there:
            return ""
    if code in UNAUTHORIZED:
        return missing_right(who, "Describe", thing)
    return f"the {thing} is not there; create it or name another one"


def group(config: Config) -> Finding:
    """Whether we may be a member of the group and commit. Nothing is committed."""
    thing = f"group {config.source.group!r}"
    heard: list[KafkaError] = []
    consumer = open_consumer(consumer_settings(config), heard.append)
    try:
        results = consumer.commit(offsets=[TopicPartition(NO_TOPIC, 0, 0)], asynchronous=False)
        heard += [item.error for item in results or () if item.error is not None]
    except KafkaException as error:
        heard.append(error.args[0])
    finally:
        consumer.close()
    codes = {error.code() for error in heard}
    denied = bool(codes & {KafkaError.GROUP_AUTHORIZATION_FAILED, KafkaError._WAIT_COORD})
    return Finding(thing, "Read", missing_right(principal(config.kafka), "Read", thing) if denied else "")


def transactional_id(config: Config) -> Finding:
    """Whether we may use it. A member that uses it at the time makes itself a new producer."""
    settings = producer_settings(config)
    name = config.transactional_id()
    del settings["delivery.timeout.ms"]
    thing = f"transactional id {name!r}"
    producer = Producer(settings | {"transactional.id": name}, logger=KAFKA_LOG)
    try:
        producer.init_transactions(ANSWER_SECONDS)
    except KafkaException as error:
        denied = error.args[0].code() in UNAUTHORIZED
        problem = missing_right(principal(config.kafka), "Write", thing) if denied else f"{thing}: {reason_of(error)}"
        return Finding(thing, "Write", problem)
    return Finding(thing, "Write")


def all_rights(client: AdminClient, config: Config) -> Iterator[Finding]:
    yield from topics(client, config)
    yield group(config)
    if config.publish.mode == "exactly-once":
        yield transactional_id(config)


def require_topics(client: AdminClient, config: Config) -> None:
    """Raise for the first topic that is not there, or that we may not use."""
    for finding in topics(client, config):
        if finding.problem:
            raise EdgekitError(finding.problem)
