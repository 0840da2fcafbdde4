"""Cut files and messages into blocks of Avro data with their schema, and check their framing: Avro containers, and
Confluent's wire format.

This module decodes nothing. A block with a broken frame becomes a `BadPacket`, and reading goes on after the
container's next sync marker.
"""

from __future__ import annotations

import contextlib
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
HEADERS = 4  # number of container headers that are kept, the most recently parsed ones
WIRE_HEADER = struct.Struct(">BI")  # Confluent: a zero byte, then the schema id
INFLATED_BYTES = 1 << 30  # most bytes of one decompressed block of a file; a larger block is a decompression bomb
MESSAGE_BYTES = 8 << 20  # the same for the one packet of a message: a larger one could not be sent uncompressed
SCHEMA_BYTES = 1 << 20  # most bytes of a schema's text: LSST's has 0.2 MB, and parsing 1 MB takes a second

Buffer = bytes | mmap.mmap


class UnknownSchemaError(PacketError):
    """The registry has no schema with the id of a message."""


@dataclass(frozen=True, slots=True)
class BadPacket:
    """A packet, or several, without a usable light curve, and the reason. packets: how many packets it stands for, if
    the container says it; 0 if it stands for none.

    status: "error" if something is damaged; "skipped" if the data is sound but no survey reads it.
    """

    file: str
    offset: int
    reason: str
    status: Literal["error", "skipped"] = "error"
    packets: int = 1


@dataclass(frozen=True, slots=True)
class Schema:
    """A writer's schema and its full name. For a survey's alert it also has the survey, the plan that reads the
    photometry, and if the schema has images, the plan that reads them, and the plan that reads the photometry and where
    the images are."""

    name: str
    survey: Survey | None = None
    plan: ReadPlan | None = None
    cutouts: ReadPlan | None = None
    with_places: ReadPlan | None = None


@dataclass(frozen=True, slots=True)
class Block:
    """The Avro data of `count` consecutive packets, without framing. offset: byte of the first packet in the file.

    index: the packet's index in its batch, if the packet came as a message of its own; rows and errors then show the
    index instead of the byte.
    """

    file: str
    offset: int
    schema: Schema
    count: int
    data: bytes | memoryview = field(repr=False)
    compressed: bool = False
    index: int | None = None


def message(data: Buffer, index: int, schema_text: Callable[[int], str] | None = None) -> Block | BadPacket:
    """Return the one packet in a message, or the reason why there is none. index: the message's index in its batch,
    which the packet's rows and errors show."""
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
        return BadPacket(
            "", index, f"the message holds {packets} packets; expected one, as `edgekit alerts replay` sends them"
        )
    return replace(block, index=index)


def _one_packet(data: Buffer, index: int) -> Block | None:
    """Return the packet of an intact, uncompressed container with exactly one packet; None for all other data."""
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
    """Cut a file or a message into blocks of Avro data. The first bytes tell the format.

    schema_text: returns the schema of a Confluent message (`Registry.schema`). LSST's installed schemas are used for an
    id that it does not know, and if it is None. If it raises PacketError, the message becomes a BadPacket. Other
    exceptions pass through, since the packet is not to blame. inflated_bytes: the limit for a decompressed block.
    """
    if len(data) == 0:
        yield BadPacket(file, 0, "the data is empty: it has 0 bytes", packets=0)
    elif data[:4] == AVRO_MAGIC:
        yield from _split_container(data, file, inflated_bytes or INFLATED_BYTES)
    elif data[:1] == WIRE_MAGIC:
        yield _unwrap_message(data, file, schema_text)
    else:
        yield BadPacket(
            file,
            0,
            f"the format is unknown: the data begins with {bytes(data[:4]).hex(' ')}; expected an Avro container "
            "(4f 62 6a 01), a Confluent message (00 and a schema id) or Parquet (50 41 52 31)",
        )


