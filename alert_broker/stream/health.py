"""A small HTTP server beside the pipeline: `/metrics` for Prometheus, `/healthz` and `/readyz` for the supervisor that
restarts it.

It only reads snapshots. A client has `SECONDS_PER_CLIENT` to send its request and to receive the answer. If `CLIENTS`
are connected, a new client replaces the oldest one, so that nobody can block the probes by keeping connections open.
"""

from __future__ import annotations

import io
import json
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from socketserver import TCPServer, ThreadingMixIn
from threading import BoundedSemaphore, Lock, Thread
from typing import Any

from alert_broker.stream import metrics
from alert_broker.stream.stats import Snapshot, Stats
from edgekit.errors import EdgekitError

CLIENTS, SECONDS_PER_CLIENT, REQUEST_BYTES = 8, 5.0, 16_384
# seconds: several times what a batch may take on a loaded machine, and less than a person would wait
STUCK_AFTER = 120.0
JSON = "application/json"


def health(now: Snapshot, stuck_after: float) -> tuple[bool, dict[str, Any]]:
    """Return whether the pipeline moves, and the answer for the client. It is stuck if there was no progress for
    `stuck_after` seconds while work waits."""
    behind, in_flight = sum(max(lag, 0) for lag in now.lag.values()), now.ledger.total().in_flight
    numbers = {"lag": behind, "in_flight": in_flight, "progress_age": round(now.progress_age, 3), "paused": now.paused}
    if now.progress_age > stuck_after and (behind > 0 or in_flight > 0):
        reason = f"no progress for {now.progress_age:.0f} s with {behind} messages to come and {in_flight} in flight"
        return False, {"status": "stuck", "reason": reason, **numbers}
    return True, {"status": "ok", **numbers}


def readiness(now: Snapshot, stuck_after: float) -> tuple[bool, dict[str, Any]]:
    """Return whether partitions are assigned, the model is loaded and the pipeline moves, and the answer for the
    client."""
    if now.ready:
        if not (stuck := health(now, stuck_after))[0]:
            return stuck
        return True, {"status": "ready", "partitions": len(now.lag), "models": now.models}
    reason = "no partition is assigned" if now.models else "no model is loaded yet"
    return False, {"status": "not ready", "reason": reason}


@contextmanager
def serve(stats: Stats, host: str = "127.0.0.1", port: int = 0, stuck_after: float = STUCK_AFTER) -> Iterator[Server]:
    """Serve on this address (port 0 selects a free port) until the block ends. Raises EdgekitError if the address
    cannot be used."""
    metrics.page(stats.snapshot())  # this reports a missing package at once
    try:
        server = Server(stats, host, port, stuck_after)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise EdgekitError(
            f"metrics cannot be served on {host}:{port}: {reason}; choose another address, or port 0 for a free one"
        ) from None
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.1}, name="health", daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class Server(ThreadingMixIn, TCPServer):
    """The server that `serve` yields. `port` is the port on which it listens."""

    allow_reuse_address = daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    def __init__(self, stats: Stats, host: str, port: int, stuck_after: float) -> None:
        self.stats, self.stuck_after = stats, stuck_after
        self._slots, self._lock = BoundedSemaphore(CLIENTS), Lock()
        self._clients: dict[socket.socket, None] = {}  # oldest first
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, port), _Request)

    @property
    def port(self) -> int:
        return int(self.server_address[1])

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._slots.acquire(blocking=False):
            with self._lock:
                oldest = next(iter(self._clients), None)
                if oldest is not None:
                    _hang_up(oldest)
            self._slots.acquire()  # the oldest client's thread finds its connection closed, and ends
        with self._lock:
            self._clients[request] = None
        try:
            super().process_request(request, client_address)
        except RuntimeError:  # the system cannot start another thread
            self._leave(request)
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._leave(request)

    def _leave(self, client: socket.socket) -> None:
        with self._lock:
            self._clients.pop(client, None)
        self._slots.release()

    def server_close(self) -> None:
        super().server_close()
        with self._lock:
            for client in self._clients:
                _hang_up(client)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore a client that closed its connection. Any other error is a bug of edgekit, and its traceback goes to
        the log."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


def _hang_up(client: socket.socket) -> None:
    with suppress(OSError):
        client.shutdown(socket.SHUT_RDWR)


class _Request(BaseHTTPRequestHandler):
    """One request per connection. The whole request is read before it is parsed, because http.server's time limit is
    for each byte."""

    server: Server
    server_version, sys_version = "edgekit", ""

    def setup(self) -> None:
        super().setup()
        until, head = time.monotonic() + SECONDS_PER_CLIENT, b""
        while b"\r\n\r\n" not in head and b"\n\n" not in head and len(head) < REQUEST_BYTES:
            self.connection.settimeout(max(until - time.monotonic(), 1e-3))
            more = self.connection.recv(REQUEST_BYTES)
            if not more:
                break
            head += more
        self.rfile = io.BytesIO(head)
        self.connection.settimeout(max(until - time.monotonic(), 1.0))  # for all of the answer

    def do_GET(self) -> None:
        now, path = self.server.stats.snapshot(), self.path.partition("?")[0]
        good, content_type = True, JSON
        if path == "/metrics":
            content, content_type = metrics.page(now), metrics.CONTENT_TYPE
        elif path in ("/healthz", "/readyz"):
            good, answer = (health if path == "/healthz" else readiness)(now, self.server.stuck_after)
            content = json.dumps(answer).encode() + b"\n"
        else:
            self.send_error(HTTPStatus.NOT_FOUND, explain="The server has /metrics, /healthz and /readyz.")
            return
        self.send_response(HTTPStatus.OK if good else HTTPStatus.SERVICE_UNAVAILABLE)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def do_HEAD(self) -> None:
        self.do_GET()

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing, because probes come every few seconds."""
