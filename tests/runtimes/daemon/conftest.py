"""A daemon in this process, with a small language model and a small bundle; and one in a process of its own."""

import asyncio
import contextlib
import http.client
import json
import os
import re
import subprocess
import sys
import threading
import time

import pytest

pytest.importorskip("starlette", reason="pip install 'edgekit[serve]'")
pytest.importorskip("uvicorn", reason="pip install 'edgekit[serve]'")

from edgekit.bundle.store import write_bundle
from runtimes.daemon.app import Daemon
from runtimes.daemon.config import LimitSettings, ModelSettings, ServeConfig, ServerSettings
from runtimes.daemon.run import Server, listen, uvicorn_config
from tests.gguf_files import toy_model
from tests.runtimes.llm.conftest import toy

__all__ = ["toy"]


class Running:
    """A daemon in a thread of this process, and a client."""

    def __init__(self, config):
        self.daemon = Daemon(config)
        self.socket = listen("127.0.0.1", 0)
        self.port = self.socket.getsockname()[1]
        self.server = Server(uvicorn_config(self.daemon, config), self.daemon, lambda text: None)
        self.server.capture_signals = contextlib.nullcontext  # signals belong to the main thread
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()
        while not self.server.started:
            assert self.thread.is_alive()
            time.sleep(0.01)

    def run(self):
        self.runner = asyncio.Runner()
        self.runner.run(self.server.serve(sockets=[self.socket]))
        self.runner.close()

    def call(self, function):
        """Call a function in the event loop."""

        async def called():
            return function()

        return asyncio.run_coroutine_threadsafe(called(), self.runner.get_loop()).result(10)

    def stop(self):
        if self.thread.is_alive():
            self.call(self.server.drain)
            self.thread.join(20)
            assert not self.thread.is_alive()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}"

    def request(self, method, path, body=None, headers=None, timeout=60):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        try:
            content = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
            connection.request(method, path, content, {"Content-Type": "application/json", **(headers or {})})
            answer = connection.getresponse()
            return Answer(answer.status, dict(answer.getheaders()), answer.read())
        finally:
            connection.close()

    def get(self, path, **options):
        return self.request("GET", path, **options)

    def post(self, path, body, **options):
        return self.request("POST", path, body, **options)

    def queue(self, name="toy"):
        return self.daemon.models.entries[name].loaded.queue

    def settled(self, name="toy", seconds=10):
        """Whether a language model has no answer, and all blocks of its cache are free."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            queue = self.queue(name)
            if (
                not queue.held
                and queue.engine.blocks.free == queue.engine.blocks.number
                and not queue.job.scheduler.busy
            ):
                return True
            time.sleep(0.02)
        return False

    def slow_down(self, monkeypatch, name="toy", seconds=0.02):
        """Let each step of a language model take at least this time."""
        self.post("/v1/completions", {"model": name, "prompt": "a", "max_tokens": 1})
        engine = self.queue(name).engine
        step = engine.step

        def slowly(*arguments):
            time.sleep(seconds)
            return step(*arguments)

        monkeypatch.setattr(engine, "step", slowly)


class Answer:
    def __init__(self, status, headers, content):
        self.status, self.headers, self.content = status, {k.lower(): v for k, v in headers.items()}, content

    @property
    def json(self):
        return json.loads(self.content)

    def refused(self, status, *words):
        """One line for a person, in OpenAI's form or the inference protocol's."""
        assert self.status == status, (self.status, self.content[:500])
        error = self.json["error"]
        message = error if isinstance(error, str) else error["message"]
        assert "\n" not in message
        assert len(message) < 700
        assert all(word in message for word in words), (words, message)
        if not isinstance(error, str):
            assert set(error) == {"message", "type", "param", "code"}
        return True


@pytest.fixture(scope="session")
def model_files(tmp_path_factory, tiny_bundle):
    """The paths of a small language model and of a small bundle."""
    folder = tmp_path_factory.mktemp("served")
    write_bundle(tiny_bundle, folder / "tiny.edge")
    return toy_model(folder), folder / "tiny.edge"


@pytest.fixture(scope="session")
def serve_config(model_files):
    """serve_config(...): a configuration of both models; limits, server: what differs from the defaults."""

    def make(limits=None, server=None, models=None, **others):
        toy, tiny = model_files
        found = {
            "toy": ModelSettings(path=str(toy), engine="torch", context=2048),
            "tiny": ModelSettings(path=str(tiny), runtime="torch", batch_seconds=0.02),
        }
        return ServeConfig(
            ServerSettings(listen="127.0.0.1:0", **(server or {})),
            limits=LimitSettings(**(limits or {})),
            models=found | (models or {}),
            **others,
        ).check()

    return make


@pytest.fixture(scope="session")
def start(serve_config):
    """start(...): a running daemon, as a context manager."""

    @contextlib.contextmanager
    def run(**options):
        found = Running(serve_config(**options))
        try:
            yield found
        finally:
            found.stop()

    return run


@pytest.fixture(scope="module")
def running(start):
    with start() as found:
        yield found


@contextlib.contextmanager
def process(*arguments, environment=None, pass_fds=(), cwd=None):
    """`edgekit serve` in a process of its own; its port is read from what it prints."""
    command = [sys.executable, "-c", "from edgekit.cli import main; main()", "serve", *map(str, arguments)]
    with subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        pass_fds=pass_fds,
        cwd=cwd,
        env={**os.environ, **(environment or {})},
    ) as found:
        try:
            lines = []
            for line in found.stderr:
                lines.append(line)
                if match := re.search(r"at https?://[^:]+:(\d+)", line):
                    yield found, int(match[1])
                    break
            else:
                raise AssertionError("".join(lines))
        finally:
            found.kill()


@pytest.fixture
def slow(running, monkeypatch):
    running.slow_down(monkeypatch)
