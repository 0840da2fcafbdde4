"""Send packets from files to a topic, one per message, at a given rate or as fast as the broker accepts them.

The content of a file is sent unchanged, whether it is damaged or not. A container of many packets is split into
containers of one packet, and Parquet into the packets that `tables` makes of it.
"""

from __future__ import annotations

import itertools
import tarfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from confluent_kafka import KafkaError, KafkaException, Message, Producer

from alert_broker import simulated_packets
from alert_broker.avro.columns import Columns
from alert_broker.containers import AVRO_MAGIC, WIRE_HEADER, Block, Schema, header_end, split
from alert_broker.packets import PARQUET_MAGIC, file_name, find_files
from alert_broker.simulate import SimulatedAlert
from alert_broker.stream.clients import reason_of, refusal_of
from alert_broker.stream.config import Secret
from alert_broker.stream.tables import container, table_packets
from edgekit.bundle.bounded import claim
from edgekit.errors import EdgekitError

TICK = 0.002  # seconds; messages that are due within a tick are sent together
FLUSH_SECONDS = 120.0


@dataclass(frozen=True, slots=True)
class Sent:
    """The counts of a replay. late: the longest delay of a message behind the given rate, in seconds."""

    messages: int
    bytes: int
    seconds: float
    late: float


def packets(paths: Iterable[str | Path], column: str = "") -> Iterator[bytes]:
    """Yield the packets in files, folders and tar archives, in order. column: the column of Parquet files that holds
    packets."""
    for path in find_files(paths):
        try:
            yield from _packets_of_file(path, column)
        except (OSError, tarfile.TarError) as error:
            reason = getattr(error, "strerror", None) or error
            raise EdgekitError(f"{file_name(path)} cannot be read: {reason}; repair it, or leave it out") from None


def _packets_of_file(path: Path, column: str) -> Iterator[bytes]:
    name = file_name(path)
    if tarfile.is_tarfile(path):
        with tarfile.open(path) as archive:
            for member in archive:
                content = archive.extractfile(member) if member.isfile() else None
                if content is not None:
                    claim(member.size, path.stat().st_size, f"{name}:{member.name}")
                    yield from single_packets(content.read(), f"{name}:{member.name}", column)
        return
    # pyarrow opens no file whose name is not UTF-8
    with path.open("rb") as stream:
        if stream.read(len(PARQUET_MAGIC)) == PARQUET_MAGIC:
            stream.seek(0)
            yield from table_packets(stream, name, column)
            return
    yield from single_packets(path.read_bytes(), name, column)


def single_packets(data: bytes, name: str, column: str = "") -> Iterator[bytes]:
    """Yield the packets of a file, one per message. If anything in an Avro file is wrong, the file is sent unchanged as
    one message."""
    if data[:4] == PARQUET_MAGIC:
        yield from table_packets(data, name, column)
        return
    if data[:4] != AVRO_MAGIC:
        yield data
        return
    blocks = list(split(data, name))
    found: list[tuple[Schema, bytes]] = []
    for block in blocks:
        if not isinstance(block, Block) or block.schema.plan is None:
            yield data
            return
        if block.count == 1:
            found.append((block.schema, bytes(block.data)))
            continue
        ends, fault = Columns(block.schema.plan).read(block.data, block.count)
        if fault is not None:
            yield data
            return
        starts = [0, *ends.tolist()]
        found += [(block.schema, bytes(block.data[start:end])) for start, end in itertools.pairwise(starts)]
    if len(found) == 1:
        yield data
        return
    header = _null_codec(data[: header_end(data)])
    for schema, datum in found:
        if schema.survey is not None and (number := schema.survey.schema_id(schema.name)) is not None:
            yield WIRE_HEADER.pack(0, number) + datum
        else:
            yield container(header, datum)


def simulated(alerts: Iterable[SimulatedAlert]) -> Iterator[bytes]:
    """Yield simulated alerts as the survey sends them."""
    for alert in alerts:
        yield simulated_packets.message(alert.survey, alert.packet)


def send(
    messages: Iterable[bytes],
    topic: str,
    settings: dict[str, Secret],
    *,
    rate: float = 0.0,
    progress: Callable[[int, int], None] = lambda count, size: None,
    stop: Callable[[], bool] = lambda: False,
) -> Sent:
    """Send messages at this many per second, or as fast as the broker accepts them if the rate is 0. Raises
    EdgekitError if the broker did not accept one. When `stop` returns true, the messages that were begun are
    finished."""
    failed: list[str] = []
    producer = _open_producer(settings, failed)
    started = time.monotonic()
    count = size = 0
    late = 0.0
    for message in messages:
        if stop() or failed:
            break
        if rate:
            due = started + count / rate
            while (wait := due - time.monotonic()) > TICK:
                producer.poll(min(wait - TICK, 0.05))
            late = max(late, -wait)
        if refusal := _produce(producer, topic, message):
            failed.append(f"packet {count + 1}, of {len(message)} bytes, cannot be sent: {refusal}")
            break
        count, size = count + 1, size + len(message)
        producer.poll(0)
        progress(count, size)
    left = producer.flush(FLUSH_SECONDS)
    if failed or left:
        raise EdgekitError(f"{topic}: {failed[0] if failed else f'the broker did not acknowledge {left} messages'}")
    return Sent(count, size, time.monotonic() - started, late)


def _open_producer(settings: dict[str, Secret], failed: list[str]) -> Producer:
    """Return a producer that adds the errors of its messages to `failed`."""

    def report(error: KafkaError | None, _: Message) -> None:
        if error is not None:
            failed.append(error.str())

    try:
        return Producer({
            "linger.ms": 5, "message.max.bytes": 8_388_608, "queue.buffering.max.kbytes": 65_536,
            "sticky.partitioning.linger.ms": 10, **settings, "enable.idempotence": True,
            "delivery.report.only.error": True, "on_delivery": report,
        })  # fmt: skip
    except (KafkaException, ValueError, TypeError) as error:
        raise EdgekitError(f"the producer cannot be configured: {refusal_of(error, settings)}") from None


def _produce(producer: Producer, topic: str, message: bytes) -> str:
    """Give a message to the producer, once its queue has room. Return the reason if it refuses the message, else ""."""
    while True:
        try:
            producer.produce(topic, message)
            return ""
        except BufferError:
            producer.poll(0.05)
        except KafkaException as error:
            return reason_of(error)


def _null_codec(header: bytes) -> bytes:
    """Return the container header for blocks that are not compressed."""
    key = b"\x14avro.codec"
    return header.replace(key + b"\x0edeflate", key + b"\x08null")
