"""A model, packets, and topics on a broker, for the tests of the stream."""

import io

import fastavro
import numpy as np
import pytest

from edgekit.bundle.store import write_bundle
from tests.alert_broker.small import small_bundle


@pytest.fixture(scope="session")
def bundle(tmp_path_factory):
    """A small model on disk, for the pipeline."""
    return write_bundle(small_bundle(), tmp_path_factory.mktemp("model") / "small.edge").path


@pytest.fixture(scope="session")
def packets() -> list[bytes]:
    """Simulated ZTF alerts as messages, of 40 objects."""
    from alert_broker import simulated_packets
    from alert_broker.simulate import simulate

    return [simulated_packets.message("ztf", alert.packet) for alert in simulate("ztf", 40, 3, cutouts=False)]


@pytest.fixture(scope="session")
def packets_with_images(tmp_path_factory):
    """Messages of two ZTF and two LSST alerts, and the images in them as fastavro reads them."""
    from alert_broker.containers import WIRE_HEADER
    from alert_broker.simulate import simulate, write
    from alert_broker.surveys import lsst

    messages, images = [], []
    for survey in ("ztf", "lsst"):
        folder = tmp_path_factory.mktemp(survey)
        for path in write(folder, simulate(survey, 2, 4), packets_per_file=1):
            data = path.read_bytes()
            if survey == "ztf":
                (packet,) = fastavro.reader(io.BytesIO(data))
                images.append([packet[f"cutout{name}"]["stampData"] for name in ("Science", "Template", "Difference")])
            else:
                schema = lsst.schema(WIRE_HEADER.unpack(data[:5])[1])
                packet = fastavro.schemaless_reader(io.BytesIO(data[5:]), schema, None)
                images.append([packet[f"cutout{name}"] for name in ("Science", "Template", "Difference")])
            messages.append(data)
    return messages, images


@pytest.fixture
def rig(broker, bundle, tmp_path):
    from tests.alert_broker.stream.rig import Rig

    address, settings = broker
    return Rig(address, settings, tmp_path, bundle)


@pytest.fixture
def cluster():
    """librdkafka's mock cluster with the topics `source`, `results` and `dead`."""
    from tests.brokers import MockCluster

    with MockCluster() as cluster:
        for topic in ("source", "results", "dead"):
            cluster.create_topic(topic, 1)
        yield cluster


@pytest.fixture
def cluster_source(cluster):
    """A source that has joined its group on the mock cluster."""
    from alert_broker.stream.source import Source
    from alert_broker.stream.stats import Stats
    from tests.alert_broker.stream.mock_broker import config_of

    source = Source(config_of(cluster), Stats())
    for _ in range(100):
        source.poll(1, 0.1)
        if source.consumer.assignment():
            break
    yield source
    source.close()


@pytest.fixture
def source(monkeypatch):
    """A source whose consumer is a `FakeConsumer`, with the partitions 0 and 1 of the topic "t"."""
    from alert_broker.stream import config as configuration
    from alert_broker.stream import source as module
    from alert_broker.stream.stats import Stats
    from tests.alert_broker.stream.fake_consumer import FakeConsumer, FakeLag, FakeTopicIds, assign

    consumer = FakeConsumer()
    monkeypatch.setattr(module, "open_consumer", lambda settings, **callbacks: consumer)
    monkeypatch.setattr(module, "Lag", FakeLag)
    monkeypatch.setattr(module, "TopicIds", FakeTopicIds)
    monkeypatch.setattr(module, "partitions_of", lambda client, topic: [0, 1])
    tables = {
        "source": {"topics": ["t"], "drain_seconds": 0.05},
        "output": [{"topic": "r"}],
        "batch": {"bytes": 10_000},
        "kafka": {"bootstrap.servers": "x:1"},
    }
    source = module.Source(configuration.parse(tables, "test").check(), Stats())
    assign(consumer, 0, 1)
    return source


@pytest.fixture(scope="session")
def long_packet() -> bytes:
    """A valid ZTF alert with 10,000 detections in its history, which deflate to some hundred kB."""
    from alert_broker import simulated_packets
    from alert_broker.simulate import simulate

    (alert,) = simulate("ztf", 1, 5, cutouts=False)
    candidate = alert.packet["candidate"]
    rng = np.random.default_rng(1)
    known = dict.fromkeys(("ra", "dec", "candid"))
    history = [
        candidate
        | known
        | {"jd": candidate["jd"] - days, "magpsf": 18.0 + days / 40.0 + noise, "sigmapsf": 0.1, "fid": 1 + k % 2}
        for k, (days, noise) in enumerate(zip(np.linspace(0.01, 30.0, 10_000), rng.normal(0, 0.1, 10_000), strict=True))
    ]
    return simulated_packets.message("ztf", alert.packet | {"prv_candidates": history})
