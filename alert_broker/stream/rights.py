"""Find out which rights this client has at the broker, without reading, writing or committing an alert.

The broker lists for each topic the rights of this client. To check the right on the group, this module commits an
offset of a topic that does not exist: the broker checks the right on the group first, and refuses the topic after that.
To check the right on the transactional id, it starts a producer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from confluent_kafka import KafkaError, KafkaException, Producer, TopicCollection, TopicPartition
from confluent_kafka.admin import AclOperation, AdminClient  # type: ignore[attr-defined]

from alert_broker.stream.clients import (
    ABSENT,
    KAFKA_LOG,
    REBALANCED,
    consumer_settings,
    open_consumer,
    producer_settings,
    reason_of,
    refusal_of,
)
from alert_broker.stream.config import Config
from alert_broker.stream.connect import principal
from edgekit.errors import EdgekitError

ANSWER_SECONDS = 8.0
NO_TOPIC = "edgekit.check"  # the name of a topic that does not exist
# The broker answers with one of these to a commit for NO_TOPIC after it has accepted the group: the topic does not
# exist, this client may not describe it, or the group has members at the moment.
GROUP_ACCEPTED = {
    *ABSENT,
    KafkaError.TOPIC_AUTHORIZATION_FAILED,
    *REBALANCED,
    KafkaError.FENCED_MEMBER_EPOCH,
    KafkaError.STALE_MEMBER_EPOCH,
}
UNAUTHORIZED = {
    KafkaError.TOPIC_AUTHORIZATION_FAILED,
    KafkaError.GROUP_AUTHORIZATION_FAILED,
    KafkaError.CLUSTER_AUTHORIZATION_FAILED,
    KafkaError.TRANSACTIONAL_ID_AUTHORIZATION_FAILED,
}


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of one check. thing: such as "topic 'ztf'"; right: the right that the consumer needs on it; problem:
    empty if the consumer has the right."""

    thing: str
    right: str
    problem: str = ""


def missing_right(who: str, right: str, thing: str) -> str:
    return f"{who} has no right to {right} on the {thing}; add an access rule for it at the broker"


def topics(client: AdminClient, config: Config) -> list[Finding]:
    """Check that the topics exist, and that this client may read or write them."""
    who = principal(config.kafka_settings())
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
        denied = bool(allowed) and wanted[name] not in allowed  # brokers without access rules may send no list
        findings.append(Finding(thing, right, missing_right(who, right, thing) if denied else ""))
    return findings


def _topic_problem(client: AdminClient, name: str, error: KafkaException, who: str) -> str:
    """Return the problem of a topic that the broker does not describe. A cluster that chooses a controller, and a
    broker that cannot describe topics, only show in the metadata that the topic exists; they say nothing of rights."""
    thing, code = f"topic {name!r}", error.args[0].code()
    if code not in (*UNAUTHORIZED, *ABSENT):
        try:
            there = client.list_topics(timeout=ANSWER_SECONDS).topics  # a request for one name may create it
        except KafkaException as failure:
            return f"the broker does not describe the {thing}: {reason_of(failure)}"
        if name in there:
            return ""
    if code in UNAUTHORIZED:
        return missing_right(who, "Describe", thing)
    return f"the {thing} is not there; create it or name another one"


def group(config: Config) -> Finding:
    """Check that this client may be a member of the group and commit. Nothing is committed."""
    thing = f"group {config.source.group!r}"
    heard: list[KafkaError] = []
    consumer = open_consumer(consumer_settings(config), heard.append)
    answers: list[KafkaError] = []
    try:
        results = consumer.commit(offsets=[TopicPartition(NO_TOPIC, 0, 0)], asynchronous=False)
        answers = [item.error for item in results or () if item.error is not None]
    except KafkaException as error:
        answers = [error.args[0]]
    finally:
        consumer.close()
    return Finding(thing, "Read", _group_problem(thing, principal(config.kafka_settings()), heard, answers))


def _group_problem(thing: str, who: str, heard: Sequence[KafkaError], answers: Sequence[KafkaError]) -> str:
    """Return the problem of the group. heard: errors of the client as a whole; answers: errors of the commit. Without
    the right, librdkafka finds no coordinator."""
    codes = {error.code() for error in (*heard, *answers)}
    if codes & {KafkaError.GROUP_AUTHORIZATION_FAILED, KafkaError._WAIT_COORD}:
        return missing_right(who, "Read", thing)
    unexpected = [error.str() for error in answers if error.code() not in GROUP_ACCEPTED]
    return f"the right on the {thing} cannot be checked: {unexpected[0]}; try again later" if unexpected else ""


def transactional_id(config: Config) -> Finding:
    """Check that this client may use the transactional id. A member that uses it at the same time makes itself a new
    producer."""
    settings = producer_settings(config)
    name = config.transactional_id()
    del settings["delivery.timeout.ms"]
    thing = f"transactional id {name!r}"
    try:
        producer = Producer(settings | {"transactional.id": name}, logger=KAFKA_LOG)
    except (KafkaException, ValueError, TypeError) as error:
        raise EdgekitError(f"the producer cannot be configured: {refusal_of(error, settings)}") from None
    try:
        producer.init_transactions(ANSWER_SECONDS)
    except KafkaException as error:
        denied = error.args[0].code() in UNAUTHORIZED
        problem = (
            missing_right(principal(config.kafka_settings()), "Write", thing)
            if denied
            else f"{thing}: {reason_of(error)}"
        )
        return Finding(thing, "Write", problem)
    return Finding(thing, "Write")


def all_rights(client: AdminClient, config: Config) -> Iterator[Finding]:
    yield from topics(client, config)
    yield group(config)
    if config.publish.mode == "exactly-once":
        yield transactional_id(config)


def require_topics(client: AdminClient, config: Config) -> None:
    """Raise for the first topic that does not exist or that this client may not use."""
    for finding in topics(client, config):
        if finding.problem:
            raise EdgekitError(finding.problem)
