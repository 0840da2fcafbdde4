"""Cut files and messages into blocks of Avro data with their schema, and check the framing: containers, wire format.

Nothing is decoded here. A block with a broken frame becomes a `BadPacket`, and reading goes on at the container's next
sync marker.
"""

from __future__ import annotations

import functools
import json
import mmap
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from fastavro.schema import parse_schema

from alert_broker.avro.plan import ReadPlan, SchemaError, compile_plan
from alert_broker.surveys import lsst
from alert_broker.surveys.base import PacketError, Survey, surveys

AVRO_MAGIC, WIRE_MAGIC = b"Obj\x01", b"\x00"
SYNC_BYTES = 16
HEADERS = 4  # kept, of the containers met lately
WIRE_HEADER = struct.Struct(">BI")  # Confluent: a zero byte, then the schema id
INFLATED_BYTES = 1 << 30  # of one block of a file; more is a decompression bomb
MESSAGE_BYTES = 8 << 20  # of a message's one packet: larger ones could not be sent uncompressed
SCHEMA_BYTES = 1 << 20  # of a schema's text: LSST's has 0.2 MB, and parsing 1 MB takes a second

Buffer = bytes | mmap.mmap


class UnknownSchemaError(PacketError):
    """The registry has no schema with the id of a message."""


@dataclass(frozen=True, slots=True)
class BadPacket:
    """What gave no light curve and why. packets: how many it stands for, as far as the container says; 0 for none.

    status: "error" where something is damaged, "skipped" where it is sound but not for us.
    """

    file: str
    offset: int
    reason: str
    status: Literal["error", "skipped"] = "error"
    packets: int = 1


@dataclass(frozen=True, slots=True)
class Schema:
    """A writer's schema: its full name, and where it is a survey's alert, that and the plans for reading its photometry
    and its images, if it has any."""

    name: str
    survey: Survey | None = None
    plan: ReadPlan | None = None
    cutouts: ReadPlan | None = None


@dataclass(frozen=True, slots=True)
class Block:
    """Avro data of `count` packets in a row, without framing. offset: byte of the first packet in the file.

    index: the packet's index in its batch, if it came as a message of its own; it is reported instead of the byte.
    """

    file: str
    offset: int
    schema: Schema
    count: int
    data: bytes | memoryview = field(repr=False)
    compressed: bool = False
    index: int | None = None


def message(data: Buffer, index: int, schema_text: Callable[[int], str] | None = None) -> Block | BadPacket:
    """The one packet in a message, or the reason why there is none. index: of the message in its batch; the packet's
    rows and errors carry it."""
    if data[: len(AVRO_MAGIC)] == AVRO_MAGIC and (whole := _one_packet(data, index)) is not None:
        return whole
    packets = 0
    block: Block | None = None
    for item in split(data, "", schema_text, MESSAGE_BYTES):
        if isinstance(item, BadPacket):
            return replace(item, offset=index, packets=1)
        packets += item.count
        block = item
    if block is None or packets != 1:
        return BadPacket("", index, f"the message holds {packets} packets; expected one, as alerts replay sends them")
    return replace(block, index=index)


def _one_packet(data: Buffer, index: int) -> Block | None:
    """The packet of an intact, uncompressed container of exactly one packet; None for all other data."""
    try:
        header = _header(data)
    except (PacketError, UnicodeDecodeError):
        return None
    at = len(header.content) + SYNC_BYTES
    count, start, end, fault = _frame(data, at, data[at - SYNC_BYTES : at])
    if fault or count != 1 or end == start or end + SYNC_BYTES != len(data) or header.codec != "null":
        return None
    return Block("", start, header.schema, 1, memoryview(data)[start:end], index=index)


def split(
    data: Buffer, file: str, schema_text: Callable[[int], str] | None = None, inflated_bytes: int | None = None
) -> Iterator[Block | BadPacket]:
    """Cut a file or a message into blocks of Avro data; the first bytes say which format it is.

    schema_text: gives the schemas of Confluent messages (`Registry.schema`). LSST's installed ones are used for ids
    that it does not know, and without it. A PacketError that it raises becomes a BadPacket; any other error is raised,
    as the packet is not at fault.
    """
    if len(data) == 0:
        yield BadPacket(file, 0, "empty: 0 bytes", packets=0)
    elif data[:4] == AVRO_MAGIC:
        yield from _split_container(data, file, inflated_bytes or INFLATED_BYTES)
    elif data[:1] == WIRE_MAGIC:
        yield _unwrap_message(data, file, schema_text)
    else:
        yield BadPacket(
            file,
            0,
            f"begins with {bytes(data[:4]).hex(' ')}; expected an Avro container (4f 62 6a 01), "
            "a Confluent message (00 and a schema id) or Parquet (50 41 52 31)",
        )


