"""Fuzz with coverage feedback (libFuzzer, from `pip install atheris`) all code that a hostile message reaches: framing,
container headers, the embedded schema, its compilation, and the loop over the bytes.

    python tools/fuzz_coverage.py --seconds 600 --json benchmarks/fuzz_coverage.json

The compiled loop runs as plain Python on numpy arrays, so that each of its branches counts and each index is checked.
The first byte of an input chooses one of two targets: a message as it arrives (`containers.split`, then the reader
reads its blocks), and data for one of a few schemas that together have every type. Accepted values are compared with
fastavro's. The run ends, and keeps the input in a file, at an error that a packet must not raise, an index out of
bounds, an input that takes more than ten seconds, or values other than fastavro's. The corpus stays in `--corpus`, and
the next run continues from it.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

os.environ["NUMBA_DISABLE_JIT"] = "1"

ROW = [{"name": "time", "type": "double"}, {"name": "flag", "type": "boolean"}]
RECORD = {"type": "record", "name": "row", "fields": ROW}
COLOUR = {"type": "enum", "name": "colour", "symbols": ["RED", "GREEN"]}
FIELDS: list[list[Any]] = [
    ["int", "string", ["null", "double"], "long"],
    [["null", {"type": "array", "items": RECORD}], "bytes"],
    [COLOUR, {"type": "fixed", "name": "four", "size": 4}, "float"],
    [{"type": "array", "items": ["null", "int"]}, ["int", "null", "double"], ["string", "null"]],
    [{"type": "map", "values": "long"}, "int", ["null", "string", {"type": "map", "values": "bytes"}], "boolean"],
    [{"type": "array", "items": {"type": "array", "items": "string"}}, ["null", RECORD], "row"],
    [["null", {"type": "long", "logicalType": "timestamp-micros"}], "null", ["null", "boolean"], ["null", "float"]],
]  # fmt: skip
ENTRY_SECONDS = 10  # the longest time of one input; it should take milliseconds, but machines are shared
LONGEST = 4096  # bytes of an input
MESSAGE, DATUM = 0, 1


def schemas() -> list[dict[str, Any]]:
    return [
        {"type": "record", "name": f"r{k}", "fields": [{"name": f"f{n}", "type": kind} for n, kind in enumerate(kinds)]}
        for k, kinds in enumerate(FIELDS)
    ]


def seeds() -> list[bytes]:
    """Return valid inputs for both targets."""
    import fastavro
    from fastavro.schema import parse_schema
    from fuzz_stream import PACKET, SCHEMA

    row = {"time": 1.5, "flag": True}
    values: list[list[Any]] = [
        [3, "text", 2.5, 2**40], [[row, row], b"bytes"], ["GREEN", b"four", 0.5], [[None, 7], 3.5, "text"],
        [{"key": 5}, -9, {"k": b"v"}, True], [[["a", "b"], []], row, row], [None, None, False, 1.5],
    ]  # fmt: skip
    found = []
    for k, (schema, row_of) in enumerate(zip(schemas(), values, strict=True)):
        stream = io.BytesIO()
        packet = {f"f{n}": value for n, value in enumerate(row_of)}
        fastavro.schemaless_writer(stream, parse_schema(schema), packet)
        found += [bytes([DATUM, k]) + stream.getvalue(), bytes([DATUM, k | 8]) + 2 * stream.getvalue()]
        container = io.BytesIO()
        fastavro.writer(container, schema | {"name": "ztf.alert"}, [packet] * 2, sync_marker=b"0123456789abcdef")
        found.append(bytes([MESSAGE]) + container.getvalue())
    for codec in ("null", "deflate"):
        container = io.BytesIO()
        fastavro.writer(container, SCHEMA, [PACKET, PACKET], codec=codec, sync_interval=1, sync_marker=b"0" * 16)
        found.append(bytes([MESSAGE]) + container.getvalue())
    found += [bytes([MESSAGE]) + b"\0\0\0\4\x4cdatum", bytes([MESSAGE]) + b"PAR1"]
    return found


def child(options: argparse.Namespace) -> None:
    """Run the fuzzer itself, which never returns."""
    import atheris

    with atheris.instrument_imports(include=["alert_broker.avro", "alert_broker.containers"]):
        from alert_broker import containers, packets
        from alert_broker.avro.columns import Columns
        from alert_broker.avro.plan import compile_plan
    import fastavro
    from fastavro.schema import parse_schema

    from alert_broker.surveys.base import surveys

    surveys()
    warnings.simplefilter("ignore", RuntimeWarning)  # numbers wrap at 64 bits, as compiled
    parsed = [parse_schema(schema) for schema in schemas()]
    wanted = [
        [f"f{n}" for n in range(4)],
        ["f0.time", "f0.flag", "f1"],
        ["f0", "f1", "f2"],
        ["f0", "f1", "f2"],
        ["f1", "f3"],
        ["f0", "f1.flag", "f2.time"],
        ["f0", "f1", "f2", "f3"],
    ]
    plans = [compile_plan(schema, paths) for schema, paths in zip(parsed, wanted, strict=True)]
    tally = {"messages": 0, "data": 0, "accepted": 0, "refused": 0}
    report = Path(options.report)

    def one(data: bytes) -> None:
        if len(data) > 2 and data[0] & 1 == DATUM:
            datum(data[2:], data[1] & 7, 2 if data[1] & 8 else 1)
        else:
            message(data[1:])
        if sum((tally["messages"], tally["data"])) % 1000 == 0:
            report.write_text(json.dumps(tally))

    def message(data: bytes) -> None:
        tally["messages"] += 1
        for item in packets.batches(containers.split(data, "fuzz")):
            tally["refused" if isinstance(item, containers.BadPacket) else "accepted"] += 1

    def datum(data: bytes, which: int, count: int) -> None:
        tally["data"] += 1
        plan, schema = plans[which % len(plans)], parsed[which % len(plans)]
        columns = Columns(plan)
        _, fault = columns.read(data, count)
        if options.plant and fault is not None and not fault.field:
            _, fault = columns.read(data[: fault.at], count)
        if fault is not None:
            tally["refused"] += 1
            return
        tally["accepted"] += 1
        batch = columns.take()
        batch.validate(full=True)
        stream = io.BytesIO(data)
        try:
            values = [fastavro.schemaless_reader(stream, schema, None) for _ in range(count)]
        except (UnicodeDecodeError, OverflowError):  # in a text or a date that this check does not read
            return
        if stream.tell() != len(data):
            raise AssertionError("accepted, but not by fastavro")
        rows = batch.to_pylist()
        for name in batch.schema.names:
            for row, value in zip(rows, values, strict=True):
                if not same(row[name], value[name]):
                    raise AssertionError(f"{name}: {row[name]!r}, but fastavro has {value[name]!r}")

    def same(ours: Any, theirs: Any) -> bool:
        if isinstance(ours, dict) and theirs is not None:
            return all(same(value, theirs[key]) for key, value in ours.items())
        if isinstance(ours, list) and theirs is not None:
            return len(ours) == len(theirs) and all(map(same, ours, theirs))
        if hasattr(theirs, "timestamp"):
            return True  # fastavro converts it to a date
        # The column of a union of number types has the widest of them.
        return repr(ours) == repr(float(theirs) if isinstance(ours, float) and type(theirs) is int else theirs)

    arguments = [sys.argv[0], options.corpus, f"-max_total_time={options.seconds}", f"-max_len={LONGEST}",
                 f"-timeout={ENTRY_SECONDS}", f"-artifact_prefix={options.corpus}/../", f"-seed={options.seed}",
                 "-print_final_stats=1", "-rss_limit_mb=3000"]  # fmt: skip
    atheris.Setup(arguments, one)
    atheris.Fuzz()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=600)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--corpus", default="runs/fuzz/corpus", help="folder of inputs, which grows")
    parser.add_argument("--json", type=Path, help="write the numbers here")
    parser.add_argument("--plant", action="store_true", help="a reader that forgives bytes left over: must be found")
    parser.add_argument("--report", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.report:
        child(options)
        return
    try:
        import atheris  # noqa: F401
    except ImportError:
        sys.exit("fuzz_coverage: needs atheris, which is not installed; run: pip install atheris")
    from bench_inference import describe_machine

    folder = Path(options.corpus)
    folder.mkdir(parents=True, exist_ok=True)
    for number, data in enumerate(seeds()):
        (folder / f"seed-{number:03}").write_bytes(data)
    report = folder.parent / "tally.json"
    machine = describe_machine()  # with the commit at the start of the run
    started = time.perf_counter()
    command = [sys.executable, __file__, *sys.argv[1:], "--report", str(report)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    tail = done.stdout.splitlines()
    statistics = dict(line[6:].split(": ", 1) for line in tail if line.startswith("stat::"))
    covered = [line for line in tail if " cov: " in line] or ["cov: 0"]
    result = {"machine": machine, "seconds": time.perf_counter() - started, "status": done.returncode}
    result |= {name: int(value) for name, value in statistics.items()}
    result |= {"corpus": len(list(folder.iterdir())), "coverage": int(covered[-1].split("cov: ")[1].split()[0])}
    result |= json.loads(report.read_text()) if report.exists() else {}
    print(json.dumps({name: value for name, value in result.items() if name != "machine"}, indent=1))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    if done.returncode:
        sys.exit("\n".join(["fuzz_coverage: a failing input; its file is beside the corpus", *tail[-40:]]))


if __name__ == "__main__":
    main()