def _split_container(data: Buffer, file: str, inflated_bytes: int) -> Iterator[Block | BadPacket]:
    try:
        header = _header(data)
    except (PacketError, UnicodeDecodeError) as error:
        yield BadPacket(file, 0, f"the Avro container's header cannot be used: {error}")
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
        packets = count if 0 < count <= end - start else 1  # an impossible count is not passed on
        if fault:
            # Every block ends with the container's sync marker, so reading can go on after the next marker.
            following = data.find(sync, at)
            lost = (following if following >= 0 else len(data)) - at
            yield BadPacket(
                file, at, f"the block at byte {at} is damaged: {fault}; {lost} bytes are lost", packets=packets
            )
            at = following + SYNC_BYTES if following >= 0 else len(data)
            continue
        at = end + SYNC_BYTES
        # a view, because most of the bytes are images that nobody reads
        content: bytes | memoryview = memoryview(data)[start:end]
        if codec == "deflate":
            inflate = zlib.decompressobj(wbits=-zlib.MAX_WBITS)
            try:
                content = inflate.decompress(content, inflated_bytes)
            except zlib.error as error:
                yield BadPacket(file, start, f"the block does not decompress: {error}", packets=packets)
                continue
            if not inflate.eof:
                reason = f"the block decompresses to more than {inflated_bytes} bytes, or ends early"
                yield BadPacket(file, start, reason, packets=packets)
                continue
        if count > len(content):
            yield BadPacket(file, start, f"the block claims to hold {count} packets in {len(content)} bytes")
        elif count:
            yield Block(file, start, schema, count, content, compressed=codec != "null")


@dataclass(frozen=True, slots=True)
class _Header:
    """A container's first bytes, up to its sync marker, and the codec and schema that they state."""

    content: bytes = field(repr=False)
    codec: str
    schema: Schema


_headers: list[_Header] = []  # the most recently parsed header is first


def _header(data: Buffer) -> _Header:
    """Return a container's header. A header is parsed once for many packets: packets of a survey have the same header
    bytes."""
    for known in _headers:
        same = (
            data.startswith(known.content) if isinstance(data, bytes) else data[: len(known.content)] == known.content
        )
        if same:
            return known
    metadata, at = _container_metadata(data)
    codec = metadata.get("avro.codec", b"null").decode()
    if codec not in ("null", "deflate"):
        raise PacketError(f"the codec is {codec!r}; supported: null, deflate")
    found = _Header(bytes(data[:at]), codec, _container_schema(metadata.get("avro.schema", b"")))
    _headers.insert(0, found)
    del _headers[HEADERS:]
    return found


def header_end(data: Buffer) -> int:
    """Return the byte after a container's header and its sync marker. Raises PacketError if the header is not whole."""
    return _container_metadata(data)[1] + SYNC_BYTES


def _frame(data: Buffer, at: int, sync: bytes) -> tuple[int, int, int, str]:
    """Return a block's packet count, first byte and end, and the fault of its framing ("" if it has none)."""
    try:
        count, position = _read_long(data, at)
        size, start = _read_long(data, position)
    except PacketError as error:
        return 0, at, at, str(error)
    end = start + size
    if count < 0 or size < 0:
        return 0, at, at, f"it claims to hold {count} packets in {size} bytes"
    if end + SYNC_BYTES > len(data):
        early = end + SYNC_BYTES - len(data)
        if data.find(sync, start) < 0:
            return count, start, end, f"it is cut short: {early} bytes are missing at the end of the file"
    elif data[end : end + SYNC_BYTES] == sync:
        return count, start, end, ""
    found = data.find(sync, start)
    if 0 <= found < end:
        return (
            count,
            start,
            end,
            f"it ends {end - found} bytes earlier than it says: bytes were lost, or its length is damaged",
        )
    return count, start, end, "the container's sync marker does not follow it"


def _container_metadata(data: Buffer) -> tuple[dict[str, bytes], int]:
    """Return the header's key-value map and the byte after it."""
    metadata: dict[str, bytes] = {}
    at = len(AVRO_MAGIC)
    while True:
        entries, at = _read_long(data, at)
        if entries == 0:
            return metadata, at
        if entries < 0:  # the block then also gives its size in bytes, so that a reader can skip it
            entries, (_, at) = -entries, _read_long(data, at)
        for _ in range(entries):
            key, at = _read_bytes(data, at)
            value, at = _read_bytes(data, at)
            metadata[key.decode()] = value


