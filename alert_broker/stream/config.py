"""The configuration of a consumer: `broker.toml`, with one dataclass for each table. Unknown names are errors.

`[kafka]` is passed to librdkafka unchanged, including the settings of SASL and TLS. Its values are never shown. A value
that begins with `env:` is read from the environment, so that the file need not contain a secret.
"""

from __future__ import annotations

import os
import tomllib
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from edgekit.errors import EdgekitError, unknown
from edgekit.settings import from_table, read_toml

Secret = str | int | float | bool
OURS = {  # settings that decide whether an alert is lost; a file must not change them
    "enable.auto.commit", "enable.auto.offset.store", "enable.idempotence", "enable.partition.eof", "transactional.id",
    "acks", "group.id", "group.instance.id", "partition.assignment.strategy", "auto.offset.reset", "isolation.level",
    "delivery.report.only.error",
}  # fmt: skip
ENVIRONMENT = "env:"


def _option(default: Any, text: str, *, shown: bool = True) -> Any:
    """Return a field of a table, with the help text of its flag. shown: whether its value may be printed."""
    return field(default=default, metadata={"help": text}, repr=shown)


@dataclass(frozen=True, slots=True)
class SourceSettings:
    """The topics that the consumer reads, and how it reads them."""

    topics: tuple[str, ...] = _option((), "Topics to read.")
    group: str = _option("edgekit", "Consumer group; its members share the partitions.")
    instance: str = _option("", "Name of this member for static membership: a restart then moves no partition.")
    start_at: str = _option(
        "earliest",
        "Where to begin: earliest or latest, if the group has committed nothing; a time, or offsets such as 0=12,1=40, "
        "to which every start moves the group.",
    )
    until_eos: bool = _option(False, "End when every partition has been read to its end.")
    on_gap: Literal["go-on", "stop"] = _option(
        "go-on", "What to do if retention deleted alerts before they were read: count them and go on, or stop."
    )
    drain_seconds: float = _option(
        20.0, "How long alerts in flight of a partition may finish when another consumer takes the partition over."
    )
    unreadable: Literal["skip", "stop"] = _option(
        "skip", "What to do with a record batch that cannot be read: a dead letter for each of its offsets, or stop."
    )
    unreadable_seconds: float = _option(10.0, "How long the consumer tries to read such a record batch first.")
    stop_seconds: float = _option(
        0.5, "How long alerts in flight may finish after SIGTERM. The rest is not committed and will be read again."
    )


@dataclass(frozen=True, slots=True)
class Batch:
    """The size of a batch, and the number of batches that may wait."""

    size: int = _option(1024, "Alerts in a batch; fewer give less throughput, because a batch has costs of its own.")
    bytes: int = _option(
        67_108_864,
        "Bytes of packets in a batch. Memory holds up to 3 queue + 5 + publish.uncommitted batches, and kafka's "
        "queued.max.messages.kbytes.",
    )
    seconds: float = _option(0.024, "A batch that is not full is closed after this time.")
    queue: int = _option(2, "Batches that may wait before each stage. More batches use memory and gain no speed.")


@dataclass(frozen=True, slots=True)
class Model:
    """The model and its runtime."""

    bundle: str = _option("", "Bundle, or name of a model, for all surveys; by default each survey has its own model.")
    runtime: str = _option("auto", "c, onnxruntime or torch; auto selects c if this machine can compile it.")
    prior: str = _option(
        "uniform", "Class shares that the probabilities are for: uniform, lsst, or a TOML file of CLASS = SHARE."
    )
    threads: int = _option(0, "Threads of the Gaussian process; 0 uses all cores but one.")
    alert_seconds: float = _option(
        10.0, "An alert whose light curve takes longer to interpolate becomes a dead letter."
    )
    reuse: Literal["off", "detections", "points"] = _option(
        "points",
        "An alert with the same detections, or points, as its object's last alert gets its classification.",
    )


@dataclass(frozen=True, slots=True)
class Cutouts:
    """A second model, which scores the images of every alert in the same pass."""

    model: str = _option("", "Bundle of a network that scores the images, such as braai.edge; adds the column drb.")
    runtime: str = _option("auto", "Its runtime: onnxruntime, openvino or torch.")


@dataclass(frozen=True, slots=True)
class Output:
    """A topic for the results that the filter `where` accepts, or for all results if it is empty. attach: as in
    `routing.Route`."""

    topic: str = ""
    where: str = ""
    format: Literal["avro", "json"] = "avro"
    attach: Literal["nothing", "cutouts", "packet"] = "nothing"


