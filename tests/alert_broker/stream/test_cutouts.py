"""The images in packets are returned byte for byte, in the order of the messages, also with other messages between
them."""

import io

import fastavro
import numpy as np
import pyarrow as pa
import pytest
from fastavro.schema import parse_schema

from alert_broker import containers, simulated_packets
from alert_broker.containers import WIRE_HEADER
from alert_broker.stream.cutouts import CUTOUTS, cutouts
from alert_broker.surveys import lsst
from alert_broker.ztf_schema import ztf_schema

NOTHING = (None, None, None)


def found(messages, schema_text=None):
    """Return the images of each message."""
    columns = cutouts(messages, schema_text)
    assert [column.type for column in columns] == [pa.large_binary()] * len(CUTOUTS)
    return list(zip(*(column.to_pylist() for column in columns), strict=True))


def test_cutouts_are_the_packets_own(packets_with_images):
    messages, images = packets_with_images
    mixed = [messages[2], b"nothing", messages[0], messages[3], messages[1][:-30], messages[1]]
    images_of = found(mixed)
    first, second, third, fourth = map(tuple, images)
    assert images_of == [third, NOTHING, first, fourth, NOTHING, second]
    assert third != fourth  # the images of two alerts differ
    assert len(CUTOUTS) == len(images_of[0])


@pytest.mark.realdata
def test_cutouts_of_real_packets(shared_data):
    """One call has packets of every available survey and schema version; the survey WINTER is unknown."""
    alerts = shared_data / "alerts"
    paths = [*alerts.glob("ztf*/*.avro"), *alerts.glob("other/*.avro"), *alerts.glob("lsst_wire/*.bin")]
    messages, expected = [path.read_bytes() for path in paths], []
    for path, data in zip(paths, messages, strict=True):
        if path.suffix == ".bin":
            schema = lsst.schema(WIRE_HEADER.unpack(data[:5])[1])
            packet = fastavro.schemaless_reader(io.BytesIO(data[5:]), schema, None)
        else:
            (packet,) = fastavro.reader(io.BytesIO(data))
        images = [packet.get(f"cutout{name}") for name in ("Science", "Template", "Difference")]
        expected.append(tuple(image["stampData"] if isinstance(image, dict) else image for image in images))
    images_of = found(messages)
    assert images_of == expected
    assert sum(image is not None for images in images_of for image in images) >= 3 * (85 + 1)


@pytest.mark.parametrize("seed", range(5))
def test_any_mixture_keeps_its_order(packets_with_images, seed):
    rng = np.random.default_rng(seed)
    messages, images = packets_with_images
    choices = [*zip(messages, map(tuple, images), strict=True), (b"garbage", NOTHING), (b"", NOTHING)]
    chosen = [choices[k] for k in rng.integers(len(choices), size=20)]
    assert found([message for message, _ in chosen]) == [expected for _, expected in chosen]


def test_a_message_that_inflates_beyond_the_limit_of_a_message_has_no_images(packets_with_images, monkeypatch):
    messages, images = packets_with_images
    stream = io.BytesIO()
    (packet,) = fastavro.reader(io.BytesIO(messages[0]))
    fastavro.writer(stream, parse_schema(ztf_schema()), [packet], codec="deflate")
    assert found([stream.getvalue()]) == [tuple(images[0])]
    monkeypatch.setattr(containers, "MESSAGE_BYTES", 1000)
    assert found([stream.getvalue()]) == [NOTHING]


def test_no_messages_have_no_images():
    assert found([]) == []
    assert found([b"garbage"]) == [NOTHING]


def test_views_of_bytes_are_read_too(packets_with_images):
    messages, images = packets_with_images
    assert found([memoryview(message) for message in messages]) == [tuple(three) for three in images]


@pytest.mark.parametrize("missing", range(3))
@pytest.mark.parametrize("survey", ["ztf", "lsst"])
def test_one_image_may_be_missing(packets_with_images, survey, missing):
    messages, images = packets_with_images
    number = {"ztf": 0, "lsst": 2}[survey]
    data = messages[number]
    if survey == "ztf":
        (packet,) = fastavro.reader(io.BytesIO(data))
    else:
        schema = lsst.schema(WIRE_HEADER.unpack(data[:5])[1])
        packet = fastavro.schemaless_reader(io.BytesIO(data[5:]), schema, None)
    packet["cutout" + ("Science", "Template", "Difference")[missing]] = None
    expected = [None if k == missing else image for k, image in enumerate(images[number])]
    assert found([messages[1], simulated_packets.message(survey, packet)]) == [tuple(images[1]), tuple(expected)]


def test_a_message_of_two_packets_has_no_images_of_its_own(packets_with_images, tmp_path):
    messages, _ = packets_with_images
    packets = [next(fastavro.reader(io.BytesIO(message))) for message in messages[:2]]
    path = simulated_packets.write_file(tmp_path, "ztf", 0, packets, single=False)
    assert found([path.read_bytes()]) == [NOTHING]


def test_an_image_whose_length_lies_is_none(packets_with_images):
    """The damaged packet has no image; its neighbours keep theirs."""
    messages, images = packets_with_images
    at = messages[0].index(images[0][1]) - 3
    damaged = messages[0][:at] + b"\xff\xff\xff" + messages[0][at + 3 :]
    assert found([messages[2], damaged, messages[1]]) == [tuple(images[2]), NOTHING, tuple(images[1])]