def _read_long(data: Buffer, at: int) -> tuple[int, int]:
    """Return a zigzag variable-length integer and the byte after it."""
    value, shift = 0, 0
    for end, byte in enumerate(data[at : at + 10], at + 1):
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return (value >> 1) ^ -(value & 1), end
        shift += 7
    raise PacketError("it ends inside a number" if at + 10 > len(data) else "it has a number of more than 64 bits")


def _read_bytes(data: Buffer, at: int) -> tuple[bytes, int]:
    size, at = _read_long(data, at)
    if size < 0 or at + size > len(data):
        raise PacketError(f"it claims that {size} bytes follow byte {at}, but it has {len(data)} bytes in all")
    return data[at : at + size], at + size


@functools.lru_cache(maxsize=64)
def _container_schema(text: bytes) -> Schema:
    """Return a container's schema. It is parsed once for each distinct text: ZTF repeats 23 kB of schema in every
    packet."""
    if len(text) > SCHEMA_BYTES:
        raise PacketError(f"the schema has {len(text)} bytes; at most {SCHEMA_BYTES} are read")
    try:
        parsed = parse_schema(json.loads(text))
        if not isinstance(parsed, dict) or parsed.get("type") != "record":
            return Schema("a union" if isinstance(parsed, list) else "not a record")
        survey = next(_matching(parsed["name"]), None)
        return _planned(parsed, survey) if survey else Schema(parsed["name"])
    except SchemaError as error:
        raise PacketError(f"the schema cannot be used: {error}") from error
    except Exception as error:  # the text may be any JSON, for which fastavro raises many types of exceptions
        raise PacketError(f"the schema does not parse ({type(error).__name__}: {error})") from error


def _matching(schema_name: str) -> Iterator[Survey]:
    return (survey for survey in surveys().values() if survey.recognises_schema(schema_name))


def _unwrap_message(data: Buffer, file: str, schema_text: Callable[[int], str] | None) -> Block | BadPacket:
    if len(data) <= WIRE_HEADER.size:
        return BadPacket(
            file, 0, f"the Confluent message has {len(data)} bytes; expected 5 bytes of header and a packet"
        )
    _, identifier = WIRE_HEADER.unpack(data[: WIRE_HEADER.size])
    try:
        schema = _message_schema(identifier) if schema_text is None else _known_schema(schema_text, identifier)
    except PacketError as error:
        return BadPacket(file, 0, str(error))
    return Block(file, WIRE_HEADER.size, schema, 1, memoryview(data)[WIRE_HEADER.size :])


def _known_schema(schema_text: Callable[[int], str], identifier: int) -> Schema:
    """Return the registry's schema with this id. A registry numbers schemas as it likes, so its answer wins over an
    installed schema of LSST with the same id."""
    try:
        found = _registered_schema(schema_text, identifier)
    except UnknownSchemaError:
        if identifier not in lsst.schema_versions():
            raise
        return _message_schema(identifier)
    if isinstance(found, str):
        raise PacketError(found)
    return found


@functools.lru_cache(maxsize=64)
def _registered_schema(schema_text: Callable[[int], str], identifier: int) -> Schema | str:
    """Return a registered schema by its number, because a lookup by 0.2 MB of schema text would take longer than
    reading a packet. For a schema that cannot be used, return the reason, which is kept as well: parsing the schema
    again for each of its packets would take much longer. The cache holds no exception, because an exception that is
    raised again keeps the frames of every raise, and with them every packet."""
    try:
        return _container_schema(schema_text(identifier).encode(errors="surrogatepass"))
    except UnknownSchemaError:
        raise
    except PacketError as error:
        return str(error)


@functools.cache
def _message_schema(identifier: int) -> Schema:
    return _planned(lsst.schema(identifier), surveys()["lsst"])


def _planned(parsed: Any, survey: Survey) -> Schema:
    plan = compile_plan(parsed, survey.paths)
    images: ReadPlan | None = None
    with_places: ReadPlan | None = None
    with contextlib.suppress(SchemaError):  # the schema has no images, or not as columns
        images, with_places = compile_plan(parsed, survey.cutouts), compile_plan(parsed, survey.paths, survey.cutouts)
    return Schema(parsed["name"], survey, plan, images, with_places)
