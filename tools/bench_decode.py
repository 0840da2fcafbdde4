"""Alert packets per second and core: the compiled Avro reader beside fastavro, and what it makes of `alerts classify`.

    python tools/bench_decode.py --json benchmarks/decode.json

Decoding alone: datums in memory, without framing, to Arrow columns of the fields that light curves need, a thousand
packets at a time (ours), or to a dict of every field (fastavro, which has nothing quicker for a few fields). CPU time
of this process, both in turns; rates are of the quickest round, ratios medians of the rounds' ratios. Classification:
whole runs over files, in turns with the reader replaced by fastavro and a conversion of its dicts to the same columns;
wall time, as the runs' account has it. Simulated packets are always measured, real ones where the data is; of the real
ones each is there several times.
"""

from __future__ import annotations

import argparse
import io
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import fastavro
import numpy as np
import numpy.typing as npt
import pyarrow as pa
from bench_inference import describe_machine

from alert_broker import containers, gaussian_process, packets
from alert_broker.avro.columns import Columns, Fault, warm_up
from alert_broker.avro.plan import Array, Node, ReadPlan, Record, compile_plan
from alert_broker.classify import classify_files
from alert_broker.containers import Block
from alert_broker.simulate import simulate, write

OURS, THEIRS = "edgekit", "fastavro"
STAGES = ("decode", "features", "inference")
SIMULATED = {"ztf": 400, "lsst": 100}  # alerts
REAL = (  # name, files, copies of each for classification
    ("real ztf", "ztf*/*.avro", 6),
    ("real lsst, first detections", "lsst_wire/*shallow*.bin", 12),
    ("real lsst, long histories", "lsst_wire/*deep*.bin", 6),
)
BATCH = 1024  # packets between conversions to Arrow, as `alerts classify` has it
SECONDS = 15.0  # of decoding for each set of packets
FEWEST_ROUNDS = 5
RUNS = 3  # of classification

parsed: dict[ReadPlan, Any] = {}  # the schemas behind the plans, for fastavro


def remember(schema: Any, wanted: Any) -> ReadPlan:
    plan = compile_plan(schema, wanted)
    parsed[plan] = schema
    return plan


class ByFastavro:
    """In the place of `Columns`: a dict per packet, then columns of the wanted fields."""

    def __init__(self, plan: ReadPlan) -> None:
        self.plan, self.rows = plan, list[Any]()

    def read(
        self, data: bytes | memoryview, count: int, plan: ReadPlan | None = None
    ) -> tuple[npt.NDArray[np.int64], Fault | None]:
        stream, ends, plan = io.BytesIO(data), [], plan or self.plan
        for _ in range(count):
            self.rows.append(project(fastavro.schemaless_reader(stream, parsed[plan], None), plan.root))
            ends.append(stream.tell())
        assert ends[-1] == len(data)
        return np.array(ends), None

    def take(self) -> pa.RecordBatch:
        rows, self.rows = self.rows, []
        return pa.RecordBatch.from_pylist(rows)


def project(value: Any, node: Node) -> Any:
    """The wanted fields of a value."""
    if value is None:
        return None
    if isinstance(node, Array):
        return [project(item, node.items) for item in value]
    if isinstance(node, Record):
        return {name: project(value[name], inner) for name, inner in node.fields.items()}
    return value


@dataclass(frozen=True, slots=True)
class Sample:
    """Files of packets of one kind."""

    name: str
    files: list[Path]

    def blocks(self) -> Iterator[Block]:
        for file in self.files:
            for block in containers.split(file.read_bytes(), str(file)):
                assert isinstance(block, Block), block
                yield block


def samples(folder: Path, data: Path) -> Iterator[Sample]:
    for survey, count in SIMULATED.items():
        # one packet to a file, as the surveys send them
        yield Sample(f"simulated {survey}", write(folder / survey, simulate(survey, count, 1), packets_per_file=1))
    for number, (name, pattern, copies) in enumerate(REAL):
        for file in sorted((data / "alerts").glob(pattern)):
            for copy in range(copies):
                target = folder / f"real{number}" / f"{copy}-{file.name}"
                target.parent.mkdir(exist_ok=True)
                shutil.copy(file, target)
        if (folder / f"real{number}").exists():
            yield Sample(name, sorted((folder / f"real{number}").iterdir()))


