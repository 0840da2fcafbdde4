"""Functions that the commands on alerts share: signals, missing packages, pairs of names and values."""

import os
import signal

import click
import pytest

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


def test_every_command_has_an_example(edgekit):
    for command in ("classify", "simulate", "check", "consume", "replay", "redrive"):
        done = edgekit("alerts", command, "--help")
        assert done.status == 0
        assert "Example" in done.out
