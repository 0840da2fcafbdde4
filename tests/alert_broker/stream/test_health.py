"""Requests to the server over real sockets on 127.0.0.1."""

import json
import socket
import threading
import time
from dataclasses import replace
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
from prometheus_client.parser import text_string_to_metric_families

from alert_broker.stream import health as module
from alert_broker.stream.health import CLIENTS, health, readiness, serve
from alert_broker.stream.ledger import Ledger
from alert_broker.stream.stats import Stats
from edgekit.errors import EdgekitError
from tests.alert_broker.stream.sample import busy_stats
from tests.alert_broker.stream.waiting import Stopwatch


def get(port: int, path: str, *, method: str = "GET", timeout: float = 10.0) -> tuple[int, str]:
    try:
        with urlopen(Request(f"http://127.0.0.1:{port}{path}", method=method), timeout=timeout) as answer:
            return answer.status, answer.read().decode()
    except HTTPError as error:
        return error.code, error.read().decode()


@pytest.fixture
def stats() -> Stats:
    return busy_stats()


@pytest.fixture
def server(stats):
    with serve(stats) as found:
        yield found


def test_the_metrics_page_is_served(server):
    with urlopen(f"http://127.0.0.1:{server.port}/metrics?x=1", timeout=5) as answer:
        assert answer.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
        families = {family.name for family in text_string_to_metric_families(answer.read().decode())}
    assert {"edgekit_alerts_consumed", "edgekit_stage_seconds", "process_cpu_seconds"} <= families
    assert get(server.port, "/metrics", method="HEAD") == (200, "")


def test_health_over_http(server, stats):
    status, text = get(server.port, "/healthz")
    assert (status, json.loads(text)["status"]) == (200, "ok")
    server.stuck_after = -1.0  # with a negative limit, any progress age is stuck
    status, text = get(server.port, "/healthz")
    answer = json.loads(text)
    assert (status, answer["status"], answer["lag"], answer["in_flight"]) == (503, "stuck", 42, 12)
    assert "with 42 messages to come and 12 in flight" in answer["reason"]
    stats.lag.clear()
    stats.ledger.add(("ztf", 1), filtered=12)
    assert get(server.port, "/healthz")[0] == 200


@pytest.mark.parametrize(
    ("age", "lag", "in_flight", "good"),
    [
        (59.0, 10, 5, True),
        (61.0, 10, 0, False),
        (61.0, 0, 5, False),
        (61.0, 0, 0, True),
        (1e6, -3, 0, True),  # a broker whose end offset is too low
    ],
)
def test_stuck_is_work_that_waits_without_progress(stats, age, lag, in_flight, good):
    ledger = Ledger()
    ledger.add(("t", 0), consumed=9 + in_flight, published=9)
    now = replace(stats.snapshot(), progress_age=age, lag={("t", 0): lag}, ledger=ledger)
    assert health(now, 60.0)[0] is good


def test_progress_makes_it_healthy_again(stats):
    stats._progress -= 100.0
    assert not health(stats.snapshot(), 60.0)[0]
    stats.progress()
    assert health(stats.snapshot(), 60.0)[0]


def test_ready_once_partitions_and_model_are_there(server, stats):
    assert get(server.port, "/readyz")[0] == 200
    stats.ready = False
    status, text = get(server.port, "/readyz")
    assert (status, json.loads(text)["status"]) == (503, "not ready")
    assert "no partition" in json.loads(text)["reason"]
    stats.models = {}
    assert readiness(stats.snapshot(), 60.0)[1]["reason"] == "no model is loaded yet"


def test_who_is_stuck_is_not_ready(server):
    server.stuck_after = -1.0
    status, text = get(server.port, "/readyz")
    assert (status, json.loads(text)["status"]) == (503, "stuck")


@pytest.mark.parametrize("path", ["/", "/metric", "/metrics/", "/healthz/../metrics", "/%2e%2e/etc/passwd"])
def test_other_paths_are_404(server, path):
    assert get(server.port, path)[0] == 404


def test_other_methods_are_refused(server):
    assert get(server.port, "/healthz", method="POST")[0] == 501
    assert get(server.port, "/healthz")[0] == 200


