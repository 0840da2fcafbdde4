"""Compare the compiled Avro reader with fastavro: alert packets per second and core, and the speed of `alerts classify`
with either reader.

    python tools/bench_decode.py --json benchmarks/decode.json

Decoding alone: edgekit reads datums in memory, without framing, to Arrow columns of the fields that light curves need,
a thousand packets at a time. fastavro reads them to a dict of every field, because it has no quicker way to read a few
fields. The tool takes the CPU time of this process, both readers in turns; rates are those of the quickest round, and
ratios are medians of the rounds' ratios. Classification: whole runs over files, in turns with runs in which fastavro
and a conversion of its dicts to the same columns replace the reader; the wall time is that of the runs' own account.
The tool always measures simulated packets, and real ones if the data is there, several copies of each.
"""

from __future__ import annotations

import argparse
import io
import json
import shutil
import tempfile
import time
from collections.abc import Iterator
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
from edgekit.cost.timing import Timed, in_turns, timed

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
FEWEST_ROUNDS, MOST_ROUNDS = 5, 2000
RUNS = 3  # of classification

parsed: dict[ReadPlan, Any] = {}  # the schemas behind the plans, for fastavro


def remember(schema: Any, wanted: Any) -> ReadPlan:
    plan = compile_plan(schema, wanted)
    parsed[plan] = schema
    return plan


class ByFastavro:
    """Replaces `Columns`: makes a dict of each packet, then columns of the wanted fields."""

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
    """Return the wanted fields of a value."""
    if value is None:
        return None
    if isinstance(node, Array):
        return [project(item, node.items) for item in value]
    if isinstance(node, Record):
        return {name: project(value[name], inner) for name, inner in node.fields.items()}
    return value


@dataclass(frozen=True, slots=True)
class Sample:
    """Files of packets of one survey."""

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
    """Time both readers in turns on the packets of a sample."""
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
    calls = [timed(call, time.process_time) for call in (ours, theirs)]
    taken = in_turns(calls, seconds=SECONDS, least=FEWEST_ROUNDS, most=MOST_ROUNDS)[:, :, 0]
    seconds = {OURS: taken[:, 0] / len(many), THEIRS: taken[:, 1] / len(few)}  # of a packet
    size = float(np.mean([len(block.data) for block in blocks]))
    result: dict[str, Any] = {"packets": len(blocks), "mean_bytes": size, "rounds": len(taken)}
    for name, values in seconds.items():
        result[name] = {
            "alerts_per_s": 1 / float(values.min()),
            "median_alerts_per_s": 1 / float(np.median(values)),
            "megabytes_per_s": size / float(values.min()) / 1e6,
        }
    return {"sample": sample.name, **result, "ratio": float(np.median(seconds[THEIRS] / seconds[OURS]))}


def classification(sample: Sample, folder: Path) -> dict[str, Any]:
    """Return the wall microseconds per alert and stage of whole runs, the best of some runs with each reader."""
    count = 0

    def run_with(reader: Any) -> Timed:
        def run() -> tuple[float, ...]:
            nonlocal count
            packets.Columns = reader  # type: ignore[misc]
            account = classify_files(sample.files, folder / "out.parquet", force=True)
            count = account.packets
            return tuple(account.seconds[stage] for stage in STAGES)

        return run

    taken = in_turns([run_with(Columns), run_with(ByFastavro)], least=RUNS, most=RUNS, warmup=1)
    packets.Columns = Columns  # type: ignore[misc]
    result: dict[str, Any] = {"sample": sample.name, "packets": count}
    for index, name in enumerate((OURS, THEIRS)):
        best = taken[taken[:, index].sum(axis=1).argmin(), index]
        seconds = dict(zip(STAGES, best.tolist(), strict=True))
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
    (compile_seconds,) = timed(warm_up, time.process_time)()
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
