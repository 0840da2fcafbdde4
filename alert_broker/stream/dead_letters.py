"""Dead letters: a message that cannot be processed is sent to a topic of its own, unchanged, with headers that say why
and where it was read, so that it can be sent again. Too many dead letters stop the consumer, because then the fault
is not in the alerts.

A dead letter over the size limit is stored without its payload, and the header `edgekit.omitted` says so; `redrive`
re-reads the payload from the original topic, partition and offset, which other headers hold.
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
from operator import methodcaller

import numpy as np
import numpy.typing as npt
from confluent_kafka import Message

from alert_broker.containers import WIRE_HEADER, WIRE_MAGIC
from alert_broker.stream.config import DeadLetters
from alert_broker.stream.message_batch import position_of
from alert_broker.stream.sender import Headers, Outgoing
from edgekit.errors import EdgekitError

LOG = logging.getLogger("edgekit.stream")
PREFIX = "edgekit."  # of the names of the headers that edgekit adds
REASON, STATUS, SCHEMA_ID, STACK = (PREFIX + name for name in ("reason", "status", "schema-id", "stack"))
TOPIC, PARTITION, OFFSET = (PREFIX + name for name in ("topic", "partition", "offset"))
WHEN, ATTEMPTS, OMITTED = PREFIX + "dead-lettered-at", PREFIX + "attempts", PREFIX + "omitted"
REDRIVEN = PREFIX + "redriven"  # the run of `redrive` that sent the message last
UNREADABLE = "unreadable"  # status of a dead letter whose message the broker's client cannot read
SHOWN = 300  # characters of a reason in messages to people
MOST_REASON = 4096  # characters of a reason in a header
LONGEST_CATEGORY = 100  # characters
COUNT = re.compile("[0-9]{1,9}")
# a number on its own, such as a byte or a size, which is not part of a schema's version
ALONE = re.compile(r"(?<![\w.])\d+(?![\w.])")
_headers = methodcaller("headers")


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """The reason for which one message of a batch is a dead letter. index: the message's index in the batch; stack: a
    digest of the stack trace if the program failed, else empty."""

    index: int
    reason: str
    status: str = "error"
    stack: str = ""


def stack_digest(error: BaseException) -> str:
    """Return a digest that is equal for equal stack traces, whatever the alert, so that failures can be counted."""
    frames = [f"{frame.filename}:{frame.name}:{frame.lineno}" for frame in traceback.extract_tb(error.__traceback__)]
    return hashlib.sha256("\n".join([type(error).__name__, *frames]).encode()).hexdigest()[:16]


def category_of(reason: str) -> str:
    """Return the reason without the numbers and details that differ from alert to alert, so that reasons can be
    counted."""
    return ALONE.sub("N", reason.split(":")[0])[:LONGEST_CATEGORY].encode(errors="replace").decode()


def text_of(value: str | bytes | None) -> str:
    """Return the value of a header as text."""
    return value.decode(errors="replace") if isinstance(value, bytes) else value or ""


def position_headers(message: Message) -> Headers:
    """Return headers that say where a message was read: topic, partition and offset."""
    (topic, partition), offset = position_of(message)
    return [(TOPIC, topic.encode()), (PARTITION, b"%d" % partition), (OFFSET, b"%d" % offset)]


class UnreadableHeadersError(Exception):
    """The headers of a message cannot be read: the name of one is not UTF-8."""


def headers_of(message: Message) -> Headers:
    """Return the headers of a message. Call it once for each message.

    If the name of a header is not UTF-8, the binding returns a list that holds a null pointer, and leaves an error
    behind. The interpreter looks for such an error after a call through `methodcaller`. After a plain call of the
    method it may not look, and the null pointer crashes the process. A second call leaves no error behind.
    """
    try:
        found = _headers(message) or []
    except Exception as error:  # UnicodeDecodeError or SystemError, by version of the binding and of Python
        cause = error.__cause__ or error
        raise UnreadableHeadersError(f"{type(cause).__name__}: {cause}") from error
    return list(found.items()) if isinstance(found, dict) else list(found)


def attempts(headers: Headers) -> int:
    """Return how often the message was a dead letter before. The header may hold anything, because any producer can
    write it."""
    text = text_of(dict(headers).get(ATTEMPTS))
    return int(text) if COUNT.fullmatch(text) else 0


def _our_headers(dead_letter: DeadLetter, message: Message, attempt: int) -> Headers:
    headers = position_headers(message)
    headers += [
        (REASON, dead_letter.reason[:MOST_REASON].encode(errors="replace")),
        (STATUS, dead_letter.status.encode()),
        (WHEN, b"%d" % int(time.time() * 1000)),
        (ATTEMPTS, b"%d" % attempt),
    ]
    return headers


def outgoing(dead_letter: DeadLetter, message: Message, topic: str) -> Outgoing:
    """Return the dead letter as a message. It has the key, the payload and the headers of the alert, and headers of
    edgekit. If the message cannot be copied, the dead letter has only the headers of edgekit, which say where the
    message can be read again."""
    try:
        return _whole(dead_letter, message, topic)
    except Exception as error:
        (name, partition), offset = position_of(message)
        LOG.warning("the message at %s[%d], offset %d, cannot be copied: %r", name, partition, offset, error)
        omitted = f"the message, because it cannot be copied ({type(error).__name__}: {error})"
        headers = _our_headers(dead_letter, message, 1)
        headers.append((OMITTED, omitted[:MOST_REASON].encode(errors="replace")))
        return Outgoing(topic, None, headers, dead_letter.index)


def _whole(dead_letter: DeadLetter, message: Message, topic: str) -> Outgoing:
    value = message.value()
    before = headers_of(message)
    if dead_letter.status == UNREADABLE:
        ours = _our_headers(dead_letter, message, 1)
        return Outgoing(topic, None, [*ours, (OMITTED, b"the record, because it cannot be read")], dead_letter.index)
    headers: Headers = [
        *((name, content) for name, content in before if not name.startswith(PREFIX) or name == REDRIVEN),
        *_our_headers(dead_letter, message, attempts(before) + 1),
    ]
    if value is not None and value[:1] == WIRE_MAGIC and len(value) >= WIRE_HEADER.size:
        headers.append((SCHEMA_ID, b"%d" % WIRE_HEADER.unpack(value[: WIRE_HEADER.size])[1]))
    if dead_letter.stack:
        headers.append((STACK, dead_letter.stack.encode()))
    return Outgoing(topic, value, headers, dead_letter.index, message.key())


def without_content(message: Outgoing, refusal: str) -> Outgoing:
    """Return a dead letter that the broker refuses, without the payload, the key and the headers of the alert. The
    headers of edgekit say where the alert can be read again."""
    ours: Headers = [(name, content) for name, content in message.headers if name.startswith(PREFIX)]
    if message.value is None and len(ours) == len(message.headers):
        raise EdgekitError(
            f"a dead letter cannot be sent even without its payload: {refusal}; raise the broker's limits, such as "
            "message.max.bytes"
        )
    omitted = f"{len(message.value or b'')} bytes, because the broker refuses the dead letter with them: {refusal}"
    named = dict(ours)
    where = [text_of(named.get(name)) for name in (TOPIC, PARTITION, OFFSET)]
    LOG.warning("the dead letter for the message at %s[%s], offset %s, is sent without its %s", *where, omitted)
    return Outgoing(message.topic, None, [*ours, (OMITTED, omitted.encode())], message.alert_index)


class DeadLetterLimits:
    """Counts the dead letters among the last alerts, in the order in which the alerts came."""

    def __init__(self, config: DeadLetters) -> None:
        self._config = config
        self._window: deque[bool] = deque(maxlen=config.window)
        self._dead = self._row = 0

    def check(self, dead_letters: Sequence[DeadLetter], owned: npt.NDArray[np.bool_]) -> None:
        """Count the dead letters of a batch; raise if there are too many. owned: (messages,) whether this member still
        owns the partition of each message; the others do not count, as their next owner counts them. Unreadable
        messages do not count either: one batch of a producer may hold any number of them."""
        dead = {dead_letter.index: dead_letter for dead_letter in dead_letters if dead_letter.status != UNREADABLE}
        for index in np.flatnonzero(owned).tolist():
            is_dead = index in dead
            if len(self._window) == self._window.maxlen:
                self._dead -= self._window[0]
            self._window.append(is_dead)
            self._dead += is_dead
            self._row = self._row + 1 if is_dead else 0
            if self._row >= self._config.max_consecutive:
                self._stop(f"{self._row} alerts in a row are dead letters", dead[index])
            full = len(self._window) == self._window.maxlen
            if is_dead and full and self._dead > self._config.max_ratio * len(self._window):
                self._stop(f"{self._dead} of the last {len(self._window)} alerts are dead letters", dead[index])

    def _stop(self, what: str, last: DeadLetter) -> None:
        raise EdgekitError(
            f"the consumer stopped, because {what} (allowed: {self._config.max_consecutive} in a row, "
            f"{self._config.max_ratio:.0%} of {self._config.window}); the last one: {last.reason[:SHOWN]}; "
            "find the cause and start again, or raise dead_letters.max_ratio or dead_letters.max_consecutive; what was "
            "not committed is read again"
        )