@dataclass(frozen=True, slots=True)
class DeadLetters:
    """The topic for alerts that cannot be processed. Too many of them stop the consumer, because then the fault is not
    in the alerts."""

    topic: str = _option("edgekit-dead-letters", "Topic for alerts that cannot be read, unchanged, with the reason.")
    max_ratio: float = _option(0.5, "Stop if more than this share of the last `window` alerts were dead letters.")
    window: int = _option(1000, "Alerts over which the share is computed; the limit holds once there are this many.")
    max_consecutive: int = _option(200, "Stop after this many dead letters in a row.")


@dataclass(frozen=True, slots=True)
class Publish:
    """How the consumer sends results."""

    mode: Literal["at-least-once", "exactly-once"] = _option(
        "at-least-once",
        "exactly-once sends results and offsets in one transaction, for consumers that read only committed messages.",
    )
    transactional_id: str = _option(
        "", "For exactly-once: a name that this member keeps after a restart [GROUP-INSTANCE]."
    )
    seconds: float = _option(60.0, "How long the broker may take to acknowledge before the consumer stops.")
    commit_seconds: float = _option(
        0.1,
        "The least time between two commits of offsets; with exactly-once, the time of one transaction's results.",
    )
    uncommitted: int = _option(
        8, "How many batches may be published and not yet committed. A crash repeats at most these batches."
    )


@dataclass(frozen=True, slots=True)
class Archive:
    """Parquet files of all results, by night."""

    folder: str = _option("", "Folder for Parquet files of the results; none by default.")


@dataclass(frozen=True, slots=True)
class Registry:
    """The registry that has the schemas of messages in Confluent wire format. LSST's schemas are installed."""

    url: str = _option(
        "", "http://..., file:FOLDER or mock://...; by default only Rubin's installed schemas are known.", shown=False
    )
    seconds: float = _option(300.0, "How long to wait for a registry that does not answer before the consumer stops.")


@dataclass(frozen=True, slots=True)
class Metrics:
    """Prometheus and health checks."""

    listen: str = _option("", "HOST:PORT for /metrics, /healthz and /readyz; none by default.")


@dataclass(frozen=True, slots=True)
class Config:
    """All tables of the file."""

    source: SourceSettings = field(default_factory=SourceSettings)
    batch: Batch = field(default_factory=Batch)
    model: Model = field(default_factory=Model)
    cutouts: Cutouts = field(default_factory=Cutouts)
    output: tuple[Output, ...] = ()
    dead_letters: DeadLetters = field(default_factory=DeadLetters)
    publish: Publish = field(default_factory=Publish)
    archive: Archive = field(default_factory=Archive)
    registry: Registry = field(default_factory=Registry)
    metrics: Metrics = field(default_factory=Metrics)
    kafka: Mapping[str, Secret] = field(default_factory=dict, repr=False)

    def check(self) -> Config:
        """Return this configuration. Raises EdgekitError if it cannot work."""
        if not self.source.topics:
            raise EdgekitError("no topic to read; give one by source.topics or --source-topics")
        if not self.kafka.get("bootstrap.servers"):
            raise EdgekitError(
                "no broker; give one by bootstrap.servers in [kafka] or --kafka bootstrap.servers=HOST:PORT"
            )
        if not self.output and not self.archive.folder:
            raise EdgekitError("results go nowhere; give an [[output]] with a topic, or set archive.folder")
        written = [*(item.topic for item in self.output), self.dead_letters.topic]
        for topic in written:
            if not topic:
                raise EdgekitError("an output, or dead_letters, has no topic; name one")
            if topic in self.source.topics:
                raise EdgekitError(f"the topic {topic!r} is both read and written; name another one")
        if len(set(written)) < len(written):
            raise EdgekitError(
                f"two outputs share a topic: {', '.join(map(repr, written))}; give each a topic of its own"
            )
        for name, value, low in (
            ("batch.size", self.batch.size, 1),
            ("batch.bytes", self.batch.bytes, 1),
            ("batch.queue", self.batch.queue, 1),
            ("dead_letters.window", self.dead_letters.window, 1),
            ("dead_letters.max_consecutive", self.dead_letters.max_consecutive, 1),
            ("model.threads", self.model.threads, 0),
            ("publish.uncommitted", self.publish.uncommitted, 1),
        ):
            if value < low:
                raise EdgekitError(f"{name} is {value}; expected {low} or more")
        for name, seconds in (
            ("batch.seconds", self.batch.seconds),
            ("publish.seconds", self.publish.seconds),
            ("publish.commit_seconds", self.publish.commit_seconds),
            ("model.alert_seconds", self.model.alert_seconds),
            ("source.stop_seconds", self.source.stop_seconds),
            ("source.unreadable_seconds", self.source.unreadable_seconds),
        ):
            if not seconds > 0:
                raise EdgekitError(f"{name} is {seconds}; expected a number above 0")
        if self.metrics.listen and not self.metrics.listen.rpartition(":")[2].isdigit():
            raise EdgekitError(f"metrics.listen is {self.metrics.listen!r}; expected HOST:PORT, such as 127.0.0.1:9108")
        if not 0 <= self.dead_letters.max_ratio <= 1:
            raise EdgekitError(f"dead_letters.max_ratio is {self.dead_letters.max_ratio}; expected 0 to 1")
        return self

    def transactional_id(self) -> str:
        """Return the name that this member keeps after a restart; empty if it has none."""
        if self.publish.transactional_id or not self.source.instance:
            return self.publish.transactional_id
        return f"{self.source.group}-{self.source.instance}"

    def registry_url(self) -> str:
        """Return the registry's address, which may hold a password or come from the environment."""
        return str(secrets_from_environment({"registry.url": self.registry.url})["registry.url"])

    def kafka_settings(self) -> dict[str, Secret]:
        """Return `[kafka]` with the values from the environment. Never print it."""
        return secrets_from_environment(self.kafka)


