"""`edgekit alerts replay`: the packets that are sent, their topic, the repetitions, and the report. A fake Kafka
accepts all packets."""

import json

import pytest

from alert_broker.simulate import simulate, write


@pytest.fixture
def night(tmp_path):
    write(tmp_path / "night", simulate("ztf", 5, 1, cutouts=False), packets_per_file=5)
    return tmp_path / "night"


KAFKA = ("--kafka", "bootstrap.servers=x:1")


def test_the_packets_of_all_paths_in_order_so_many_times(edgekit, sent, night):
    (night / "damaged.bin").write_bytes(b"nothing")
    done = edgekit(
        "alerts", "replay", night / "damaged.bin", night, "--topic", "a", "--repeat", 2, "--rate", 50, *KAFKA
    )
    assert done.status == 0, done.err
    (call,) = sent
    assert (call.topic, call.rate, call.settings) == ("a", 50.0, {"bootstrap.servers": "x:1"})
    assert len(call.packets) == 2 * 6
    assert call.packets[:6] == call.packets[6:]
    assert call.packets[0] == b"nothing"
    assert len(set(call.packets)) == 6
    assert not call.stop()


def test_the_report_as_a_line_and_as_json(edgekit, sent, night):
    arguments = ["alerts", "replay", night, "--topic", "a", *KAFKA]
    line = edgekit(*arguments).out
    told = json.loads(edgekit(*arguments, "--json").out)
    size = sum(map(len, sent[0].packets))
    assert line == f"a: 5 packets, {size / 1e6:,.1f} MB in 2.0 s, 2/s\n"
    assert told == {"topic": "a", "messages": 5, "bytes": size, "seconds": 2.0, "late_seconds": 0.0}


@pytest.mark.parametrize(("late", "said"), [(0.1, ""), (3.0, ", at most 3.0 s behind the rate")])
def test_a_rate_that_was_not_kept_is_said(late, said, capsys):
    from alert_broker.commands.replay import report

    report("a", 10, 2_000_000, 4.0, late, as_json=False)
    assert capsys.readouterr().out == f"a: 10 packets, 2.0 MB in 4.0 s, 2/s{said}\n"


def test_a_secret_of_the_environment_goes_to_kafka_and_nowhere_else(edgekit, sent, night, monkeypatch):
    monkeypatch.setenv("NIGHTLY", "hunter2")
    done = edgekit("alerts", "replay", night, "--topic", "a", *KAFKA, "--kafka", "sasl.password=env:NIGHTLY")
    assert sent[0].settings["sasl.password"] == "hunter2"
    assert "hunter2" not in done.out + done.err


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["nowhere", "--topic", "a"], 1, "nowhere does not exist"),
        (["night"], 2, "--topic"),
        (["--topic", "a"], 2, "PATHS"),
        (["night", "--topic", "a", "--repeat", "0"], 2, "--repeat"),
        (["night", "--topic", "a", "--rate", "-1"], 2, "--rate"),
        (["night", "--topic", "a", "--kafka", "sasl.password=env:NO_SUCH_VARIABLE"], 1, "NO_SUCH_VARIABLE"),
    ],
)
def test_what_cannot_be_replayed_is_one_line(edgekit, sent, night, monkeypatch, arguments, status, said):
    monkeypatch.chdir(night.parent)
    assert edgekit("alerts", "replay", *arguments).failed_with(status, said)
    assert not sent
