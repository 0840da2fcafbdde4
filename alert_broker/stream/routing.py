"""Which topics an alert goes to, and as what: routes with a filter, a format and what is attached of the packet.

An alert goes to every route whose filter takes it. What none takes goes to the default route, or is filtered.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from alert_broker.stream import filters
from alert_broker.stream.cutouts import CUTOUTS, cutouts
from alert_broker.stream.outputs import Encoder, Format, Registry, encoder
from edgekit.errors import EdgekitError, unknown

Attachment = Literal["nothing", "cutouts", "packet"]
ATTACHED: dict[str, tuple[str, ...]] = {"nothing": (), "cutouts": CUTOUTS, "packet": ("packet",)}
TOPIC_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-")
LONGEST_TOPIC = 249  # characters, as Kafka has it


@dataclass(frozen=True, slots=True)
class Route:
    """where: a filter (see `filters`), "" for everything. attach: the packet's images, or all of it as it came, in
    columns of bytes, which are base64 in JSON."""

    topic: str
    where: str = ""
    format: Format = "avro"
    attach: Attachment = "nothing"

    def __post_init__(self) -> None:
        if not self.topic or len(self.topic) > LONGEST_TOPIC or not TOPIC_CHARACTERS.issuperset(self.topic):
            raise EdgekitError(
                f"a route's topic is {self.topic!r}; expected 1 to {LONGEST_TOPIC} letters, digits, dots, underscores "
                "and hyphens"
            )
        if self.attach not in ATTACHED:
            raise unknown("attachment", self.attach, ATTACHED, where=f"the route to {self.topic}")


@dataclass(frozen=True, slots=True)
class Message:
    """For one topic. row: the alert's, among those routed; key: its object, whose alerts thus stay in order."""

    row: int
    topic: str
    key: bytes
    value: bytes


@dataclass(frozen=True, slots=True)
class Routed:
    """Messages of a batch, and the rows that gave none: every row is in one of the two."""

    messages: list[Message]
    filtered: npt.NDArray[np.int64]


class Router:
    """Rows of one schema to messages. schema: as `reuse.output_schema` has it; subjects are TOPIC-value."""

    def __init__(
        self,
        routes: Sequence[Route],
        schema: pa.Schema,
        *,
        default: Route | None = None,
        registry: Registry | None = None,
    ) -> None:
        chosen = [*routes, *([default] if default else [])]
        if not chosen:
            raise EdgekitError("there is no route; give one, or a default route for everything")
        for topic in (topics := [route.topic for route in chosen]):
            if topics.count(topic) > 1:
                raise EdgekitError(f"two routes go to {topic!r}; join their filters with `or`")
        if default and default.where:
            raise EdgekitError(f"the default route, to {default.topic}, has a filter; it takes what no other takes")
        self.routes, self.default, self.schema = tuple(routes), default, schema
        self.filters = {route: filters.compile(route.where, schema) for route in routes if route.where}
        self._registry = registry
        self._encoders: dict[Route, Encoder] = {route: self._encoder(route) for route in chosen}

    def __call__(
        self,
        rows: pa.RecordBatch,
        packets: Sequence[bytes | memoryview] | None = None,
        schema_text: Callable[[int], str] | None = None,
    ) -> Routed:
        """The messages of these rows. packets: (rows,) the message that each came in, for what is attached;
        schema_text: for their schemas, as `containers.split` has it."""
        keys = [(text or "").encode() for text in rows["object_id"].to_pylist()]
        taken = np.zeros(rows.num_rows, np.bool_)
        messages: list[Message] = []
        for route in self.routes:
            mask = np.ones(rows.num_rows, np.bool_)
            if route in self.filters:
                mask = self.filters[route](rows).to_numpy(zero_copy_only=False)
            taken |= mask
            messages += self._messages(route, rows, keys, np.flatnonzero(mask), packets, schema_text)
        rest = np.flatnonzero(~taken)
        if self.default is None:
            return Routed(messages, rest)
        messages += self._messages(self.default, rows, keys, rest, packets, schema_text)
        return Routed(messages, rest[:0])

    def warm_up(self) -> None:
        """Have what encodes compiled, so that the first alert need not wait for it."""
        for item in self._encoders.values():
            item.encode(pa.RecordBatch.from_pylist([{}], item.schema))

    def _encoder(self, route: Route) -> Encoder:
        schema = self.schema
        for name in ATTACHED[route.attach]:
            schema = schema.append(pa.field(name, pa.large_binary()))
        return encoder(route.format, schema, self._registry, f"{route.topic}-value")

    def _messages(
        self,
        route: Route,
        rows: pa.RecordBatch,
        keys: Sequence[bytes],
        indices: npt.NDArray[np.int64],
        packets: Sequence[bytes | memoryview] | None,
        schema_text: Callable[[int], str] | None,
    ) -> list[Message]:
        if len(indices) == 0:
            return []
        chosen = rows if len(indices) == rows.num_rows else rows.take(pa.array(indices))
        arrays = list(chosen.columns)
        if route.attach != "nothing":
            if packets is None:
                raise EdgekitError(f"the route to {route.topic} attaches {route.attach}, but there are no packets")
            of_these = [packets[index] for index in indices.tolist()]
            if route.attach == "packet":
                arrays.append(pa.array([bytes(packet) for packet in of_these], pa.large_binary()))
            else:
                arrays += cutouts(of_these, schema_text)
        encode = self._encoders[route]
        values = encode.encode(pa.RecordBatch.from_arrays(arrays, schema=encode.schema))
        return [
            Message(index, route.topic, keys[index], value)
            for index, value in zip(indices.tolist(), values, strict=True)
        ]