def secrets_from_environment(table: Mapping[str, Secret]) -> dict[str, Secret]:
    """Return the settings. A value that begins with env: is replaced by the value of that environment variable."""
    settings = {}
    for name, value in table.items():
        if isinstance(value, str) and value.startswith(ENVIRONMENT):
            variable = value.removeprefix(ENVIRONMENT)
            if variable not in os.environ:
                raise EdgekitError(f"{name!r} is read from the environment variable {variable!r}, which is not set")
            value = os.environ[variable]
        settings[name] = value
    return settings


def inline(text: str, where: str) -> dict[str, Any]:
    """Return the TOML table whose content, without braces, is the text: topic = "x", format = "json"."""
    try:
        table: dict[str, Any] = tomllib.loads(f"table = {{ {text} }}")["table"]
    except tomllib.TOMLDecodeError as error:
        raise EdgekitError(f'{where} {text!r} is no TOML table: {error}; example: topic = "x"') from None
    return table


def load(path: Path | None, changes: Mapping[str, Mapping[str, Any]] | None = None) -> Config:
    """Return the configuration in the file, if there is one, with the changes of the flags: table to name to value."""
    tables: dict[str, Any] = {}
    if path is not None:
        try:
            tables = read_toml(path)
        except OSError as error:
            raise EdgekitError(f"{path} cannot be read: {error.strerror}") from None
    config = parse(tables, str(path))
    for name, values in (changes or {}).items():
        if name == "output":
            config = replace(config, output=tuple(from_table(Output, item, "--output") for item in values))
        elif name == "kafka":
            config = replace(config, kafka={**config.kafka, **_kafka(values, "--kafka")})
        else:
            table = getattr(config, name)
            config = replace(config, **{name: from_table(type(table), values, f"--{name}", table)})
    return config.check()


def parse(tables: Mapping[str, Any], where: str) -> Config:
    """Return the configuration in these tables. Raises EdgekitError for an unknown name and for a value of another
    type."""
    classes = typing.get_type_hints(Config)
    values: dict[str, Any] = {}
    for name, table in tables.items():
        if name not in classes:
            raise unknown("table", name, classes, where=where)
        if name == "output":
            if not isinstance(table, list):
                raise EdgekitError(f"{where}: output is one table; write [[output]], as there may be several")
            values[name] = tuple(from_table(Output, item, f"{where} [[output]]") for item in table)
        elif not isinstance(table, dict):
            raise EdgekitError(f"{where}: {name} is a {type(table).__name__}; expected a table [{name}]")
        elif name == "kafka":
            values[name] = _kafka(table, where)
        else:
            values[name] = from_table(classes[name], table, f"{where} [{name}]")
    return Config(**values)


def _kafka(table: Mapping[str, Any], where: str) -> dict[str, Secret]:
    for name, value in table.items():
        if name in OURS:
            raise EdgekitError(
                f"{where}: kafka sets {name}, which decides whether alerts are lost; leave it to edgekit"
            )
        if not isinstance(value, str | int | float | bool):
            raise EdgekitError(
                f"{where}: kafka has a {type(value).__name__} for {name!r}; expected text, a number, true or false"
            )
    return dict(table)
