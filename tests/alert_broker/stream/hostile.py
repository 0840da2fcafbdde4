"""Hostile messages, and the stages of the pipeline without a broker, which must give each of them one outcome."""

from __future__ import annotations

import ctypes
import random
from collections.abc import Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any

import numpy as np
from confluent_kafka import Producer

from alert_broker.stream import pipeline as module
from alert_broker.stream.config import Config
from alert_broker.stream.dead_letters import ATTEMPTS, OFFSET, PARTITION, REDRIVEN, TOPIC
from alert_broker.stream.in_flight import InFlight
from alert_broker.stream.message_batch import MessageBatch
from alert_broker.stream.pipeline import Pipeline
from alert_broker.stream.publication import Publication
from alert_broker.stream.sender import Outgoing
from alert_broker.stream.stats import Stats
from tests.brokers import _librdkafka, configure_topic

HOSTILE_COUNTS = ("²", "9" * 5000, "-1", "٣", "1e9", "", "nan", "0x10", " 1")
NOT_UTF_8 = b"\xff\xfe"  # the name of a header; the binding cannot read it
LARGEST = 2**63 - 1


@dataclass(frozen=True)
class Hostile:
    """A message as a producer sends it. headers: raw names, which need not be UTF-8."""

    value: bytes | None
    key: bytes | None = None
    headers: tuple[tuple[bytes, bytes | None], ...] = ()
    timestamp: int = 0


def damaged(rng: random.Random, packet: bytes) -> bytes | None:
    """The packet with some damage, or something else altogether."""
    data = bytearray(packet)
    choice = rng.randrange(9)
    if choice == 0:
        return None
    if choice == 1:
        return rng.randbytes(rng.randrange(200))
    if choice == 2:
        return b"\x00" + rng.randrange(2**32).to_bytes(4, "big") + packet[:2000]
    if choice == 3:
        return bytes(data[: rng.randrange(len(data))])
    if choice == 4:
        return b"Obj\x01" + rng.randbytes(rng.randrange(400))
    for _ in range(rng.randrange(1, 9)):
        at = rng.randrange(len(data))
        if choice == 5:
            data[at] ^= 1 << rng.randrange(8)
        elif choice == 6:
            del data[at : at + rng.randrange(1, 20)]
        elif choice == 7:
            data[at:at] = rng.choice((b"\xff" * 12, b"\x80" * 10, bytes(30), rng.randbytes(5)))
        else:
            data[at : at + 4] = rng.randbytes(4)
        if not data:
            break
    return bytes(data)


def hostile(rng: random.Random, packet: bytes) -> Hostile:
    """One hostile message: something in its value, key, headers or timestamp is not as it should be."""
    headers: list[tuple[bytes, bytes | None]] = []
    for _ in range(rng.choice((0, 0, 1, 3))):
        count = rng.choice(HOSTILE_COUNTS).encode()
        headers.append(
            rng.choice(
                (
                    (ATTEMPTS.encode(), count),
                    (NOT_UTF_8 + rng.randbytes(3).replace(b"\0", b""), b"x"),
                    (TOPIC.encode(), b"__consumer_offsets"),
                    (PARTITION.encode(), count),
                    (OFFSET.encode(), b"-7"),
                    (REDRIVEN.encode(), None),
                    ("😈\x1b[2J".encode(), rng.randbytes(40)),
                    (b"", None),
                    (b"large", bytes(20_000)),
                )
            )
        )
    value = damaged(rng, packet) if rng.random() < 0.8 else packet
    key = rng.choice((None, b"", rng.randbytes(12), b"\x1b]0;x\x07", bytes(5000)))
    return Hostile(value, key, tuple(headers), rng.choice((0, 1, LARGEST, -1, -(2**63), 1_790_000_000_000)))


class FakeMessage:
    """What the binding gives for a message, its faults included: see `headers_of`."""

    def __init__(self, hostile: Hostile, offset: int) -> None:
        self._hostile, self._offset, self._asked = hostile, offset, False

    def __len__(self) -> int:
        return len(self._hostile.value or b"")

    def value(self) -> bytes | None:
        return self._hostile.value or None

    def key(self) -> bytes | None:
        return self._hostile.key

    def headers(self) -> list[tuple[str, bytes | None]] | None:
        assert not self._asked, "the second call gives a null pointer, which crashes the process"
        self._asked = True
        return [(name.decode(), content) for name, content in self._hostile.headers] or None

    def timestamp(self) -> tuple[int, int]:
        return 1, self._hostile.timestamp

    def topic(self) -> str:
        return "source"

    def partition(self) -> int:
        return 0

    def offset(self) -> int:
        return self._offset

    def error(self) -> None:
        return None


