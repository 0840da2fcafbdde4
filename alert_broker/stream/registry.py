"""Schema registries: they give the schemas of messages by number, and a number for a schema of ours.

`http://`, `https://`: a Confluent-compatible service (REST, `/schemas/ids/ID` and `/subjects/SUBJECT/versions`).
`file:FOLDER`: `ID.avsc` files in a folder, for one machine. `mock://NAME`: in this process's memory, for tests.

An id that the registry does not know, or for which it has no usable schema, is a `PacketError`: its messages become
dead letters. A registry that does not answer is a `RegistryError`: no message may be lost for that, so the consumer
tries again later, from the same offset. If a registry answers other questions and fails on one id again and again, the
schema with that id is at fault.
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
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from pathlib import Path
from threading import Thread
from typing import Any

from alert_broker.containers import UnknownSchemaError
from alert_broker.stream.outputs import Registry
from alert_broker.surveys.base import PacketError
from edgekit.errors import EdgekitError

CONTENT_TYPE = "application/vnd.schemaregistry.v1+json"
TIMEOUT_SECONDS = 5.0  # of one request, from its start to the last byte of the answer
LOOK_SECONDS = 0.05  # seconds between checks whether the consumer stops, while a request is running
DELAYS = (0.2, 0.5, 1.0)  # seconds before each repetition of a request; after the last one the caller decides
CHUNK = 65_536  # bytes of an answer that are read at a time
LARGEST_ANSWER = 16 << 20  # bytes; LSST's schema takes 0.2 MB
FORGET_UNKNOWN_SECONDS = 60.0  # then an id without a schema is asked for again: it may have been registered since
MOST_UNKNOWN = 10_000  # ids without a schema that are remembered
FAILURES = 2  # on one schema, while the registry answers other questions, after which the schema is at fault
LARGEST_ID = 2**31 - 1
SHOWN = 200  # characters of another program's error in ours
ADVICE = {
    401: "check user and password",
    403: "check user and password",
    409: "the schema does not fit the subject's others: change its compatibility, or name another subject",
    422: "it takes the schema to be invalid",
}


class RegistryError(EdgekitError):
    """The registry did not answer, or did not answer as a registry should. The caller should try again later.
    identifier: the id of the schema that was asked for."""

    identifier: int | None = None


def never() -> bool:
    return False


def open_registry(
    url: str,
    *,
    user: str = "",
    password: str = "",
    sleep: Callable[[float], object] = time.sleep,
    stopped: Callable[[], bool] = never,
    seconds: float = TIMEOUT_SECONDS,
) -> Registry:
    """Return the registry at a URL. user, password: for basic authentication; they may also stand inside the URL, and
    are never shown. stopped: once it returns true, a running request is given up; seconds: the limit for a request."""
    scheme, _, rest = url.partition(":")
    if scheme in ("http", "https"):
        return HttpRegistry.at(url, user, password, sleep, stopped, min(seconds, TIMEOUT_SECONDS))
    if scheme == "file":
        return FolderRegistry(Path(rest.removeprefix("//")))
    if scheme == "mock":
        return _mocks.setdefault(rest, MemoryRegistry())
    raise EdgekitError(
        f"the schema registry {scheme + ':...'!r} is not supported; expected http://HOST:PORT, "
        "https://HOST:PORT, file:FOLDER or mock://NAME"
    )


def _unknown_id(identifier: int, where: str) -> UnknownSchemaError:
    return UnknownSchemaError(f"unknown schema id {identifier}: neither one of LSST's that is installed nor in {where}")


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
            except (UnicodeDecodeError, IsADirectoryError) as error:
                raise PacketError(f"schema {identifier} in {self.folder} cannot be read: {error}") from None
            except OSError as error:
                raise RegistryError(f"the schema registry {self.folder} cannot be read: {error}") from error
        return self._known[identifier]

    def register(self, subject: str, schema: str) -> int:
        partial = self.folder / f".{os.getpid()}.avsc"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            while True:
                numbers = sorted(int(file.stem) for file in self.folder.glob("*.avsc") if file.stem.isdigit())
                for identifier in numbers:
                    if _same(self.schema(identifier), schema):
                        return identifier
                partial.write_text(schema, encoding="utf-8")
                identifier = max(numbers, default=0) + 1
                try:
                    (self.folder / f"{identifier}.avsc").hardlink_to(partial)  # fails if another process was quicker
                except FileExistsError:
                    continue
                return identifier
        except OSError as error:
            raise RegistryError(f"the schema registry {self.folder} cannot be written: {error.strerror}") from error
        finally:
            with contextlib.suppress(OSError):
                partial.unlink()


@dataclass(frozen=True, slots=True)
class HttpRegistry:
    """A registry service. url: without user and password."""

    url: str
    _headers: Mapping[str, str] = field(repr=False)
    _sleep: Callable[[float], object] = field(default=time.sleep, repr=False)
    _stopped: Callable[[], bool] = field(default=never, repr=False)
    _seconds: float = TIMEOUT_SECONDS
    _known: dict[int, str] = field(default_factory=dict, repr=False)
    # when the registry was asked, and the type and the text of the error; an error that is raised again and again would
    # keep the frames of every raise, and with them every packet
    _unknown: dict[int, tuple[float, type[PacketError], str]] = field(default_factory=dict, repr=False)
    _failed: dict[int, int] = field(default_factory=dict, repr=False)  # how often while the registry worked
    _numbers: dict[tuple[str, str], int] = field(default_factory=dict, repr=False)

    @classmethod
    def at(
        cls,
        url: str,
        user: str,
        password: str,
        sleep: Callable[[float], object] = time.sleep,
        stopped: Callable[[], bool] = never,
        seconds: float = TIMEOUT_SECONDS,
    ) -> HttpRegistry:
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
        return cls(shown, headers, sleep, stopped, seconds)

    def schema(self, identifier: int) -> str:
        if identifier not in self._known:
            if identifier in self._unknown:
                asked, error_type, reason = self._unknown[identifier]
                if time.monotonic() - asked < FORGET_UNKNOWN_SECONDS:
                    raise error_type(reason)
            try:
                self._known[identifier] = self._ask_schema(identifier)
            except PacketError as error:
                self._remember(identifier, error)
                raise
            except RegistryError as error:
                error.identifier = identifier
                raise
            self._failed.pop(identifier, None)
        return self._known[identifier]

    def _ask_schema(self, identifier: int) -> str:
        answer = self._ask("GET", f"/schemas/ids/{identifier}") if 0 <= identifier <= LARGEST_ID else None
        if answer is None:
            raise _unknown_id(identifier, self.url)
        if answer.get("schemaType", "AVRO") != "AVRO":
            raise PacketError(f"schema {identifier} in {self.url} is {answer['schemaType']!r}; expected AVRO")
        if answer.get("references"):
            raise PacketError(
                f"schema {identifier} in {self.url} refers to other schemas; register it without references"
            )
        text = answer.get("schema")
        if not isinstance(text, str):
            raise PacketError(f"the schema registry {self.url} has no text for schema {identifier}")
        return text

    def blames(self, error: RegistryError) -> bool:
        """Return whether the schema that was asked for is at fault, and not the registry: the registry has failed on it
        `FAILURES` times and answered another question each time. The schema's messages then become dead letters."""
        identifier = error.identifier
        if identifier is None:
            return False
        try:
            status, _ = self._exchange(urllib.request.Request(f"{self.url}/schemas/types", headers=dict(self._headers)))
        except (OSError, http.client.HTTPException, ValueError):
            return False
        if status != 200:
            return False
        self._failed[identifier] = self._failed.get(identifier, 0) + 1
        if self._failed[identifier] < FAILURES:
            return False
        del self._failed[identifier]
        self._remember(identifier, PacketError(f"schema {identifier} cannot be had: {error}"))
        return True

    def _remember(self, identifier: int, error: PacketError) -> None:
        if len(self._unknown) >= MOST_UNKNOWN:
            self._unknown.clear()
        self._unknown[identifier] = time.monotonic(), type(error), str(error)

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
        """Return the answer; None if the registry does not have what was asked for. A request that fails for a reason
        that may pass is repeated."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url}{path}", data, dict(self._headers), method=method)
        for delay in (*DELAYS, None):
            try:
                status, content = self._exchange(request)
            except (OSError, http.client.HTTPException, ValueError) as error:
                text = str(getattr(error, "reason", "") or error or type(error).__name__)
                reason = repr(" ".join(text.split())[:SHOWN])[1:-1]  # a server's status line may be in it
            else:
                answer = _json_object(content)
                if status < 300:
                    if answer is not None:
                        return answer
                    reason = "its answer is no JSON object"
                else:
                    code = (answer or {}).get("error_code")
                    if status == 404 and method == "GET" and isinstance(code, int) and code != 404:
                        return None
                    reason = f"HTTP status {status} for {path}"
                    if status < 500 and status not in (408, 429):
                        advice = ADVICE.get(status, "check the URL")
                        if method == "GET" and isinstance(code, int) and status not in (401, 403, 404):
                            raise PacketError(f"the schema registry {self.url} refuses: {reason}; {advice}")
                        raise RegistryError(f"the schema registry {self.url} refuses: {reason}; {advice}")
            if delay is not None:
                self._sleep(delay)
        raise RegistryError(
            f"the schema registry {self.url} does not answer: {reason} (tried {len(DELAYS) + 1} times); "
            "nothing is lost; start again when it answers"
        )

    def _exchange(self, request: urllib.request.Request) -> tuple[int, bytes]:
        """Return the status and the content of the answer, within `_seconds` altogether. The request runs in its own
        thread, because a server can make name lookup, TLS and headers last for ever by sending single bytes."""
        future: Future[tuple[int, bytes]] = Future()
        deadline = time.monotonic() + self._seconds

        def work() -> None:
            try:
                future.set_result(_read(request, self._seconds, deadline))
            except BaseException as error:
                future.set_exception(error)

        Thread(target=work, name="edgekit-registry", daemon=True).start()
        while not wait([future], LOOK_SECONDS).done:
            if self._stopped():
                raise RegistryError(f"the schema registry {self.url} does not answer, and the consumer stops")
            if time.monotonic() > deadline:
                raise TimeoutError(f"no complete answer within {self._seconds:g} s")
        return future.result()


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Follows no redirect, because it would send the password to another host."""

    def redirect_request(self, *_: Any) -> None:
        return None


_opener = urllib.request.build_opener(_NoRedirect)


def _read(request: urllib.request.Request, seconds: float, deadline: float) -> tuple[int, bytes]:
    """Return the status and the content of an answer. The deadline also ends the thread of a request that was given
    up."""
    try:
        response = _opener.open(request, timeout=seconds)
    except urllib.error.HTTPError as error:
        response = error  # the answer, all the same
    with response:
        content = b""
        while chunk := response.read1(CHUNK):
            content += chunk
            if len(content) > LARGEST_ANSWER or time.monotonic() > deadline:
                raise TimeoutError(f"{len(content)} bytes of an answer came, and not its end")
        return int(response.status), content


def _json_object(content: bytes) -> dict[str, Any] | None:
    """Return the JSON object; None for any other content, such as another server's page."""
    try:
        answer = json.loads(content)
    except (ValueError, RecursionError):
        return None
    return answer if isinstance(answer, dict) else None


def _same(first: str, second: str) -> bool:
    """Return whether two schemas are equal except for white space."""
    try:
        return bool(json.loads(first) == json.loads(second))
    except ValueError:
        return first == second
