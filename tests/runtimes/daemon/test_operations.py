"""Keys, limits, probes, metrics, and what a hostile or a slow client can do."""

import dataclasses
import hashlib
import json
import socket
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from edgekit.errors import EdgekitError
from runtimes.daemon import keys
from runtimes.daemon.config import KeySettings, ModelSettings
from runtimes.daemon.keys import Keys
from runtimes.daemon.refusal import RefusedError
from tests.runtimes.daemon.test_infer import asked
from tests.runtimes.daemon.test_openai import CHAT, LONG

# --- keys


def test_a_key_is_stored_as_its_hash():
    key, line = keys.new_key("telescope")
    assert line == f"telescope:{hashlib.sha256(key.encode()).hexdigest()}"
    assert len(key) > 40
    assert keys.new_key("telescope")[0] != key
    with pytest.raises(EdgekitError, match="the name 'a b'"):
        keys.new_key("a b")


def test_keys_come_from_a_file_and_the_environment(tmp_path, monkeypatch):
    (first, one), (_, two) = keys.new_key("one"), keys.new_key("two")
    (tmp_path / "keys").write_text(f"# of the telescope\n{one}\n\n")
    monkeypatch.setenv(keys.VARIABLE, f"{two},")
    found = keys.load(KeySettings(file=str(tmp_path / "keys")))
    assert sorted(found) == ["one", "two"]
    assert Keys(found).check(f"Bearer {first}") == "one"


@pytest.mark.parametrize("text", ["one", "one:abc", "one:" + "g" * 64, ":" + "0" * 64, "ek_secret"])
def test_a_line_that_is_none_is_refused_and_not_shown(tmp_path, text):
    (tmp_path / "keys").write_text(f"{text}\n")
    with pytest.raises(EdgekitError, match="line 1: expected NAME:HASH") as found:
        keys.load(KeySettings(file=str(tmp_path / "keys")))
    assert "secret" not in str(found.value)


def test_a_file_that_everybody_may_write_is_refused(tmp_path):
    path = tmp_path / "keys"
    path.write_text("")
    path.chmod(0o666)
    with pytest.raises(EdgekitError, match="every user may write"):
        keys.load(KeySettings(file=str(path)))
    with pytest.raises(EdgekitError, match="No such file"):
        keys.load(KeySettings(file=str(tmp_path / "none")))


def test_a_key_is_checked():
    (key, line), other = keys.new_key("one"), keys.new_key("two")[0]
    found = Keys(dict([line.split(":")]))
    assert found.check(f"bearer {key}") == "one"
    for header in (None, "", key, f"Basic {key}", "Bearer ", f"Bearer {other}", f"Bearer {key}x", "Bearer \ud800"):
        with pytest.raises(RefusedError) as refused:
            found.check(header)
        assert refused.value.status == 401
    assert Keys({}).check(None) == ""


def test_a_key_has_its_requests_in_a_minute():
    now = [0.0]
    (first, one), (second, two) = keys.new_key("one"), keys.new_key("two")
    found = Keys(dict([one.split(":"), two.split(":")]), per_minute=3, clock=lambda: now[0])
    for _ in range(3):
        found.check(f"Bearer {first}")
    with pytest.raises(RefusedError, match="more than 3") as refused:
        found.check(f"Bearer {first}")
    assert (refused.value.status, refused.value.retry_after) == (429, 21)
    assert found.check(f"Bearer {second}") == "two"
    now[0] = 20.0
    assert found.check(f"Bearer {first}") == "one"
    with pytest.raises(RefusedError):
        found.check(f"Bearer {first}")
    now[0] = 1e6
    for _ in range(3):
        found.check(f"Bearer {first}")


def test_a_server_with_keys_serves_nobody_else(start, tmp_path):
    key, line = keys.new_key("one")
    (tmp_path / "keys").write_text(line)
    with start(keys=KeySettings(file=str(tmp_path / "keys"), requests_per_minute=6)) as running:
        for path in ("/v1/models", "/stats", "/metrics", "/v2/models/tiny", "/v2", "/none"):
            assert running.get(path).refused(401, "API key")
        assert running.get("/v1/models").headers["www-authenticate"] == "Bearer"
        for path in ("/", "/healthz", "/readyz", "/v2/health/live"):
            assert running.get(path).status == 200
        allowed = {"Authorization": f"Bearer {key}"}
        statuses = [running.get("/v1/models", headers=allowed).status for _ in range(7)]
        assert statuses == [200] * 6 + [429]
        assert int(running.get("/v1/models", headers=allowed).headers["retry-after"]) <= 11


