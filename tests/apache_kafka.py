"""A real Apache Kafka for tests and benchmarks: one node or three, plain or secured, restarted with its data.

`EDGEKIT_KAFKA_HOME` names the unpacked official distribution, or any folder with its jars in `libs/`. Java 17 or newer
must be on the path. A node needs some three seconds and 400 MB of memory. This broker is not for production: it listens
on the loopback address only, and `INTERNAL` lets everybody do everything.
"""

from __future__ import annotations

import base64
import os
import shutil
import signal
import subprocess
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from confluent_kafka import KafkaException
from confluent_kafka.admin import (
    AclBinding,
    AclBindingFilter,
    AclOperation,
    AclPermissionType,
    ResourcePatternType,
    ResourceType,
)

from alert_broker.stream.clients import Admin
from edgekit.errors import EdgekitError
from tests.brokers import free_ports
from tests.certificates import Authority

HOME = "EDGEKIT_KAFKA_HOME"
START_SECONDS = 60.0
STEP = 0.05
SUPERUSER = "ANONYMOUS"  # whoever connects to INTERNAL


def missing() -> str:
    """Why no Apache Kafka can be started here; empty if one can."""
    home = os.environ.get(HOME, "")
    if not home:
        return f"{HOME} is not set; it names an unpacked Apache Kafka, see CONTRIBUTING.md"
    if not any(Path(home, "libs").glob("kafka*.jar")):
        return f"{HOME} is {home}, which has no libs/kafka*.jar; expected an unpacked Apache Kafka"
    if shutil.which("java") is None:
        return "no java on the path; Apache Kafka needs version 17 or newer"
    return ""


