"""The Open Inference Protocol v2: what the clients of Triton and KServe speak, for every bundle."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from edgekit import __version__
from runtimes.daemon import tensors
from runtimes.daemon.access import read_body
from runtimes.daemon.config import LimitSettings
from runtimes.daemon.models import Models
from runtimes.daemon.openai_api import BODY_IN_LOOP, CLOSED
from runtimes.daemon.refusal import RefusedError

VERSION = "1"  # of every model: the configuration names one file for each


class Inference:
    """The routes. most: bytes of a body."""

    def __init__(self, models: Models, limits: LimitSettings, most: int) -> None:
        self._models, self._limits, self._most = models, limits, most

    async def server(self, request: Request) -> Response:
        return JSONResponse({"name": "edgekit", "version": __version__, "extensions": ["binary_tensor_data"]})

    async def model(self, request: Request) -> Response:
        """Describe a model, which is loaded for that."""
        name = _name(request)
        async with self._models.tensors(name) as loaded:
            session = loaded.queue.session
            return JSONResponse(
                {
                    "name": name,
                    "versions": [VERSION],
                    "platform": f"edgekit_{session.provider}",
                    "inputs": [tensors.described(spec) for spec in session.inputs],
                    "outputs": [tensors.described(spec) for spec in session.outputs],
                }
            )

    async def ready(self, request: Request) -> Response:
        """A model is ready if it can be loaded on demand; only one that has failed to load is not."""
        entry = self._models.find(_name(request))
        if entry.state == "failed":
            raise RefusedError(503, f"the model {entry.name!r} cannot be loaded: {entry.error}")
        return JSONResponse({"name": entry.name, "ready": True})

    async def infer(self, request: Request) -> Response:
        name = _name(request)
        self._models.find(name, "tensors")
        content = await read_body(request, self._most, self._limits.body_seconds)
        header = request.headers.get(tensors.HEADER)
        asked = (
            tensors.read(content, header)
            if len(content) < BODY_IN_LOOP
            else await asyncio.to_thread(tensors.read, content, header)
        )
        until = time.monotonic() + min(self._limits.answer_seconds, asked.deadline or self._limits.answer_seconds)
        async with self._models.tensors(name) as loaded:
            tensors.check_outputs(asked, loaded.queue.session.outputs)
            running = asyncio.wrap_future(loaded.queue.submit(asked.arrays, until))
            watch = asyncio.ensure_future(_gone(request))
            done, _ = await asyncio.wait((running, watch), return_when=asyncio.FIRST_COMPLETED)
            watch.cancel()
            if running not in done:
                running.cancel()
                return Response(status_code=CLOSED)
            found = running.result()
        body, head = await asyncio.to_thread(tensors.write, name, asked, found)
        if head is None:
            return Response(body, media_type="application/json")
        headers = {"Inference-Header-Content-Length": str(head)}
        return Response(body, media_type="application/octet-stream", headers=headers)


async def _gone(request: Request) -> None:
    """Return when the client has gone. The body was read, so that nothing else can come."""
    receive: Any = request.receive
    while (await receive())["type"] != "http.disconnect":
        pass


def _name(request: Request) -> str:
    """Return the name of the model in the path."""
    version = request.path_params.get("version", VERSION)
    if version != VERSION:
        raise RefusedError(404, f"version {version[:40]!r} of a model; every model has one version, {VERSION}")
    name: str = request.path_params["name"]
    return name
