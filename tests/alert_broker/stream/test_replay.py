"""Packets from files become messages: each packet occurs once and can be read alone, and damaged files are sent
unchanged."""

import io
import os
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from confluent_kafka import TopicPartition

from alert_broker import containers, simulated_packets
from alert_broker.containers import Block
from alert_broker.packets import batches
from alert_broker.simulate import simulate, write
from alert_broker.stream.clients import open_consumer
from alert_broker.stream.replay import packets, send
from edgekit.errors import EdgekitError
from tests.brokers import MockCluster

COUNTS = {"ztf": 7, "lsst": 5}


def identifiers(messages) -> list[int]:
    """Return the alerts' ids, as the consumer would read them."""
    blocks = [containers.message(value, index) for index, value in enumerate(messages)]
    assert all(isinstance(block, Block) for block in blocks), blocks
    found = {}
    for batch in batches(blocks):
        found |= dict(zip(batch.alerts["offset"].to_pylist(), batch.alerts["alert_id"].to_pylist(), strict=True))
    return [found[index] for index in sorted(found)]


@pytest.mark.parametrize("survey", COUNTS)
@pytest.mark.parametrize("per_file", [1, 3])
def test_every_packet_once(survey, per_file, tmp_path):
    alerts = list(simulate(survey, COUNTS[survey], 5, cutouts=False))
    write(tmp_path / "night", alerts, packets_per_file=per_file)
    messages = list(packets([tmp_path / "night"]))
    expected = [alert.curve.alert_id for alert in alerts]
    assert sorted(identifiers(messages)) == sorted(expected)
    with tarfile.open(tmp_path / "night.tar", "w") as archive:
        archive.add(tmp_path / "night", "night")
    assert sorted(packets([tmp_path / "night.tar"])) == sorted(messages)


def test_single_packets_are_sent_as_they_are(tmp_path):
    alerts = list(simulate("ztf", 3, 5, cutouts=False))
    files = write(tmp_path / "night", alerts, packets_per_file=1)
    assert sorted(packets([tmp_path / "night"])) == sorted(file.read_bytes() for file in files)


def test_compressed_containers_are_taken_apart(tmp_path):
    import fastavro

    alerts = list(simulate("ztf", 4, 6, cutouts=False))
    stream = io.BytesIO()
    schema = simulated_packets._ztf_parsed()
    fastavro.writer(stream, schema, [alert.packet for alert in alerts], codec="deflate")
    (tmp_path / "night.avro").write_bytes(stream.getvalue())
    messages = list(packets([tmp_path / "night.avro"]))
    assert identifiers(messages) == [alert.curve.alert_id for alert in alerts]


def test_file_names_that_are_not_utf_8_are_replayed(tmp_path):
    night = tmp_path / "night"
    night.mkdir()
    pq.write_table(pa.table({"packet": pa.array([b"one", b"two"], pa.binary())}), tmp_path / "table")
    (tmp_path / "table").rename(Path(os.fsdecode(os.fsencode(night) + b"/\xfd.parquet")))
    Path(os.fsdecode(os.fsencode(night) + b"/\xfe.bin")).write_bytes(b"three")
    assert list(packets([night])) == [b"one", b"two", b"three"]


def test_an_archive_that_is_cut_is_one_clear_error(tmp_path):
    (tmp_path / "a").write_bytes(bytes(5000))
    with tarfile.open(tmp_path / "night.tar", "w") as archive:
        archive.add(tmp_path / "a", "a")
    data = (tmp_path / "night.tar").read_bytes()
    (tmp_path / "night.tar").write_bytes(data[:3000])
    with pytest.raises(EdgekitError, match=r"night\.tar cannot be read: .*; repair it, or leave it out"):
        list(packets([tmp_path / "night.tar"]))


def test_a_packet_that_is_too_large_is_one_clear_error_and_the_packets_before_it_are_sent():
    with MockCluster() as cluster:
        cluster.create_topic("night", 1)
        settings = {"bootstrap.servers": cluster.address, "message.max.bytes": 2000}
        assert send([b"x" * 1000], "night", settings).messages == 1  # the twin
        with pytest.raises(EdgekitError, match=r"night: packet 2, of 3000 bytes, cannot be sent: .*too large"):
            send([b"x" * 1000, b"x" * 3000, b"x" * 1000], "night", settings)
        consumer = open_consumer({"bootstrap.servers": cluster.address, "group.id": "g"})
        try:
            assert consumer.get_watermark_offsets(TopicPartition("night", 0), timeout=10) == (0, 2)
        finally:
            consumer.close()


def test_damage_is_replayed(tmp_path):
    (file,) = write(tmp_path / "night", simulate("ztf", 3, 5, cutouts=False), packets_per_file=3)
    damaged = file.read_bytes()[:-50]
    file.write_bytes(damaged)
    assert list(packets([file])) == [damaged]
