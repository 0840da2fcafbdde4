"""Framing against fastavro's own block reader; containers that are damaged, alike, mapped, or too large inside."""

import gc
import io
import json
import mmap
import weakref
import zlib
from dataclasses import replace

import fastavro
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alert_broker import containers
from alert_broker.containers import AVRO_MAGIC, BadPacket, Block, UnknownSchemaError, header_end, message, split
from alert_broker.surveys.base import PacketError
from tests.alert_broker import ztf_containers
from tests.alert_broker.avro.maker import zigzag
from tests.alert_broker.ztf_containers import SYNC


def container(count, note="", **options) -> bytes:
    """Return a container of alerts of different lengths."""
    alerts = [ztf_containers.alert(number, "ZTF" + "a" * (number % 5 + 1)) for number in range(count)]
    return ztf_containers.container(alerts, avro_schema=ztf_containers.schema(note=note), **options)


def contents(items):
    return [bytes(item.data) if isinstance(item, Block) else item for item in items]


def by_fastavro(data):
    """(offset of the block's data, packets, data) of each block."""
    with io.BytesIO(data) as stream:
        return [(block.num_records, block.bytes_.getvalue()) for block in fastavro.block_reader(stream)]


@pytest.mark.parametrize("codec", ["null", "deflate"])
@settings(max_examples=30, deadline=None)
@given(count=st.integers(1, 40), interval=st.integers(1, 600))
def test_blocks_are_those_of_fastavro(codec, count, interval):
    data = container(count, codec=codec, sync_interval=interval)
    found = list(split(data, "file"))
    assert [(block.count, bytes(block.data)) for block in found] == by_fastavro(data)
    assert sum(block.count for block in found) == count
    for block in found:
        assert (block.file, block.schema.survey.name, block.compressed) == ("file", "ztf", codec == "deflate")
        assert codec == "deflate" or data[block.offset :].startswith(block.data)


def test_blocks_of_a_mapped_file_are_those_of_its_bytes(tmp_path):
    data = container(9, sync_interval=100)
    (tmp_path / "night.avro").write_bytes(data)
    with (
        (tmp_path / "night.avro").open("rb") as stream,
        mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
    ):
        found = list(split(mapped, "file"))
        assert contents(found) == contents(split(data, "file"))
        assert len(found) > 1
        for block in found:
            block.data.release()
        del found, block


def test_every_byte_that_is_lost_costs_two_blocks_at_most_and_changes_none():
    """The block that it was in; and, if it was in a sync marker, the next one, which the marker would have begun."""
    data = container(6, sync_interval=1)
    whole = contents(split(data, "file"))
    assert len(whole) == 6
    cost = {len(whole) - len(lossy(data, at, whole)) for at in range(header_end(data), len(data))}
    assert cost == {1, 2}


def lossy(data, at, whole):
    """The blocks that are left without one byte; each of them is one of the whole."""
    items = list(split(data[:at] + data[at + 1 :], "file"))
    left = [bytes(item.data) for item in items if isinstance(item, Block)]
    assert left == [content for content in whole if content in left]
    assert any(isinstance(item, BadPacket) for item in items)
    return left


@pytest.mark.parametrize("interval", [1, 10_000])
def test_a_header_that_is_cut_is_no_header(interval):
    data = container(2, sync_interval=interval)
    end = header_end(data)
    assert data[end - len(SYNC) : end] == SYNC
    for length in range(len(AVRO_MAGIC), end - len(SYNC)):
        with pytest.raises(PacketError):
            header_end(data[:length])
        (bad,) = split(data[:length], "file")
        assert bad.reason.startswith("the Avro container's header cannot be used: ")


def test_a_header_in_blocks_with_a_size_and_other_metadata_is_read():
    """fastavro writes none like this; Java's library may."""
    data = container(1)
    metadata, _ = containers._container_metadata(data)
    pairs = [("origin", b"\xff\x00"), *metadata.items()]
    blocks = b""
    for key, value in pairs:
        pair = zigzag(len(key)) + key.encode() + zigzag(len(value)) + value
        blocks += zigzag(-1) + zigzag(len(pair)) + pair
    (block,) = split(AVRO_MAGIC + blocks + b"\0" + data[header_end(data) - len(SYNC) :], "file")
    assert bytes(block.data) == contents(split(data, "file"))[0]


def test_headers_are_known_again_and_never_mistaken():
    """More containers than are remembered, whose headers differ in their last letter, in turns."""
    notes = "abcdefg"
    assert len(notes) > containers.HEADERS
    data = {note: container(1, note) for note in notes}
    for _ in range(2):
        for note in notes:
            (block,) = split(data[note], "file")
            assert block.offset == len(data[note]) - len(SYNC) - len(block.data)
            assert containers._headers[0].content in data[note]
            assert note.encode() in containers._headers[0].content
    assert len(containers._headers) == containers.HEADERS


@pytest.mark.parametrize(("limit", "fits"), [(-1, False), (0, True)])
def test_a_block_that_inflates_beyond_the_limit_is_refused(monkeypatch, limit, fits):
    (size,) = {len(content) for content in contents(split(container(3, codec="deflate"), "file"))}
    monkeypatch.setattr(containers, "INFLATED_BYTES", size + limit)
    (item,) = split(container(3, codec="deflate"), "file")
    assert isinstance(item, Block) == fits
    reason = f"the block decompresses to more than {size + limit} bytes, or ends early"
    assert fits or (item.packets, item.reason) == (3, reason)


