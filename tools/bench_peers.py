"""Compare `edgekit alerts consume` with other consumers of the same topic, on a real Apache Kafka, in one run.

    EDGEKIT_KAFKA_HOME=... python tools/bench_peers.py --json benchmarks/peers.json

The peers are a plain loop over confluent-kafka and an application of Quix Streams (tools/peer_consumers.py). Each of
them does nothing with a message, decodes it with fastavro, or classifies it with edgekit's stages. edgekit's own stages
also run in memory, in threads, without a broker (tools/bench_memory.py). Broker, consumer and the reader of the results
share the machine's cores.

All are measured in turns, `--rounds` times after a round that warms the machine up. The rates of those that publish
results are of the middle half of the messages, those of the others of the last three quarters. Each ratio is taken
within a round; the output has medians and quartiles.

Quix Streams is not a dependency of edgekit, and it excludes the client that edgekit is measured with:

    pip install --no-deps quixstreams rocksdict orjson pydantic-settings python-dotenv jsonlines jsonpath-ng ply \\
        httpx httpcore h11 anyio authlib joserfc cachetools
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import bench_memory
import confluent_kafka
import numpy as np
import numpy.typing as npt
from bench_alerts import MEMORY_ALERTS, SETTLED, Broker, cycle, fill, packets, settled_rate, simulated
from bench_fetch import pipeline_rate
from bench_inference import describe_machine

from edgekit.cost.timing import Timed, in_turns
from tests.apache_kafka import missing

OURS, MEMORY = "edgekit alerts consume", "edgekit's stages in memory"
CONSUMERS = {"plain": "confluent-kafka", "quix": "Quix Streams"}
WORKS = {
    "nothing": "nothing",
    "fastavro": "fastavro",
    "fastavro-cached": "fastavro, schema parsed once",
    "classify": "edgekit's classifier",
}
SLOW = ("fastavro", "fastavro-cached")  # a quarter of the messages is enough
CONSUMER = Path(__file__).with_name("peer_consumers.py")
SECONDS = 300.0  # for one measurement


def peer_rate(broker: Broker, consumer: str, work: str, count: int) -> float:
    """Messages per second of a peer. If it classifies, those that a reader of the results gets."""
    name = uuid.uuid4().hex[:8]
    broker.create_topic(name)
    where = ["--broker", broker.server.address, "--results", name, "--count", str(count)]
    command = [sys.executable, str(CONSUMER), consumer, work, *where]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        if work == "classify":
            reader = broker.reader(name, 1)
            try:
                return settled_rate(reader, count)
            finally:
                reader.close()
        return float(json.loads(process.communicate(timeout=SECONDS)[0])["per_second"])
    finally:
        process.communicate(timeout=60)


def measured(name: str, measure: Callable[[], float]) -> Timed:
    """Return a function that measures a rate and returns the seconds of one message."""

    def once() -> tuple[float, ...]:
        rate = measure()
        print(f"{name:45s} {rate:8,.0f}/s", flush=True)
        return (1 / rate,)

    return once


def measure_all(broker: Broker, values: list[bytes], count: int, rounds: int) -> dict[str, npt.NDArray[np.float64]]:
    """Return (rounds,) messages per second of each consumer."""
    fill(broker, cycle(values, count))
    calls: dict[str, Callable[[], float]] = {
        MEMORY: lambda: float(bench_memory.all_cores(values, MEMORY_ALERTS)["packets_per_s"]),
        OURS: lambda: pipeline_rate(broker, count, {}),
    }
    for consumer, title in CONSUMERS.items():
        for work, what in WORKS.items():
            number = count // 4 if work in SLOW else count
            calls[f"{title}: {what}"] = lambda consumer=consumer, work=work, number=number: peer_rate(  # type: ignore[misc]
                broker, consumer, work, number
            )
    taken = in_turns([measured(name, call) for name, call in calls.items()], least=rounds, most=rounds, warmup=1)
    return {name: 1 / taken[:, k, 0] for k, name in enumerate(calls)}


def quartiles(values: npt.NDArray[np.float64]) -> dict[str, float]:
    low, middle, high = np.percentile(values, [25, 50, 75])
    return {"median": float(middle), "lower": float(low), "upper": float(high)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    parser.add_argument("--data", type=Path, default=default, help="folder with alerts/; simulated packets without it")
    parser.add_argument("--count", type=int, default=SETTLED, help=f"messages to a measurement, at least {SETTLED}")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the numbers here")
    options = parser.parse_args()
    if reason := missing():
        parser.error(reason)
    if find_spec("quixstreams") is None:
        parser.error("quixstreams is not installed; the description above says how to install it")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the broker ends with this process
    real = (options.data / "alerts").is_dir()
    values = packets(options.data, "ztf*/*.avro") if real else simulated("ztf", 100)
    machine = describe_machine() | {name: version(name) for name in ("confluent-kafka", "quixstreams", "fastavro")}
    machine["librdkafka"] = confluent_kafka.libversion()[0]
    print(*(f"{name} {value}" for name, value in machine.items()), sep=", ")
    with Broker() as broker:
        print(f"{broker.name}, {options.count:,} {'real' if real else 'simulated'} ZTF packets", flush=True)
        rates = measure_all(broker, values, options.count, options.rounds)
    ratios = {name: rates[OURS] / other for name, other in rates.items() if name != OURS}
    report: dict[str, Any] = {
        "machine": machine,
        "broker": broker.name,
        "packets": "real" if real else "simulated",
        "count": options.count,
        "rounds": options.rounds,
        "per_second": {name: quartiles(found) for name, found in rates.items()},
        "edgekit_by": {name: quartiles(found) for name, found in ratios.items()},
    }
    print(f"\n{'medians [quartiles]':45s}    per second             edgekit is so many times as fast")
    for name, rate in report["per_second"].items():
        line = f"{name:45s} {rate['median']:8,.0f} [{rate['lower']:,.0f}, {rate['upper']:,.0f}]"
        if ratio := report["edgekit_by"].get(name):
            line += f"   {ratio['median']:6.2f} [{ratio['lower']:.2f}, {ratio['upper']:.2f}]"
        print(line)
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