def decoding(sample: Sample) -> dict[str, Any]:
    """CPU seconds of both readers, in turns, on all packets of a sample."""
    blocks = list(sample.blocks())
    many = (blocks * (1 + BATCH // len(blocks)))[:BATCH]
    columns = {block.schema.plan: Columns(block.schema.plan) for block in blocks if block.schema.plan}

    def ours() -> None:
        for block in many:
            _, fault = columns[block.schema.plan].read(block.data, block.count)
            assert fault is None, fault
        for item in columns.values():
            item.take()

    def theirs() -> None:
        for block in few:
            fastavro.schemaless_reader(io.BytesIO(block.data), parsed[block.schema.plan], None)

    few = blocks[:: 1 + len(blocks) // 100]  # enough for a round of a tenth of a second
    packets_of = {OURS: many, THEIRS: few}
    seconds: dict[str, list[float]] = {OURS: [], THEIRS: []}
    ours()
    until = time.perf_counter() + SECONDS
    while len(seconds[OURS]) < FEWEST_ROUNDS or time.perf_counter() < until:
        for name, call in ((OURS, ours), (THEIRS, theirs)):
            seconds[name].append(cpu_seconds(call) / len(packets_of[name]))
    size = float(np.mean([len(block.data) for block in blocks]))
    result: dict[str, Any] = {"packets": len(blocks), "mean_bytes": size, "rounds": len(seconds[OURS])}
    for name, values in seconds.items():
        result[name] = {
            "alerts_per_s": 1 / min(values),
            "median_alerts_per_s": 1 / float(np.median(values)),
            "megabytes_per_s": size / min(values) / 1e6,
        }
    return {"sample": sample.name, **result, "ratio": float(np.median(np.divide(seconds[THEIRS], seconds[OURS])))}


def cpu_seconds(call: Callable[[], None]) -> float:
    started = time.process_time()
    call()
    return time.process_time() - started


def classification(sample: Sample, folder: Path) -> dict[str, Any]:
    """Wall microseconds per alert and stage of whole runs, the best of some with each reader."""
    best: dict[str, dict[str, float]] = {}
    count = 0
    for _ in range(RUNS):
        for name, reader in ((OURS, Columns), (THEIRS, ByFastavro)):
            packets.Columns = reader  # type: ignore[misc,assignment]
            account = classify_files(sample.files, folder / "out.parquet", force=True)
            count = account.packets
            seconds = {stage: account.seconds[stage] for stage in STAGES}
            if name not in best or sum(seconds.values()) < sum(best[name].values()):
                best[name] = seconds
    packets.Columns = Columns  # type: ignore[misc]
    result: dict[str, Any] = {"sample": sample.name, "packets": count}
    for name, seconds in best.items():
        result[name] = {f"{stage}_us": 1e6 * value / count for stage, value in seconds.items()}
        result[name]["alerts_per_s"] = count / sum(seconds.values())
        result[name]["decode_share"] = seconds["decode"] / sum(seconds.values())
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    parser.add_argument(
        "--data", type=Path, default=default, help="folder with alerts/; without it, simulated ones only"
    )
    parser.add_argument("--json", type=Path, help="write the numbers here")
    options = parser.parse_args()

    machine = describe_machine() | {name: version(name) for name in ("fastavro", "numba", "pyarrow")}
    print(*(f"{name} {value}" for name, value in machine.items()), sep=", ")
    compile_seconds = cpu_seconds(warm_up)
    print(f"reader ready after {compile_seconds:.1f} CPU s (compiled, or loaded from numba's cache)\n")
    gaussian_process.warm_up()
    containers.compile_plan = remember
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        chosen = list(samples(folder, options.data))
        print(
            "decoding, one core                   |   edgekit           |  fastavro           |\n"
            "sample                       packets |  alerts/s     MB/s  |  alerts/s     MB/s  | ratio"
        )
        decoded = []
        for sample in chosen:
            row = decoding(sample)
            decoded.append(row)
            rates = "  | ".join(
                f"{row[name]['alerts_per_s']:9,.0f} {row[name]['megabytes_per_s']:8,.0f}" for name in (OURS, THEIRS)
            )
            print(f"{row['sample']:28s} {row['packets']:7d} | {rates}  | {row['ratio']:5.1f}", flush=True)
        print("\nalerts classify, microseconds of wall time per alert")
        print("sample                       reader      decode  features  inference   alerts/s   decode's share")
        classified = []
        for sample in chosen:
            result = classification(sample, folder)
            classified.append(result)
            for reader in (OURS, THEIRS):
                one = result[reader]
                print(
                    f"{sample.name:28s} {reader:9s} {one['decode_us']:8.0f} {one['features_us']:9.0f} "
                    f"{one['inference_us']:10.0f} {one['alerts_per_s']:10,.0f} {one['decode_share']:10.0%}",
                    flush=True,
                )
    if options.json:
        report = {"machine": machine, "ready_cpu_s": compile_seconds, "decode": decoded, "classify": classified}
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
