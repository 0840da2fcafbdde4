"""Schema registries: the schemas of messages by number, and a number for a schema of ours.

`http://`, `https://`: a Confluent-compatible service (REST, `/schemas/ids/ID` and `/subjects/SUBJECT/versions`).
`file:FOLDER`: `ID.avsc` files in a folder, for one machine. `mock://NAME`: in this process's memory, for tests.

An id that the registry does not know is a `PacketError`: the packet's fault, a dead letter. A registry that does not
answer is a `RegistryError`: no packet may be lost for that, so the consumer tries again later, from the same offset.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from alert_broker.stream.outputs import Registry
from alert_broker.surveys.base import PacketError
from edgekit.errors import EdgekitError

CONTENT_TYPE = "application/vnd.schemaregistry.v1+json"
TIMEOUT_SECONDS = 5.0  # of one request
DELAYS = (0.2, 0.5, 1.0)  # seconds before each further try, for a hiccup; what lasts longer is the caller's to wait for
LARGEST_ANSWER = 16 << 20  # bytes; LSST's schema takes 0.2 MB
FORGET_UNKNOWN_SECONDS = (
    60.0  # an id that was unknown is asked for again after this: its schema may have been registered
)
MOST_UNKNOWN = 10_000  # of them remembered
LARGEST_ID = 2**31 - 1
ADVICE = {
    401: "check user and password",
    403: "check user and password",
    409: "the schema does not fit the subject's others: change its compatibility, or name another subject",
    422: "it takes the schema to be invalid",
}


class RegistryError(EdgekitError):
    """The registry did not answer, or not as a registry should; whoever needs its schemas should try again later."""


def open_registry(
    url: str, *, user: str = "", password: str = "", sleep: Callable[[float], None] = time.sleep
) -> Registry:
    """The registry at a URL; user and password, also inside the URL, are for basic authentication and never shown."""
    scheme, _, rest = url.partition(":")
    if scheme in ("http", "https"):
        return HttpRegistry.at(url, user, password, sleep)
    if scheme == "file":
        return FolderRegistry(Path(rest.removeprefix("//")))
    if scheme == "mock":
        return _mocks.setdefault(rest, MemoryRegistry())
    raise EdgekitError(
        f"the schema registry {scheme + ':...'!r} is not supported; expected http://HOST:PORT, "
        "https://HOST:PORT, file:FOLDER or mock://NAME"
    )


def _unknown_id(identifier: int, where: str) -> PacketError:
    return PacketError(f"unknown schema id {identifier}: neither one of LSST's that is installed nor in {where}")


@dataclass(slots=True)
class MemoryRegistry:
    """Schemas in memory, numbered from 1."""

    schemas: dict[int, str] = field(default_factory=dict)

    def schema(self, identifier: int) -> str:
        if identifier not in self.schemas:
            raise _unknown_id(identifier, "the registry in memory")
        return self.schemas[identifier]

    def register(self, subject: str, schema: str) -> int:
        for identifier, known in self.schemas.items():
            if _same(known, schema):
                return identifier
        identifier = max(self.schemas, default=0) + 1
        self.schemas[identifier] = schema
        return identifier


_mocks: dict[str, MemoryRegistry] = {}


@dataclass(frozen=True, slots=True)
class FolderRegistry:
    """`ID.avsc` files in a folder. Several processes can register at once; files may also be put there by hand."""

    folder: Path
    _known: dict[int, str] = field(default_factory=dict, repr=False)

    def schema(self, identifier: int) -> str:
        if identifier not in self._known:
            try:
                self._known[identifier] = (self.folder / f"{identifier}.avsc").read_text(encoding="utf-8")
            except FileNotFoundError:
                if self.folder.is_dir():
                    raise _unknown_id(identifier, f"the folder {self.folder}") from None
                raise RegistryError(
                    f"the schema registry's folder {self.folder} does not exist; create it, or name another one"
                ) from None
            except (OSError, UnicodeDecodeError) as error:
                raise RegistryError(f"the schema registry {self.folder} cannot be read: {error}") from error
        return self._known[identifier]

    def register(self, subject: str, schema: str) -> int:
        fresh = self.folder / f".{os.getpid()}.avsc"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            while True:
                numbers = sorted(int(file.stem) for file in self.folder.glob("*.avsc") if file.stem.isdigit())
                for identifier in numbers:
                    if _same(self.schema(identifier), schema):
                        return identifier
                fresh.write_text(schema, encoding="utf-8")
                identifier = max(numbers, default=0) + 1
                try:
                    (self.folder / f"{identifier}.avsc").hardlink_to(fresh)  # fails if another process was quicker
                except FileExistsError:
                    continue
                return identifier
        except OSError as error:
            raise RegistryError(f"the schema registry {self.folder} cannot be written: {error.strerror}") from error
        finally:
            with contextlib.suppress(OSError):
                fresh.unlink()


@dataclass(frozen=True, slots=True)
class HttpRegistry:
    """A registry service. url: without user and password."""

    url: str
    _headers: Mapping[str, str] = field(repr=False)
    _sleep: Callable[[float], None] = field(default=time.sleep, repr=False)
    _known: dict[int, str] = field(default_factory=dict, repr=False)
    _unknown: dict[int, float] = field(default_factory=dict, repr=False)  # id to when it was asked for
    _numbers: dict[tuple[str, str], int] = field(default_factory=dict, repr=False)

    @classmethod
    def at(cls, url: str, user: str, password: str, sleep: Callable[[float], None] = time.sleep) -> HttpRegistry:
        try:
            parts = urllib.parse.urlsplit(url)
            host, port = parts.hostname, parts.port
        except ValueError:
            host = port = None
        if not host:
            raise EdgekitError(
                "the schema registry's URL has no host, or a port that is no number; expected http://HOST:PORT"
            )
        name = f"[{host}]" if ":" in host else host
        shown = f"{parts.scheme}://{name}{f':{port}' if port else ''}{parts.path.rstrip('/')}"
        user = user or urllib.parse.unquote(parts.username or "")
        password = password or urllib.parse.unquote(parts.password or "")
        headers = {"Accept": f"{CONTENT_TYPE}, application/json", "Content-Type": CONTENT_TYPE}
        if user:
            headers["Authorization"] = f"Basic {base64.b64encode(f'{user}:{password}'.encode()).decode()}"
        return cls(shown, headers, sleep)

    def schema(self, identifier: int) -> str:
        if identifier not in self._known:
            asked = self._unknown.get(identifier)
            if asked is not None and time.monotonic() - asked < FORGET_UNKNOWN_SECONDS:
                raise _unknown_id(identifier, self.url)
            answer = self._ask("GET", f"/schemas/ids/{identifier}") if 0 <= identifier <= LARGEST_ID else None
            if answer is None:
                if len(self._unknown) >= MOST_UNKNOWN:
                    self._unknown.clear()
                self._unknown[identifier] = time.monotonic()
                raise _unknown_id(identifier, self.url)
            if answer.get("schemaType", "AVRO") != "AVRO":
                raise PacketError(f"schema {identifier} in {self.url} is {answer['schemaType']!r}; expected AVRO")
            if answer.get("references"):
                raise PacketError(
                    f"schema {identifier} in {self.url} refers to other schemas; register it without references"
                )
            if not isinstance(answer.get("schema"), str):
                raise RegistryError(f"the schema registry {self.url} has no text for schema {identifier}")
            self._known[identifier] = answer["schema"]
        return self._known[identifier]

    def register(self, subject: str, schema: str) -> int:
        if (subject, schema) not in self._numbers:
            path = f"/subjects/{urllib.parse.quote(subject, safe='')}/versions"
            answer = self._ask("POST", path, {"schema": schema, "schemaType": "AVRO"})
            identifier = (answer or {}).get("id")
            if not isinstance(identifier, int):
                raise RegistryError(f"the schema registry {self.url} gave no id for the subject {subject}")
            self._numbers[subject, schema] = identifier
        return self._numbers[subject, schema]

    def _ask(self, method: str, path: str, body: object = None) -> dict[str, Any] | None:
        """The answer; None if what was asked for is not there. What may pass is tried again."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url}{path}", data, dict(self._headers), method=method)
        for delay in (*DELAYS, None):
            try:
                with _opener.open(request, timeout=TIMEOUT_SECONDS) as response:
                    answer = json.loads(response.read(LARGEST_ANSWER))
                if isinstance(answer, dict):
                    return answer
                reason = "its answer is no JSON object"
            except urllib.error.HTTPError as error:
                with error:
                    if error.code == 404 and method == "GET" and _error_code(error) != 404:
                        return None
                    reason = f"HTTP status {error.code} ({error.reason}) for {path}"
                    if error.code < 500 and error.code not in (408, 429):
                        advice = ADVICE.get(error.code, "check the URL")
                        raise RegistryError(f"the schema registry {self.url} refuses: {reason}; {advice}") from None
            except (OSError, http.client.HTTPException, ValueError) as error:
                reason = str(getattr(error, "reason", "") or error or type(error).__name__)
            if delay is not None:
                self._sleep(delay)
        raise RegistryError(
            f"the schema registry {self.url} does not answer: {reason} (tried {len(DELAYS) + 1} times); "
            "nothing is lost; start again when it answers"
        )


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the password to another host."""

    def redirect_request(self, *_: Any) -> None:
        return None


_opener = urllib.request.build_opener(_NoRedirect)


def _error_code(error: urllib.error.HTTPError) -> int:
    """The registry's own error code, such as 40403 for an unknown schema; 404 if another server's page was returned."""
    try:
        code = json.loads(error.read(LARGEST_ANSWER)).get("error_code")
    except (ValueError, AttributeError, OSError):
        return 404
    return code if isinstance(code, int) else 404


def _same(first: str, second: str) -> bool:
    """Whether two schemas are equal except for white space."""
    try:
        return bool(json.loads(first) == json.loads(second))
    except ValueError:
        return first == second
