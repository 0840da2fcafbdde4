"""What lies in deploy/ fits what edgekit serves, and the tools that read it, where they are installed, accept it."""

import configparser
import json
import os
import re
import shutil
import subprocess
import tomllib
from http.client import HTTPConnection
from pathlib import Path

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from alert_broker.stream.config import Publish
from alert_broker.stream.health import STUCK_AFTER, serve
from alert_broker.stream.logs import _is_secret
from alert_broker.stream.metrics import page
from alert_broker.stream.watchdog import TRY_AGAIN
from tests.alert_broker.stream.sample import busy_stats

DEPLOY = Path(__file__).resolve().parents[1] / "deploy"
UNIT = DEPLOY / "edgekit-alerts@.service"
ADDED = {"job", "instance", "le"}  # labels that Prometheus adds to a scrape, and histograms' own
METRIC = re.compile(r"(?<![:\w])(?:edgekit|process)_\w+")
PROMTOOL = os.environ.get("EDGEKIT_PROMTOOL") or shutil.which("promtool")


def on_the_page() -> dict[str, set[str]]:
    """The labels of every series that the page has."""
    found: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(page(busy_stats().snapshot()).decode()):
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


def unknown(queries: list[str]) -> set[str]:
    """Metrics and labels in these queries that no page has."""
    page_has = on_the_page()
    labels = {label for names in page_has.values() for label in names} | ADDED
    missing = set()
    for query in queries:
        missing |= set(METRIC.findall(query)) - page_has.keys()
        for names in re.findall(r"(?:by|on|group_left|group_right) \(([^)]*)\)", query):
            missing |= {name.strip() for name in names.split(",")} - labels
        for metric, matchers in re.findall(r"(\w+)\{([^}]*)\}", query):
            used = set(re.findall(r"(\w+)(?:=~|!~|!=|=)", matchers))
            missing |= used - ADDED - page_has.get(metric, set()) - ({"job"} if metric == "up" else set())
    return missing


@pytest.fixture(scope="module")
def board() -> dict:
    return json.loads((DEPLOY / "grafana.json").read_text())


@pytest.fixture(scope="module")
def rules() -> list[dict]:
    (group,) = yaml.safe_load((DEPLOY / "alert-rules.yml").read_text())["groups"]
    return group["rules"]


@pytest.fixture(scope="module")
def manifests() -> dict[str, dict]:
    return {item["kind"]: item for item in yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text())}


@pytest.fixture(scope="module")
def container(manifests) -> dict:
    (found,) = manifests["Deployment"]["spec"]["template"]["spec"]["containers"]
    return found


# --- Prometheus and Grafana


def test_what_the_dashboard_asks_for_is_on_the_page(board):
    queries = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    assert len(queries) > 20
    assert unknown(queries) == set()
    asked = {name for query in queries for name in METRIC.findall(query)}
    assert {name for name in on_the_page() if name.startswith("edgekit_alerts_")} <= asked


def test_the_dashboard_is_well_formed(board):
    ids = [panel["id"] for panel in board["panels"]]
    assert len(set(ids)) == len(ids)
    taken: set[tuple[int, int]] = set()
    for place in (panel["gridPos"] for panel in board["panels"]):
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken
        assert place["x"] + place["w"] <= 24
        taken |= cells
    variables = {item["name"] for item in board["templating"]["list"]}
    assert set(re.findall(r"\$\{?(\w+)", json.dumps(board))) - {"__rate_interval", "__all"} == variables


def test_what_the_rules_ask_for_is_on_the_page(rules):
    assert unknown([rule["expr"] for rule in rules]) == set()
    recorded = {rule["record"] for rule in rules if "record" in rule}
    assert {name for rule in rules for name in re.findall(r"edgekit:[\w:]+", rule["expr"])} <= recorded


