"""Each right that can be missing at a secured Kafka is named with the thing and the user; `edgekit alerts check` shows
all of them, and changes nothing."""

import json
import os

import pytest
from confluent_kafka import TopicPartition
from confluent_kafka.admin import AclOperation, ResourceType

from alert_broker.stream.clients import open_consumer
from tests.alert_broker.conftest import REAL
from tests.alert_broker.stream.rig import Rig, repeat
from tests.alert_broker.stream.waiting import Stopwatch
from tests.apache_kafka import ApacheKafka, missing
from tests.brokers import create_topics

pytestmark = [pytest.mark.kafka, pytest.mark.skipif(bool(missing()), reason=missing() or "-")]

READ, WRITE, DESCRIBE = AclOperation.READ, AclOperation.WRITE, AclOperation.DESCRIBE
TOPIC, GROUP, TRANSACTIONAL_ID = ResourceType.TOPIC, ResourceType.GROUP, ResourceType.TRANSACTIONAL_ID


@pytest.fixture(scope="module")
def secured(tmp_path_factory):
    with ApacheKafka(tmp_path_factory.mktemp("kafka") / "one", users={"alice": "wonder99"}) as cluster:
        yield cluster


@pytest.fixture
def rig(secured, bundle, tmp_path, monkeypatch):
    """Topics at the secured broker, which alice may not use yet."""
    monkeypatch.setattr(
        "tests.alert_broker.stream.rig.create_topics",
        lambda address, topics, copies: create_topics(secured.internal, topics),
    )
    settings = {name: value for name, value in secured.settings("alice").items() if name != "bootstrap.servers"}
    return Rig(secured.address, {**REAL, **settings}, tmp_path, bundle, partitions=1)


def rules(rig):
    """All that a consumer needs, by the name of the fault that its absence is."""
    return {
        "source": (TOPIC, rig.source, READ),
        "results": (TOPIC, rig.results, WRITE),
        "dead letters": (TOPIC, rig.dead, WRITE),
        "group": (GROUP, rig.name, READ),
        "transactional id": (TRANSACTIONAL_ID, rig.name, WRITE),
    }


def grant(secured, rig, but=""):
    for name, rule in rules(rig).items():
        if name != but:
            secured.allow("alice", *rule)


def exactly(rig):
    return {"mode": "exactly-once", "transactional_id": rig.name, "seconds": 20.0}


def config_file(rig, **changes):
    import tomli_w

    path = rig.folder / "broker.toml"
    path.write_text(tomli_w.dumps(rig.tables(publish=exactly(rig), **changes)))
    return path


def expected(rig, missing):
    resource, name, operation = rules(rig)[missing]
    right = "Describe" if resource == TOPIC else operation.name.capitalize()
    thing = {TOPIC: "topic", GROUP: "group", TRANSACTIONAL_ID: "transactional id"}[resource]
    return f"the user 'alice' has no right to {right} on the {thing} {name!r}"


@pytest.mark.parametrize("lacking", ["source", "results", "dead letters", "group", "transactional id"])
def test_a_right_that_is_missing_is_named(secured, rig, edgekit, lacking):
    grant(secured, rig, but=lacking)
    path = config_file(rig)
    for command in ("check", "consume"):
        stopwatch = Stopwatch(os.getpid(), *secured.pids)
        done = edgekit("alerts", command, "--config", path, "--json")
        assert done.status == 1, done.out
        assert expected(rig, lacking) in done.err.splitlines()[-1]
        assert "Traceback" not in done.err
        assert stopwatch.seconds() < 15.0  # ten, and the compilation of kernels on a busy machine


def test_a_right_to_describe_is_not_enough(secured, rig, edgekit):
    grant(secured, rig, but="source")
    secured.allow("alice", TOPIC, rig.source, DESCRIBE)
    done = edgekit("alerts", "consume", "--config", config_file(rig), "--json")
    assert done.status == 1
    assert f"the user 'alice' has no right to Read on the topic {rig.source!r}" in done.err.splitlines()[-1]


def test_with_all_rights_the_check_is_good_and_changes_nothing(secured, rig, edgekit, packets):
    grant(secured, rig)
    path = config_file(rig)
    sent = Rig(secured.internal, REAL, rig.folder, rig.bundle, partitions=1, name=rig.name).send(repeat(packets, 20))
    findings = json.loads(edgekit("alerts", "check", "--config", path, "--json").out)
    assert [finding["problem"] for finding in findings] == [""] * 6
    table = edgekit("alerts", "check", "--config", path)
    assert table.status == 0
    assert table.out.count("good") == 6
    consumer = open_consumer({**rig.kafka, "group.id": rig.name})
    try:
        assert consumer.committed([TopicPartition(rig.source, 0)], 20)[0].offset == -1001
    finally:
        consumer.close()
    done = edgekit("alerts", "consume", "--config", path, "--json")
    assert done.status == 0, done.err
    assert json.loads(done.out)["ledger"]["total"]["published"] == sent


@pytest.mark.parametrize("change", [{"sasl.password": "wrong"}, {"sasl.username": "bob"}], ids=["password", "user"])
def test_a_wrong_user_or_password_is_said_at_once(secured, rig, edgekit, change):
    stopwatch = Stopwatch(os.getpid(), *secured.pids)
    done = edgekit("alerts", "consume", "--config", config_file(rig, kafka=change), "--json")
    assert done.status == 1
    last = done.err.splitlines()[-1]
    assert f"the broker refuses the user {change.get('sasl.username', 'alice')!r}" in last
    assert "Traceback" not in done.err
    assert "wonder99" not in done.err
    assert stopwatch.seconds() < 15.0  # five of them for the import on a busy machine


def test_a_topic_that_is_not_there_is_named(secured, rig, edgekit):
    grant(secured, rig)
    secured.allow("alice", TOPIC, "nowhere", READ)
    done = edgekit("alerts", "check", "--config", config_file(rig, source={"topics": ["nowhere"]}), "--json")
    assert done.status == 1
    assert "the topic 'nowhere' is not there" in done.err.splitlines()[-1]