def _split_container(data: Buffer, file: str, inflated_bytes: int) -> Iterator[Block | BadPacket]:
    try:
        header = _header(data)
    except (PacketError, UnicodeDecodeError) as error:
        yield BadPacket(file, 0, f"the Avro container's header is not usable: {error}")
        return
    at, codec, schema = len(header.content), header.codec, header.schema
    sync = data[at : at + SYNC_BYTES]
    at += SYNC_BYTES
    if at >= len(data):
        whole = at == len(data)
        reason = "the Avro container holds no packets" if whole else "the Avro container ends inside its header"
        yield BadPacket(file, 0, reason, "skipped" if whole else "error", packets=0 if whole else 1)
    while at < len(data):
        count, start, end, fault = _frame(data, at, sync)
        packets = count if 0 < count <= end - start else 1  # a count that cannot be is not passed on
        if fault:
            # Blocks end in the container's sync marker, so the next one shows where reading can go on.
            following = data.find(sync, at)
            lost = (following if following >= 0 else len(data)) - at
            yield BadPacket(file, at, f"the block at byte {at} {fault}; {lost} bytes are lost", packets=packets)
            at = following + SYNC_BYTES if following >= 0 else len(data)
            continue
        at = end + SYNC_BYTES
        content: bytes | memoryview = memoryview(data)[start:end]  # not copied: most of it is images, never looked at
        if codec == "deflate":
            inflate = zlib.decompressobj(wbits=-zlib.MAX_WBITS)
            try:
                content = inflate.decompress(content, inflated_bytes)
            except zlib.error as error:
                yield BadPacket(file, start, f"the block does not decompress: {error}", packets=packets)
                continue
            if not inflate.eof:
                reason = f"the block decompresses to more than {inflated_bytes} bytes or ends early"
                yield BadPacket(file, start, reason, packets=packets)
                continue
        if count > len(content):
            yield BadPacket(file, start, f"the block claims {count} packets in {len(content)} bytes")
        elif count:
            yield Block(file, start, schema, count, content, compressed=codec != "null")


@dataclass(frozen=True, slots=True)
class _Header:
    """A container's first bytes, up to its sync marker, and what they say."""

    content: bytes = field(repr=False)
    codec: str
    schema: Schema


_headers: list[_Header] = []  # met lately, the last one first


def _header(data: Buffer) -> _Header:
    """Read once for many packets: a survey's have the same header, which is known again by comparing its bytes."""
    for known in _headers:
        same = (
            data.startswith(known.content) if isinstance(data, bytes) else data[: len(known.content)] == known.content
        )
        if same:
            return known
    metadata, at = _container_metadata(data)
    codec = metadata.get("avro.codec", b"null").decode()
    if codec not in ("null", "deflate"):
        raise PacketError(f"its codec is {codec!r}; supported: null, deflate")
    found = _Header(bytes(data[:at]), codec, _container_schema(metadata.get("avro.schema", b"")))
    _headers.insert(0, found)
    del _headers[HEADERS:]
    return found


def header_end(data: Buffer) -> int:
    """The byte after a container's header and its sync marker; PacketError if the header is not whole."""
    return _container_metadata(data)[1] + SYNC_BYTES


def _frame(data: Buffer, at: int, sync: bytes) -> tuple[int, int, int, str]:
    """A block's packet count, first byte, end, and what is wrong with its framing ("" for nothing)."""
    try:
        count, position = _read_long(data, at)
        size, start = _read_long(data, position)
    except PacketError as error:
        return 0, at, at, str(error)
    end = start + size
    if count < 0 or size < 0:
        return 0, at, at, f"claims {count} packets in {size} bytes"
    if end + SYNC_BYTES > len(data):
        early = end + SYNC_BYTES - len(data)
        if data.find(sync, start) < 0:
            return count, start, end, f"is cut short: {early} bytes are missing at the end of the file"
    elif data[end : end + SYNC_BYTES] == sync:
        return count, start, end, ""
    found = data.find(sync, start)
    if 0 <= found < end:
        return (
            count,
            start,
            end,
            f"ends {end - found} bytes earlier than it says: bytes were lost, or its length is damaged",
        )
    return count, start, end, "is not followed by the container's sync marker"