class ApacheKafka:
    """nodes: 1 or 3, each a broker and a controller. users: names and passwords; with any, clients come by SASL_SSL
    with SCRAM-SHA-512, and may do only what `allow` has granted them. authority: signs the nodes' certificates.
    environment: of the nodes' processes, beside ours."""

    def __init__(
        self,
        folder: Path,
        nodes: int = 1,
        users: Mapping[str, str] | None = None,
        authority: Authority | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        if reason := missing():
            raise EdgekitError(f"Apache Kafka cannot be started: {reason}")
        self.folder, self.users = folder, dict(users or {})
        self._environment = {**os.environ, **(environment or {})}
        self.authority = authority or (Authority(folder / "ca") if self.users else None)
        self._cluster = cluster_id()
        ports = free_ports(3 * nodes)
        self._ports = [tuple(ports[3 * k : 3 * k + 3]) for k in range(nodes)]  # clients, brokers, controllers
        self._processes: list[subprocess.Popen[bytes] | None] = [None] * nodes
        self._nodes = [folder / f"node-{number}" for number in range(1, nodes + 1)]
        for number, node in enumerate(self._nodes):
            node.mkdir(parents=True)
            (node / "node.properties").write_text(self._properties(number))
            if self.authority is not None:
                self.authority.sign(node / "node.pem")

    @property
    def address(self) -> str:
        """Where clients connect."""
        return ",".join(f"127.0.0.1:{clients}" for clients, _, _ in self._ports)

    @property
    def internal(self) -> str:
        """A plain listener without a password and without rules, for those who set the broker up."""
        return ",".join(f"127.0.0.1:{brokers}" for _, brokers, _ in self._ports)

    def settings(self, user: str = "") -> dict[str, str]:
        """librdkafka's settings for a client, as this user."""
        if not self.users:
            return {"bootstrap.servers": self.address}
        assert self.authority is not None
        return {
            "bootstrap.servers": self.address,
            "security.protocol": "SASL_SSL",
            "ssl.ca.location": str(self.authority.file),
            "sasl.mechanism": "SCRAM-SHA-512",
            "sasl.username": user,
            "sasl.password": self.users[user],
        }

    def allow(self, user: str, resource: ResourceType, name: str, *operations: AclOperation) -> None:
        """Grant these rights on a topic, a group or a transactional id, and wait until they are in force."""
        admin = Admin({"bootstrap.servers": self.internal})
        rules = [
            AclBinding(
                resource, name, ResourcePatternType.LITERAL, f"User:{user}", "*", operation, AclPermissionType.ALLOW
            )
            for operation in operations
        ]
        for future in admin.create_acls(rules).values():
            future.result(START_SECONDS)
        found = AclBindingFilter(
            resource, name, ResourcePatternType.LITERAL, f"User:{user}", "*", AclOperation.ANY, AclPermissionType.ANY
        )
        deadline = time.monotonic() + START_SECONDS
        while not set(rules) <= set(admin.describe_acls(found).result(START_SECONDS)):
            if time.monotonic() > deadline:
                raise EdgekitError(f"Apache Kafka does not apply the rules of {user} on {name}")
            time.sleep(STEP)

    def start(self) -> Self:
        for number in range(len(self._nodes)):
            self.start_node(number, wait=False)
        self.wait()
        return self

    def start_node(self, number: int, *, wait: bool = True) -> None:
        """Start a node, or start it again with the data that it had."""
        node = self._nodes[number]
        if not (self.data(number) / "meta.properties").exists():
            scram = [
                part
                for name, password in self.users.items()
                for part in ("--add-scram", f"SCRAM-SHA-512=[name={name},password={password}]")
            ]
            arguments = ["format", "-t", self._cluster, "-c", str(node / "node.properties"), *scram]
            done = subprocess.run(
                [*self._java("256m"), "kafka.tools.StorageTool", *arguments],
                capture_output=True,
                text=True,
                check=False,
            )
            if done.returncode:
                raise EdgekitError(f"Apache Kafka does not format its storage: {done.stderr.strip()[-500:]}")
        with (node / "log").open("ab") as log:
            self._processes[number] = subprocess.Popen(
                [*self._java("512m"), "kafka.Kafka", str(node / "node.properties")],
                env=self._environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        if wait:
            self.wait()

    def wait(self) -> None:
        """Until every node that was started is in the cluster."""
        running = [number for number, process in enumerate(self._processes) if process is not None]
        admin = Admin({"bootstrap.servers": self.internal, "log_level": 0, "socket.timeout.ms": 5000})
        deadline = time.monotonic() + START_SECONDS
        while True:
            for number in running:
                process = self._processes[number]
                assert process is not None
                if process.poll() is not None or time.monotonic() > deadline:
                    log = (self._nodes[number] / "log").read_text(errors="replace")
                    self.kill()
                    raise EdgekitError(f"node {number + 1} of Apache Kafka does not start: {log[-1000:]}")
            try:
                if {number + 1 for number in running} <= set(admin.list_topics(timeout=2.0).brokers):
                    return
            except KafkaException:
                pass
            time.sleep(STEP)

    def kill(self, number: int | None = None) -> None:
        """At once, as a crash: one node, or all. The data stays."""
        self._end(signal.SIGKILL, number)

    def stop(self, number: int | None = None) -> None:
        """In order: clients are told that the node goes."""
        self._end(signal.SIGTERM, number)

    def data(self, number: int) -> Path:
        """The folder in which a node keeps its messages."""
        return self._nodes[number] / "data"

    @property
    def pids(self) -> list[int]:
        """The processes of the nodes that were started."""
        return [process.pid for process in self._processes if process is not None]

    def running(self, number: int) -> bool:
        process = self._processes[number]
        return process is not None and process.poll() is None

    def leader(self, topic: str, partition: int = 0) -> int:
        """The index of the node that leads a partition."""
        admin = Admin({"bootstrap.servers": self.internal})
        return int(admin.list_topics(topic, timeout=START_SECONDS).topics[topic].partitions[partition].leader) - 1

    def _end(self, how: signal.Signals, number: int | None) -> None:
        for index in range(len(self._nodes)) if number is None else [number]:
            process = self._processes[index]
            if process is not None:
                process.send_signal(how)
                process.wait(START_SECONDS)
                self._processes[index] = None

    def _java(self, memory: str) -> list[str]:
        libraries = Path(os.environ[HOME]).resolve() / "libs" / "*"
        quiet = "-Dorg.slf4j.simpleLogger.defaultLogLevel=warn"
        return ["java", f"-Xmx{memory}", "-XX:TieredStopAtLevel=1", quiet, "-cp", str(libraries)]

    def _properties(self, number: int) -> str:
        clients, brokers, controllers = self._ports[number]
        node, count = self._nodes[number], len(self._nodes)
        copies = min(3, count)
        values = {
            "process.roles": "broker,controller",
            "node.id": number + 1,
            "controller.quorum.voters": ",".join(
                f"{k + 1}@127.0.0.1:{port}" for k, (_, _, port) in enumerate(self._ports)
            ),
            "listeners": f"CLIENTS://127.0.0.1:{clients},INTERNAL://127.0.0.1:{brokers},CONTROLLER://127.0.0.1:{controllers}",
            "advertised.listeners": f"CLIENTS://127.0.0.1:{clients},INTERNAL://127.0.0.1:{brokers}",
            "controller.listener.names": "CONTROLLER",
            "inter.broker.listener.name": "INTERNAL",
            "listener.security.protocol.map": "CONTROLLER:PLAINTEXT,INTERNAL:PLAINTEXT,CLIENTS:"
            + ("SASL_SSL" if self.users else "PLAINTEXT"),
            "log.dirs": self.data(number),
            "log.cleaner.backoff.ms": 500,
            "message.max.bytes": 8_388_608,  # an alert with ten thousand detections has 1.4 MB
            "log.retention.check.interval.ms": 1000,
            "offsets.topic.replication.factor": copies,
            "offsets.topic.num.partitions": 6,
            "transaction.state.log.replication.factor": copies,
            "transaction.state.log.num.partitions": 6,
            "transaction.state.log.min.isr": (copies + 1) // 2,
            "default.replication.factor": copies,
            "min.insync.replicas": (copies + 1) // 2,
            "broker.session.timeout.ms": 3000,
            "broker.heartbeat.interval.ms": 500,
            "group.initial.rebalance.delay.ms": 0,
            "group.min.session.timeout.ms": 1000,
            "group.consumer.min.session.timeout.ms": 1000,
            "group.consumer.session.timeout.ms": 6000,
            "group.consumer.heartbeat.interval.ms": 500,
            "group.consumer.min.heartbeat.interval.ms": 100,
            "auto.create.topics.enable": "false",
        }
        if self.users:
            values |= {
                "ssl.keystore.type": "PEM",
                "ssl.keystore.location": node / "node.pem",
                "sasl.enabled.mechanisms": "SCRAM-SHA-512",
                "listener.name.clients.scram-sha-512.sasl.jaas.config": (
                    "org.apache.kafka.common.security.scram.ScramLoginModule required;"
                ),
                "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
                "super.users": f"User:{SUPERUSER}",
            }
        return "".join(f"{name}={value}\n" for name, value in values.items())

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, error: object, traceback: TracebackType | None) -> None:
        self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)


def cluster_id() -> str:
    """A random id, which must not look like an option of the command that gets it."""
    while (text := base64.urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=")).startswith("-"):
        pass
    return text
