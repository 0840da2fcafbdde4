"""`edgekit alerts consume`: flags, one-line errors, the report; and the way round, to alerts that are redriven."""

import json
import logging
import uuid

import pytest

from edgekit.bundle.store import write_bundle
from tests.alert_broker.small import small_bundle


def kafka(settings):
    return [part for setting in settings for part in ("--kafka", setting)]


def test_the_way_round(edgekit, broker, tmp_path):
    from tests.brokers import create_topics

    address, settings = broker
    server = [f"bootstrap.servers={address}"]
    member = [*server, *(f"{name}={value}" for name, value in settings.items())]
    name = uuid.uuid4().hex[:8]
    alerts, results, dead = (f"{name}-{end}" for end in ("alerts", "results", "dead"))
    create_topics(address, {alerts: 2, results: 1, dead: 1})
    model = tmp_path / "small.edge"
    write_bundle(small_bundle(), model)
    done = edgekit(
        "alerts",
        "simulate",
        "--to-topic",
        alerts,
        "--survey",
        "ztf",
        "--count",
        20,
        "--no-cutouts",
        *kafka(server),
    )
    assert done.status == 0, done.err
    assert f"{alerts}: 20 packets" in done.out
    (tmp_path / "damaged.avro").write_bytes(b"Obj\x01 no more")
    done = edgekit(
        "alerts",
        "replay",
        tmp_path / "damaged.avro",
        "--topic",
        alerts,
        "--repeat",
        2,
        "--json",
        *kafka(server),
    )
    assert json.loads(done.out)["messages"] == 2
    config = tmp_path / "broker.toml"
    config.write_text(f"""
[source]
topics = ["{alerts}"]
group = "{name}"
until_eos = true
[model]
bundle = "{model}"
[[output]]
topic = "{results}"
[dead_letters]
topic = "{dead}"
[kafka]
"bootstrap.servers" = "somewhere-else:9092"
""")
    done = edgekit("alerts", "consume", "--config", config, "--batch-size", 5, "--json", *kafka(member))
    assert done.status == 0, done.err
    report = json.loads(done.out)
    total = report["ledger"]["total"]
    assert report["failed"] is None
    assert (total["consumed"], total["published"], total["dead_lettered"]) == (22, 20, 2)
    assert report["reasons"].popitem()[1] == 2
    logging.getLogger("edgekit").handlers.clear()
    done = edgekit("alerts", "redrive", "--config", config, "--json", *kafka(member))
    assert logging.getLogger("edgekit").handlers  # with the secrets of the configuration masked
    assert json.loads(done.out) == {"sent": 2, "passed_over": 0, "gone": 0}
    for group, passed in (("", 0), (f"{name}-other", 2), (f"{name}-other", 0)):  # a group looks at a letter once
        done = edgekit(
            "alerts",
            "redrive",
            "--config",
            config,
            "--json",
            "--reason",
            "no such",
            *kafka(member),
            *(["--group", group] if group else []),
        )
        assert json.loads(done.out) == {"sent": 0, "passed_over": passed, "gone": 0}
    done = edgekit("alerts", "consume", "--config", config, *kafka(member))
    assert done.status == 0, done.err
    assert any(line.split()[0] == "all" and line.split()[-2:] == ["2", "0"] for line in done.out.splitlines()), done.out


@pytest.mark.parametrize(("arguments", "status", "said"), [
    (["consume"], 1, "no topic to read"),
    (["consume", "--config", "nowhere.toml"], 1, "nowhere.toml cannot be read"),
    (["consume", "--source-topics", "a", "--kafka", "hunter2"], 2, "expected NAME=VALUE"),
    (["consume", "--source-topics", "a", "--kafka", "bootstrap.servers=x:1", "--output", "topic"], 1, "no TOML table"),
    (["consume", "--batch-size", "many"], 2, "--batch-size"),
    (["consume", "--publish-mode", "perhaps"], 2, "exactly-once"),
])  # fmt: skip
def test_what_is_wrong_is_one_line(edgekit, arguments, status, said):
    done = edgekit("alerts", *arguments)
    assert done.status == status
    assert said in done.err
    assert "hunter2" not in done.err + done.out