# --- browsers


def test_a_page_of_another_site_cannot_use_the_server(running):
    assert running.post("/v1/chat/completions", CHAT, headers={"Origin": "https://evil.example"}).refused(
        403, "page of"
    )
    assert running.post("/v1/chat/completions", CHAT, headers={"Origin": "null"}).refused(403, "page of")
    assert running.get("/v1/models", headers={"Host": "evil.example"}).refused(403, "server.hosts")
    assert running.get("/v1/models", headers={"Host": f"evil.example:{running.port}"}).refused(403, "evil.example")
    assert running.post("/v1/chat/completions", CHAT, headers={"Content-Type": "text/plain"}).refused(415, "text/plain")
    own = {"Host": f"localhost:{running.port}", "Origin": f"http://localhost:{running.port}"}
    assert running.get("/v1/models", headers=own).status == 200
    assert running.get("/v1/models", headers={"Host": "[::1]:80"}).status == 200
    assert "access-control-allow-origin" not in running.get("/v1/models").headers


def test_hosts_can_be_added(start):
    with start(server={"hosts": ("box.local",)}) as running:
        assert running.get("/v1/models", headers={"Host": "box.local"}).status == 200
        assert running.get("/v1/models", headers={"Host": "other.local"}).status == 403


# --- limits


def raw(running, *parts, wait=0.0, timeout=20):
    """Send bytes, and return what comes until the server ends the connection."""
    with socket.create_connection(("127.0.0.1", running.port), timeout=timeout) as connection:
        for part in parts:
            connection.sendall(part)
            time.sleep(wait)
        found = b""
        try:
            while more := connection.recv(65536):
                found += more
        except ConnectionResetError:
            pass
        return found


HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


@pytest.fixture(scope="module")
def strict(start):
    """A server with tight limits."""
    limits = {"body": "100KB", "body_seconds": 0.5, "header_seconds": 0.7, "write_seconds": 1.0, "connections": 12}
    with start(limits=limits) as found:
        yield found


def test_a_body_is_bounded(strict):
    assert strict.post("/v1/chat/completions", b"x" * 100_001).refused(413, "limits.body is 100000")
    chunked = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
    found = raw(strict, chunked + (b"4000\r\n" + b"x" * 0x4000 + b"\r\n") * 10)
    assert found.startswith(b"HTTP/1.1 413")
    assert b"connection: close" in found.lower()
    assert strict.post("/v2/models/tiny/infer", b"x" * 100_001).refused(413, "limits.body")
    assert strict.post("/v1/chat/completions", b"{}", headers={"Content-Encoding": "gzip"}).refused(415, "compressed")


def test_a_body_that_does_not_end_is_cut(strict):
    started = time.monotonic()
    found = raw(strict, HEAD + b"Content-Length: 1000\r\n\r\n{")
    assert found.startswith(b"HTTP/1.1 408")
    assert b"was not complete after 0.5 s" in found
    assert 0.3 < time.monotonic() - started < 5


def test_headers_that_do_not_end_are_cut(strict):
    for start in (b"", b"POST /v1/chat", HEAD):
        started = time.monotonic()
        assert raw(strict, start) == b""
        assert 0.5 < time.monotonic() - started < 5
    found = raw(strict, b"GET / HTTP/1.1\r\nx: " + b"y" * 100_000)
    assert found.startswith(b"HTTP/1.1 400") or found == b""


def test_what_is_no_http_is_refused(strict):
    for start in (b"\x16\x03\x01\x02\x00\x01\x00\n\r\n\r\n", b"GET\r\n\r\n", b"\0" * 100 + b"\r\n\r\n"):
        assert raw(strict, start).startswith(b"HTTP/1.1 400") or raw(strict, start) == b""
    assert strict.get("/healthz").status == 200


def test_connections_are_bounded(strict):
    held = [socket.create_connection(("127.0.0.1", strict.port)) for _ in range(14)]
    try:
        assert strict.get("/healthz").status == 503
    finally:
        for item in held:
            item.close()
    until = time.monotonic() + 5
    while strict.get("/healthz").status != 200:
        assert time.monotonic() < until


