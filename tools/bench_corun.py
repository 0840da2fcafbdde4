"""Measure alerts beside a language model on one CPU: each way of sharing the machine is a row.

    EDGEKIT_KAFKA_HOME=... python tools/bench_corun.py --json benchmarks/corun.json
    python tools/bench_corun.py alone "model alone" "1 thread, nice 19" serve --rates 256 --seconds 20 --rounds 1

`edgekit alerts consume` classifies real ZTF packets (images left out, as most of a packet's bytes are images) between
two topics of a broker on the same cores: latency is from the moment when the producer gets a packet to the moment when
a reader has the result. The language model is SmolLM2-135M, with three streams of chat and a prompt of 1,500 tokens
every 4 s, for as long as the alerts come. Rows are measured in turns, one after the other in each round; the
output has each round and the median. With --json, rows that were stored before and are not measured now are kept.
`others` is the share of the cores that other programs took; a row with more than 5 % of it is no measurement.

Rows: `alone`: the alerts; `model alone`: the language model with one thread, at default priority; "N threads": it is a
process of its own beside the alerts, as it comes, or with ", nice 19", ", idle" (SCHED_IDLE), ", split" (the model on
the last core, the alerts on the others), ", budget N" (tokens of a step); "llama.cpp N threads": the same load on
llama.cpp through the package xllamacpp or the library that EDGEKIT_LLAMACPP names; `serve`: `edgekit serve` with a
table [alerts], as it comes, asked through its HTTP API.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench_alerts import EDGEKIT, Broker, broker_name, packets, simulated
from confluent_kafka import Producer
from language_load import percentiles, separate, served

from edgekit import machine
from edgekit.importers import downloads
from tests.brokers import CLIENT

ROWS = (
    "alone", "model alone", "1 thread", "2 threads", "1 thread, nice 19", "2 threads, nice 19", "2 threads, idle",
    "1 thread, split", "2 threads, budget 512", "2 threads, budget 128", "2 threads, budget 64",
    "2 threads, budget 16", "llama.cpp 1 thread", "llama.cpp 2 threads", "serve",
)  # fmt: skip
WARM_SECONDS = 3.0  # of both together before the measurement
MOST_OTHERS = 0.05  # of the cores that other programs may take; the report marks a row with more


# --- the alerts


def without_images(values: list[bytes]) -> list[bytes]:
    """Return the packets with empty images: they are most of the bytes, and nobody reads them here."""
    import io

    import fastavro

    found = []
    for value in values:
        reader = fastavro.reader(io.BytesIO(value))
        records = [
            {name: None if name.startswith("cutout") else item for name, item in record.items()} for record in reader
        ]
        out = io.BytesIO()
        fastavro.writer(out, reader.writer_schema, records)
        found.append(out.getvalue())
    return found


class Stream:
    """A broker, packets at a rate, a reader of the results, and their latencies."""

    def __init__(self, broker: Broker, values: list[bytes], rate: float) -> None:
        self._broker, self._values, self._rate = broker, values, rate
        self._sent: dict[tuple[int, int], float] = {}
        self._arrived: dict[tuple[int, int], float] = {}
        self._stop = threading.Event()
        self._counted_from = float("inf")
        self._total = 0
        self.late = 0.0
        self._threads = [threading.Thread(target=target, daemon=True) for target in (self._read, self._produce)]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def ready(self, process: subprocess.Popen[str]) -> None:
        """Return when the results have caught up with the packets, which wait while the consumer starts."""
        deadline = time.monotonic() + 90
        while not self._arrived or self._total - len(self._arrived) > 0.25 * self._rate:
            if time.monotonic() > deadline or process.poll() is not None:
                raise SystemExit(f"{len(self._arrived)} of {self._total} results came")
            time.sleep(0.05)

    def begin(self) -> None:
        self._counted_from, self.late = time.time(), 0.0

    def end(self) -> dict[str, Any]:
        """Stop; return the latencies of the alerts that were sent since `begin`."""
        self._stop.set()
        deadline = time.monotonic() + 60
        while len(self._arrived) < self._total or self._threads[1].is_alive():
            if time.monotonic() > deadline:
                raise SystemExit(f"{len(self._arrived)} of {self._total} results came")
            time.sleep(0.05)
        latencies = [self._arrived[at] - sent for at, sent in self._sent.items() if sent >= self._counted_from]
        return {
            "alerts": len(latencies),
            "alert_ms": percentiles(latencies),
            "over_50_ms": float(np.mean([value > 0.05 for value in latencies])),
            "producer_late_ms": 1e3 * self.late,
        }

    def _read(self) -> None:
        reader = self._broker.reader("results", 1)
        while not self._stop.is_set() or len(self._arrived) < self._total or self._threads[1].is_alive():
            message = reader.poll(0.02)
            now = time.time()
            if message is not None and message.error() is None:
                headers = dict(message.headers())
                self._arrived[int(headers["edgekit.partition"]), int(headers["edgekit.offset"])] = now
        reader.close()

    def _produce(self) -> None:
        producer: Producer = self._broker.producer()
        start, number = time.monotonic(), 0
        while not self._stop.is_set():
            due = start + number / self._rate
            while (wait := due - time.monotonic()) > 0.0005:
                producer.poll(min(wait, 0.005))
            self.late = max(self.late, -wait)
            created = time.time()
            producer.produce(
                "source",
                self._values[number % len(self._values)],
                partition=number % self._broker.partitions,
                on_delivery=lambda error, message, created=created: self._sent.__setitem__(
                    (message.partition(), message.offset()), created
                ),
            )
            number += 1
            self._total = number
        assert producer.flush(60) == 0


class Others:
    """The share of the machine's cores that programs take which are no part of the measurement."""

    def __init__(self) -> None:
        self._busy, self._ours, self._at = self._now()

    def share(self) -> float:
        busy, ours, at = self._now()
        return max(0.0, busy - self._busy - ours + self._ours) / (at - self._at) / (psutil.cpu_count() or 1)

    def _now(self) -> tuple[float, float, float]:
        times, this = psutil.cpu_times(), psutil.Process()
        every = [process.cpu_times() for process in (this, *this.children(recursive=True))]
        ours = sum(item.user + item.system for item in every)
        return times.user + times.nice + times.system, ours, time.monotonic()


