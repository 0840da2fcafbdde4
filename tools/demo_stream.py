"""The end of the demo: `edgekit alerts consume` classifies a simulated night from a broker, at ten times Rubin's mean
rate or as fast as the embedded broker of this machine runs, and publishes the results. The demo prints the ledger and
draws the latency."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from confluent_kafka import Consumer, KafkaError, TopicPartition
from matplotlib.figure import Figure

from edgekit.compression.plots import GRID, INK, KEPT, LOST, MUTED, styled, to_png
from tests.brokers import CLIENT, Tansu, create_topics, free_port

RATE = 2560.0  # alerts a second: ten times Rubin's rate of 10,000 a visit, every 39 s
PARTITIONS = 2
EDGEKIT = [sys.executable, "-c", "from edgekit.cli import main; main()"]
START_SECONDS = 60.0


def stream(folders: Sequence[Path], out: Path, repeat: int) -> dict[str, Any]:
    """Replay the packets in these folders `repeat` times through `edgekit alerts consume`, and return the counts and
    the latency."""
    with Tansu() as broker:
        create_topics(broker.address, {"night": PARTITIONS, "classified": 1, "edgekit-dead-letters": 1})
        (out / "broker.toml").write_text(configuration(broker.address, listen := f"127.0.0.1:{free_port()}"))
        consumer = subprocess.Popen(
            [*EDGEKIT, "alerts", "consume", "--config", out / "broker.toml", "--json"],
            stdout=subprocess.PIPE,
            stderr=(out / "consume.log").open("w"),
            text=True,
        )
        try:
            wait_until_ready(f"http://{listen}/readyz", consumer)
            kafka = ["--topic", "night", "--kafka", f"bootstrap.servers={broker.address}"]
            speed = ["--rate", str(RATE), "--repeat", str(repeat), "--json"]
            command = [*EDGEKIT, "alerts", "replay", *folders, *kafka, *speed]
            replayed = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            sent = json.loads(replayed.stdout)
            wait_for_the_last(broker.address, sent["messages"])
        finally:
            consumer.terminate()
            report, _ = consumer.communicate(timeout=60)
        if consumer.returncode:
            sys.exit(f"demo: the consumer ended with status {consumer.returncode}; {out / 'consume.log'} says why")
        latency = latencies(broker.address)
    seconds = latency[:, 1] - latency[:, 0]
    (out / "latency.png").write_bytes(to_png(picture(latency)))
    rate = sent["messages"] / sent["seconds"]
    return {
        "sent": sent["messages"],
        "rate": rate,
        "limited_by": "the rate" if rate > 0.95 * RATE else "this machine and its broker",
        "ledger": json.loads(report)["ledger"],
        "picture": str(out / "latency.png"),
        "latency_s": {f"p{q}": float(np.percentile(seconds, q)) for q in (50, 99, 100)},
    }


def configuration(address: str, listen: str) -> str:
    return f"""[source]
topics = ["night"]
group = "demo"

[[output]]
topic = "classified"
format = "json"

[metrics]
listen = "{listen}"

[kafka]
"bootstrap.servers" = "{address}"
"session.timeout.ms" = {CLIENT["session.timeout.ms"]}
"fetch.wait.max.ms" = {CLIENT["fetch.wait.max.ms"]}
"""


def wait_until_ready(url: str, consumer: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and consumer.poll() is None:
        try:
            urllib.request.urlopen(url, timeout=1.0).close()
            return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    sys.exit("demo: the consumer does not become ready; consume.log says why")


def wait_for_the_last(address: str, count: int) -> None:
    """Wait until `count` alerts have a result or are dead letters."""
    deadline = time.monotonic() + 60
    reader = open_reader(address, [("classified", 0), ("edgekit-dead-letters", 0)])
    while count > 0 and time.monotonic() < deadline:
        count -= sum(message.error() is None for message in reader.consume(2000, 0.1))
    reader.close()


def latencies(address: str) -> Any:
    """Return (results, 2) Unix seconds: when each alert was sent, and when its result was published."""
    sent = {position: moment for position, moment, _ in read(address, [("night", k) for k in range(PARTITIONS)])}
    published = [
        (sent[int(headers["edgekit.partition"]), int(headers["edgekit.offset"])], moment)
        for _, moment, headers in read(address, [("classified", 0)])
    ]
    return np.array(sorted(published))


def open_reader(address: str, partitions: list[tuple[str, int]]) -> Consumer:
    reader = Consumer(
        {
            "bootstrap.servers": address,
            "group.id": "demo-reader",
            **CLIENT,
            "enable.auto.commit": False,
            "enable.partition.eof": True,
        }
    )
    reader.assign([TopicPartition(topic, number, 0) for topic, number in partitions])
    return reader


def read(address: str, partitions: list[tuple[str, int]]) -> list[tuple[tuple[int, int], float, dict[str, Any]]]:
    reader = open_reader(address, partitions)
    left, found = len(partitions), []
    while left:
        for message in reader.consume(2000, 0.2):
            error = message.error()
            if error is not None:
                left -= error.code() == KafkaError._PARTITION_EOF
                continue
            position = (message.partition(), message.offset())
            found.append((position, message.timestamp()[1] / 1e3, dict(message.headers() or ())))
    reader.close()
    return found


@styled
def picture(latency: Any) -> Figure:
    """Plot the rates of alerts and results above, and the latency of each alert with its median and 99th percentile
    below."""
    figure = Figure(figsize=(7.0, 4.6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    start = latency[0, 0]
    width = 0.25
    edges = np.arange(0.0, latency[:, 1].max() - start + width, width)
    for column, name, colour in ((0, "sent", MUTED), (1, "published", KEPT)):
        counts, _ = np.histogram(latency[:, column] - start, edges)
        above.stairs(counts / width, edges, color=colour, label=name, linewidth=1.6)
    above.set_ylabel("alerts/s")
    above.legend(loc="upper right", ncols=2)
    above.set_ylim(bottom=0)
    seconds = 1e3 * (latency[:, 1] - latency[:, 0])
    below.plot(latency[:, 0] - start, seconds, ".", color=GRID, markersize=2, rasterized=True)
    bins = np.digitize(latency[:, 0] - start, edges)
    for quantile, colour in ((50, INK), (99, LOST)):
        points = [(edges[k - 1] + width / 2, np.percentile(seconds[bins == k], quantile)) for k in np.unique(bins)]
        below.plot(*np.array(points).T, color=colour, linewidth=1.6, label=f"p{quantile}")
    below.set_ylabel("sent to published, ms")
    below.set_xlabel("seconds")
    below.set_ylim(bottom=0)
    below.legend(loc="upper left", ncols=2)
    return figure
