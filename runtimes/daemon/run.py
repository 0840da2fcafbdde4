"""Run the daemon: sockets, signals, and uvicorn."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import Callable, Iterator

import uvicorn

from edgekit.errors import EdgekitError
from runtimes.daemon import systemd
from runtimes.daemon.app import Daemon
from runtimes.daemon.config import ServeConfig, is_loopback
from runtimes.daemon.connection import timed
from runtimes.daemon.keys import load as load_keys

LOG = logging.getLogger("edgekit.serve")
LARGEST_HEAD = 32 << 10  # bytes of the headers of a request
KEEP_SECONDS = 5  # that a connection is kept without a request
END_SECONDS = 5  # after server.drain_seconds: to write the errors of answers that have not ended


class Server(uvicorn.Server):
    """uvicorn with the daemon's signals: SIGTERM and SIGINT drain, SIGHUP reloads; a second one ends at once."""

    def __init__(self, config: uvicorn.Config, daemon: Daemon, say: Callable[[str], None]) -> None:
        super().__init__(config)
        self._daemon, self._say = daemon, say

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.drain)
        loop.add_signal_handler(signal.SIGHUP, self._reload)
        try:
            yield
        finally:
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                loop.remove_signal_handler(number)

    def drain(self) -> None:
        """Stop: end idle connections, let answers go on for a while."""
        self.force_exit = self.should_exit
        self.should_exit = True
        self._daemon.stop()

    def _reload(self) -> None:
        systemd.notify("RELOADING=1")
        self._daemon.reload()
        systemd.notify("READY=1")

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if not self.should_exit:
            systemd.notify("READY=1")
            for item in sockets or []:
                self._say(_url(item, bool(self.config.ssl_certfile)))


def serve(
    config: ServeConfig, reread: Callable[[], ServeConfig] | None = None, say: Callable[[str], None] = print
) -> None:
    """Serve until SIGTERM or SIGINT. say: is told the addresses once the daemon is ready."""
    listening = systemd.sockets() or [listen(*config.address())]
    for item in listening:
        check_open(item, config)
    daemon = Daemon(config, reread)
    server = Server(uvicorn_config(daemon, config), daemon, say)
    try:
        server.run(sockets=listening)
    except SystemExit:  # how uvicorn says that the application could not start
        raise EdgekitError(daemon.failed or "the daemon could not start; its log has the reason") from None


def uvicorn_config(daemon: Daemon, config: ServeConfig) -> uvicorn.Config:
    limits, server = config.limits, config.server
    try:
        found = uvicorn.Config(
            daemon,
            http=timed(limits.header_seconds, limits.write_seconds),
            ws="none",
            loop="asyncio",
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            limit_concurrency=limits.connections,
            timeout_keep_alive=KEEP_SECONDS,
            timeout_graceful_shutdown=int(server.drain_seconds) + END_SECONDS,
            h11_max_incomplete_event_size=LARGEST_HEAD,
            ssl_certfile=server.certificate or None,
            ssl_keyfile=server.private_key or None,
        )
        found.load()
    except OSError as error:
        raise EdgekitError(f"server.certificate or server.private_key cannot be used: {error}") from None
    return found


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that is bound to this address."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    found = socket.socket(family, socket.SOCK_STREAM)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((host, port))
    except OSError as error:
        found.close()
        raise EdgekitError(
            f"cannot listen on {host}:{port}: {error.strerror or error}; choose another server.listen, or port 0"
        ) from None
    return found


def check_open(item: socket.socket, config: ServeConfig) -> None:
    """Raise if other machines reach the socket and no key is needed, unless the configuration says so."""
    host = "" if item.family == socket.AF_UNIX else item.getsockname()[0]
    if not host or is_loopback(host):
        return
    if not config.server.without_keys and not load_keys(config.keys):
        item.close()
        raise EdgekitError(
            f"other machines reach {host}, and there are no API keys; make one with `edgekit serve "
            "--new-key NAME` and set keys.file, or set server.without_keys = true"
        )


def _url(item: socket.socket, secure: bool) -> str:
    if item.family == socket.AF_UNIX:
        return f"unix:{item.getsockname()}"
    host, port = item.getsockname()[:2]
    return f"http{'s' * secure}://{f'[{host}]' if ':' in host else host}:{port}"
