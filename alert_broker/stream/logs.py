"""Write log lines for people, or as one JSON object per line for programs, and mask the secrets in both.

A value is secret if its key has the name that librdkafka, schema registries and cloud clients give to secrets, or if it
is the password in a URL. `redacted` masks the secrets in a configuration. `configure` masks their values in all log
lines, since a library's error message may quote them.
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
# Parts of a key's name, without dots and dashes. `userinfo` is a schema registry's user:password.
SECRET_NAMES = (
    "password", "passwd", "passphrase", "secret", "token", "credential", "userinfo", "apikey", "accesskey",
    "privatekey", "sslkeypem", "jaas", "oauthbearerconfig", "authorization",
)  # fmt: skip
NO_SECRETS = ("sasloauthbearertokenendpointurl",)
USER_IN_URL = re.compile(r"(?<=://)[^/?#\s]*@")  # up to the last @, because a password may contain one
MIN_MASKED = 4  # characters of a value that is masked everywhere; a shorter value may be part of a word
STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
LOGGER = "edgekit"


def redacted(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the same configuration with every secret masked: by its key, in a URL, and in other entries that contain
    its value."""
    known = secrets(config)
    return {key: _masked(key, value, known) for key, value in config.items()}


def secrets(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the values to mask, and the forms in which messages quote them. The longest come first, because one value
    may be the beginning of another."""
    found = {text for key, value in config.items() for text in _secrets(key, value) if len(text) >= MIN_MASKED}
    forms = {form for text in found for form in (text, repr(text)[1:-1], json.dumps(text)[1:-1], quote(text, safe=""))}
    return tuple(sorted(forms, key=lambda text: (-len(text), text)))


def configure(
    *,
    as_json: bool = False,
    level: int = logging.INFO,
    config: Mapping[str, Any] | None = None,
    stream: TextIO | None = None,
) -> logging.Logger:
    """Return the stream's logger, which writes to standard error or `stream` and masks the secrets of `config`. A
    second call replaces the first."""
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
    """A handler that looks up standard error for each line, because the dashboard replaces it while it is on the
    screen."""

    def __init__(self, stream: TextIO | None) -> None:
        logging.Handler.__init__(self)
        self._fixed = stream

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        return self._fixed or sys.stderr


class _Formatter(logging.Formatter):
    """Formats a record and its `extra` fields as one masked line. A traceback is a field in JSON, and has its own lines
    otherwise."""

    def __init__(self, as_json: bool, known: tuple[str, ...]) -> None:
        super().__init__()
        self._as_json, self._known = as_json, known

    def format(self, record: logging.LogRecord) -> str:
        try:
            message = record.getMessage()
        except (TypeError, ValueError):  # otherwise logging itself would print the unmasked arguments
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
        details = f" ({', '.join(f'{key} {printable(value)}' for key, value in fields.items())})" if fields else ""
        lines = [f"{moment} {level:<7} {printable(message)}{details}", *map(printable, trace.splitlines())]
        return "\n".join(lines)


def _is_secret(key: object) -> bool:
    name = re.sub(r"[^a-z0-9]", "", str(key).lower())
    return name not in NO_SECRETS and any(part in name for part in SECRET_NAMES)


def _masked(key: object, value: Any, known: Iterable[str]) -> Any:
    """Return the value in a form that JSON can hold, with its secrets masked."""
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
    """Yield the secret texts in a value: all of them if its key is secret, else the passwords in URLs."""
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
            yield text.partition(":")[2]  # the password in user:password
        yield from (found[:-1].partition(":")[2] for found in USER_IN_URL.findall(text))


def _text(value: object) -> str:
    return bytes(value).decode(errors="backslashreplace") if isinstance(value, bytes | bytearray) else str(value)


def _without(text: str, known: Iterable[str]) -> str:
    text = USER_IN_URL.sub(f"{MASK}@", text)
    for secret in known:
        text = text.replace(secret, MASK)
    return text
