"""Run the alert stream at twice Rubin's mean rate for half an hour: the memory must stay flat and the ledger must be
exact.

    python tools/soak_alerts.py --minutes 30 --json benchmarks/soak.json

`edgekit alerts consume` runs between topics of an embedded broker (Tansu, in memory); one packet in a hundred is
damaged. The broker keeps every message, so the LSST packets contain no images (--cutouts adds them, 100 kB each, for a
short run). Memory is the resident set of the consumer, which the tool reads every few seconds. It is flat if its median
in the last quarter is at most 5 % above that in the second quarter. The exit status is 1 if it is not flat, or if the
ledger, the results or the dead letters do not match the sent packets.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from bench_alerts import Broker
from bench_inference import describe_machine
from confluent_kafka import Message

from alert_broker import simulated_packets
from alert_broker.simulate import simulate

DAMAGED_EVERY = 100
SAMPLE_SECONDS = 2.0
GROWTH = 0.05


class Results(threading.Thread):
    """Counts the published results by the position of their alert."""

    def __init__(self, broker: Broker) -> None:
        super().__init__(daemon=True)
        self.readers = {topic: broker.reader(topic, 1) for topic in ("results", "dead")}
        self.counts = {topic: Counter[tuple[int, int]]() for topic in self.readers}

    def run(self) -> None:
        while True:
            for topic, reader in self.readers.items():
                for message in reader.consume(2000, 0.1):
                    if message.error() is None:
                        headers = dict(message.headers() or ())
                        self.counts[topic][int(headers["edgekit.partition"]), int(headers["edgekit.offset"])] += 1


def spread(values: Any) -> dict[str, float]:
    """Return the number of samples, their extremes and three percentiles; the result does not store the samples."""
    low, median, high = (float(value) for value in np.percentile(values, (5, 50, 95)))
    return {
        "samples": len(values),
        "min": float(np.min(values)),
        "p5": low,
        "p50": median,
        "p95": high,
        "max": float(np.max(values)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--rate", type=float, default=512.0, help="packets a second")
    parser.add_argument("--cutouts", action="store_true", help="send the images as well")
    parser.add_argument("--json", type=Path, help="write the numbers here")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the broker ends with this process
    machine = describe_machine()
    print(*(f"{name} {value}" for name, value in machine.items()), sep=", ")
    alerts = simulate("lsst", 500, 1, cutouts=options.cutouts)
    values = [simulated_packets.message("lsst", alert.packet) for alert in alerts]
    damaged = [value[: len(value) // 2] for value in values]
    size = float(np.mean([len(value) for value in values]))
    total = int(options.minutes * 60 * options.rate)
    print(f"{total:,} LSST packets of {size / 1e3:.1f} kB on average at {options.rate:.0f}/s")
    memory: list[tuple[float, float, float]] = []
    with Broker(partitions=8, wait=5000) as broker:  # Tansu needs time to find a message in a log of half an hour
        process = broker.consume()
        results = Results(broker)
        results.start()
        worker, server = psutil.Process(process.pid), psutil.Process(broker.server.pid)
        failed: list[str] = []

        def report(error: Any, _: Message) -> None:
            if error is not None:
                failed.append(error.str())

        producer = broker.producer(**{"enable.idempotence": True})
        started, sampled, late = time.monotonic(), 0.0, 0.0
        for number in range(total):
            due = started + number / options.rate
            while (wait := due - time.monotonic()) > 0.0005:
                producer.poll(min(wait, 0.005))
            late = max(late, -wait)
            value = (damaged if number % DAMAGED_EVERY == DAMAGED_EVERY - 1 else values)[number % len(values)]
            producer.produce("source", value, partition=number % broker.partitions, on_delivery=report)
            if (now := time.monotonic()) - sampled > SAMPLE_SECONDS:
                sampled = now
                memory.append((now - started, worker.memory_info().rss / 1e6, server.memory_info().rss / 1e6))
        assert producer.flush(120) == 0
        assert not failed, failed[0]
        deadline = time.monotonic() + 60
        while sum(map(len, results.counts.values())) < total and time.monotonic() < deadline:
            time.sleep(0.2)
        cpu = sum(worker.cpu_times()[:2]) / (time.monotonic() - started)
        process.terminate()
        out, log = process.communicate(timeout=60)
        time.sleep(1.0)  # wait for a result that might come twice
    ledger = json.loads(out)["ledger"]
    samples = np.array_split(np.array(memory), 4)
    second, last = float(np.median(samples[1][:, 1])), float(np.median(samples[3][:, 1]))
    bad = total // DAMAGED_EVERY
    checks = {
        "memory is flat": last <= second * (1 + GROWTH),
        "the ledger is exact": ledger["in_flight"] == 0
        and (ledger["total"]["consumed"], ledger["total"]["published"], ledger["total"]["dead_lettered"])
        == (total, total - bad, bad),
        "results are what was sent": len(results.counts["results"]) == results.counts["results"].total() == total - bad,
        "dead letters are what was damaged": len(results.counts["dead"]) == results.counts["dead"].total() == bad,
        "the consumer ended well": process.returncode == 0,
    }
    row = {
        "machine": machine,
        "minutes": options.minutes,
        "rate": options.rate,
        "messages": total,
        "mean_bytes": size,
        "producer_late_s": late,
        "cpu_share_of_a_core": cpu,
        "ledger": ledger["total"],
        "consumer_mb": {"second_quarter": second, "last_quarter": last},
        "memory_mb": {
            "sample_seconds": SAMPLE_SECONDS,
            "consumer_by_quarter": [spread(quarter[:, 1]) for quarter in samples],
            "broker_by_quarter": [spread(quarter[:, 2]) for quarter in samples],
        },
        "checks": checks,
    }
    if options.json:
        options.json.write_text(json.dumps(row, indent=1) + "\n")
    print(
        f"consumer: {second:.0f} MB in the second quarter, {last:.0f} MB in the last; CPU {cpu:.0%} of a core; "
        f"broker: {memory[-1][2]:,.0f} MB at the end; producer at most {late:.2f} s late"
    )
    print(f"ledger: {ledger['total']}")
    for name, passed in checks.items():
        print(f"{'yes' if passed else 'NO '}  {name}")
    if not all(checks.values()):
        sys.exit(log[-2000:])


if __name__ == "__main__":
    main()
