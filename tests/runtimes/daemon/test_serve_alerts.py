"""The daemon beside the alerts: it supervises the consumer, shows its numbers, and chooses a placement."""

import asyncio
import sys
import textwrap

import pytest
from starlette.testclient import TestClient

from edgekit.errors import EdgekitError
from runtimes.daemon.alerts_job import AlertProcess, AlertSettings
from runtimes.daemon.app import Daemon
from runtimes.daemon.config import ModelSettings, ServeConfig, load
from runtimes.daemon.models import Models
from runtimes.daemon.stats import Stats

CONSUMER = """
import http.server, json, signal, sys, threading
class Page(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'edgekit_alerts_consumed_total{partition="0"} 5.0\\n')
    def log_message(self, *_): pass
server = http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Page)
signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=server.shutdown).start())
server.serve_forever()
print(json.dumps({"ledger": {"total": {"consumed": 5}}}))
"""


@pytest.fixture
def config(tmp_path):
    (tmp_path / "broker.toml").write_text("")
    return ServeConfig(
        models={"t2": ModelSettings("t2-gr")}, alerts=AlertSettings(str(tmp_path / "broker.toml"), slo_ms=40.0)
    )


def test_the_consumer_runs_as_long_as_the_daemon_and_its_numbers_are_shown(config):
    daemon = Daemon(config)
    daemon.alerts = AlertProcess(config.alerts)
    daemon.alerts._command = [sys.executable, "-c", CONSUMER, str(daemon.alerts.port)]
    with TestClient(daemon, base_url="http://127.0.0.1") as client:
        for _ in range(200):
            if daemon.alerts.metrics():
                break
            asyncio.run(asyncio.sleep(0.05))
        shown = client.get("/stats").json()
        assert shown["alerts"]["state"] == "running"
        assert shown["alerts"]["alerts"] == {"consumed": 5}
        assert shown["alerts"]["slo_ms"] == 40.0
        assert shown["placement"].startswith("kernel, ")
        assert "edgekit_alerts_consumed_total" in client.get("/metrics/alerts").text
        process = daemon.alerts._process
    assert process.returncode == 0
    assert daemon.alerts.status()["ledger"] == {"consumed": 5}


def test_without_alerts_nothing_is_supervised(config):
    daemon = Daemon(ServeConfig(models=config.models))
    with TestClient(daemon, base_url="http://127.0.0.1") as client:
        assert daemon.alerts is None
        assert "alerts" not in client.get("/stats").json()
        assert client.get("/metrics/alerts").status_code == 404


def test_the_table_is_read_and_checked(tmp_path):
    path = tmp_path / "serve.toml"
    path.write_text(
        textwrap.dedent(f"""
        [models.t2]
        path = "t2-gr"
        [alerts]
        config = "{tmp_path}/broker.toml"
        slo_ms = 25.0
    """)
    )
    with pytest.raises(EdgekitError, match=r"alerts\.config: .*no such file"):
        load(path)
    (tmp_path / "broker.toml").write_text("")
    assert load(path).alerts.slo_ms == 25.0
    path.write_text(path.read_text().replace("slo_ms", "slo"))
    with pytest.raises(EdgekitError, match="did you mean 'slo_ms'"):
        load(path)


def test_language_threads_leave_a_core_to_the_alerts(config):
    async def placements():
        found = []
        for item in (config, ServeConfig(models=config.models)):
            models = Models(item, Stats())
            found.append(models.placement)
            await models.close()
        return found

    beside, alone = asyncio.run(placements())
    assert beside.nice > alone.nice
    assert beside.threads == max(1, alone.threads - 1)
