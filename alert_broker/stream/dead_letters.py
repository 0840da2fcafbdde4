"""Dead letters: an alert that cannot be read goes to a topic of its own, as it came, with all that is needed to tell
why and to send it again. Too many of them stop the consumer: then it is not the alerts that are broken.

One that is too large for that topic goes without its bytes, and says so in the header `edgekit.omitted`; the topic,
partition and offset in its other headers tell where they are, and `redrive` gets them from there.
"""

from __future__ import annotations

import hashlib
import logging
import re
import time
import traceback
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from confluent_kafka import Message

from alert_broker.containers import WIRE_HEADER, WIRE_MAGIC
from alert_broker.stream.config import DeadLetters
from alert_broker.stream.publish import Headers, Outgoing
from alert_broker.stream.source import place_of
from edgekit.errors import EdgekitError

LOG = logging.getLogger("edgekit.stream")
PREFIX = "edgekit."  # of our headers
REASON, STATUS, SCHEMA_ID, STACK = (PREFIX + name for name in ("reason", "status", "schema-id", "stack"))
TOPIC, PARTITION, OFFSET = (PREFIX + name for name in ("topic", "partition", "offset"))
WHEN, ATTEMPTS, OMITTED = PREFIX + "dead-lettered-at", PREFIX + "attempts", PREFIX + "omitted"
REDRIVEN = PREFIX + "redriven"  # which run of `redrive` has sent it last
SHOWN = 300  # characters of a reason in messages to people
MOST_REASON = 4096  # characters of a reason in a header
KIND = 100  # characters of a reason in counts
ALONE = re.compile(r"(?<![\w.])\d+(?![\w.])")  # a number that is a word: a byte, a size; not a schema's version


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """Why one message of a batch is a dead letter. stack: digest of where the program failed, if it did."""

    place: int
    reason: str
    status: str = "error"
    stack: str = ""


def stack_digest(error: BaseException) -> str:
    """The same for the same failure at the same place, whatever the alert: for counting."""
    frames = [f"{frame.filename}:{frame.name}:{frame.lineno}" for frame in traceback.extract_tb(error.__traceback__)]
    return hashlib.sha256("\n".join([type(error).__name__, *frames]).encode()).hexdigest()[:16]


def kind_of(reason: str) -> str:
    """A reason without what differs from alert to alert, for counting."""
    return ALONE.sub("N", reason.split(":")[0])[:KIND].encode(errors="replace").decode()


def text_of(value: str | bytes | None) -> str:
    """A header's value as text."""
    return value.decode(errors="replace") if isinstance(value, bytes) else value or ""


def position_headers(message: Message) -> Headers:
    """Where a message was read."""
    (topic, partition), offset = place_of(message)
    return [(TOPIC, topic.encode()), (PARTITION, b"%d" % partition), (OFFSET, b"%d" % offset)]


def headers_of(message: Message) -> Headers:
    found = message.headers() or []
    return list(found.items()) if isinstance(found, dict) else list(found)


def attempts(headers: Headers) -> int:
    """How often it was a dead letter before."""
    text = text_of(dict(headers).get(ATTEMPTS))
    return int(text) if text.isdigit() else 0


def outgoing(letter: DeadLetter, message: Message, topic: str) -> Outgoing:
    """The dead letter as a message: the same key and bytes, the headers that it had, and ours."""
    value = message.value()
    before = headers_of(message)
    headers: Headers = [
        *((name, content) for name, content in before if not name.startswith(PREFIX) or name == REDRIVEN),
        *position_headers(message), (REASON, letter.reason[:MOST_REASON].encode(errors="replace")),
        (STATUS, letter.status.encode()), (WHEN, b"%d" % int(time.time() * 1000)),
        (ATTEMPTS, b"%d" % (attempts(before) + 1)),
    ]  # fmt: skip
    if value is not None and value[:1] == WIRE_MAGIC and len(value) >= WIRE_HEADER.size:
        headers.append((SCHEMA_ID, b"%d" % WIRE_HEADER.unpack(value[: WIRE_HEADER.size])[1]))
    if letter.stack:
        headers.append((STACK, letter.stack.encode()))
    return Outgoing(topic, value, headers, letter.place, message.key())


def without_content(message: Outgoing, refusal: str) -> Outgoing:
    """A dead letter that no broker takes, without the bytes, key and headers of its alert: ours say where those are."""
    ours: Headers = [(name, content) for name, content in message.headers if name.startswith(PREFIX)]
    if message.value is None and len(ours) == len(message.headers):
        raise EdgekitError(f"a dead letter cannot be sent: {refusal}; raise the broker's limits")
    omitted = f"{len(message.value or b'')} bytes, as the letter cannot be sent with them: {refusal}"
    named = dict(ours)
    where = [text_of(named.get(name)) for name in (TOPIC, PARTITION, OFFSET)]
    LOG.warning("the dead letter for %s[%s] at %s goes without its %s", *where, omitted)
    return Outgoing(message.topic, None, [*ours, (OMITTED, omitted.encode())], message.place)


class DeadLetterLimits:
    """Counts dead letters among the last alerts, in the order in which they came."""

    def __init__(self, config: DeadLetters) -> None:
        self._config = config
        self._window: deque[bool] = deque(maxlen=config.window)
        self._dead = self._row = 0

    def check(self, letters: Sequence[DeadLetter], count: int) -> None:
        """A batch of `count` alerts with these dead letters; raise where that is too many."""
        dead = {letter.place: letter for letter in letters}
        for place in range(count):
            is_dead = place in dead
            if len(self._window) == self._window.maxlen:
                self._dead -= self._window[0]
            self._window.append(is_dead)
            self._dead += is_dead
            self._row = self._row + 1 if is_dead else 0
            if self._row >= self._config.max_consecutive:
                self._stop(f"{self._row} alerts in a row are dead letters", dead[place])
            full = len(self._window) == self._window.maxlen
            if is_dead and full and self._dead > self._config.max_ratio * len(self._window):
                self._stop(f"{self._dead} of the last {len(self._window)} alerts are dead letters", dead[place])

    def _stop(self, what: str, last: DeadLetter) -> None:
        raise EdgekitError(
            f"stopped, as {what} (allowed: {self._config.max_consecutive} in a row, {self._config.max_ratio:.0%} of "
            f"{self._config.window}); the last: {last.reason[:SHOWN]}; this batch is not committed: find the cause, "
            "and start again, or raise dead_letters.max_ratio and dead_letters.max_consecutive"
        )
