"""The readers of the stream, for `fuzz_readers.py`: messages, a registry's answers, and `broker.toml`. None of them
needs a network.

Messages go through the stages of the stream, without a broker: decoding, classifying, routing, publishing. Something
in each message is not as it should be: its value, key, headers or timestamp (`tests/alert_broker/stream/hostile.py`).
Each message must have one outcome, a result in both outputs or one dead letter, and the producer must accept what is
sent. A file is the seed of a batch of messages.
"""

from __future__ import annotations

import functools
import http.client
import io
import json
import logging
import os
import random
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fuzz_changes import Files

BATCH = 64  # messages
URL, HOST = "http://registry.invalid:8081", "registry.invalid"
ROW = {
    "type": "record",
    "name": "row",
    "fields": [
        {"name": "jd", "type": "double"},
        {"name": "fid", "type": "int"},
        {"name": "magpsf", "type": "float"},
        {"name": "sigmapsf", "type": "float"},
        {"name": "isdiffpos", "type": "string"},
    ],
}
SCHEMA = {  # the least that is a ZTF alert
    "type": "record",
    "name": "ztf.alert",
    "fields": [
        {"name": "objectId", "type": "string"},
        {"name": "candid", "type": "long"},
        {"name": "candidate", "type": ROW},
        {"name": "prv_candidates", "type": ["null", {"type": "array", "items": "row"}]},
    ],
}
DETECTION = {"jd": 2_460_000.5, "fid": 1, "magpsf": 20.0, "sigmapsf": 0.1, "isdiffpos": "t"}
PACKET = {"objectId": "ZTF24aaaaaaa", "candid": 1, "candidate": DETECTION, "prv_candidates": [DETECTION]}
CONFIGURATION = """[source]
topics = ["ztf", "lsst"]
group = "g"
start_at = "2026-08-01T04:00:00Z"
drain_seconds = 20.0
[batch]
size = 512
bytes = 67108864
[model]
runtime = "auto"
threads = 2
[[output]]
topic = "kilonovae"
where = "best_class == 'KN' and best_probability > 0.8 or not n_dropped in [1, 2]"
format = "json"
[[output]]
topic = "all"
attach = "packet"
[dead_letters]
topic = "dead"
max_ratio = 0.5
[publish]
mode = "exactly-once"
transactional_id = "t"
[archive]
folder = "nights"
[registry]
url = "http://user:secret@registry:8081"
[metrics]
listen = "127.0.0.1:9108"
[kafka]
"bootstrap.servers" = "localhost:9092"
"security.protocol" = "SASL_SSL"
"sasl.password" = "env:HOME"
"""


@functools.cache
def _stages() -> tuple[Any, list[bytes]]:
    """The stages with a small model, two outputs and no limit of dead letters; and packets of two surveys."""
    import tempfile

    import pytest

    from alert_broker import simulated_packets
    from alert_broker.simulate import simulate
    from alert_broker.stream import config as configuration
    from edgekit.bundle.store import write_bundle
    from tests.alert_broker.small import small_bundle
    from tests.alert_broker.stream.hostile import InMemory

    logging.disable(logging.CRITICAL)  # the consumer logs why messages become dead letters
    folder = Path(tempfile.gettempdir()).parent
    tables = {
        "source": {"topics": ["source"]},
        "model": {"bundle": str(write_bundle(small_bundle(), folder / "small.edge").path), "reuse": "off"},
        "output": [{"topic": "results", "format": "json", "attach": "packet"}, {"topic": "avro"}],
        "dead_letters": {"topic": "dead", "max_ratio": 1.0, "max_consecutive": 10**9},
        "archive": {"folder": str(folder / "archive")},
        "kafka": {"bootstrap.servers": "127.0.0.1:1"},
    }
    stages = InMemory(configuration.parse(tables, "the fuzzer").check(), pytest.MonkeyPatch())
    alerts = ((survey, item.packet) for survey in ("ztf", "lsst") for item in simulate(survey, 20, 3))
    return stages, [simulated_packets.message(survey, packet) for survey, packet in alerts]


def drawn_seed(files: Files, rng: random.Random) -> Files:
    return {"seed": str(rng.getrandbits(48)).encode()}


def read_messages(path: Path) -> None:
    run_batch(*_stages(), int(path.read_bytes()))


def run_batch(stages: Any, packets: list[bytes], seed: int) -> None:
    """Run a batch through the stages, and count the outcomes of each message."""
    from edgekit.errors import EdgekitError
    from tests.alert_broker.stream.hostile import hostile

    rng = random.Random(seed)
    try:
        found = Counter(stages.run([hostile(rng, rng.choice(packets)) for _ in range(BATCH)]))
    except EdgekitError as error:
        raise AssertionError(f"the consumer ends: {error}") from error
    by_topic: dict[str, set[int]] = {"results": set(), "avro": set(), "dead": set()}
    for topic, offset in found:
        by_topic[topic].add(offset)
    results, dead = by_topic["results"], by_topic["dead"]
    whole = dead | results == set(range(BATCH)) and not dead & results and results == by_topic["avro"]
    if not whole or set(found.values()) != {1}:
        raise AssertionError("a message has no outcome or more than one")


