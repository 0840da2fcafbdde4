"""The filters of the routes decide the topics of every alert, each route has its format, and no alert is lost between
routes."""

import io
import json

import fastavro
import numpy as np
import pyarrow as pa
import pytest
from fastavro.schema import parse_schema

from alert_broker.stream.cutouts import CUTOUTS
from alert_broker.stream.registry import open_registry
from alert_broker.stream.routing import Route, Router
from edgekit.errors import EdgekitError

SCHEMA = pa.schema([("object_id", pa.string()), ("best_class", pa.string()), ("p", pa.float32())])


def rows_of(count=40, seed=0):
    rng = np.random.default_rng(seed)
    return pa.RecordBatch.from_pylist(
        [
            {
                "object_id": f"o{k}",
                "best_class": [None, "KN", "SNIa"][rng.integers(3)],
                "p": None if rng.random() < 0.2 else float(np.float32(rng.random())),
            }
            for k in range(count)
        ],
        schema=SCHEMA,
    )


def value_of(message, registry):
    identifier = int.from_bytes(message.value[1:5], "big")
    schema = parse_schema(json.loads(registry.schema(identifier)))
    return fastavro.schemaless_reader(io.BytesIO(message.value[5:]), schema, None)


@pytest.mark.parametrize("default", [None, Route("rest")])
@pytest.mark.parametrize("seed", range(3))
def test_every_row_is_routed_or_filtered(default, seed):
    registry, rows = open_registry(f"mock://routing{seed}"), rows_of(seed=seed)
    router = Router(
        [Route("kilonovae", 'best_class == "KN"'), Route("sure", "p > 0.7", "json")],
        SCHEMA,
        default=default,
        registry=registry,
    )
    routed = router(rows)
    expected, left = [], []
    for k, row in enumerate(rows.to_pylist()):  # the reference
        topics = [
            topic
            for topic, takes in (("kilonovae", row["best_class"] == "KN"), ("sure", (row["p"] or 0) > 0.7))
            if takes
        ]
        if not topics and default:
            topics = ["rest"]
        expected += [(k, topic) for topic in topics]
        left += [] if topics else [k]
    assert sorted((message.row, message.topic) for message in routed.messages) == sorted(expected)
    assert routed.filtered.tolist() == left
    assert {message.row for message in routed.messages} | set(left) == set(range(rows.num_rows))
    for message in routed.messages:
        row = rows.to_pylist()[message.row]
        found = json.loads(message.value) if message.topic == "sure" else value_of(message, registry)
        assert found == {**row, "p": None if row["p"] is None else pytest.approx(row["p"], rel=1e-7)}
        assert message.key == row["object_id"].encode()


def test_routes_that_take_everything_and_nothing():
    rows = rows_of()
    assert len(Router([Route("all")], SCHEMA)(rows).messages) == rows.num_rows
    nothing = Router([Route("none", "p > 2")], SCHEMA)(rows)
    assert (nothing.messages, len(nothing.filtered)) == ([], rows.num_rows)
    assert Router([Route("all")], SCHEMA)(rows.slice(0, 0)).messages == []


@pytest.mark.parametrize(
    ("routes", "default", "reason"),
    [
        ([], None, "there is no route"),
        ([Route("a"), Route("a", "p > 1")], None, "two routes go to 'a'; join their filters with `or`"),
        ([Route("a")], Route("b", "p > 1"), "the default route, to b, has a filter"),
        ([Route("a", "q > 1")], None, "unknown column 'q'"),
        ([Route("a", format="afro")], None, "unknown format 'afro'"),
    ],
)
def test_routes_that_cannot_be(routes, default, reason):
    with pytest.raises(EdgekitError, match=reason):
        Router(routes, SCHEMA, default=default)


@pytest.mark.parametrize("topic", ["", "a b", "é", "x" * 250, "a/b"])
def test_topics_that_kafka_refuses(topic):
    with pytest.raises(EdgekitError, match="the topic of a route is"):
        Route(topic)


def test_an_unknown_attachment():
    with pytest.raises(EdgekitError, match=r"unknown attachment 'cutout' in the route to a; .*did you mean 'cutouts'"):
        Route("a", attach="cutout")


def test_attached_to_those_that_are_routed(packets_with_images):
    messages, images = packets_with_images
    registry = open_registry("mock://attached")
    rows = pa.RecordBatch.from_pylist(
        [{"object_id": str(k), "best_class": "KN" if k % 2 else None, "p": k / 4} for k in range(4)], schema=SCHEMA
    )
    router = Router(
        [Route("images", 'best_class == "KN"', attach="cutouts"), Route("whole", "p == 0.5", attach="packet")],
        SCHEMA,
        registry=registry,
    )
    routed = router(rows, messages)
    found = [(message.row, message.topic, value_of(message, registry)) for message in routed.messages]
    assert [item[:2] for item in found] == [(1, "images"), (3, "images"), (2, "whole")]
    for row, topic, value in found:
        attached = [value["packet"]] if topic == "whole" else [value[name] for name in CUTOUTS]
        assert attached == ([messages[row]] if topic == "whole" else images[row])
    with pytest.raises(EdgekitError, match="the route to images attaches cutouts, but it was given no packets"):
        router(rows)


def test_warming_up_encodes_once_by_each_route_and_needs_no_packet():
    router = Router(
        [Route("a", attach="cutouts"), Route("b", "p > 2", attach="packet"), Route("c", format="json")], SCHEMA
    )
    seen = []
    for route, encode in router._encoders.items():
        router._encoders[route] = Watched(encode, seen)
    router.warm_up()
    assert seen == ["avro", "avro", "json"]


class Watched:
    """An encoder that records its calls."""

    def __init__(self, encode, seen):
        self.encode_rows, self.schema, self.seen = encode.encode, encode.schema, seen

    def encode(self, rows):
        (value,) = self.encode_rows(rows)
        self.seen.append("json" if value.startswith(b"{") else "avro")
        return [value]
