"""A small model on disk for the commands, and a record of the calls that would have reached Kafka."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from edgekit.bundle.store import write_bundle
from tests.alert_broker.small import small_bundle


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model") / "small.edge"
    write_bundle(small_bundle(), path)
    return path


@pytest.fixture
def sent(monkeypatch):
    """Record the calls of `send`, which accepts all packets and sends none."""
    from alert_broker.stream import replay

    calls = []

    def send(packets, topic, settings, *, rate=0.0, stop=lambda: False, progress=lambda count, size: None):
        listed = list(packets)
        calls.append(SimpleNamespace(packets=listed, topic=topic, settings=settings, rate=rate, stop=stop))
        return replay.Sent(len(listed), sum(map(len, listed)), 2.0, 0.0)

    monkeypatch.setattr(replay, "send", send)
    return calls
