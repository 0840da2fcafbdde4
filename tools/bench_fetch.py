"""Measure what settings of fetching give: alerts per second from a real Apache Kafka through the pipeline, in one run.

    EDGEKIT_KAFKA_HOME=... python tools/bench_fetch.py --json benchmarks/fetch.json

Broker, consumer and reader share the machine's cores. A plain consumer that does nothing reads the same messages first
and last. Rates are of the middle half of the messages. The settings are measured in turns, `--rounds` times,
and the median counts.
"""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import sys
import uuid
from pathlib import Path
from typing import Any

from bench_alerts import SETTLED, Broker, cycle, fill, packets, settled_rate, simulated
from bench_inference import describe_machine

# The first row has edgekit's defaults; each other row changes one value.
SETTINGS: dict[str, dict[str, int]] = {
    "as edgekit sets it": {},
    "fetch.queue.backoff.ms = 1000": {"fetch.queue.backoff.ms": 1000},
    "fetch.queue.backoff.ms = 100": {"fetch.queue.backoff.ms": 100},
    "fetch.queue.backoff.ms = 1": {"fetch.queue.backoff.ms": 1},
    "queued.max.messages.kbytes = 16384": {"queued.max.messages.kbytes": 16_384},
    "queued.max.messages.kbytes = 131072": {"queued.max.messages.kbytes": 131_072},
}


def pipeline_rate(broker: Broker, count: int, settings: dict[str, int]) -> float:
    """Return the alerts per second of `edgekit alerts consume`, as a new group with its own topic for results."""
    name = uuid.uuid4().hex[:8]
    broker.create_topic(name)
    flags = [part for key, value in settings.items() for part in ("--kafka", f"{key}={value}")]
    process = broker.consume("--source-until-eos", "--source-group", name, *flags, results=name)
    reader = broker.reader(name, 1)
    try:
        return settled_rate(reader, count)
    finally:
        reader.close()
        process.communicate(timeout=60)


def plain_rate(broker: Broker, count: int) -> float:
    reader = broker.reader("source", broker.partitions, **{"fetch.queue.backoff.ms": 10})
    try:
        return settled_rate(reader, count)
    finally:
        reader.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    parser.add_argument("--data", type=Path, default=default, help="folder with alerts/; simulated packets without it")
    parser.add_argument("--count", type=int, default=SETTLED, help=f"messages to a measurement, at least {SETTLED}")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the numbers here")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    real = (options.data / "alerts").is_dir()
    values = packets(options.data, "ztf*/*.avro") if real else simulated("ztf", 100)
    rates: dict[str, list[float]] = {name: [] for name in SETTINGS}
    with Broker() as broker:
        print(f"{broker.name}, {options.count:,} {'real' if real else 'simulated'} ZTF packets", flush=True)
        fill(broker, cycle(values, options.count))
        plain = [plain_rate(broker, options.count)]
        for _ in range(options.rounds):
            for name, settings in SETTINGS.items():
                rates[name].append(pipeline_rate(broker, options.count, settings))
                print(f"{name:40s} {rates[name][-1]:8,.0f}/s", flush=True)
        plain.append(plain_rate(broker, options.count))
        report: dict[str, Any] = {
            "machine": describe_machine(),
            "broker": broker.name,
            "packets": "real" if real else "simulated",
            "count": options.count,
            "plain_consumer_per_s": plain,
            "pipeline_per_s": rates,
            "median_per_s": {name: statistics.median(found) for name, found in rates.items()},
        }
    print(f"a plain consumer: {plain[0]:,.0f}/s at the beginning, {plain[1]:,.0f}/s at the end")
    for name, rate in report["median_per_s"].items():
        print(f"{name:40s} {rate:8,.0f}/s")
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
