"""What stands before every route: who may come in, how much a client may send, and what is counted."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from runtimes.daemon.config import is_loopback
from runtimes.daemon.keys import Keys
from runtimes.daemon.refusal import RefusedError, from_error
from runtimes.daemon.stats import Stats

LOG = logging.getLogger("edgekit.serve")
OPEN = ("/", "/healthz", "/readyz", "/v2/health/live", "/v2/health/ready")  # need no key: they tell nothing of models
LOCAL = ("localhost", "127.0.0.1", "::1")
HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"cache-control", b"no-store"),
    (b"referrer-policy", b"no-referrer"),
]


class Access:
    """A middleware. keys: returns those that hold now; hosts: names by which the server may be called, None for any;
    stopping: whether the server drains; routes: the paths that are counted each by itself."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        keys: Callable[[], Keys],
        hosts: Sequence[str] | None,
        stopping: Callable[[], bool],
        route: Callable[[str], str],
        stats: Stats,
    ) -> None:
        self._app, self._keys, self._hosts, self._stopping = app, keys, hosts, stopping
        self._route, self._stats = route, stats

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path, began = scope["path"], False

        async def counted(message: Message) -> None:
            nonlocal began
            if message["type"] == "http.response.start":
                began = True
                message["headers"] = [*message.get("headers", []), *HEADERS]
                self._stats.requests(self._route(path), message["status"])
            await send(message)

        try:
            self._check(path, Headers(scope=scope))
            scope["app"] = self  # the router raises what it would answer as plain text otherwise
            await self._app(scope, receive, counted)
        except ClientDisconnect:
            return
        except HTTPException as error:  # of the router
            refused = RefusedError(error.status_code, f"{scope['method']} {path[:80]}: {error.detail}")
            await refuse(path, refused, counted, error.headers)
        except Exception as error:
            refused = from_error(error)
            if refused.status == 500:  # the other ones are the client's doing
                LOG.error("a request to %s has failed", self._route(path), exc_info=error)
            if began:  # the connection is closed, so that the client sees that the answer is not whole
                raise
            await refuse(path, refused, counted)

    def _check(self, path: str, headers: Headers) -> None:
        """Raise RefusedError unless the client may send this request. A page of another site in the user's browser may
        not: a browser names the page's origin, and the host that it believes to speak to."""
        host = _host_of(f"//{headers.get('host', '')}")
        if self._hosts is not None and host not in self._hosts:
            raise RefusedError(403, f"the host {host[:80]!r} is not this server's; add it to server.hosts")
        if (origin := headers.get("origin")) is not None and urlsplit_netloc(origin) != headers.get("host", ""):
            raise RefusedError(403, f"a page of {origin[:80]!r} may not send requests to this server")
        if self._stopping() and path not in OPEN:
            raise RefusedError(503, "the daemon stops; send the request again", code="stopping", retry_after=5)
        if path not in OPEN:
            self._keys().check(headers.get("authorization"))


def hosts_for(host: str, more: Sequence[str]) -> Sequence[str] | None:
    """Return the names by which a server may be called that listens on this host; None for any. Only a server that
    other machines cannot reach is safe from names that an attacker points at it, if it knows its own."""
    return [*LOCAL, host, *more] if is_loopback(host) else None


def urlsplit_netloc(origin: str) -> str:
    try:
        return urlsplit(origin).netloc
    except ValueError:
        return ""


def _host_of(address: str) -> str:
    try:
        return urlsplit(address).hostname or ""
    except ValueError:
        return ""


async def refuse(path: str, refused: RefusedError, send: Send, more: Mapping[str, str] | None = None) -> None:
    """Answer with an error in the form that the route's clients read. more: headers, such as the methods allowed."""
    content = json.dumps(refused.as_inference() if path.startswith("/v2") else refused.as_openai()).encode() + b"\n"
    headers = {
        "content-type": "application/json",
        "content-length": str(len(content)),
        **refused.headers,
        **(more or {}),
    }
    if refused.status in (408, 413):  # the rest of the body was not read
        headers["connection"] = "close"
    pairs = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": refused.status, "headers": pairs})
    await send({"type": "http.response.body", "body": content})


async def read_body(request: Request, most: int, seconds: float) -> bytes:
    """Return the body of a request. Raises RefusedError if it is too large, too slow or compressed."""
    if request.headers.get("content-encoding", "identity") != "identity":
        raise RefusedError(415, "a compressed body is not supported; send it as it is")
    declared = request.headers.get("content-length", "0")
    if declared.isdigit() and int(declared[:20]) > most:
        raise RefusedError(413, f"the body has {declared[:20]} bytes; limits.body is {most}")
    parts, size = [], 0
    try:
        async with asyncio.timeout(seconds):
            async for part in request.stream():
                parts.append(part)
                size += len(part)
                if size > most:
                    raise RefusedError(413, f"the body has more bytes than limits.body, which is {most}")
    except TimeoutError:
        raise RefusedError(408, f"the body was not complete after {seconds:g} s") from None
    return b"".join(parts)


def require_json(request: Request) -> None:
    """Raise unless the body says that it is JSON: a browser asks this server before it sends that from another site."""
    media: Any = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media != "application/json":
        raise RefusedError(415, f"the content type is {media[:60]!r}; send Content-Type: application/json")
