"""Measure the alert stream in one run: decoding, packets in memory to messages in memory, and the way through a broker.

    python tools/bench_alerts.py --json benchmarks/alerts.json

Decoding: the compiled reader and fastavro read the same packets; CPU time (tools/bench_decode.py).

In memory: one core turns real ZTF packets into the messages that the producer is given, in comparison with the
reference production path (tools/bench_memory.py). Then the same stages run in threads on LSST's first detections, as
the pipeline runs them; wall time on all cores.

Through a broker: `edgekit alerts consume` runs between two topics of a broker on the same cores. The broker is the
Apache Kafka that EDGEKIT_KAFKA_HOME names, or else an embedded Kafka-compatible one (Tansu, in memory); the output says
which. Latency is the time from the moment when the producer gets the packet to the moment when a consumer has the
result. The limit of the broker itself is the rate at which a consumer that does nothing reads the same messages; both
rates are of the middle half of the messages.
"""

from __future__ import annotations

import argparse
import itertools
import json
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import bench_decode
import bench_memory
import numpy as np
import psutil
from bench_inference import describe_machine
from confluent_kafka import Consumer, Producer, TopicPartition

from alert_broker import containers, simulated_packets
from alert_broker.simulate import simulate
from alert_broker.stream.config import Batch
from tests.apache_kafka import ApacheKafka, missing
from tests.brokers import CLIENT, Tansu, create_topics

MEMORY_ALERTS = 8192
# so many messages, at most, edgekit has read and not published; see `batch.bytes` in alert_broker/stream/config.py
IN_FLIGHT = (3 * Batch().queue + 5) * Batch().size
SETTLED = 4 * IN_FLIGHT  # messages for a rate, some 3 GB of packets; see `settled_rate`
EDGEKIT = [sys.executable, "-c", "from edgekit.cli import main; main()"]


def packets(data: Path, pattern: str) -> list[bytes]:
    return [path.read_bytes() for path in sorted((data / "alerts").glob(pattern))]


def simulated(survey: str, count: int) -> list[bytes]:
    return [simulated_packets.message(survey, alert.packet) for alert in simulate(survey, count, 1)]


def cycle(values: Sequence[bytes], count: int) -> list[bytes]:
    return list(itertools.islice(itertools.cycle(values), count))


# --- through a broker


def broker_name() -> str:
    return "Tansu (embedded)" if missing() else "Apache Kafka, one node"