@pytest.mark.parametrize("count", [3, -1])
def test_a_count_that_cannot_be_stands_for_one_packet(count):
    """Otherwise nine bytes could claim to be all alerts of a year in the account of what was lost."""
    data = container(0) + zigzag(count) + zigzag(2) + b"ab" + SYNC
    (bad,) = split(data, "file")
    assert f"claims to hold {count} packets in 2 bytes" in bad.reason
    assert bad.packets == 1


def test_a_block_of_no_packets_is_none():
    data = container(0) + zigzag(0) + zigzag(0) + SYNC
    (block,) = split(data + container(1)[header_end(data) :], "file")
    assert block.count == 1
    assert list(split(data, "file")) == []


# --- messages


def test_a_message_is_the_one_packet_that_splitting_finds():
    """An intact, uncompressed container takes a shorter way; the result is the same."""
    for data in (container(1), container(1, codec="deflate")):
        (block,) = split(data, "")
        found = message(data, 7)
        assert found == replace(block, index=7, data=found.data)
        assert bytes(found.data) == bytes(block.data)


@pytest.mark.parametrize(
    ("count", "reason"), [(0, "the Avro container holds no packets"), (2, "the message holds 2 packets; expected one")]
)
def test_a_message_of_none_or_two_packets_is_refused(count, reason):
    bad = message(container(count), 3)
    assert isinstance(bad, BadPacket)
    assert (bad.offset, bad.packets) == (3, 1)
    assert bad.reason.startswith(reason)


def test_a_message_with_anything_behind_its_packet_is_refused():
    for behind in (b"\0", SYNC, container(1)[header_end(container(1)) :]):
        assert isinstance(message(container(1) + behind, 0), BadPacket)


def test_a_message_cut_anywhere_is_one_bad_packet_with_its_index():
    data = container(1)
    for length in range(len(data)):
        bad = message(data[:length], 5)
        assert isinstance(bad, BadPacket), length
        assert (bad.file, bad.offset, bad.packets) == ("", 5, 1)


def test_an_installed_schema_is_used_only_for_an_id_that_the_registry_does_not_know():
    asked = []

    def schema_text(identifier):
        asked.append(identifier)
        if identifier == 900:
            return json.dumps({"type": "record", "name": "ours", "fields": []})
        raise UnknownSchemaError(f"no schema {identifier}")

    bad = message(b"\0" + (4711).to_bytes(4, "big") + b"datum", 2, schema_text)
    assert (bad.reason, bad.offset, asked) == ("no schema 4711", 2, [4711])
    installed = message(b"\0" + (1101).to_bytes(4, "big") + b"datum", 2, schema_text)
    assert (installed.schema.name, asked) == ("lsst.v11_1.alert", [4711, 1101])
    assert message(b"\0" + (900).to_bytes(4, "big") + b"datum", 2, schema_text).schema.name == "ours"
    assert message(b"\0" + (900).to_bytes(4, "big") + b"datum", 2).schema.name == "lsst.v9_0.alert"  # without one


def test_a_registered_schema_that_is_no_schema_is_parsed_once():
    asked = []

    def schema_text(identifier):
        asked.append(identifier)
        return '{"type": "recard \ud800"}'

    for _ in range(3):
        assert "the schema does not parse" in message(b"\0\0\0\x12\x67datum", 2, schema_text).reason
    assert asked == [4711]


class Packet(bytearray):
    """Bytes with weak references, which show whether anything still holds the packet."""


def held(schema_text) -> list[bool]:
    """Whether each of three packets of one schema is still in memory after it was refused."""
    references = []
    for _ in range(3):
        packet = Packet(b"\0\0\0\x12\x67datum")
        assert isinstance(message(packet, 0, schema_text), BadPacket)
        references.append(weakref.ref(packet))
        del packet
    gc.collect()
    return [reference() is not None for reference in references]


def test_a_packet_whose_schema_cannot_be_used_does_not_stay_in_memory():
    assert held(lambda _: '{"type": "recard"}') == [False] * 3


def test_planted_an_error_that_is_raised_again_keeps_every_packet():
    error = UnknownSchemaError("no schema")

    def schema_text(identifier):
        raise error

    assert held(schema_text) == [True] * 3


def test_a_message_is_not_inflated_without_limit():
    """Of 8 MB; a file may hold a block of many packets, and has more room."""
    whole = container(1, codec="deflate")
    for size, fits in ((7 << 20, True), (9 << 20, False)):
        packer = zlib.compressobj(wbits=-15)
        bomb = packer.compress(bytes(size)) + packer.flush()
        data = whole[: header_end(whole)] + zigzag(1) + zigzag(len(bomb)) + bomb + SYNC
        assert len(data) < 1 << 20
        assert isinstance(next(split(data, "file")), Block)
        found = message(data, 0)
        assert isinstance(found, Block) or "decompresses to more than 8388608 bytes" in found.reason
        assert isinstance(found, Block) is fits


def test_a_schema_of_megabytes_is_not_parsed():
    assert "at most 1048576 are read" in message(b"\0\0\0\x12\x67datum", 2, lambda _: " " * (1 << 21)).reason