def test_a_client_that_does_not_read_is_disconnected(strict):
    """A stream of answers fills the buffers of both sides; then the server waits for `write_seconds`."""

    body = json.dumps({**LONG, "stream": True, "logprobs": True, "top_logprobs": 20, "n": 8}).encode()
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect(("127.0.0.1", strict.port))
    connection.sendall(HEAD + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
    until = time.monotonic() + 60
    while strict.daemon.stats.snapshot(["toy"])[0]["toy"].tokens < 8 * 20:
        assert time.monotonic() < until
        time.sleep(0.05)
    assert strict.settled(seconds=60)
    protocols = list(strict.server.server_state.connections)
    until = time.monotonic() + 20
    while strict.server.server_state.connections:
        assert time.monotonic() < until, protocols
        time.sleep(0.05)
    connection.close()


# --- probes, metrics


def test_metrics_count(start):
    with start() as running:
        assert running.post("/v1/chat/completions", CHAT).status == 200
        assert running.post("/v1/chat/completions", {**CHAT, "n": 0}).status == 400
        assert running.post("/v2/models/tiny/infer", asked(np.zeros((2, 12, 2), np.float32))).status == 200
        running.get("/some/thing")
        running.get("/other/thing")
        page = running.get("/metrics")
        assert page.headers["content-type"].startswith("text/plain; version=0.0.4")
        found = {
            (sample.name, *sorted(sample.labels.values())): sample.value
            for family in text_string_to_metric_families(page.content.decode())
            for sample in family.samples
        }
        assert found["edgekit_serve_requests_total", "/v1/chat/completions", "200"] == 1
        assert found["edgekit_serve_requests_total", "/v1/chat/completions", "400"] == 1
        assert found["edgekit_serve_requests_total", "404", "other"] == 2
        assert found["edgekit_serve_requests_total", "/v2/models/{name}/infer", "200"] == 1
        assert found["edgekit_serve_tokens_total", "toy"] == 8
        assert found["edgekit_serve_first_token_seconds_count", "toy"] == 1
        assert found["edgekit_serve_between_tokens_seconds_count", "toy"] == 7
        assert found["edgekit_serve_answers_total", "length", "toy"] == 1
        assert found["edgekit_serve_batch_sum", "tiny"] == 2
        assert found["edgekit_serve_blocks", "toy", "used"] == 0
        assert found["edgekit_serve_blocks", "free", "toy"] == 128
        assert found["edgekit_serve_loaded", "toy"] == 1
        assert found["edgekit_ready",] == 1
        assert found["process_open_fds",] > 0
        stats = running.get("/stats").json
        assert stats["models"]["toy"]["tokens"] == 8
        assert stats["models"]["toy"]["blocks"] == {"used": 0, "total": 128}
        assert stats["state"] == "ready"
        assert stats["memory"]["models_bytes"] == sum(item["needs_bytes"] for item in stats["models"].values())


def test_a_step_that_does_not_end_is_not_healthy(start, monkeypatch):
    monkeypatch.setattr("runtimes.daemon.app.STUCK_AFTER", 0.3)
    with start() as running:
        running.post("/v1/chat/completions", CHAT)
        engine, hold = running.queue().engine, threading.Event()
        step = engine.step
        monkeypatch.setattr(engine, "step", lambda *arguments: hold.wait(30) and step(*arguments))
        thread = threading.Thread(target=running.post, args=("/v1/chat/completions", CHAT))
        thread.start()
        until = time.monotonic() + 20
        while (answer := running.get("/healthz")).status == 200:
            assert time.monotonic() < until
            time.sleep(0.05)
        assert "toy has computed one step" in answer.json["reason"]
        assert running.get("/readyz").status == 503
        hold.set()
        thread.join()
        while running.get("/readyz").status == 503:
            assert time.monotonic() < until
            time.sleep(0.05)


def test_a_step_that_fails_ends_its_answers_and_no_others(start, monkeypatch):
    with start() as running:
        running.post("/v1/chat/completions", CHAT)
        engine = running.queue().engine
        with monkeypatch.context() as patch:
            patch.setattr(engine, "step", lambda *arguments: 1 / 0)
            answer = running.post("/v1/chat/completions", CHAT)
            assert answer.refused(500, "its log has the reason")
            assert b"division" not in answer.content
        assert running.post("/v1/chat/completions", CHAT).status == 200
        assert running.settled()


# --- models


def test_an_idle_model_is_dropped_and_loaded_again(start, model_files):
    models = {"toy": ModelSettings(path=str(model_files[0]), engine="torch", context=512, idle_seconds=0.5)}
    with start(models=models) as running:
        entry = running.daemon.models.entries["toy"]
        first = running.post("/v1/chat/completions", CHAT).json["choices"]
        until = time.monotonic() + 15
        while entry.loaded is not None:
            assert time.monotonic() < until
            time.sleep(0.05)
        assert entry.state == "not loaded"
        assert running.post("/v1/chat/completions", CHAT).json["choices"] == first
        assert running.get("/stats").json["models"]["toy"]["loads"] == 2


def test_a_model_in_use_is_not_dropped(start, model_files, monkeypatch):
    models = {"toy": ModelSettings(path=str(model_files[0]), engine="torch", context=512, idle_seconds=0.1)}
    with start(models=models) as running:
        running.slow_down(monkeypatch)
        assert running.post("/v1/chat/completions", {**LONG, "max_tokens": 50}).json["usage"]["completion_tokens"] == 50


def test_memory_is_admitted_before_loading(start):
    with start(server={"memory": "70MB"}) as running:
        answer = running.post("/v1/chat/completions", CHAT)
        assert answer.refused(507, "MB of weights", "MB of cache", "MB of workspace", "= ", "server.memory")
        assert running.daemon.models.entries["toy"].loaded is None
        assert running.get("/v2/models/toy/ready").refused(503, "cannot be loaded")
        assert running.get("/stats").json["models"]["toy"]["state"] == "failed"


def test_an_idle_model_makes_room_for_another(start, monkeypatch):
    with start(server={"memory": "100MB"}) as running:
        assert running.post("/v2/models/tiny/infer", asked(np.zeros((1, 12, 2), np.float32))).status == 200
        tiny, toy = (running.daemon.models.entries[name] for name in ("tiny", "toy"))
        assert running.post("/v1/chat/completions", CHAT).status == 200
        assert tiny.loaded is None
        running.slow_down(monkeypatch)

        long = threading.Thread(target=running.post, args=("/v1/chat/completions", {**LONG, "max_tokens": 90}))
        long.start()
        while not toy.loaded.queue.job.scheduler.busy:
            time.sleep(0.01)
        answer = running.post("/v2/models/tiny/infer", asked(np.zeros((1, 12, 2), np.float32)))
        assert answer.refused(503, "other models are in use")
        assert answer.headers["retry-after"] == "10"
        long.join()


def test_a_damaged_model_is_an_error_of_the_server_with_its_reason(start, tmp_path):
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + bytes(20))
    with start(models={"bad": ModelSettings(path=str(tmp_path / "bad.gguf"))}) as running:
        assert running.post("/v1/chat/completions", {**CHAT, "model": "bad"}).refused(503, "bad.gguf")
        assert running.post("/v1/chat/completions", CHAT).status == 200