class Broker:
    """An Apache Kafka if there is one, else a Tansu, with topics for one measurement."""

    def __init__(self, partitions: int = 2, wait: int = CLIENT["fetch.wait.max.ms"]) -> None:
        self.name = broker_name()
        self.server = Tansu() if missing() else ApacheKafka(Path(tempfile.mkdtemp()) / "kafka")
        self.partitions, self.wait = partitions, wait  # wait: milliseconds that a fetch may take

    def __enter__(self) -> Broker:
        self.server.start()
        create_topics(self.server.address, {"source": self.partitions, "results": 1, "dead": 1})
        return self

    def __exit__(self, *_: object) -> None:
        self.server.__exit__(None, None, None)

    def create_topic(self, name: str) -> None:
        create_topics(self.server.address, {name: 1})

    def producer(self, **settings: Any) -> Producer:
        return Producer(
            {
                "bootstrap.servers": self.server.address,
                "linger.ms": 2,
                "message.max.bytes": 8_388_608,
                "queue.buffering.max.kbytes": 65_536,
                **settings,
            }
        )

    def reader(self, topic: str, partitions: int, **settings: Any) -> Consumer:
        consumer = Consumer(
            {
                "bootstrap.servers": self.server.address,
                "group.id": "reader",
                **CLIENT,
                "enable.auto.commit": False,
                "fetch.wait.max.ms": self.wait,
                **settings,
            }
        )
        consumer.assign([TopicPartition(topic, number, 0) for number in range(partitions)])
        return consumer

    def consume(self, *flags: str, results: str = "results") -> subprocess.Popen[str]:
        kafka = {"bootstrap.servers": self.server.address, **CLIENT, "fetch.wait.max.ms": self.wait}
        settings = [part for name, value in kafka.items() for part in ("--kafka", f"{name}={value}")]
        return subprocess.Popen(
            [
                *EDGEKIT,
                "alerts",
                "consume",
                *settings,
                "--topics",
                "source",
                "--output",
                f'topic = "{results}", format = "json"',
                "--dead-letters-topic",
                "dead",
                "--model-reuse",
                "off",
                "--model-runtime",
                "c",
                "--json",
                *flags,
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )


def fill(broker: Broker, values: list[bytes]) -> float:
    """Send all values as fast as the broker takes them; return messages per second."""
    producer = broker.producer()
    started = time.perf_counter()
    for number, value in enumerate(values):
        while True:
            try:
                producer.produce("source", value, partition=number % broker.partitions)
                break
            except BufferError:
                producer.poll(0.05)
    assert producer.flush(300) == 0
    return len(values) / (time.perf_counter() - started)


def at_a_rate(values: list[bytes], rate: float, seconds: float, *flags: str) -> dict[str, Any]:
    """Measure latency and CPU share while messages come at a fixed rate."""
    with Broker() as broker:
        process = broker.consume(*flags)
        reader = broker.reader("results", 1)
        sent: dict[tuple[int, int], float] = {}
        arrived: dict[tuple[int, int], float] = {}

        def read(until: Callable[[], bool], count: int) -> None:
            deadline = time.monotonic() + 60 + seconds
            while len(arrived) < count or not until():
                assert time.monotonic() < deadline, f"{len(arrived)} of {count} results came"
                message = reader.poll(0.02)  # returns as soon as there is one; `consume` may wait for more
                now = time.time()
                if message is not None and message.error() is None:
                    headers = dict(message.headers())
                    arrived[int(headers["edgekit.partition"]), int(headers["edgekit.offset"])] = now

        producer = broker.producer()
        warm = 2 * broker.partitions
        for number in range(warm):
            producer.produce("source", values[number % len(values)], partition=number % broker.partitions)
        producer.flush(30)
        read(lambda: True, warm)  # the consumer has joined and has loaded its model
        total = int(rate * seconds)
        worker = psutil.Process(process.pid)
        before, began = worker.cpu_times(), time.time()
        late = 0.0

        def produce() -> None:
            nonlocal late
            start = time.monotonic()
            for number in range(total):
                due = start + number / rate
                while (wait := due - time.monotonic()) > 0.0005:
                    producer.poll(min(wait, 0.005))
                late = max(late, -wait)
                created = time.time()
                producer.produce(
                    "source",
                    values[number % len(values)],
                    partition=number % broker.partitions,
                    on_delivery=lambda error, message, created=created: sent.__setitem__(
                        (message.partition(), message.offset()), created
                    ),
                )
            assert producer.flush(60) == 0

        thread = threading.Thread(target=produce)
        thread.start()
        read(lambda: not thread.is_alive(), warm + total)
        after, wall = worker.cpu_times(), time.time() - began
        thread.join()
        process.terminate()
        report = json.loads(process.communicate(timeout=60)[0])
        latency = np.array([arrived[position] - moment for position, moment in sent.items()])
    return {
        "rate": rate,
        "seconds": wall,
        "messages": total,
        "mean_bytes": float(np.mean([len(v) for v in values])),
        "latency_s": {f"p{q}": float(np.percentile(latency, q)) for q in (50, 90, 99, 100)},
        "producer_late_s": late,
        "cpu_share_of_a_core": (after.user + after.system - before.user - before.system) / wall,
        "ledger": report["ledger"]["total"],
    }


def settled_rate(reader: Consumer, count: int) -> float:
    """Return messages per second over the middle half of them.

    During the first quarter the consumer joins and fills its queues; during the last quarter they run empty, while
    nothing more is read. A quarter must be as long as the queues. Otherwise the messages at the beginning of the half
    have been worked on before it begins, and none at its end make up for them: the rate comes out too high.
    """
    assert count >= SETTLED, f"{count} messages; a settled rate needs {SETTLED} or more"
    moments: list[float] = []
    deadline = time.monotonic() + 300
    while len(moments) < count:
        assert time.monotonic() < deadline, f"{len(moments)} of {count} messages came"
        for message in reader.consume(500, 0.05):
            if message.error() is None:
                moments.append(time.perf_counter())
    first, last = count // 4, count - count // 4
    return (last - first) / (moments[last - 1] - moments[first - 1])


def at_the_limit(values: list[bytes], count: int) -> dict[str, Any]:
    """Measure the rates of a consumer that does nothing and of edgekit's consumer on the same messages."""
    with Broker() as broker:
        produced = fill(broker, cycle(values, count))
        reader = broker.reader("source", broker.partitions)
        plain = settled_rate(reader, count)
        reader.close()
        process = broker.consume("--source-until-eos")
        reader = broker.reader("results", 1)
        ours = settled_rate(reader, count)
        reader.close()
        report = json.loads(process.communicate(timeout=60)[0])
    return {
        "messages": count,
        "produced_per_s": produced,
        "read_per_s": plain,
        "pipeline_per_s": ours,
        "share_of_limit": ours / plain,
        "ledger": report["ledger"]["total"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    parser.add_argument("--data", type=Path, default=default, help="folder with alerts/; simulated packets without it")
    parser.add_argument("--seconds", type=float, default=60.0, help="of the measurement at a rate")
    parser.add_argument("--json", type=Path, help="write the numbers here")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the broker ends with this process
    real = (options.data / "alerts").is_dir()
    ztf = packets(options.data, "ztf*/*.avro") if real else simulated("ztf", 100)
    lsst = packets(options.data, "lsst_wire/*shallow*.bin") if real else simulated("lsst", 30)
    machine = describe_machine()
    print(*(f"{name} {value}" for name, value in machine.items()), sep=", ")
    print(f"{'real' if real else 'simulated'} packets: {len(ztf)} ZTF, {len(lsst)} LSST first detections\n")
    report: dict[str, Any] = {"machine": machine, "packets": "real" if real else "simulated"}

    containers.compile_plan = bench_decode.remember
    with tempfile.TemporaryDirectory() as folder:
        report["decode"] = []
        for sample in bench_decode.samples(Path(folder), options.data):
            row = bench_decode.decoding(sample)
            report["decode"].append(row)
            ours, theirs = row[bench_decode.OURS]["alerts_per_s"], row[bench_decode.THEIRS]["alerts_per_s"]
            print(
                f"decode {row['sample']:28s} {ours:10,.0f}/s  fastavro {theirs:8,.0f}/s  {row['ratio']:6.1f}x",
                flush=True,
            )

    memory = report["memory"] = bench_memory.one_core(ztf, MEMORY_ALERTS)
    ours = memory["edgekit"]
    print(
        f"\none core, ZTF packets to messages: {ours['alerts_per_s']:,.0f}/s "
        f"({', '.join(f'{name} {value:.0f} us' for name, value in ours['microseconds'].items())}), "
        f"{ours['classified']:,} of {ours['alerts']:,} classified"
    )
    print(
        f"reference path: {memory['reference']['alerts_per_s']:,.1f}/s; ratio {memory['ratio']:,.0f}x "
        f"({' to '.join(f'{value:.0f}' for value in memory['ratio_range'])} in {memory['rounds']} turns), "
        f"{memory['ratio_of_classified']:,.0f}x of the alerts that each classifies",
        flush=True,
    )
    for name, values in (("lsst", lsst), ("ztf", ztf)):
        memory[f"{name}_all_cores"] = bench_memory.all_cores(values, MEMORY_ALERTS)
    print(
        f"all cores: {memory['lsst_all_cores']['packets_per_s']:,.0f} LSST first detections/s, "
        f"{memory['ztf_all_cores']['packets_per_s']:,.0f} ZTF packets/s",
        flush=True,
    )

    report["broker"] = {"name": broker_name()}
    for name, values in (("ztf", ztf), ("lsst", lsst)):
        row = report["broker"][f"{name}_256_per_s"] = at_a_rate(values, 256.0, options.seconds)
        print(
            f"\n{report['broker']['name']}, {name} at {row['rate']:.0f}/s for {row['seconds']:.0f} s: latency "
            + ", ".join(f"{key} {1e3 * value:.0f} ms" for key, value in row["latency_s"].items())
            + f"; CPU {row['cpu_share_of_a_core']:.0%} of a core; {row['ledger']}",
            flush=True,
        )
        limit = report["broker"][f"{name}_limit"] = at_the_limit(values, SETTLED)
        print(
            f"broker's limit, {name}: takes {limit['produced_per_s']:,.0f}/s, gives a plain consumer "
            f"{limit['read_per_s']:,.0f}/s, the pipeline {limit['pipeline_per_s']:,.0f}/s "
            f"({limit['share_of_limit']:.0%})",
            flush=True,
        )
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
