"""edgekit alerts check, without a broker. tests/alert_broker/stream/test_rights.py has the checks with one."""

import pytest

from alert_broker.commands import check
from tests.brokers import free_port


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "broker.toml"
    path.write_text(
        f'[kafka]\n"bootstrap.servers" = "127.0.0.1:{free_port()}"\n[source]\ntopics = ["ztf"]\n'
        '[[output]]\ntopic = "classified"\n'
    )
    return path


def test_a_broker_that_does_not_answer_ends_the_check(edgekit, config, monkeypatch):
    monkeypatch.setattr(check, "SECONDS", 1.0)
    done = edgekit("alerts", "check", "--config", config)
    assert done.status == 1
    said = done.err.splitlines()[-1]
    assert "has not answered within 1 s; check bootstrap.servers" in said
    assert config.read_text().split('"')[3] in said
