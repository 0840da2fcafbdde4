"""One connection of HTTP, with limits of time that uvicorn has not: for the headers of a request, and for a client that
does not read its answer."""

from __future__ import annotations

import asyncio
import socket
from typing import Any, ClassVar

from uvicorn.protocols.http.h11_impl import H11Protocol


class TimedProtocol(H11Protocol):
    """A connection is cut if its next request's headers take more than `header_seconds`, or if what was written is not
    read within `write_seconds`."""

    header_seconds: ClassVar[float] = 10.0
    write_seconds: ClassVar[float] = 30.0
    _header_timer: asyncio.TimerHandle | None = None
    _write_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if (client := transport.get_extra_info("socket")) is not None and client.family != socket.AF_UNIX:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self._await_headers()

    def data_received(self, data: bytes) -> None:
        before = self.cycle
        super().data_received(data)
        if self.cycle is not before:  # a request has begun
            self._stop("_header_timer")
        elif (before is None or before.response_complete) and self._header_timer is None:
            self._await_headers()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stop("_write_timer")
        self._write_timer = asyncio.get_running_loop().call_later(self.write_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop("_write_timer")

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._stop("_header_timer")
        self._stop("_write_timer")

    def _await_headers(self) -> None:
        self._header_timer = asyncio.get_running_loop().call_later(self.header_seconds, self._cut)

    def _cut(self) -> None:
        self._header_timer = None
        self.transport.abort()

    def _stop(self, name: str) -> None:
        timer: asyncio.TimerHandle | None = getattr(self, name)
        if timer is not None:
            timer.cancel()
        setattr(self, name, None)


def timed(header_seconds: float, write_seconds: float) -> type[Any]:
    """Return a protocol with these limits: uvicorn makes one object of it for each connection."""
    return type("Timed", (TimedProtocol,), {"header_seconds": header_seconds, "write_seconds": write_seconds})
