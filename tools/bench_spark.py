"""Compare the alerts per second of the classifier inside Spark and without Spark.

    python tools/bench_spark.py t2-gr --json benchmarks/spark.json

The tool copies simulated ZTF packets to the number of rows asked for. Without Spark, one process with one thread calls
the function that Spark calls, on Arrow batches of 1000 packets. With Spark, local mode runs with one worker, and then
with one for each core; the packets are cached in the JVM before, and the results are discarded. Times are the wall time
of the median run after one run that warms up. The ratio of one worker to the process without Spark is the cost of
Spark, which moves packets and results between the JVM and Python.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pyarrow as pa
from bench_inference import describe_machine

from alert_broker import spark
from alert_broker.simulate import simulate, write
from edgekit.cost.timing import in_turns, timed
from edgekit.importers.files import resolve

ALERTS, ROWS_TO_BATCH, RUNS = 500, 1000, 5


def packets() -> list[bytes]:
    with tempfile.TemporaryDirectory() as name:
        write(name, simulate("ztf", ALERTS, 1), packets_per_file=1)
        return [path.read_bytes() for path in sorted(Path(name).glob("*.avro"))]


def median_seconds(call: Callable[[], object]) -> float:
    return float(np.median(in_turns([timed(call, time.perf_counter)], least=RUNS, most=RUNS, warmup=1)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--rows", type=int, default=8000)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    from pyspark.sql import SparkSession

    os.environ.update(PYSPARK_PYTHON=sys.executable, SPARK_LOCAL_IP="127.0.0.1")
    bundle, content = resolve(options.model), packets()
    rows = [content[number % len(content)] for number in range(options.rows)]
    batches = [
        pa.RecordBatch.from_pydict({"value": rows[start : start + ROWS_TO_BATCH]})
        for start in range(0, len(rows), ROWS_TO_BATCH)
    ]
    function = spark.map_in_arrow(bundle, "value")
    rates = {"without Spark, 1 thread": len(rows) / median_seconds(lambda: sum(1 for _ in function(iter(batches))))}
    cores = len(os.sched_getaffinity(0))
    for workers in sorted({1, cores}):
        session = (
            SparkSession.builder.master(f"local[{workers}]")
            .config("spark.ui.enabled", "false")
            .config("spark.driver.host", "127.0.0.1")
            .config("spark.driver.memory", "4g")
            .config("spark.sql.execution.arrow.maxRecordsPerBatch", str(ROWS_TO_BATCH))
            .getOrCreate()
        )
        session.sparkContext.setLogLevel("ERROR")
        with tempfile.TemporaryDirectory() as name:
            import pyarrow.parquet as pq

            for number, batch in enumerate(batches):
                pq.write_table(pa.Table.from_batches([batch]), f"{name}/{number:04}.parquet", compression="none")
            table = session.read.parquet(name).repartition(workers).cache()
            assert table.count() == len(rows)
            classified = spark.classify(table, bundle, "value")
            seconds = median_seconds(classified.write.format("noop").mode("overwrite").save)
            assert classified.where("status = 'classified'").count() == len(rows)
        rates[f"Spark, {workers} worker{'s' * (workers > 1)}"] = len(rows) / seconds
        session.stop()
    base = rates["without Spark, 1 thread"]
    size = float(np.mean([len(item) for item in content]))
    machine = describe_machine() | {"pyspark": version("pyspark")}
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    print(f"{len(rows):,} packets of {size / 1000:,.0f} kB, {bundle.manifest.name}")
    for name, rate in rates.items():
        print(f"{name:26s} {rate:9,.0f} alerts/s {rate / base:6.2f}x")
    if options.json:
        report = {
            "machine": machine,
            "rows": len(rows),
            "bytes": size,
            "model": bundle.manifest.name,
            "alerts_per_s": rates,
        }
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
