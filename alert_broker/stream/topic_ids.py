"""Notice a topic that was deleted and created again under the same name.

The consumer would go on at its old offset in the new topic, and would pass over the messages before it. The broker
gives every topic an id that is never used again. Brokers before Apache Kafka 2.8 give no id, but zeros. Nothing is
noticed then; a cluster whose nodes are upgraded one after another gives zeros and ids by turns.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

from confluent_kafka import KafkaException, TopicCollection, Uuid
from confluent_kafka.admin import AdminClient

ASK_SECONDS = 2.0  # between questions
ANSWER_SECONDS = 10.0  # for an answer; until then there is no other question
NO_ID = str(Uuid(0, 0))


class TopicIds:
    """The thread that polls may call it at any time, because no call waits for the broker."""

    def __init__(self, admin: AdminClient, topics: Sequence[str]) -> None:
        self._admin, self._topics = admin, list(topics)
        self._ids: dict[str, str] = {}
        self._pending: dict[str, Future[Any]] = {}
        self._asked = -ASK_SECONDS

    def changed(self) -> list[str]:
        """Return the topics whose id differs from the one in the answer before."""
        if not all(future.done() for future in self._pending.values()):
            return []
        found = [name for name, future in self._pending.items() if self._take(name, future)]
        self._pending.clear()
        if time.monotonic() - self._asked >= ASK_SECONDS:
            self._asked = time.monotonic()
            self._pending = self._admin.describe_topics(TopicCollection(self._topics), request_timeout=ANSWER_SECONDS)
        return found

    def _take(self, name: str, future: Future[Any]) -> bool:
        try:
            found = str(future.result().topic_id)
        except KafkaException:  # the consumer itself reports a topic that is not there and a broker that is away
            return False
        if found == NO_ID:
            return False
        known, self._ids[name] = self._ids.get(name, found), found
        return known != found