def descriptors():
    return len([*Path("/proc/self/fd").iterdir()])


def test_no_descriptor_and_no_process_stays(start):
    with start() as running:
        running.post("/v1/chat/completions", CHAT)
        before = descriptors()
        for _ in range(20):
            running.post("/v1/chat/completions", CHAT)
            running.post("/v1/chat/completions", b"{")
        time.sleep(0.2)
        assert descriptors() <= before + 1
        process = running.daemon.models.entries["toy"].loaded.templates._process
    assert process.poll() is not None


def test_a_model_that_is_in_use_can_be_replaced(start, model_files, monkeypatch):
    """Requests that run keep the old one; new ones get the new one, at the same time."""
    with start() as running:
        running.slow_down(monkeypatch)
        old = running.queue()
        answers = []
        long = threading.Thread(
            target=lambda: answers.append(running.post("/v1/chat/completions", {**LONG, "max_tokens": 100}))
        )
        long.start()
        while not old.job.scheduler.busy:
            time.sleep(0.01)
        config = running.daemon.config
        models = {"toy": ModelSettings(path=str(model_files[0]), engine="torch", context=512)}
        running.call(lambda: running.daemon.models.reload(dataclasses.replace(config, models=models)))
        assert running.post("/v1/chat/completions", CHAT).status == 200
        assert running.queue().engine.blocks.number == 32
        assert long.is_alive()
        long.join()
        assert answers[0].json["usage"]["completion_tokens"] == 100
        assert running.get("/v2/models/tiny").refused(404, "unknown model")
        until = time.monotonic() + 10
        while running.daemon.models._leaving:
            assert time.monotonic() < until
            time.sleep(0.05)