class _Answered:
    """A connection whose other side has sent its answer already."""

    def __init__(self, answer: bytes) -> None:
        self._answer = answer

    def makefile(self, *_: Any, **__: Any) -> io.BytesIO:
        return io.BytesIO(self._answer)

    def __getattr__(self, name: str) -> Any:
        if name not in ("sendall", "close", "settimeout", "setsockopt", "shutdown"):
            raise AttributeError(name)
        return lambda *_: None


def answers() -> list[Files]:
    """Answers with a schema: whole, in chunks, and with an id; an answer that the registry has no such schema; a page
    of another server."""
    text = json.dumps({"schema": json.dumps(SCHEMA), "id": 7, "schemaType": "AVRO"}).encode()
    missing = b'{"error_code": 40403, "message": "Schema not found"}'
    head = b"HTTP/1.1 %s\r\nContent-Type: application/json\r\n"
    sized = head + b"Content-Length: %d\r\n\r\n%s"
    chunks = b"".join(
        b"%x\r\n%s\r\n" % (len(text[at : at + 300]), text[at : at + 300]) for at in range(0, len(text), 300)
    )
    made = [
        sized % (b"200 OK", len(text), text),
        head % b"200 OK" + b"Transfer-Encoding: chunked\r\n\r\n" + chunks + b"0\r\n\r\n",
        sized % (b"404 Not Found", len(missing), missing),
        head % b"302 Found" + b"Location: http://elsewhere.invalid/\r\n\r\n",
        b"HTTP/1.0 200 OK\r\n\r\n<html></html>",
    ]
    return [{"answer": answer} for answer in made]


@functools.cache
def _datum() -> bytes:
    import fastavro

    stream = io.BytesIO()
    fastavro.schemaless_writer(stream, fastavro.parse_schema(SCHEMA), PACKET)
    return b"\0\0\0\0\x07" + stream.getvalue()


def read_answer(path: Path) -> None:
    """Decode a message whose schema is in the registry, and register a schema of ours. The registry gives the same
    answer to every request."""
    os.environ["no_proxy"] = "*"
    logging.disable(logging.CRITICAL)
    from alert_broker import containers, packets
    from alert_broker.stream.registry import RegistryError, open_registry
    from edgekit.errors import EdgekitError

    answer = path.read_bytes()

    def connect(connection: http.client.HTTPConnection) -> None:
        if connection.host != HOST:
            raise AssertionError(f"it connects to {connection.host}, not to the registry")
        connection.sock = _Answered(answer)  # type: ignore[assignment]

    http.client.HTTPConnection.connect = connect  # type: ignore[method-assign]
    client = open_registry(URL, user="user", password="secret", sleep=lambda seconds: None)
    try:
        item = containers.message(_datum(), 0, client.schema)
        bad = [found for found in packets.batches([item]) if isinstance(found, containers.BadPacket)]
        client.register("all-value", "{}")
    except RegistryError as error:
        client.blames(error)  # type: ignore[attr-defined]
        raise
    if bad:
        raise EdgekitError(bad[0].reason)


def configurations() -> list[Files]:
    return [{"broker.toml": CONFIGURATION.encode()}]


class _Consumer:
    """Gives the offsets for times, as the broker of an empty topic does."""

    def offsets_for_times(self, asked: list[Any], timeout: float) -> list[Any]:
        return asked

    def get_watermark_offsets(self, partition: Any, timeout: float) -> tuple[int, int]:
        return 0, 0


def read_configuration(path: Path) -> None:
    """All that `edgekit alerts consume --config` reads in the file before it connects."""
    import pyarrow as pa
    from confluent_kafka import TopicPartition

    from alert_broker.results import result_schema
    from alert_broker.stream import config as configuration
    from alert_broker.stream.registry import open_registry
    from alert_broker.stream.routing import Route, Router
    from alert_broker.stream.start import start_positions

    config = configuration.load(path)
    repr(config), config.kafka_settings(), config.transactional_id()
    if url := config.registry_url():
        open_registry(url, seconds=config.registry.seconds)
    if config.source.start_at not in ("earliest", "latest"):
        start_positions(config.source.start_at, [TopicPartition("ztf", 0)], _Consumer())  # type: ignore[arg-type]
    if config.output:
        schema = result_schema(("KN", "SNIa"))
        routes = [Route(item.topic, item.where, item.format, item.attach) for item in config.output]
        for chosen in Router(routes, schema).filters.values():
            chosen(pa.RecordBatch.from_pylist([], schema))