@pytest.mark.parametrize(
    "query",
    [
        "rate(edgekit_alert_consumed_total[5m])",
        "sum by (topics) (edgekit_consumer_lag)",
        'edgekit_queue_depth{stage="decode"}',
        "edgekit_alerts_consumed",
    ],
)
def test_a_planted_slip_is_caught(query):
    assert unknown([query])


@pytest.mark.skipif(
    PROMTOOL is None, reason="no promtool; Debian has it in the package prometheus, or set EDGEKIT_PROMTOOL"
)
class TestPromtool:
    def run(self, *arguments) -> str:
        done = subprocess.run([PROMTOOL, *map(str, arguments)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def test_it_accepts_configuration_and_rules(self):
        assert "SUCCESS" in self.run("check", "config", DEPLOY / "prometheus.yml")

    def test_it_can_parse_what_the_dashboard_asks(self, board, tmp_path):
        queries = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
        plain = [query.replace("$__rate_interval", "5m").replace("$job", ".*") for query in queries]
        path = tmp_path / "queries.yml"

        def write(expressions) -> None:
            rules = [{"record": f"q{number}", "expr": text} for number, text in enumerate(expressions)]
            path.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}))

        write(plain)
        assert f"{len(plain)} rules found" in self.run("check", "rules", path)
        write([*plain, "sum(edgekit_ready"])
        with pytest.raises(AssertionError, match="unclosed"):
            self.run("check", "rules", path)

    def test_alerts_fire_when_they_should_and_not_before(self, tmp_path):
        shutil.copy(DEPLOY / "alert-rules.yml", tmp_path)
        member = 'job="edgekit-alerts", instance="a:9108"'
        ledger = [
            {"series": f'edgekit_alerts_{name}{{{member}, topic="ztf", partition="0"}}', "values": values}
            for name, values in {
                "consumed_total": "0+100x40",
                "published_total": "0+100x20 2000x20",
                "filtered_total": "0x40",
                "dead_lettered_total": "0x20 100+100x20",
                "revoked_total": "0x40",
                "in_flight": "0x40",
            }.items()
        ]
        lost = [dict(item) for item in ledger]
        lost[1]["values"] = "0+99x40"
        stuck = [
            {"series": f"edgekit_progress_age_seconds{{{member}}}", "values": "1x10 60+60x10"},
            {"series": f'edgekit_consumer_lag{{{member}, topic="ztf", partition="0"}}', "values": "5x20"},
        ]
        idle = [stuck[0], {**stuck[1], "values": "0x20"}]

        def fires(name, series, minute, expected) -> dict:
            alerts = [{"exp_labels": {**labels, "severity": severity}} for labels, severity in expected]
            case = {"eval_time": f"{minute}m", "alertname": name, "exp_alerts": alerts}
            return {"interval": "1m", "input_series": series, "alert_rule_test": [case]}

        here = {"job": "edgekit-alerts", "instance": "a:9108"}
        where = {**here, "topic": "ztf", "partition": "0"}
        tests = [
            fires("EdgekitLedger", ledger, 30, []),
            fires("EdgekitLedger", lost, 30, [(where, "page")]),
            fires("EdgekitStuck", stuck, 10, []),
            fires("EdgekitStuck", stuck, 15, [(here, "page")]),
            fires("EdgekitStuck", idle, 15, []),
            fires("EdgekitDeadLetters", ledger, 19, []),
            fires("EdgekitDeadLetters", ledger, 40, [({"job": "edgekit-alerts"}, "ticket")]),
            fires("EdgekitMemberDown", [{"series": f"up{{{member}}}", "values": "1x5 0x10"}], 10, [(here, "page")]),
        ]
        for test in tests:  # summaries hold numbers; only who fires is compared
            for case in test["alert_rule_test"]:
                for alert in case["exp_alerts"]:
                    alert["exp_annotations"] = {"summary": "x"}
        text = re.sub(r"(summary: ).*", r"\1x", (tmp_path / "alert-rules.yml").read_text())
        (tmp_path / "alert-rules.yml").write_text(text)
        (tmp_path / "tests.yml").write_text(yaml.safe_dump({"rule_files": ["alert-rules.yml"], "tests": tests}))
        assert "SUCCESS" in self.run("test", "rules", tmp_path / "tests.yml")
        tests[0] = fires("EdgekitLedger", lost, 30, [])  # the twin: it is seen when one does fire
        (tmp_path / "tests.yml").write_text(yaml.safe_dump({"rule_files": ["alert-rules.yml"], "tests": tests}))
        with pytest.raises(AssertionError, match="FAILED"):
            self.run("test", "rules", tmp_path / "tests.yml")


