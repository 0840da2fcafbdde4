"""Start positions: move a consumer group to a time or to offsets before it reads."""

from __future__ import annotations

import re
from datetime import UTC, datetime

from confluent_kafka import OFFSET_BEGINNING, OFFSET_END, OFFSET_INVALID, Consumer, KafkaException, TopicPartition

from alert_broker.stream.clients import ADMIN_SECONDS, open_consumer, partitions_of, reason_of
from alert_broker.stream.config import Config, Secret
from edgekit.errors import EdgekitError


def reset_group(config: Config, settings: dict[str, Secret]) -> None:
    """Move the group to a time or to offsets before this member joins. A broker allows that only while the group is
    empty."""
    consumer = open_consumer({**settings, "enable.partition.eof": False})
    try:
        partitions = [
            TopicPartition(topic, number) for topic in config.source.topics for number in partitions_of(consumer, topic)
        ]
        wanted = start_positions(config.source.start_at, partitions, consumer)
        results = consumer.commit(offsets=wanted, asynchronous=False) or ()
        if errors := [item.error for item in results if item.error is not None]:
            raise KafkaException(errors[0])
    except KafkaException as error:
        raise EdgekitError(
            f"the group {config.source.group} cannot be moved to {config.source.start_at}: {reason_of(error)}; "
            "stop its other members first, or name a new group"
        ) from None
    finally:
        consumer.close()


def start_positions(text: str, partitions: list[TopicPartition], consumer: Consumer) -> list[TopicPartition]:
    """Return the positions at which reading starts: at a time such as 2026-08-01T04:00:00Z, or at offsets such as
    0=1200,1=1180."""
    if re.fullmatch(r"\s*\d+=\d+(\s*,\s*\d+=\d+)*\s*", text):
        wanted = {int(a): int(b) for a, b in (pair.split("=") for pair in text.split(","))}
        known = {item.partition for item in partitions}
        if missing := set(wanted) - known:
            raise EdgekitError(f"start_at names partition {min(missing)}; the topic has {len(known)}, from 0 on")
        return [
            TopicPartition(item.topic, item.partition, wanted[item.partition])
            for item in partitions
            if item.partition in wanted
        ]
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise EdgekitError(
            f"start_at is {text!r}; expected earliest, latest, a time such as 2026-08-01T04:00:00Z, or offsets such as "
            "0=1200,1=1180"
        ) from None
    moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    asked = [TopicPartition(item.topic, item.partition, int(moment.timestamp() * 1000)) for item in partitions]
    found = consumer.offsets_for_times(asked, timeout=ADMIN_SECONDS)
    for item in found:
        if item.error is not None:  # an unknown position must not be taken for the end, which would pass over alerts
            raise KafkaException(item.error)
        # the partition has no message this late
        if item.offset in (OFFSET_END, OFFSET_INVALID, OFFSET_BEGINNING) or item.offset < 0:
            _, item.offset = consumer.get_watermark_offsets(TopicPartition(item.topic, item.partition), ADMIN_SECONDS)
    return list(found)
