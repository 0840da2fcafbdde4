"""The application: its routes, and what runs beside them as long as it does."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import logging
import re
from collections.abc import Callable
from contextlib import suppress
from importlib.resources import files

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route, Router
from starlette.types import ASGIApp, Receive, Scope, Send

from edgekit.bundle.bounded import parse_size
from edgekit.errors import EdgekitError
from runtimes import exposition
from runtimes.daemon import keys, metrics, openapi, systemd
from runtimes.daemon.access import Access, hosts_for
from runtimes.daemon.alerts_job import AlertProcess
from runtimes.daemon.config import ServeConfig
from runtimes.daemon.inference_api import Inference
from runtimes.daemon.models import Models
from runtimes.daemon.openai_api import OpenAi
from runtimes.daemon.refusal import RefusedError, stopping
from runtimes.daemon.stats import Stats

LOG = logging.getLogger("edgekit.serve")
STUCK_AFTER = 120.0  # seconds of one step: several times what one takes on a loaded machine
OTHER = "other"  # the route of a path that is none


class Daemon:
    """An application of ASGI. reread: returns the configuration as its file is now, for `reload`."""

    def __init__(
        self, config: ServeConfig, reread: Callable[[], ServeConfig] | None = None, models: Models | None = None
    ) -> None:
        self.config, self._reread = config, reread
        self.stats = Stats()
        self.models = models or Models(config, self.stats)
        self.alerts = AlertProcess(config.alerts) if config.alerts.config else None
        self.draining, self.failed = False, ""  # why it could not start
        self._keys = _keys(config)
        most = parse_size(config.limits.body, "limits.body")
        self._router = Router(self._routes(most))
        self._paths = {route.path: route for route in self._router.routes if isinstance(route, Route)}
        hosts = hosts_for(config.address()[0], config.server.hosts)
        self._app: ASGIApp = Access(
            self._router,
            keys=lambda: self._keys,
            hosts=hosts,
            stopping=lambda: self.draining,
            route=self._route,
            stats=self.stats,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._live(receive, send)
        else:
            await self._app(scope, receive, send)

    @property
    def state(self) -> str:
        return "stopping" if self.draining else "ready"

    def stop(self) -> None:
        """Take no new requests. Answers that run go on for server.drain_seconds; then they end with an error."""
        if not self.draining:
            self.draining = True
            systemd.notify("STOPPING=1")
            loop = asyncio.get_running_loop()
            loop.call_later(self.config.server.drain_seconds, self.models.end_all, stopping())

    def reload(self) -> None:
        """Read keys and models again. If the file cannot be used, nothing changes, and the log says why."""
        if self._reread is None:
            return
        try:
            config = self._reread()
            found = _keys(config)
        except (EdgekitError, OSError) as error:
            LOG.error("the configuration was not reloaded, the old one holds: %s", error)
            return
        fixed = [name for name in ("server", "limits", "alerts") if getattr(config, name) != getattr(self.config, name)]
        if fixed:
            LOG.warning("changes in [%s] need a restart", "] and [".join(fixed))
        self._keys = found
        self.models.reload(config)
        LOG.info("reloaded %d models and %d keys", len(config.models), len(found.hashes))

    def _routes(self, most: int) -> list[Route]:
        openai, inference = (of(self.models, self.config.limits, most) for of in (OpenAi, Inference))
        assert isinstance(openai, OpenAi)
        assert isinstance(inference, Inference)
        model = "/v2/models/{name}"
        versioned = f"{model}/versions/{{version}}"
        post = ["POST"]
        return [
            Route("/", self._page),
            Route("/healthz", self._health),
            Route("/readyz", self._ready),
            Route("/metrics", self._metrics),
            Route("/metrics/alerts", self._alert_metrics),
            Route("/stats", self._stats),
            Route("/openapi.json", self._openapi),
            Route("/v1/models", openai.list_models),
            Route("/v1/models/{name}", openai.one_model),
            Route("/v1/chat/completions", openai.chat, methods=post),
            Route("/v1/completions", openai.complete, methods=post),
            Route("/v1/embeddings", openai.embed, methods=post),
            Route("/v2", inference.server),
            Route("/v2/health/live", self._health),
            Route("/v2/health/ready", self._ready),
            *(Route(path, inference.model) for path in (model, versioned)),
            *(Route(f"{path}/ready", inference.ready) for path in (model, versioned)),
            *(Route(f"{path}/infer", inference.infer, methods=post) for path in (model, versioned)),
        ]

    def _route(self, path: str) -> str:
        """Return the pattern of a path, so that metrics have few labels."""
        if path in self._paths:
            return path
        return next((name for name, route in self._paths.items() if route.path_regex.match(path)), OTHER)

    async def _live(self, receive: Receive, send: Send) -> None:
        """Start what runs beside the routes, and end it when the server does."""
        await receive()
        LOG.info("language models share the machine by %s", self.models.placement)
        tasks = [asyncio.create_task(work) for work in (self.models.drop_idle(), self._watchdog())]
        try:
            await self._run_beside(receive, send)
        finally:  # also after a second signal, when uvicorn cancels this task
            if self.alerts is not None:
                await asyncio.to_thread(self.alerts.stop)
            for task in tasks:
                task.cancel()
                with suppress(asyncio.CancelledError):
                    await task
            await self.models.close()
        if not self.failed:
            await send({"type": "lifespan.shutdown.complete"})

    async def _run_beside(self, receive: Receive, send: Send) -> None:
        try:
            await self.models.load_first()
        except RefusedError as error:
            self.failed = str(error)
            await send({"type": "lifespan.startup.failed", "message": self.failed})
            return
        if self.alerts is not None:
            self.alerts.start()
        await send({"type": "lifespan.startup.complete"})
        await receive()

    async def _watchdog(self) -> None:
        """Tell systemd that the daemon lives, as long as no step of a model takes too long."""
        seconds = systemd.watchdog_seconds()
        while seconds is not None:
            if not self.models.stuck(STUCK_AFTER):
                systemd.notify("WATCHDOG=1")
            await asyncio.sleep(seconds / 2)

    # --- routes

    async def _page(self, request: Request) -> Response:
        return Response(PAGE, media_type="text/html", headers={"Content-Security-Policy": _policy(PAGE)})

    async def _health(self, request: Request) -> Response:
        if reason := self.models.stuck(STUCK_AFTER):
            return JSONResponse({"status": "stuck", "reason": reason}, 503)
        return JSONResponse({"status": "ok"})

    async def _ready(self, request: Request) -> Response:
        if self.draining or (reason := self.models.stuck(STUCK_AFTER)):
            return JSONResponse({"status": "not ready", "reason": "it stops" if self.draining else reason}, 503)
        return JSONResponse({"status": "ready", "keys": bool(self._keys.hashes)})

    async def _metrics(self, request: Request) -> Response:
        page = exposition.page(metrics.Page(self.models, self.stats, not self.draining))
        return Response(page, headers={"Content-Type": exposition.CONTENT_TYPE})

    async def _alert_metrics(self, request: Request) -> Response:
        if self.alerts is None:
            raise RefusedError(404, "this daemon has no alerts; name the consumer's file in alerts.config")
        if not (page := await asyncio.to_thread(self.alerts.metrics)):
            raise RefusedError(503, "the consumer of alerts does not answer now", code="not_running", retry_after=5)
        return Response(page, headers={"Content-Type": exposition.CONTENT_TYPE})

    async def _openapi(self, request: Request) -> Response:
        names: dict[str, list[str]] = {"language": [], "tensors": []}
        for name, entry in self.models.entries.items():
            names[entry.task].append(name)
        most = self.config.limits.answers
        found = openapi.document(names["language"], names["tensors"], most, keys=bool(self._keys.hashes))
        return JSONResponse(found)

    async def _stats(self, request: Request) -> Response:
        found = metrics.as_json(self.models, self.stats, self.state)
        found["placement"] = str(self.models.placement)
        if self.alerts is not None:
            found["alerts"] = await asyncio.to_thread(self.alerts.status)
        return JSONResponse(found)


def _keys(config: ServeConfig) -> keys.Keys:
    return keys.Keys(keys.load(config.keys), config.keys.requests_per_minute)


PAGE = files(__package__).joinpath("page.html").read_text()


def _policy(page: str) -> str:
    """Return what the page may do: run its own script and style, and ask this server. Nothing from elsewhere."""

    def hashes(tag: str) -> str:
        found = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.S)
        return " ".join(
            f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" for text in found
        )

    return (
        f"default-src 'none'; script-src {hashes('script')}; style-src {hashes('style')}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
