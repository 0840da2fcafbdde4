"""Packets from files become messages: each packet occurs once and can be read alone, and damaged files are sent
unchanged."""

import io
import tarfile

import pytest

from alert_broker import containers, simulated_packets
from alert_broker.containers import Block
from alert_broker.packets import batches
from alert_broker.simulate import simulate, write
from alert_broker.stream.replay import packets

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


def test_damage_is_replayed(tmp_path):
    (file,) = write(tmp_path / "night", simulate("ztf", 3, 5, cutouts=False), packets_per_file=3)
    damaged = file.read_bytes()[:-50]
    file.write_bytes(damaged)
    assert list(packets([file])) == [damaged]