# --- rows


def measure(row: str, values: list[bytes], rate: float, seconds: float) -> dict[str, Any]:
    if row == "model alone":
        with separate("1 thread") as (begin, end):
            time.sleep(WARM_SECONDS)
            begin()
            others = Others()
            time.sleep(seconds)
            return {"others": others.share(), "language": end()}
    with Broker() as broker, tempfile.TemporaryDirectory() as folder:
        stream = Stream(broker, values, rate)
        with consuming(broker, row, Path(folder)) as (process, port):
            stream.start()
            stream.ready(process)
            if row == "alone":
                time.sleep(WARM_SECONDS)
                stream.begin()
                others = Others()
                time.sleep(seconds)
                return {"others": others.share(), **stream.end()}
            with served(port) if row == "serve" else separate(row) as (begin, end):
                time.sleep(WARM_SECONDS)
                begin()
                stream.begin()
                others = Others()
                time.sleep(seconds)
                share, language = others.share(), end()
                return {"others": share, **stream.end(), "language": language}


@contextmanager
def consuming(broker: Broker, row: str, folder: Path) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """Run the consumer, or the daemon with it; yield the process and the daemon's port."""
    if row == "serve":
        process, port = daemon(broker, folder)
    else:
        process, port = broker.consume(), 0
        if "split" in row:
            os.sched_setaffinity(process.pid, os.sched_getaffinity(0) - {max(os.sched_getaffinity(0))})
    try:
        yield process, port
    finally:
        process.terminate()
        try:
            process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()


