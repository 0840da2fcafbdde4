"""The configuration of the daemon: `serve.toml`, with one dataclass for each table. Unknown names are errors."""

from __future__ import annotations

import dataclasses
import ipaddress
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from edgekit.bundle.bounded import parse_size
from edgekit.bundle.format import MANIFEST
from edgekit.errors import EdgekitError
from edgekit.importers import downloads
from edgekit.settings import from_table, read_toml
from runtimes.daemon.alerts_job import AlertSettings

Task = Literal["language", "tensors"]
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")  # of a model, as it may stand in a path of HTTP


def _option(default: Any, text: str) -> Any:
    """Return a field of a table, with the text that the documentation shows for it."""
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """Where the daemon listens, and how it ends."""

    listen: str = _option("127.0.0.1:8400", "Address and port; port 0 selects a free port.")
    hosts: tuple[str, ...] = _option(
        (), "Names by which clients may call a server that listens on a loopback address, beside localhost."
    )
    without_keys: bool = _option(False, "Allow an address that other machines can reach without any API key.")
    certificate: str = _option("", "PEM file with the certificate for TLS.")
    private_key: str = _option("", "PEM file with the private key for TLS.")
    memory: str = _option("", "Most memory for all models, such as 4GB; by default what is free.")
    drain_seconds: float = _option(30.0, "How long answers may go on after SIGTERM; then they end with an error.")


@dataclass(frozen=True, slots=True)
class KeySettings:
    """The API keys. Without any, every client that reaches the address is served."""

    file: str = _option("", "File with one key on each line: a name and the key's hash, as --new-key prints them.")
    requests_per_minute: int = _option(0, "Requests that one key may send in a minute; 0 for no limit.")


@dataclass(frozen=True, slots=True)
class LimitSettings:
    """What one client, and all of them together, may take."""

    body: str = _option("16MB", "Largest body of a request.")
    header_seconds: float = _option(10.0, "Time in which a client must send the headers of a request.")
    body_seconds: float = _option(30.0, "Time in which a client must send the body of a request.")
    write_seconds: float = _option(30.0, "Time after which a client that does not read its answer is disconnected.")
    answer_seconds: float = _option(600.0, "Longest time for an answer, its wait in the queue included.")
    queue: int = _option(64, "Answers of one model that may wait or run; a request beyond them gets 503.")
    answers: int = _option(8, "Most answers that one request may ask for with n, or with several prompts.")
    connections: int = _option(512, "Most open connections; a connection beyond them gets 503.")


@dataclass(frozen=True, slots=True)
class ModelSettings:
    """A model, under the name by which clients ask for it."""

    path: str = _option("", "Bundle, .gguf file, folder that transformers saved, or the name of an installed model.")
    task: Literal["auto", "language", "tensors"] = _option(
        "auto", "language: text in, text out; tensors: arrays in, arrays out; auto: by the file."
    )
    engine: str = _option("native", "Engine of a language model: native, torch, llamacpp.")
    context: int = _option(0, "Tokens of the cache that all requests of a language model share; 0: 4096.")
    kv: str = _option("", "How the cache stores keys and values; the engine's own default if empty.")
    threads: int = _option(0, "CPU threads; 0: the engine's or runtime's own choice.")
    runtime: str = _option("auto", "Runtime of a bundle: c, onnxruntime, openvino, torch; auto: c if it can.")
    tokenizer: str = _option("", "Of an embedding bundle: tokenizer.json, or its folder; it cuts texts into tokens.")
    batch: int = _option(32, "Most rows that requests to a bundle share in one run; 1 turns sharing off.")
    batch_seconds: float = _option(0.002, "How long a request to a bundle waits for others to share its run.")
    idle_seconds: float = _option(600.0, "A model that nobody used for this time is dropped; 0: never.")
    load: Literal["on-demand", "at-start"] = _option("on-demand", "When the model is loaded.")

    @property
    def category(self) -> Task:
        if self.task != "auto":
            return self.task
        path = Path(self.path)
        folder = (path / "config.json").is_file() and not (path / MANIFEST).is_file()
        return "language" if path.suffix == ".gguf" or self.path in downloads.MODELS or folder else "tensors"


