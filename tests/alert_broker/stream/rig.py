"""A broker, topics of a test's own on it, and the pipeline between them, here or in a process that can be killed."""

from __future__ import annotations

import atexit
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import tomli_w
from confluent_kafka import Consumer, KafkaError, Message, Producer, TopicPartition

from alert_broker.containers import header_end
from alert_broker.stream import config as configuration
from alert_broker.stream.clients import partitions_of
from alert_broker.stream.config import Config
from alert_broker.stream.dead_letters import OFFSET, PARTITION, TOPIC, headers_of
from alert_broker.stream.run import run
from alert_broker.stream.stats import Stats
from tests.brokers import create_topics

EDGEKIT = [sys.executable, "-c", "from edgekit.cli import main; main()"]
READ_SECONDS = 60.0
START_SECONDS = 300.0  # for a process to join the group; the first one compiles kernels, on a busy machine for minutes

Position = tuple[str, int, int]


@dataclass
class Rig:
    """Topics `source`, `results` and `dead` of one test. settings: of librdkafka, for this kind of broker.
    copies: of each topic, on as many nodes."""

    address: str
    settings: dict[str, object]
    folder: Path
    bundle: Path
    partitions: int = 3
    copies: int = 1
    name: str = field(default_factory=lambda: uuid.uuid4().hex[:8])

    def __post_init__(self):
        self.source, self.results, self.dead = (f"{self.name}-{kind}" for kind in ("source", "results", "dead"))
        create_topics(self.address, {self.source: self.partitions, self.results: 2, self.dead: 1}, copies=self.copies)

    @property
    def kafka(self) -> dict[str, object]:
        return {"bootstrap.servers": self.address, **self.settings}

    def tables(self, **changes: dict[str, object]) -> dict[str, object]:
        """The configuration as TOML has it; changes go over it, table by table."""
        tables: dict[str, object] = {
            "source": {"topics": [self.source], "group": self.name, "until_eos": True, "drain_seconds": 5.0},
            "batch": {"size": 50},
            "model": {"bundle": str(self.bundle)},
            "output": [{"topic": self.results, "format": "json"}],
            "dead_letters": {"topic": self.dead},
            "publish": {"seconds": 20.0},
            "kafka": self.kafka,
        }
        for name, table in changes.items():
            tables[name] = {**tables.get(name, {}), **table} if isinstance(table, dict) else table
        return tables

    def config(self, **changes) -> Config:
        return configuration.parse(self.tables(**changes), "test").check()

    def consume(self, stop=lambda: False, **changes) -> Stats:
        """Run the pipeline in this process, to the end by default."""
        stats = Stats()
        run(self.config(**changes), stats, stop)
        return stats

    @contextmanager
    def running(self, stats: Stats, **changes) -> Iterator[None]:
        """The pipeline in a thread, until the block ends; what it raises is raised here."""
        ended, failed = threading.Event(), []

        def work():
            try:
                run(self.config(source={"until_eos": False}, **changes), stats, ended.is_set)
            except BaseException as error:
                failed.append(error)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join(60)
        assert not thread.is_alive()
        for error in failed:
            raise error

    def start(self, **changes) -> Running:
        """Run the command in a process of its own."""
        path = self.folder / f"{uuid.uuid4().hex[:8]}.toml"
        path.write_text(tomli_w.dumps(self.tables(**changes)))
        return Running(path)

    def send(self, values: Iterable[bytes], topic: str = "", headers=None, spread: int = 0) -> int:
        """spread: messages to a batch of the producer; the embedded broker counts the last of each partition only."""
        producer = Producer(
            {
                "bootstrap.servers": self.address,
                "enable.idempotence": True,
                "linger.ms": 5,
                "message.max.bytes": 8_388_608,
                "batch.num.messages": spread or 10_000,
            }
        )
        failed = []
        partition = itertools.cycle(range(self.partitions))
        count = 0
        for value in values:
            producer.produce(
                topic or self.source,
                value,
                partition=next(partition),
                headers=headers,
                on_delivery=lambda error, _: failed.append(error) if error else None,
            )
            producer.poll(0)
            count += 1
        assert producer.flush(60) == 0
        assert not failed
        return count

    def read(self, topic: str, isolation: str = "read_committed") -> list[Message]:
        """All that is in a topic."""
        consumer = Consumer({
            **self.kafka, "group.id": f"reader-{uuid.uuid4().hex}", "enable.partition.eof": True,
            "isolation.level": isolation, "enable.auto.commit": False, "fetch.wait.max.ms": 200,
        })  # fmt: skip
        try:
            left = set(partitions_of(consumer, topic))
            consumer.assign([TopicPartition(topic, number, 0) for number in left])
            found: list[Message] = []
            deadline = time.monotonic() + READ_SECONDS
            while left:
                assert time.monotonic() < deadline, f"{topic} has no end"
                for message in consumer.consume(500, 0.2):
                    if message.error() is None:
                        found.append(message)
                    elif message.error().code() == KafkaError._PARTITION_EOF:
                        left.discard(message.partition())
                    else:
                        raise AssertionError(message.error())
            return found
        finally:
            consumer.close()

    def outcome(self, sent: int, isolation: str = "read_committed") -> Outcome:
        """What became of so many messages in the source topic."""
        results, dead = self.read(self.results, isolation), self.read(self.dead, isolation)
        seen = Counter(position(message) for message in (*results, *dead))
        return Outcome(sent - len(seen), seen.total() - len(seen), len(results), len(dead), results, dead)


@dataclass
class Outcome:
    lost: int
    duplicates: int
    results: int
    dead: int
    result_messages: list[Message]
    dead_messages: list[Message]


class Running:
    """`edgekit alerts consume` in a process."""

    def __init__(self, path: Path):
        self.process = subprocess.Popen(
            [*EDGEKIT, "alerts", "consume", "--config", str(path), "--json"], stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        atexit.register(self.process.kill)  # a test that fails leaves none behind
        self._log: list[str] = []
        self.assigned = threading.Event()  # it has partitions
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self._log.append(line)
            if '"assigned ' in line:
                self.assigned.set()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def suspend(self) -> None:
        self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def send_signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    @property
    def running(self) -> bool:
        return self.process.poll() is None

    @property
    def log(self) -> list[str]:
        """The lines so far."""
        return list(self._log)

    @property
    def memory(self) -> int:
        """The bytes that are resident; 0 if the process has ended."""
        try:
            pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        except OSError:
            return 0
        return pages * os.sysconf("SC_PAGE_SIZE")

    def wait(self, seconds: float = 120.0) -> tuple[int, dict, str]:
        """Exit status, the report and the log."""
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise AssertionError(f"the consumer does not end; its log:\n{''.join(self._log[-30:])}") from None
        assert self.process.stdout is not None
        out = self.process.stdout.read()  # a page: the pipe holds it
        self._reader.join()
        return self.process.returncode, json.loads(out) if out else {}, "".join(self._log)


def position(message: Message) -> Position:
    """Where the alert behind a result or a dead letter was read."""
    headers = dict(headers_of(message))
    return headers[TOPIC].decode(), int(headers[PARTITION]), int(headers[OFFSET])


def datum_of(packet: bytes) -> bytes:
    """The Avro data of a container of one packet."""
    rest, at = packet[header_end(packet) :], 1  # the count of 1 is one byte
    while rest[at] & 0x80:
        at += 1
    return rest[at + 1 : -16]


def repeat(values: Sequence[bytes], count: int) -> list[bytes]:
    return list(itertools.islice(itertools.cycle(values), count))
