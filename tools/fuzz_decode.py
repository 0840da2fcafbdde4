"""Feed millions of damaged alert packets to the compiled Avro reader. It must not crash or hang, must not read or write
a byte out of bounds, and must read accepted packets as fastavro does.

    python tools/fuzz_decode.py --packets 10000000 --json benchmarks/fuzz.json

The packets are real ones if the data is there, and simulated ones, without images. Most damage hits bytes that matter
to the structure: tags, counts, lengths. Each packet lies next to a page that cannot be accessed: in turns, its end is
before the page, or its start is after it. The arrays into which columns are written lie so too: an access one byte out
of bounds kills the process with a signal. A reader that does not return is killed after a minute. The tool gives
samples of the accepted and the refused packets to fastavro. `tests/alert_broker/test_fuzz_decode.py` plants failures of
each type.
"""

from __future__ import annotations

import argparse
import ctypes
import faulthandler
import io
import json
import mmap
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fastavro
import numpy as np
from bench_decode import project
from bench_inference import describe_machine
from fastavro.schema import parse_schema

from alert_broker.avro import walk
from alert_broker.avro.columns import Columns, Fault
from alert_broker.avro.plan import ReadPlan, compile_plan
from alert_broker.simulate import simulate
from alert_broker.surveys import lsst
from alert_broker.surveys.base import surveys
from alert_broker.ztf_schema import ztf_schema
from edgekit.errors import EdgekitError

CHUNK = 20_000  # packets that are drawn at a time, from one seed
MOST_OPERATIONS = 4
LONGEST_HISTORY = 12  # rows kept of each list of a real packet: more rows of the same take time
SAMPLE = 100  # one of this many packets is compared with fastavro
TAKEN = 500  # packets between conversions to Arrow
HANG_SECONDS = 60
ROOM = 1 << 18  # bytes of the largest damaged packet
STRUCTURE_SHARE = 0.5  # the share of damage that hits bytes at which the reader notices a flip
HOSTILE = (0, 1, -1, 2, 3, 63, 64, 127, 128, -128, 2**15, 2**31 - 1, 2**31, -(2**31), 2**40, 2**62, 2**63 - 1, -(2**63))
# Faults that the compiled reader refuses and fastavro reads: Avro does not define the case (see `walk`), or a length is
# negative, which fastavro takes for "up to the end of the data".
STRICTER = {walk.REASONS[code] for code in (walk.LONG, walk.BOOL, walk.SIZE, walk.NEGATIVE, walk.TEXT)}
# The same, if the faulty number has one of these bits: a branch that is negative (fastavro counts it from the last one)
# or longer than needed, and a negative count, which comes with a size that fastavro does not check.
STRICTER_WITH = {walk.REASONS[code]: bits for code, bits in ((walk.BRANCH, 0x81), (walk.BEYOND, 1), (walk.COUNT, 1))}

libc = ctypes.CDLL(None, use_errno=True)


def guarded(size: int) -> memoryview:
    """Return zeros between two pages that cannot be accessed; the end lies next to the second page."""
    return memoryview(_pages(size))[-mmap.PAGESIZE - size : -mmap.PAGESIZE] if size else memoryview(b"")


def _pages(size: int) -> mmap.mmap:
    """Return memory for `size` bytes between the two pages."""
    room = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, room + 2 * mmap.PAGESIZE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for page in (start, start + mmap.PAGESIZE + room):
        if libc.mprotect(ctypes.c_void_p(page), ctypes.c_size_t(mmap.PAGESIZE), 0):
            raise OSError(ctypes.get_errno(), "mprotect")
    return memory


class GuardedColumns(Columns):
    """Columns whose arrays end next to a page that cannot be accessed."""

    def _lay_out(self) -> None:
        super()._lay_out()
        for name in ("_cells", "_valid", "_text"):
            array = getattr(self, name)
            fresh = np.frombuffer(guarded(array.nbytes), array.dtype)
            fresh[:] = array
            setattr(self, name, fresh)