# --- without a broker

CONFIG = """
[source]
topics = ["from-the-file"]
group = "night"
[batch]
size = 7
[[output]]
topic = "results"
[kafka]
"bootstrap.servers" = "from-the-file:9092"
"""


@pytest.fixture
def ran(monkeypatch):
    """The configurations that the pipeline was run with; it consumes three alerts, or raises what is put there."""
    from alert_broker.stream import run

    configs, errors = [], []

    class Pipeline:
        def __init__(self, config, stats, stop=None, *, notify):
            configs.append(config)
            self.stats = stats

        def run(self, stop):
            stats = self.stats
            stats.ledger.add(("ztf", 0), consumed=3, published=2, dead_lettered=1)
            stats.classes.update({"KN": 2})
            stats.reasons.update({"cut short": 1})
            for error in errors:
                raise error

    monkeypatch.setattr(run, "open_pipeline", Pipeline)
    return configs, errors


@pytest.fixture
def config(tmp_path):
    (tmp_path / "broker.toml").write_text(CONFIG)
    return tmp_path / "broker.toml"


def test_a_flag_of_each_type_goes_over_the_file_and_the_rest_stays(edgekit, ran, config):
    flags = ["--topics", "a", "--topics", "b", "--batch-seconds", 0.5, "--until-eos", "--publish-mode", "exactly-once"]
    flags += ["--publish-transactional-id", "one", "--output", 'topic = "x", format = "json"', "--kafka", "linger.ms=9"]
    done = edgekit("alerts", "consume", "--config", config, *flags)
    assert done.status == 0, done.err
    ((found,), _) = ran
    assert (found.source.topics, found.source.group, found.source.until_eos) == (("a", "b"), "night", True)
    assert (found.batch.size, found.batch.seconds) == (7, 0.5)
    assert (found.publish.mode, found.publish.transactional_id) == ("exactly-once", "one")
    assert [(item.topic, item.format) for item in found.output] == [("x", "json")]
    assert found.kafka == {"bootstrap.servers": "from-the-file:9092", "linger.ms": "9"}


def test_without_flags_the_file_is_all(edgekit, ran, config):
    from alert_broker.stream.config import load

    assert edgekit("alerts", "consume", "--config", config).status == 0
    assert ran[0] == [load(config)]


def test_the_long_and_the_short_name_of_a_flag_are_one(edgekit, ran, config):
    for name in ("--source-topics", "--topics"):
        edgekit("alerts", "consume", "--config", config, name, "a")
    assert ran[0][0] == ran[0][1]


def test_the_report_as_tables_and_as_json(edgekit, ran, config):
    lines = [line.split() for line in edgekit("alerts", "consume", "--config", config).out.splitlines()]
    assert ["ztf[0]", "3", "2", "0", "1", "0"] in lines
    assert ["all", "3", "2", "0", "1", "0"] in lines
    assert ["KN", "2"] in lines
    assert ["cut", "short", "1"] in lines
    told = json.loads(edgekit("alerts", "consume", "--config", config, "--json").out)
    assert told["failed"] is None
    assert told["ledger"]["total"]["consumed"] == 3
    assert (told["classes"], told["reasons"]) == ({"KN": 2}, {"cut short": 1})


def test_a_failure_is_reported_with_the_ledger_and_ends_the_command(edgekit, ran, config):
    from edgekit.errors import EdgekitError

    ran[1].append(EdgekitError("the disk is full"))
    done = edgekit("alerts", "consume", "--config", config, "--json")
    assert done.status == 1
    assert done.err.splitlines()[-1] == "edgekit: the disk is full"
    told = json.loads(done.out)
    assert (told["failed"], told["ledger"]["total"]["published"]) == ("the disk is full", 2)
