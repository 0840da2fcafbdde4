"""The parts of the compiled loop are compared with Python: numbers, texts, and datums read in one call or in many."""

import itertools

import numpy as np
import pytest
from fastavro.schema import parse_schema
from hypothesis import given
from hypothesis import strategies as st

from alert_broker.avro import columns, walk
from alert_broker.avro.columns import Columns
from alert_broker.avro.plan import compile_plan
from tests.alert_broker.avro.maker import Maker, zigzag

EDGES = sorted(
    {sign * 2**k + more for k in range(63) for sign in (1, -1) for more in (-1, 0, 1)} | {2**63 - 1, -(2**63)}
)
# the bytes at which UTF-8's rules change
CONTINUATIONS = bytes([0x00, 0x7F, 0x80, 0x8F, 0x90, 0x9F, 0xA0, 0xBF, 0xC0, 0xFF])


def buffer(data: bytes) -> np.ndarray:
    return np.frombuffer(data, np.uint8)


def number(data: bytes, most: int) -> tuple[int, int]:
    return walk._number(buffer(data), 0, len(data), most)


def by_python(data: bytes, most: int) -> tuple[int, int]:
    """Return the number by the specification, with Python's integers."""
    value = 0
    for index, byte in enumerate(data[:most]):
        value |= (byte & 0x7F) << 7 * index
        if byte < 0x80:
            bits = 64 if most == 10 else 32
            return (0, -walk.LONG) if value >> bits else ((value >> 1) ^ -(value & 1), index + 1)
    return (0, -walk.LONG) if len(data) >= most else (0, -walk.ENDS)


@pytest.mark.parametrize("most", [5, 10])
def test_numbers_at_every_power_of_two(most):
    low, high = (-(2**31), 2**31 - 1) if most == 5 else (-(2**63), 2**63 - 1)
    for value in EDGES:
        data = zigzag(value)
        if low <= value <= high:
            assert number(data, most) == (value, len(data))
            assert number(data + b"\xff", most) == (value, len(data)), "what follows is not its own"
            for length in range(len(data)):
                assert number(data[:length], most) == (0, -walk.ENDS)
        else:
            assert number(data, most) == (0, -walk.LONG)


@pytest.mark.parametrize("most", [5, 10])
@given(data=st.lists(st.sampled_from([0x00, 0x01, 0x02, 0x0F, 0x10, 0x7F, 0x80, 0x81, 0xFF]), max_size=12).map(bytes))
def test_any_bytes_are_the_number_that_python_reads(most, data):
    assert number(data, most) == by_python(data, most)


def test_the_reference_for_numbers_has_teeth():
    """Planted: a reader without the sign, and one that uses another bit, return other numbers."""
    assert by_python(zigzag(-3), 10) == (-3, 1) != (int.from_bytes(zigzag(-3), "big"), 1)
    assert by_python(b"\xff\xff\xff\xff\x0f", 5)[0] == -(2**31)
    assert by_python(b"\xff\xff\xff\xff\x1f", 5) == (0, -walk.LONG)


@pytest.mark.parametrize(
    ("claim", "behind", "expected"),
    [(0, 0, (0, 1)), (3, 3, (3, 1)), (3, 4, (3, 1)), (3, 2, (0, -walk.BEYOND)), (-1, 9, (0, -walk.NEGATIVE))],
)
def test_a_length_is_what_follows_at_least(claim, behind, expected):
    data = zigzag(claim) + bytes(behind)
    assert walk._length(buffer(data), 0, len(data)) == expected


def is_text(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def texts():
    """Yield every text of one and two bytes, and texts of three and four bytes around each border of UTF-8's ranges."""
    yield from (bytes(pair) for pair in itertools.product(range(256), repeat=2))
    for length in (2, 3):
        for first in range(0xC0, 0x100):
            yield from (bytes([first, *rest]) for rest in itertools.product(CONTINUATIONS, repeat=length))


def test_text_is_what_python_decodes():
    assert [is_text(bytes([byte])) for byte in range(256)] == [byte < 0x80 for byte in range(256)]
    wrong = [data for data in texts() if walk._is_text(buffer(data), 0, len(data)) != is_text(data)]
    assert wrong == []


def test_text_ends_where_it_is_said_to():
    data = buffer("a☃b".encode())
    assert walk._is_text(data, 0, 4)
    assert not walk._is_text(data, 0, 3), "the snowman is cut"
    assert not walk._is_text(data, 2, 5), "and begins in its middle"
    assert walk._is_text(data, 4, 5)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("room", [1, 3])
def test_datums_in_one_call_are_those_of_single_calls(seed, room, monkeypatch):
    """Columns also start with almost no capacity and move while a datum is read."""
    make = Maker(seed)
    raw = make.record(2)
    plan = compile_plan(parse_schema(raw), [item["name"] for item in raw["fields"] if item["type"] == "boolean"])
    bodies = [make.encode(raw) for _ in range(9)]
    together = Columns(plan)
    monkeypatch.setattr(columns, "INITIAL_CAPACITY", room)
    single = Columns(plan)
    ends, fault = together.read(b"".join(bodies), 9)
    assert fault is None
    assert ends.tolist() == np.cumsum([len(body) for body in bodies]).tolist()
    for body in bodies:
        assert single.read(body, 1)[1] is None
    expected = together.take()
    assert single.take().equals(expected)
    single.read(bodies[0], 1)
    assert not single.take().equals(expected)


def test_every_way_to_fail_has_a_reason_of_its_own():
    assert sorted(walk.REASONS) == list(range(walk.ENDS, walk.TEXT + 1))
    assert len(set(walk.REASONS.values())) == len(walk.REASONS)