@dataclass(frozen=True, slots=True)
class Seed:
    """A valid packet. structure: the bytes at which the reader notices a flip; lengths: the bytes of counts and
    lengths."""

    name: str
    data: bytes
    schema: Any
    plan: ReadPlan
    structure: list[int]
    lengths: list[int]


@dataclass(slots=True)
class Tally:
    """The counts of damaged packets by result. disagreements: differences from fastavro by type, with an example of
    each."""

    packets: int = 0
    accepted: int = 0
    compared: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    disagreements: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0


def seeds(data: Path | None, simulated_packets: int = 6) -> list[Seed]:
    """Return packets of every survey and schema version, without images."""
    found: list[tuple[str, bytes, Any, list[str]]] = []
    simulated = {"ztf": parse_schema(ztf_schema()), "lsst": lsst.schema(max(lsst.schema_versions()))}
    for survey, schema in simulated.items():
        for alert in simulate(survey, simulated_packets, 3, cutouts=False):
            found.append((f"simulated {survey}", encoded(shortened(alert.packet), schema), schema, paths(survey)))
    if data is not None:
        for path in sorted([*data.glob("alerts/ztf*/*.avro"), *data.glob("alerts/other/*.avro")]):
            with path.open("rb") as stream:
                reader = fastavro.reader(stream)
                schema, (packet,) = parse_schema(reader.writer_schema), reader
            survey = "ztf" if "ztf" in str(path.parent) else path.stem
            wanted = paths(survey) if survey in surveys() else ["candid", "candidate.ra", "candidate.jd"]
            found.append((f"real {survey}", encoded(shortened(packet), schema), schema, wanted))
        for path in sorted(data.glob("alerts/lsst_wire/*.bin")):
            message = path.read_bytes()
            schema = lsst.schema(int.from_bytes(message[1:5], "big"))
            packet = fastavro.schemaless_reader(io.BytesIO(message[5:]), schema, None)
            found.append(("real lsst", encoded(shortened(packet), schema), schema, paths("lsst")))
    plans: dict[str, ReadPlan] = {}
    return [
        Seed(name, body, schema, plan, *structure(body, plan))
        for name, body, schema, wanted in found
        for plan in [plans.setdefault(f"{json.dumps(schema)} {wanted}", compile_plan(schema, wanted))]
    ]


def paths(survey: str) -> list[str]:
    return surveys()[survey].paths


def shortened(packet: dict[str, Any]) -> dict[str, Any]:
    """Return the packet without images, and with the first rows of each list."""
    return {
        name: None if "cutout" in name.lower() else value[:LONGEST_HISTORY] if isinstance(value, list) else value
        for name, value in packet.items()
    }


def encoded(packet: dict[str, Any], schema: Any) -> bytes:
    stream = io.BytesIO()
    images = {name: b"image" for name in packet if "cutout" in name.lower()}
    try:
        fastavro.schemaless_writer(stream, schema, packet)
    except (TypeError, ValueError):  # an image that may not be null
        stream = io.BytesIO()
        fastavro.schemaless_writer(stream, schema, packet | images)
    return stream.getvalue()


def structure(data: bytes, plan: ReadPlan) -> tuple[list[int], list[int]]:
    """Return the bytes whose damage the reader notices, such as tags, and the bytes of counts or lengths."""
    columns = Columns(plan)
    noticed, lengths = [], []
    lie = number(2**62)
    for at in range(len(data)):
        if columns.read(data[:at] + bytes([data[at] ^ 0x85]) + data[at + 1 :], 1)[1] is not None:
            noticed.append(at)
            _, fault = columns.read(data[:at] + lie + data[at + 1 :], 1)
            if fault is not None and fault.reason in (walk.REASONS[walk.COUNT], walk.REASONS[walk.BEYOND]):
                lengths.append(at)
    return noticed or [0], lengths or [0]