class InMemory:
    """The stages of a pipeline, one after another, between a fake source and a producer that is never connected."""

    def __init__(self, config: Config, monkeypatch: Any) -> None:
        self.sent: list[Outgoing] = []
        self._producer = Producer({"bootstrap.servers": "127.0.0.1:1", "log_level": 0})
        monkeypatch.setattr(module, "Source", _FakeSource)
        monkeypatch.setattr(module, "open_publisher", lambda config, membership, budget: self)
        self.stats = Stats()
        self.pipeline = Pipeline(config, self.stats)

    def make_room(self) -> None:
        pass

    def publish(self, publication: Publication) -> None:
        for message in publication.messages:  # raises for what it cannot send
            self._producer.produce(message.topic, message.value, message.key, headers=message.headers)
        self._producer.purge()
        self._producer.poll(0)
        self.sent += publication.messages
        publication.account(np.ones(len(publication.batch), np.bool_))

    def run(self, hostiles: Sequence[Hostile]) -> list[tuple[str, int]]:
        """(topic, offset) of each result and dead letter of these messages, as one batch."""
        self.sent.clear()
        offsets = np.arange(len(hostiles))
        messages = [FakeMessage(item, k) for k, item in enumerate(hostiles)]
        where = (("source", 0),)
        batch = MessageBatch(messages, where, (1,), np.zeros(len(hostiles), np.int64), offsets, 0.0)  # type: ignore[arg-type]
        self.stats.ledger.add(where[0], consumed=len(batch))
        work = InFlight(batch)
        self.pipeline.stages.decode(work)
        self.pipeline.stages.classify(work)
        self.pipeline._publish(work)
        self.stats.ledger.check()
        return [(message.topic, int(str(dict(message.headers)[OFFSET], "ascii"))) for message in self.sent]  # type: ignore[arg-type]


class _FakeSource:
    def __init__(self, config: Config, stats: Stats) -> None:
        self.membership = _FakeMembership()


class _FakeMembership:
    def __init__(self) -> None:
        self.publishing = Lock()

    def owned(self, batch: MessageBatch) -> Any:
        return np.ones(len(batch), np.bool_)


def keep_all(address: str, topic: str) -> None:
    """Have the broker keep messages of any timestamp. Apache Kafka refuses those of tomorrow, and deletes those of last
    week at once."""
    settings = {"retention.ms": "-1", "retention.bytes": "-1", "message.timestamp.after.max.ms": str(LARGEST)}
    configure_topic(address, topic, settings)


class RawProducer:
    """librdkafka without the binding, which sends header names that are not UTF-8, and any timestamp."""

    TOPIC, PARTITION, VALUE, KEY, FLAGS, TIMESTAMP, HEADERS, COPY = 1, 3, 4, 5, 7, 8, 10, 2

    def __init__(self, address: str) -> None:
        self._library = library = _librdkafka()
        pointer, text, size = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_ssize_t
        library.rd_kafka_headers_new.restype = pointer
        library.rd_kafka_headers_new.argtypes = [size]
        library.rd_kafka_header_add.argtypes = [pointer, text, size, text, size]
        library.rd_kafka_conf_set.argtypes = [pointer, text, text, text, size]
        library.rd_kafka_flush.argtypes = [pointer, ctypes.c_int]
        library.rd_kafka_poll.argtypes = [pointer, ctypes.c_int]
        configuration, error = library.rd_kafka_conf_new(), ctypes.create_string_buffer(512)
        for name, value in (("bootstrap.servers", address), ("linger.ms", "20"), ("message.max.bytes", "8388608")):
            assert library.rd_kafka_conf_set(configuration, name.encode(), value.encode(), error, 512) == 0, error.value
        self._client = library.rd_kafka_new(0, configuration, error, 512)
        assert self._client, error.value

    def send(self, topic: str, partition: int, message: Hostile) -> None:
        library, number, pointer = self._library, ctypes.c_int, ctypes.c_void_p
        headers = library.rd_kafka_headers_new(len(message.headers))
        for name, content in message.headers:
            size = -1 if content is None else len(content)
            assert library.rd_kafka_header_add(headers, name, len(name), content, size) == 0
        value, key = message.value, message.key
        arguments = (
            number(self.TOPIC), ctypes.c_char_p(topic.encode()), number(self.PARTITION), ctypes.c_int32(partition),
            number(self.VALUE), ctypes.c_char_p(value), ctypes.c_size_t(len(value or b"")),
            number(self.KEY), ctypes.c_char_p(key), ctypes.c_size_t(len(key or b"")),
            number(self.FLAGS), number(self.COPY), number(self.TIMESTAMP), ctypes.c_int64(message.timestamp),
            number(self.HEADERS), pointer(headers), number(0),
        )  # fmt: skip
        while (error := library.rd_kafka_producev(pointer(self._client), *arguments)) == -184:  # the queue is full
            library.rd_kafka_poll(self._client, 100)
        assert error == 0, error
        library.rd_kafka_poll(self._client, 0)

    def flush(self) -> None:
        assert self._library.rd_kafka_flush(self._client, 60_000) == 0

    def close(self) -> None:
        self._library.rd_kafka_destroy(self._client)