def _container_metadata(data: Buffer) -> tuple[dict[str, bytes], int]:
    """The header's key-value map and the byte after it."""
    metadata: dict[str, bytes] = {}
    at = len(AVRO_MAGIC)
    while True:
        entries, at = _read_long(data, at)
        if entries == 0:
            return metadata, at
        if entries < 0:  # the block then also says its size in bytes, for readers that skip it
            entries, (_, at) = -entries, _read_long(data, at)
        for _ in range(entries):
            key, at = _read_bytes(data, at)
            value, at = _read_bytes(data, at)
            metadata[key.decode()] = value


def _read_long(data: Buffer, at: int) -> tuple[int, int]:
    """A zigzag variable-length integer and the byte after it."""
    value, shift = 0, 0
    for end, byte in enumerate(data[at : at + 10], at + 1):
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return (value >> 1) ^ -(value & 1), end
        shift += 7
    raise PacketError("ends inside a number" if at + 10 > len(data) else "has a number of more than 64 bits")


def _read_bytes(data: Buffer, at: int) -> tuple[bytes, int]:
    size, at = _read_long(data, at)
    if size < 0 or at + size > len(data):
        raise PacketError(f"says that {size} bytes follow byte {at}, of {len(data)} in all")
    return data[at : at + size], at + size


@functools.lru_cache(maxsize=64)
def _container_schema(text: bytes) -> Schema:
    """Parsed once for each distinct schema text: ZTF repeats 23 kB of it in every packet."""
    if len(text) > SCHEMA_BYTES:
        raise PacketError(f"its schema has {len(text)} bytes; at most {SCHEMA_BYTES} are read")
    try:
        parsed = parse_schema(json.loads(text))
        if not isinstance(parsed, dict) or parsed.get("type") != "record":
            return Schema("a union" if isinstance(parsed, list) else "not a record")
        survey = next(_matching(parsed["name"]), None)
        return _planned(parsed, survey) if survey else Schema(parsed["name"])
    except SchemaError as error:
        raise PacketError(f"its schema cannot be used: {error}") from error
    except Exception as error:  # arbitrary JSON: fastavro raises what it happens to meet
        raise PacketError(f"its schema does not parse ({type(error).__name__}: {error})") from error


def _matching(schema_name: str) -> Iterator[Survey]:
    return (survey for survey in surveys().values() if survey.recognises_schema(schema_name))


def _unwrap_message(data: Buffer, file: str, schema_text: Callable[[int], str] | None) -> Block | BadPacket:
    if len(data) <= WIRE_HEADER.size:
        return BadPacket(file, 0, f"a Confluent message of {len(data)} bytes; expected 5 of header and a packet")
    _, identifier = WIRE_HEADER.unpack(data[: WIRE_HEADER.size])
    try:
        schema = _message_schema(identifier) if schema_text is None else _known_schema(schema_text, identifier)
    except PacketError as error:
        return BadPacket(file, 0, str(error))
    return Block(file, WIRE_HEADER.size, schema, 1, memoryview(data)[WIRE_HEADER.size :])


def _known_schema(schema_text: Callable[[int], str], identifier: int) -> Schema:
    """The registry's schema with this id. A registry numbers schemas as it likes, so its answer wins over an installed
    schema of LSST with the same id."""
    try:
        found = _registered_schema(schema_text, identifier)
    except UnknownSchemaError:
        if identifier not in lsst.schema_versions():
            raise
        return _message_schema(identifier)
    if isinstance(found, PacketError):
        raise found
    return found


@functools.lru_cache(maxsize=64)
def _registered_schema(schema_text: Callable[[int], str], identifier: int) -> Schema | PacketError:
    """Cached by id: to look up 0.2 MB of schema by its text would take longer than to read a packet, and to parse a
    schema that is no schema again for each of its packets much longer."""
    try:
        return _container_schema(schema_text(identifier).encode(errors="surrogatepass"))
    except UnknownSchemaError:
        raise
    except PacketError as error:
        return error


@functools.cache
def _message_schema(identifier: int) -> Schema:
    return _planned(lsst.schema(identifier), surveys()["lsst"])


def _planned(parsed: Any, survey: Survey) -> Schema:
    try:
        images = compile_plan(parsed, survey.cutouts)
    except SchemaError:
        images = None  # it has none, or not as columns
    return Schema(parsed["name"], survey, compile_plan(parsed, survey.paths), images)