def number(value: int) -> bytes:
    """Return a zigzag number of variable length."""
    value = (value << 1) ^ (value >> 63)
    data = b""
    while value > 0x7F:
        data, value = data + bytes([value & 0x7F | 0x80]), value >> 7
    return data + bytes([value])


NUMBERS = [number(value) for value in HOSTILE] + [b"\xff" * 9, b"\xff" * 12, b"\x80" * 10 + b"\0"]


def damaged(corpus: list[Seed], seed: int, count: int) -> Iterator[tuple[Seed, int, bytes]]:
    """Yield `count` damaged packets, the same ones for the same seed: the original packet, the number of datums that it
    claims, and its bytes. All random numbers are drawn at once."""
    rng = np.random.default_rng(seed)
    chosen, others = rng.integers(len(corpus), size=(2, count)).tolist()
    operations = rng.integers(1, MOST_OPERATIONS + 1, (2, count)).min(axis=0).tolist()
    datums = np.maximum(rng.integers(-8, 4, count), 1).tolist()
    kinds = rng.integers(7, size=(count, MOST_OPERATIONS)).tolist()
    where, other_where = rng.random((2, count, MOST_OPERATIONS)).tolist()
    aimed = (rng.random((count, MOST_OPERATIONS)) < STRUCTURE_SHARE).tolist()
    values = rng.integers(1 << 16, size=(count, MOST_OPERATIONS)).tolist()
    for k in range(count):
        item = corpus[chosen[k]]
        data = bytearray(item.data * datums[k])
        for step in range(operations[k]):
            size, value = len(data) or 1, values[k][step]
            at = int(where[k][step] * size)
            kind = kinds[k][step]
            if aimed[k][step]:
                targets = item.lengths if kind in (2, 6) else item.structure
                at = min(targets[int(where[k][step] * len(targets))], size - 1)
            if not data:
                data += bytes([value & 0xFF])
            elif kind == 0:
                data[at] = value & 0xFF
            elif kind == 1:
                data[at] ^= 1 << (value & 7)
            elif kind == 2:  # a wrong length replaces the bytes
                lie = NUMBERS[value % len(NUMBERS)]
                data[at : at + 1 + (value >> 8) % len(lie)] = lie
            elif kind == 3:
                del data[at : at + 1 + value % 8]
            elif kind == 4:  # a piece of another packet replaces as many bytes, or is inserted
                other = corpus[others[k]].data
                begin = int(other_where[k][step] * len(other))
                piece = other[begin : begin + 1 + value % 200]
                data[at : at + (len(piece) if value & 0x8000 else 0)] = piece
            elif kind == 5:
                if value & 1:
                    del data[at:]
                else:
                    data += bytes(value % 17)
            else:  # a block of as many items that also gives its length in bytes, which is wrong
                data[at : at + 1] = number(-(data[at] >> 1)) + number(int(other_where[k][step] * size) - 4)
        yield item, datums[k], bytes(data[:ROOM]) or b"\0"


def stricter(fault: Fault, data: bytes) -> bool:
    """Return whether fastavro may read what this fault refuses."""
    bits = STRICTER_WITH.get(fault.reason, 0)
    return fault.reason in STRICTER or (fault.at < len(data) and bool(data[fault.at] & bits))