# --- systemd


def unit() -> dict[str, dict[str, str]]:
    parser = configparser.ConfigParser(strict=False, interpolation=None, comment_prefixes=("#",))
    parser.optionxform = str
    parser.read(UNIT)
    return {name: dict(parser[name]) for name in parser.sections()}


def test_the_unit_is_hardened_and_stops_in_time():
    service = unit()["Service"]
    wanted = {
        "DynamicUser": "yes", "NoNewPrivileges": "yes", "ProtectSystem": "strict", "ProtectHome": "yes",
        "PrivateTmp": "yes", "PrivateDevices": "yes", "CapabilityBoundingSet": "", "RestrictNamespaces": "yes",
        "RestrictSUIDSGID": "yes", "SystemCallArchitectures": "native", "KillSignal": "SIGTERM",
        "Restart": "on-failure", "RestartForceExitStatus": str(TRY_AGAIN),
    }  # fmt: skip
    assert service | wanted == service
    assert "MemoryMax" in service
    assert int(service["TimeoutStopSec"]) >= 80
    assert "password" not in UNIT.read_text().lower()


def too_few_restarts(unit, seconds: float) -> bool:
    """Whether systemd gives up a member that ends with an error after so many seconds, each time."""
    interval = 60.0 * float(unit["Unit"]["StartLimitIntervalSec"].removesuffix("min"))
    return interval / (seconds + float(unit["Service"]["RestartSec"])) > float(unit["Unit"]["StartLimitBurst"])


def test_a_broker_that_acknowledges_nothing_does_not_end_a_member_for_good():
    assert not too_few_restarts(unit(), Publish().seconds)
    assert too_few_restarts(unit(), 1.0)  # the twin: a member that cannot even start


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze here")
def test_systemd_accepts_the_unit(tmp_path):
    program = shutil.which("true")
    path = tmp_path / "edgekit-alerts@9108.service"
    path.write_text(re.sub(r"ExecStart=\S+", f"ExecStart={program}", UNIT.read_text()))

    def analyze(*arguments):
        return subprocess.run(["systemd-analyze", *arguments], capture_output=True, text=True, check=False)

    done = analyze("verify", str(path))
    assert (done.returncode, done.stderr) == (0, "")
    judged = analyze("security", "--offline=yes", "--threshold=20", str(path))  # tenths: 0 is closed, 10 wide open
    if "unrecognized option" in judged.stderr:
        pytest.skip("this systemd-analyze cannot judge a file")
    assert judged.returncode == 0, judged.stdout[-400:]
    path.write_text(path.read_text().replace("ProtectSystem=strict", "ProtectSistem=strict"))
    assert "ProtectSistem" in analyze("verify", str(path)).stderr


# --- Kubernetes


def test_probes_ask_for_what_is_served(container):
    (port,) = container["ports"]
    listen = container["args"][container["args"].index("--metrics-listen") + 1]
    assert listen == f"0.0.0.0:{port['containerPort']}"
    probes = [container[name]["httpGet"] for name in ("startupProbe", "livenessProbe", "readinessProbe")]
    assert {probe["port"] for probe in probes} == {port["name"]}
    with serve(busy_stats()) as server:

        def status(path: str) -> int:
            connection = HTTPConnection("127.0.0.1", server.port, timeout=5)
            connection.request("GET", path)
            return connection.getresponse().status

        assert {probe["path"]: status(probe["path"]) for probe in probes} == {"/healthz": 200, "/readyz": 200}
        assert status("/health") == 404
        server.stuck_after = -1.0
        assert [status(probe["path"]) for probe in probes] == [503, 503, 503]
    assert container["livenessProbe"]["periodSeconds"] * container["livenessProbe"]["failureThreshold"] < STUCK_AFTER