@dataclass(frozen=True, slots=True)
class ServeConfig:
    """All tables of the file."""

    server: ServerSettings = field(default_factory=ServerSettings)
    keys: KeySettings = field(default_factory=KeySettings)
    limits: LimitSettings = field(default_factory=LimitSettings)
    models: Mapping[str, ModelSettings] = field(default_factory=dict)
    alerts: AlertSettings = field(default_factory=AlertSettings)

    def check(self) -> ServeConfig:
        """Return this configuration. Raises EdgekitError if it cannot work."""
        if not self.models:
            raise EdgekitError("no model to serve; name one: edgekit serve MODEL, or a table [models.NAME] in the file")
        self.alerts.check()
        self.address()
        parse_size(self.limits.body, "limits.body")
        if self.server.memory:
            parse_size(self.server.memory, "server.memory")
        if bool(self.server.certificate) != bool(self.server.private_key):
            raise EdgekitError("server.certificate and server.private_key: TLS needs both files, and one is missing")
        for table, least in (("limits", 1), ("keys", 0)):
            for name, value in _numbers(getattr(self, table)):
                _check_range(f"{table}.{name}", value, least if isinstance(value, int) else 0.0)
        _check_range("server.drain_seconds", self.server.drain_seconds, 0.0)
        for name, model in self.models.items():
            _check_model(name, model)
        return self

    def address(self) -> tuple[str, int]:
        """Return the host and the port to listen on."""
        host, _, port = self.server.listen.rpartition(":")
        if not (port.isascii() and port.isdigit() and int(port[:6]) < 1 << 16):
            raise EdgekitError(f"server.listen is {self.server.listen!r}; expected HOST:PORT, such as 127.0.0.1:8400")
        return host.strip("[]") or "127.0.0.1", int(port)


def _numbers(settings: Any) -> list[tuple[str, int | float]]:
    values = [(item.name, getattr(settings, item.name)) for item in dataclasses.fields(settings)]
    return [(name, value) for name, value in values if isinstance(value, int | float)]


def _check_range(name: str, value: float, least: float) -> None:
    """Raise unless a whole number is at least `least`, or a number of seconds is above 0 and finite."""
    if isinstance(value, int) and value < least:
        raise EdgekitError(f"{name} is {value}; expected {least:g} or more")
    if isinstance(value, float) and not 0 < value < 1e9:
        raise EdgekitError(f"{name} is {value}; expected a number of seconds above 0")


def _check_model(name: str, model: ModelSettings) -> None:
    if not NAME.fullmatch(name):
        raise EdgekitError(f"the name {name!r} of a model; expected up to 64 letters, digits, '.', '_' and '-'")
    if not model.path:
        raise EdgekitError(f"models.{name}: key 'path' is missing; it names the model's file or folder")
    for key, value, least in (("context", model.context, 0), ("threads", model.threads, 0), ("batch", model.batch, 1)):
        _check_range(f"models.{name}.{key}", value, least)
    for key, seconds in (("batch_seconds", model.batch_seconds), ("idle_seconds", model.idle_seconds)):
        if not 0 <= seconds < 1e9:
            raise EdgekitError(f"models.{name}.{key} is {seconds}; expected 0 or more seconds")


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach the host."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def load(
    path: Path | None,
    models: Sequence[str] = (),
    *,
    server: Mapping[str, Any] | None = None,
    model: Mapping[str, Any] | None = None,
) -> ServeConfig:
    """Return the configuration in the file, if there is one, with what the command line adds. models: paths; each is
    served under the name of its file; server, model: values for [server], and for each of these models."""
    try:
        tables = {} if path is None else read_toml(path)
    except OSError as error:
        raise EdgekitError(f"{path} cannot be read: {error.strerror}") from None
    config = from_table(ServeConfig, tables, str(path))
    found: dict[str, ModelSettings] = dict(config.models)
    for item in models:
        name = item if item in downloads.MODELS else Path(item).name.removesuffix(Path(item).suffix)
        if name in found:
            raise EdgekitError(f"two models have the name {name!r}; give them names in serve.toml, in [models.NAME]")
        found[name] = from_table(ModelSettings, {"path": item, **(model or {})}, "the command line")
    changed = from_table(ServerSettings, server or {}, "the command line", config.server)
    checked: ServeConfig = dataclasses.replace(config, models=found, server=changed)
    return checked.check()
