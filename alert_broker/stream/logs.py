"""Log lines for people or, one JSON object a line, for machines; and no secret in either.

What is secret is told by the names of a configuration's keys, as librdkafka, schema registries and cloud clients call
them, and by URLs with a password in them. `redacted` masks them in a configuration; `configure` masks their values in
everything that is logged, since a library's error message may quote them.
"""

from __future__ import annotations

import json
import logging
import math
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from typing import Any, TextIO
from urllib.parse import quote

from edgekit.cli.console import printable

MASK = "***"
# In a key's name, without its dots and dashes. `userinfo`: a schema registry's user:password.
SECRET_NAMES = (
    "password", "passwd", "passphrase", "secret", "token", "credential", "userinfo", "apikey", "accesskey",
    "privatekey", "sslkeypem", "jaas", "oauthbearerconfig", "authorization",
)  # fmt: skip
NO_SECRETS = ("sasloauthbearertokenendpointurl",)
USER_IN_URL = re.compile(r"(?<=://)[^/?#\s]*@")  # up to the last @: a password may hold one
SHORTEST = 4  # characters of a value that is masked wherever it turns up; shorter ones are parts of words
STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
LOGGER = "edgekit"


def redacted(config: Mapping[str, Any]) -> dict[str, Any]:
    """The same with every secret masked: by its key, in a URL, and where its value turns up in another entry."""
    known = secrets(config)
    return {key: _masked(key, value, known) for key, value in config.items()}


def secrets(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The values to keep out of sight, with the ways in which messages quote them; longest first, as one may be the
    beginning of another."""
    found = {text for key, value in config.items() for text in _secrets(key, value) if len(text) >= SHORTEST}
    forms = {form for text in found for form in (text, repr(text)[1:-1], json.dumps(text)[1:-1], quote(text, safe=""))}
    return tuple(sorted(forms, key=lambda text: (-len(text), text)))


def configure(
    *,
    as_json: bool = False,
    level: int = logging.INFO,
    config: Mapping[str, Any] | None = None,
    stream: TextIO | None = None,
) -> logging.Logger:
    """The stream's logger, on standard error or `stream`; no secret of `config` passes. A second call replaces it."""
    logger = logging.getLogger(LOGGER)
    for old in [item for item in logger.handlers if isinstance(item, _Lines)]:
        logger.removeHandler(old)
    handler = _Lines(stream)
    handler.setFormatter(_Formatter(as_json, secrets(config or {})))
    logger.addHandler(handler)
    logger.setLevel(level)
    logger.propagate = False
    return logger


class _Lines(logging.StreamHandler[TextIO]):
    """Asks for standard error each time: the dashboard puts its own in the place while it is on the screen."""

    def __init__(self, stream: TextIO | None) -> None:
        logging.Handler.__init__(self)
        self._fixed = stream

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        return self._fixed or sys.stderr


class _Formatter(logging.Formatter):
    """A record with its `extra` fields in one line, masked; a traceback is a field, or follows in lines of its own."""

    def __init__(self, as_json: bool, known: tuple[str, ...]) -> None:
        super().__init__()
        self._as_json, self._known = as_json, known

    def format(self, record: logging.LogRecord) -> str:
        try:
            message = record.getMessage()
        except (TypeError, ValueError):  # logging itself would print the arguments as they are
            message = f"{record.msg} {record.args}"
        message = _without(message, self._known)
        moment = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        fields = {key: _masked(key, value, self._known) for key, value in vars(record).items() if key not in STANDARD}
        trace = _without(self.formatException(record.exc_info), self._known) if record.exc_info else ""
        level = record.levelname.lower()
        if self._as_json:
            line = {"time": moment, "level": level, "logger": record.name, "message": message}
            line |= {"exception": trace} if trace else {}
            return json.dumps(line | {f"{key}_" if key in line else key: value for key, value in fields.items()})
        told = f" ({', '.join(f'{key} {printable(value)}' for key, value in fields.items())})" if fields else ""
        lines = [f"{moment} {level:<7} {printable(message)}{told}", *map(printable, trace.splitlines())]
        return "\n".join(lines)


def _is_secret(key: object) -> bool:
    name = re.sub(r"[^a-z0-9]", "", str(key).lower())
    return name not in NO_SECRETS and any(part in name for part in SECRET_NAMES)


def _masked(key: object, value: Any, known: Iterable[str]) -> Any:
    """As JSON can have it, without secrets."""
    if _is_secret(key):
        return MASK
    if isinstance(value, Mapping):
        return {str(inner): _masked(inner, item, known) for inner, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_masked("", item, known) for item in value]
    if value is None or isinstance(value, bool):
        return value
    text = _without(_text(value), known)
    return value if isinstance(value, int | float) and math.isfinite(value) and MASK not in text else text


def _secrets(key: object, value: Any) -> Iterator[str]:
    """The texts in a value that are secret: all of them if its key says so, else the passwords in URLs."""
    if isinstance(value, Mapping):
        for inner, item in value.items():
            yield from _secrets(key if _is_secret(key) else inner, item)
    elif isinstance(value, list | tuple | set | frozenset):
        for item in value:
            yield from _secrets(key, item)
    elif value is not None and not isinstance(value, bool):
        text = _text(value)
        if _is_secret(key):
            yield text
            yield text.partition(":")[2]  # of user:password
        yield from (found[:-1].partition(":")[2] for found in USER_IN_URL.findall(text))


def _text(value: object) -> str:
    return bytes(value).decode(errors="backslashreplace") if isinstance(value, bytes | bytearray) else str(value)


def _without(text: str, known: Iterable[str]) -> str:
    text = USER_IN_URL.sub(f"{MASK}@", text)
    for secret in known:
        text = text.replace(secret, MASK)
    return text