def test_the_autoscaler_follows_the_lag_of_the_same_group(manifests, container):
    scaler, deployment = manifests["ScaledObject"]["spec"], manifests["Deployment"]
    config = tomllib.loads(manifests["ConfigMap"]["data"]["broker.toml"])
    assert scaler["scaleTargetRef"]["name"] == deployment["metadata"]["name"]
    (trigger,) = scaler["triggers"]
    assert trigger["type"] == "kafka"
    assert [trigger["metadata"]["topic"]] == config["source"]["topics"]
    assert trigger["metadata"]["consumerGroup"] == config["source"]["group"]
    assert trigger["metadata"]["bootstrapServers"] == config["kafka"]["bootstrap.servers"]
    assert int(trigger["metadata"]["lagThreshold"]) > 0
    assert trigger["authenticationRef"]["name"] == manifests["TriggerAuthentication"]["metadata"]["name"]


def test_manifests_fit_each_other(manifests, container):
    pod = manifests["Deployment"]["spec"]["template"]
    labels = pod["metadata"]["labels"]
    for kind in ("Deployment", "PodDisruptionBudget", "PodMonitor"):
        assert manifests[kind]["spec"]["selector"]["matchLabels"].items() <= labels.items()
    (endpoint,) = manifests["PodMonitor"]["spec"]["podMetricsEndpoints"]
    assert endpoint["port"] == container["ports"][0]["name"]
    volumes = {item["name"] for item in pod["spec"]["volumes"]}
    assert {item["name"] for item in container["volumeMounts"]} == volumes
    assert pod["spec"]["terminationGracePeriodSeconds"] >= 80
    folder = next(item["mountPath"] for item in container["volumeMounts"] if item["name"] == "config")
    assert container["args"][container["args"].index("--config") + 1] == f"{folder}/broker.toml"
    assert (
        container["securityContext"] | {"readOnlyRootFilesystem": True, "allowPrivilegeEscalation": False}
        == (container["securityContext"])
    )


# --- configuration


def configurations(manifests) -> list[str]:
    return [(DEPLOY / "broker.toml").read_text(), manifests["ConfigMap"]["data"]["broker.toml"]]


def test_no_secret_stands_in_a_file(manifests):
    for text in configurations(manifests):
        secret = {name: value for name, value in tomllib.loads(text)["kafka"].items() if _is_secret(name)}
        assert secret == {"sasl.password": "env:KAFKA_PASSWORD"}


def test_configurations_are_accepted(manifests, container, tmp_path, monkeypatch):
    configuration = pytest.importorskip("alert_broker.stream.config", reason="this edgekit has no consumer yet")
    monkeypatch.setenv("KAFKA_PASSWORD", "x")
    for text in configurations(manifests):
        (tmp_path / "broker.toml").write_text(text)
        config = configuration.load(tmp_path / "broker.toml")
        assert config.kafka_settings()["sasl.password"] == "x"
        seconds = config.source.drain_seconds + config.publish.seconds
        assert int(unit()["Service"]["TimeoutStopSec"]) >= seconds
        assert manifests["Deployment"]["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] >= seconds


def test_the_command_lines_are_edgekits(container, edgekit):
    pytest.importorskip("alert_broker.stream.config", reason="this edgekit has no consumer yet")
    text = edgekit("alerts", "consume", "--help").out
    assert container["args"][:3] == ["edgekit", "alerts", "consume"]
    started = unit()["Service"]["ExecStart"]
    assert " alerts consume " in started
    flags = {word for word in [*container["args"], *started.split()] if word.startswith("--")}
    assert {flag for flag in flags if not re.search(rf"{flag}[ ,\n]", text)} == set()
