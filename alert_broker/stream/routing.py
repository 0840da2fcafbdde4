"""Decide to which topics an alert goes, and in which form: a route has a filter, a format, and the parts of the packet
that it attaches.

An alert goes to every route whose filter accepts it. If no filter accepts it, it goes to the default route; if there is
none, it counts as filtered.
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
MAX_TOPIC = 249  # characters; Kafka's limit


@dataclass(frozen=True, slots=True)
class Route:
    """One output topic. where: a filter (see `filters`), "" for all alerts. attach: adds the packet's images, or the
    whole unchanged packet, as columns of bytes, which are base64 in JSON."""

    topic: str
    where: str = ""
    format: Format = "avro"
    attach: Attachment = "nothing"

    def __post_init__(self) -> None:
        if not self.topic or len(self.topic) > MAX_TOPIC or not TOPIC_CHARACTERS.issuperset(self.topic):
            raise EdgekitError(
                f"the topic of a route is {self.topic!r}; expected 1 to {MAX_TOPIC} letters, digits, dots, "
                "underscores and hyphens"
            )
        if self.attach not in ATTACHED:
            raise unknown("attachment", self.attach, ATTACHED, where=f"the route to {self.topic}")


@dataclass(frozen=True, slots=True)
class Message:
    """One message to a topic. row: the index of the alert's row among the routed rows; key: the alert's object, so that
    the alerts of an object stay in order."""

    row: int
    topic: str
    key: bytes
    value: bytes


@dataclass(frozen=True, slots=True)
class Routed:
    """The messages of a batch, and the rows that gave no message: every row is in one of the two."""

    messages: list[Message]
    filtered: npt.NDArray[np.int64]


class Router:
    """Turns rows of one schema into messages. schema: that of `reuse.output_schema`; subjects in the registry are
    TOPIC-value."""

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
            raise EdgekitError("there is no route; give a route, or a default route for all alerts")
        for topic in (topics := [route.topic for route in chosen]):
            if topics.count(topic) > 1:
                raise EdgekitError(f"two routes go to {topic!r}; join their filters with `or`")
        if default and default.where:
            raise EdgekitError(
                f"the default route, to {default.topic}, has a filter; remove it, because this route "
                "gets the alerts that no other route accepts"
            )
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
        """Return the messages of these rows. packets: (rows,) the message in which each alert came, for attachments;
        schema_text: returns the schemas of these messages, as in `containers.split`."""
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
        """Compile the encoders, so that the first alert need not wait for it."""
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
                raise EdgekitError(f"the route to {route.topic} attaches {route.attach}, but it was given no packets")
            chosen_packets = [packets[index] for index in indices.tolist()]
            if route.attach == "packet":
                arrays.append(pa.array([bytes(packet) for packet in chosen_packets], pa.large_binary()))
            else:
                arrays += cutouts(chosen_packets, schema_text)
        encode = self._encoders[route]
        values = encode.encode(pa.RecordBatch.from_arrays(arrays, schema=encode.schema))
        return [
            Message(index, route.topic, keys[index], value)
            for index, value in zip(indices.tolist(), values, strict=True)
        ]