def exchange(port: int, content: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", port), timeout=10) as client:
        client.sendall(content)
        client.shutdown(socket.SHUT_WR)
        answer = b""
        while more := client.recv(65536):
            answer += more
        return answer


NONSENSE = [
    b"", b"\0" * 100, b"GET", b"\r\n\r\n", b"GET /metrics HTTP/9.9\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc",
    b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 200 + b"\r\n",
]  # fmt: skip


@pytest.mark.parametrize("content", NONSENSE)
def test_nonsense_is_refused_and_does_no_harm(server, content, capfd):
    answer = exchange(server.port, content)
    assert b" 200 " not in answer[:20]
    assert get(server.port, "/healthz")[0] == 200
    assert "Traceback" not in capfd.readouterr().err


def test_a_request_without_end_is_cut_off(server):
    client = socket.create_connection(("127.0.0.1", server.port), timeout=10)
    client.sendall(b"GET /" + b"a" * (module.REQUEST_BYTES + 10))
    answer = client.recv(100)
    assert b" 200 " not in answer  # it was refused, or the connection is closed and the answer is empty
    client.close()


@pytest.fixture
def holding(server):
    """Open three times as many connections as the server has slots; each sends half a request."""
    clients = []
    for _ in range(3 * CLIENTS):
        client = socket.create_connection(("127.0.0.1", server.port), timeout=10)
        client.sendall(b"GET /healthz HT")
        clients.append(client)
    yield clients
    for client in clients:
        client.close()


def test_clients_that_hold_on_keep_no_probe_out(server, monkeypatch, request):
    monkeypatch.setattr(module, "SECONDS_PER_CLIENT", 3600.0)  # no client goes by itself
    before = threading.active_count()
    request.getfixturevalue("holding")
    for _ in range(20):
        assert get(server.port, "/healthz", timeout=60)[0] == 200
    assert threading.active_count() <= before + CLIENTS


def test_without_giving_places_away_the_probe_would_wait(server, monkeypatch, request):
    """The twin: if the server does not disconnect the oldest client, the probe of the test above does wait."""
    monkeypatch.setattr(module, "_hang_up", lambda client: None)
    request.getfixturevalue("holding")
    with pytest.raises(TimeoutError):
        get(server.port, "/healthz", timeout=1)


def dribble(client: socket.socket) -> None:
    """Send a byte again and again, for three seconds at least."""
    for _ in range(60):
        client.sendall(b"G")
        time.sleep(0.05)


def test_a_byte_now_and_then_is_not_enough(server, monkeypatch):
    monkeypatch.setattr(module, "SECONDS_PER_CLIENT", 0.4)
    client = socket.create_connection(("127.0.0.1", server.port), timeout=10)
    with client, pytest.raises(OSError, match=r"reset|pipe"):
        dribble(client)


def test_it_ends_at_once_whoever_is_connected(stats):
    with serve(stats) as server:
        client = socket.create_connection(("127.0.0.1", server.port), timeout=10)
        client.sendall(b"GET /met")
        get(server.port, "/healthz")
        stopwatch, port = Stopwatch(), server.port
    assert stopwatch.seconds() < 1
    assert client.recv(10) == b""  # the server has closed the connection
    client.close()
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", port), timeout=1)


def test_scrapes_while_the_pipeline_writes(server, stats):
    """While the pipeline writes, counters rise and never fall, and every scrape is readable."""
    stop = threading.Event()

    def work() -> None:
        number = 0
        while not stop.is_set():
            number += 1
            stats.ledger.add((f"t{number % 5}", number % 60), consumed=1, published=1)
            stats.lag[f"t{number % 5}", number % 60] = number
            stats.classes[f"class {number % 40}"] += 1
            stats.observe("decode", 0.01)

    worker = threading.Thread(target=work)
    worker.start()
    try:
        seen = []
        for _ in range(10):
            families = text_string_to_metric_families(get(server.port, "/metrics")[1])
            seen.append(
                sum(
                    s.value
                    for f in families
                    if f.name == "edgekit_alerts_published"
                    for s in f.samples
                    if s.name.endswith("total")
                )
            )
    finally:
        stop.set()
        worker.join()
    assert seen == sorted(seen)
    assert seen[-1] > seen[0] >= 1138


def test_a_taken_port_is_one_clear_error(server, stats):
    with (
        pytest.raises(EdgekitError, match=rf"127.0.0.1:{server.port}: Address already in use; choose another"),
        serve(stats, port=server.port),
    ):
        pass
    elsewhere = "192.0.2.1"  # an address that no machine has
    with pytest.raises(EdgekitError, match=rf"on {elsewhere}:0: Cannot assign"), serve(stats, host=elsewhere):
        pass


def test_ipv6(stats):
    if not socket.has_ipv6:
        pytest.skip("this Python has no IPv6")
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError as error:
        pytest.skip(f"no IPv6 here: {error}")
    with serve(stats, "::1") as server, urlopen(f"http://[::1]:{server.port}/healthz", timeout=5) as answer:
        assert answer.status == 200