def daemon(broker: Broker, folder: Path) -> tuple[subprocess.Popen[str], int]:
    kafka = {"bootstrap.servers": broker.server.address, **CLIENT, "fetch.wait.max.ms": broker.wait}
    lines = [f"{json.dumps(name)} = {json.dumps(value)}" for name, value in kafka.items()]
    (folder / "broker.toml").write_text(
        "[kafka]\n" + "\n".join(lines) + '\n[source]\ntopics = ["source"]\n[[output]]\ntopic = "results"\n'
        'format = "json"\n[dead_letters]\ntopic = "dead"\n[model]\nreuse = "off"\nruntime = "c"\n'
    )
    (folder / "serve.toml").write_text(
        '[server]\nlisten = "127.0.0.1:0"\n[models.smollm2]\npath = "smollm2"\ncontext = 8192\nload = "at-start"\n'
        f'[alerts]\nconfig = "{folder}/broker.toml"\n'
    )
    log = (folder / "log").open("w+")
    process = subprocess.Popen(
        [*EDGEKIT, "serve", "--config", str(folder / "serve.toml")], stdout=log, stderr=log, text=True
    )
    deadline = time.monotonic() + 90
    while not (found := re.search(r"at http://127\.0\.0\.1:(\d+)", (folder / "log").read_text())):
        if process.poll() is not None or time.monotonic() > deadline:
            raise SystemExit(f"the daemon did not start: {(folder / 'log').read_text()[-500:]}")
        time.sleep(0.1)
    return process, int(found[1])


def median(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the medians of all numbers over the rounds."""
    found: dict[str, Any] = {}
    for key, value in rounds[0].items():
        values = [item[key] for item in rounds if item.get(key) is not None]
        if isinstance(value, dict):
            found[key] = median(values)
        else:
            found[key] = statistics.median(values) if values else None
    return found


def describe(name: str, rate: float, row: dict[str, Any]) -> str:
    text = f"{name:24s} {rate:4.0f}/s"
    if alert := row.get("alert_ms"):
        text += f"  alerts p50 {alert['p50']:6.1f} p99 {alert['p99']:6.1f} p99.9 {alert['p99.9']:6.1f} max "
        text += f"{alert['p100']:6.1f} ms, over 50 ms {row['over_50_ms']:6.2%}"
    if language := row.get("language"):
        between = language["between_tokens_ms"]
        first = language["long_first_token_s"]
        text += f"  {language['generated_per_s']:4.0f} tokens/s, prompts {language['long_prompt_tokens_per_s']:4.0f}/s"
        if between:
            text += f", between p50 {between['p50']:5.1f} p99 {between['p99']:5.1f} max {between['p100']:5.1f} ms"
        text += "" if first is None else f", long first {first:.2f} s"
    if row["others"] > MOST_OTHERS:
        text += f"  ({row['others']:.0%} of the cores were taken by other programs: measure again)"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    parser.add_argument("rows", nargs="*", default=ROWS, help=f"[default: {', '.join(ROWS)}]")
    parser.add_argument("--data", type=Path, default=default, help="folder with alerts/; simulated packets without it")
    parser.add_argument("--rates", type=float, nargs="+", default=[100.0, 256.0], help="alerts a second")
    parser.add_argument("--seconds", type=float, default=90.0, help="of one measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the numbers here; rows that are there and not measured stay")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the broker ends with this process
    downloads.find("smollm2")
    real = (options.data / "alerts").is_dir()
    values = without_images(packets(options.data, "ztf*/*.avro")) if real else simulated("ztf", 100)
    print(f"{broker_name()}, {'real' if real else 'simulated'} ZTF packets, {machine.describe()}", flush=True)
    measured: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for _ in range(options.rounds):
        for rate in options.rates:
            for name in options.rows:
                if name == "model alone" and rate != options.rates[0]:
                    continue
                row = measure(name, values, rate, options.seconds)
                measured.setdefault((name, rate), []).append(row)
                print(describe(name, rate, row), flush=True)
                if options.json:
                    store(options.json, measured, options, real)


def store(path: Path, measured: dict[tuple[str, float], list[dict[str, Any]]], options: Any, real: bool) -> None:
    old = json.loads(path.read_text())["rows"] if path.is_file() else []
    kept = [row for row in old if (row["row"], row["rate"]) not in measured]
    new = [
        {"row": name, "rate": rate, "seconds": options.seconds, "rounds": len(rounds), **rounded(median(rounds))}
        for (name, rate), rounds in measured.items()
    ]
    report = {
        "machine": machine.describe(),
        "broker": broker_name(),
        "packets": f"{'real' if real else 'simulated'} ZTF, without images",
        "rows": [*kept, *new],
    }
    path.write_text(json.dumps(report, indent=1) + "\n")


def rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


if __name__ == "__main__":
    main()
