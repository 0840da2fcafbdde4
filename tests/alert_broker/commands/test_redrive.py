"""`edgekit alerts redrive`: the arguments that the command computes from its flags and the consumer's file, without
Kafka."""

import json

import pytest

from alert_broker.stream import redrive as stream

CONFIG = """
[source]
topics = ["ztf"]
group = "night"
[[output]]
topic = "results"
[dead_letters]
topic = "dead"
[kafka]
"bootstrap.servers" = "from-the-file:9092"
"linger.ms" = 7
"""


@pytest.fixture
def config(tmp_path):
    (tmp_path / "broker.toml").write_text(CONFIG)
    return tmp_path / "broker.toml"


@pytest.fixture
def asked(monkeypatch):
    """Record the calls of `redrive`, which handles six dead letters and sends three."""
    calls = []

    def redrive(settings, dead_letters, *, progress, stop, **options):
        progress(6)
        calls.append({"settings": settings, "topic": dead_letters.topic, **options})
        return stream.Redriven(3, 2, len(calls) - 1)

    monkeypatch.setattr(stream, "redrive", redrive)
    return calls


def test_without_flags_all_is_as_the_consumer_has_it(edgekit, config, asked):
    done = edgekit("alerts", "redrive", "--config", config)
    assert done.status == 0, done.err
    assert asked == [
        {
            "settings": {"bootstrap.servers": "from-the-file:9092", "linger.ms": 7},
            "topic": "dead",
            "group": "night-redrive",
            "reason": "",
            "to_topic": "",
            "max_attempts": 3,
        }
    ]


def test_flags_go_over_the_file(edgekit, config, asked):
    flags = {"--reason": "schema", "--to-topic": "again", "--group": "other", "--max-attempts": 9}
    pairs = [item for pair in flags.items() for item in pair]
    edgekit("alerts", "redrive", "--config", config, *pairs, "--kafka", "bootstrap.servers=elsewhere:1")
    (call,) = asked
    assert call["settings"] == {"bootstrap.servers": "elsewhere:1", "linger.ms": 7}
    assert [call[name] for name in ("reason", "to_topic", "group", "max_attempts")] == list(flags.values())


def test_the_counts_as_a_line_and_as_json(edgekit, config, asked):
    assert edgekit("alerts", "redrive", "--config", config).out == "3 dead letters sent again, 2 skipped\n"
    assert "skipped, 1 without their alert" in edgekit("alerts", "redrive", "--config", config).out
    told = json.loads(edgekit("alerts", "redrive", "--config", config, "--json").out)
    assert told == {"sent": 3, "passed_over": 2, "gone": 2}


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        ([], 2, "--config"),
        (["--config", "nowhere.toml"], 1, "nowhere.toml cannot be read"),
        (["--config", "broker.toml", "--max-attempts", "0"], 2, "--max-attempts"),
        (["--config", "broker.toml", "--kafka", "hunter2"], 2, "expected NAME=VALUE"),
    ],
)
def test_what_cannot_be_redriven_is_one_line(edgekit, config, asked, monkeypatch, arguments, status, said):
    monkeypatch.chdir(config.parent)
    done = edgekit("alerts", "redrive", *arguments)
    assert done.failed_with(status, said)
    assert "hunter2" not in done.err
    assert not asked
