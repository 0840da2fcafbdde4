"""Functions that the commands on alerts share: signals, missing packages, pairs of names and values."""

import os
import signal

import click
import pytest
from confluent_kafka import KafkaError, KafkaException

from alert_broker.commands.common import alert_packages, key_values, stopping
from edgekit.errors import EdgekitError


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks_to_stop_and_the_second_one_stops(number):
    before = signal.getsignal(number)
    with stopping() as stop:
        assert not stop()
        os.kill(os.getpid(), number)
        assert stop()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
    assert signal.getsignal(number) is before


@pytest.mark.parametrize(("package", "extra"), [("confluent_kafka", "stream"), ("pyarrow", "alerts")])
def test_a_missing_package_is_named_with_its_extra(package, extra):
    with pytest.raises(EdgekitError, match=rf"needs {package}.*pip install 'edgekit\[{extra}\]'"), alert_packages():
        raise ModuleNotFoundError(name=package)


def test_pairs_become_a_dictionary_and_a_value_may_hold_an_equals_sign():
    assert key_values(["a=1", "b=x=y", "c="], "--kafka") == {"a": "1", "b": "x=y", "c": ""}


@pytest.mark.parametrize("pair", ["secret", "=secret"])
def test_a_wrong_pair_is_refused_without_showing_it(pair):
    with pytest.raises(click.UsageError, match="--kafka: expected NAME=VALUE") as caught:
        key_values(["a=1", pair], "--kafka")
    assert "secret" not in caught.value.format_message()


COMMANDS = {  # each with the function that calls the Kafka client
    "check": ("rights.all_rights", ["--config", "broker.toml"]),
    "redrive": ("redrive.redrive", ["--config", "broker.toml"]),
    "replay": ("replay.send", ["broker.toml", "--topic", "a", "--kafka", "bootstrap.servers=x:1"]),
    "simulate": (
        "replay.send",
        ["--to-topic", "a", "--survey", "ztf", "--count", "1", "--kafka", "bootstrap.servers=x:1"],
    ),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_an_error_of_the_kafka_client_is_one_line(edgekit, monkeypatch, tmp_path, command):
    function, arguments = COMMANDS[command]

    def fail(*arguments, **options):
        raise KafkaException(KafkaError(KafkaError._TRANSPORT))

    monkeypatch.chdir(tmp_path)
    (tmp_path / "broker.toml").write_text(
        '[source]\ntopics = ["ztf"]\n[[output]]\ntopic = "r"\n[kafka]\n"bootstrap.servers" = "x:1"\n'
    )
    monkeypatch.setattr(f"alert_broker.stream.{function}", fail)
    monkeypatch.setattr("alert_broker.stream.connect.reach", lambda settings, stop: object())
    done = edgekit("alerts", command, *arguments)
    assert done.status == 1
    assert done.err.splitlines()[-1].startswith("edgekit: the Kafka client failed: ")
    assert "Traceback" not in done.err


def test_every_command_has_an_example(edgekit):
    for command in ("classify", "simulate", "check", "consume", "replay", "redrive"):
        done = edgekit("alerts", command, "--help")
        assert done.status == 0
        assert "Example" in done.out