class Fuzzer:
    """Feeds damaged packets to one reader for each plan. read: replaces the reader's method, for planted failures."""

    def __init__(self, corpus: list[Seed], read: Callable[..., Any] = Columns.read) -> None:
        self.corpus, self.tally, self._read = corpus, Tally(), read
        self._columns = {item.plan: GuardedColumns(item.plan) for item in corpus}
        self._alone = {item.plan: Columns(item.plan) for item in corpus}
        pages = _pages(ROOM)
        self._memory = memoryview(pages)[mmap.PAGESIZE : mmap.PAGESIZE + ROOM]

    def run(self, seed: int, count: int) -> None:
        """Feed another `count` packets."""
        started = time.perf_counter()
        for k, (item, datums, data) in enumerate(damaged(self.corpus, seed, count)):
            fault = self.feed(item, datums, data, at_end=k & 1 == 0)
            if k % TAKEN == 0:
                for some in self._columns.values():
                    some.take().validate(full=True)
            if k % SAMPLE == 0 or (fault is None and k % (SAMPLE // 10) == 0):
                self.compare(item, datums, data, fault, f"seed {seed}, packet {k}")
        self.tally.seconds += time.perf_counter() - started

    def feed(self, item: Seed, datums: int, data: bytes, *, at_end: bool) -> Fault | None:
        """Feed one packet, which lies before or after a page that cannot be accessed."""
        tally = self.tally
        start = ROOM - len(data) if at_end else 0
        self._memory[start : start + len(data)] = data
        columns = self._columns[item.plan]
        before = len(columns)
        ends, fault = self._read(columns, self._memory[start : start + len(data)], datums)
        tally.packets += 1
        if fault is None:
            tally.accepted += 1
            assert len(ends) == datums
        else:
            tally.reasons["bytes are left over" if not fault.field else fault.reason] += 1
            assert 0 <= fault.start <= fault.at <= len(data), fault
        assert len(columns) - before == len(ends)
        return fault

    def compare(self, item: Seed, datums: int, data: bytes, fault: Fault | None, name: str) -> None:
        """Compare with fastavro: accepted packets must have the same values, and fastavro must refuse the refused ones,
        unless the reader is known to be stricter."""
        self.tally.compared += 1
        stream = io.BytesIO(data)
        try:
            values = [fastavro.schemaless_reader(stream, item.schema, None) for _ in range(datums)]
            whole = stream.tell() == len(data)
        except UnicodeDecodeError:
            return  # in a text that no one wants, which the reader does not check
        except Exception:  # fastavro may raise anything for hostile bytes
            values, whole = [], False
        if fault is None:
            alone = self._alone[item.plan]
            self._read(alone, data, datums)
            rows = alone.take().to_pylist()
            if not whole:
                self.tally.disagreements.setdefault("accepted, but not by fastavro", name)
            elif repr(rows) != repr([project(value, item.plan.root) for value in values]):
                self.tally.disagreements.setdefault("other values than fastavro's", name)
        elif whole and not stricter(fault, data):
            self.tally.disagreements.setdefault(f"fastavro reads what is refused: {fault.reason}", name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    parser.add_argument("--packets", type=int, default=10_000_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--data", type=Path, default=default, help="folder with alerts/; without it, simulated ones only"
    )
    parser.add_argument("--json", type=Path, help="write the numbers here")
    options = parser.parse_args()
    faulthandler.enable()
    machine = describe_machine()  # with the commit at the start of the run
    corpus = seeds(options.data if options.data.is_dir() else None)
    print(f"{len(corpus)} packets of {', '.join(sorted({item.name for item in corpus}))}", flush=True)
    fuzzer = Fuzzer(corpus)
    tally = fuzzer.tally
    for chunk in range(-(-options.packets // CHUNK)):
        faulthandler.dump_traceback_later(HANG_SECONDS, exit=True)
        fuzzer.run(options.seed + chunk, min(CHUNK, options.packets - tally.packets))
        faulthandler.cancel_dump_traceback_later()
        if chunk % 25 == 0:
            rate = tally.packets / tally.seconds
            print(f"{tally.packets:12,} packets, {tally.accepted:,} accepted, {rate:,.0f}/s", flush=True)
    report = {
        "machine": machine, "seed": options.seed, "packets": tally.packets, "accepted": tally.accepted,
        "refused": dict(tally.reasons.most_common()), "compared": tally.compared, "disagreements": tally.disagreements,
        "seconds": tally.seconds, "seeds": dict(Counter(item.name for item in corpus)),
    }  # fmt: skip
    print(json.dumps({name: value for name, value in report.items() if name != "machine"}, indent=1))
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    if tally.disagreements:
        raise EdgekitError(f"fastavro disagrees: {tally.disagreements}")


if __name__ == "__main__":
    main()
