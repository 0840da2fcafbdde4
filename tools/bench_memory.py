"""Compare the pipeline with the reference production path, from packets in memory to messages in memory. This module
is a part of tools/bench_alerts.py.

edgekit: the pipeline's stages take real ZTF packets, one stage after the other on one core, up to the topic, key,
headers and Avro bytes that the producer is called with; reuse is off, so that every alert is classified. The reference
takes alert by alert: fastavro, a pandas frame, george with scipy, pivot and RobustScaler (tools/bench_gp.py), one ONNX
Runtime call, JSON. The published broker runs its TensorFlow model there, which is not available; t2-gr on ONNX Runtime
replaces it. This makes the reference look faster, and so does counting the alerts that it skips because they have too
few points.

The tool takes the CPU time of both in turns, so that a busy machine slows both; all numbers are medians over the
rounds.
"""

from __future__ import annotations

import io
import json
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import fastavro
import numpy as np
from bench_gp import reference
from check_gp_parity import ZTF, Sample
from threadpoolctl import threadpool_limits

from alert_broker.classify import load_kernels
from alert_broker.lightcurve import LightCurves
from alert_broker.results import CLASSIFIED
from alert_broker.stream import config as configuration
from alert_broker.stream.classifiers import open_classifiers
from alert_broker.stream.dead_letters import position_headers
from alert_broker.stream.in_flight import with_positions
from alert_broker.stream.message_batch import MessageBatch
from alert_broker.stream.routing import Route, Router
from alert_broker.stream.sender import Outgoing
from alert_broker.stream.stages import Stages
from edgekit.cost.timing import Timed, in_turns, timed
from edgekit.importers.files import resolve
from edgekit.session import open_session

BATCH = configuration.Batch().size
ROUNDS = 15
ROUNDS_OF_THREADS = 5
STAGES = ("decode", "classify", "route")


@dataclass(frozen=True, slots=True)
class Given:
    """Replaces a Kafka message of the topic `source`."""

    number: int
    content: bytes

    def value(self) -> bytes:
        return self.content

    def topic(self) -> str:
        return "source"

    def partition(self) -> int:
        return 0

    def offset(self) -> int:
        return self.number

    def headers(self) -> None:
        return None


def one_core(packets: list[bytes], alerts: int) -> dict[str, Any]:
    """Time the reference on all packets and the pipeline on `alerts` packets, repeated, in turns. The ratio is the
    median of the rounds' ratios."""
    batches = [_batch(packets, start, min(BATCH, alerts - start)) for start in range(0, alerts, BATCH)]
    stages, router = open_stages(1)
    for item in stages.classifiers.opened.values():
        item.session._threads = 1  # type: ignore[attr-defined]
    one = reference_path()
    counts: dict[str, int] = {}
    skipped = 0

    def by_reference() -> None:
        nonlocal skipped
        skipped = sum(one(value) is None for value in packets)

    def by_stages() -> tuple[float, ...]:
        nonlocal counts
        seconds, counts = through_stages(batches, stages, router)
        return tuple(seconds)

    reference_once = timed(by_reference, time.process_time)
    calls: list[Timed] = [lambda: (*reference_once(), 0.0, 0.0), by_stages]  # the reference is one stage
    with threadpool_limits(1):
        taken = in_turns(calls, least=ROUNDS, most=ROUNDS, warmup=1)
    theirs, ours = taken[:, 0].sum(axis=1) / len(packets), taken[:, 1].sum(axis=1) / alerts
    each = 1e6 * np.median(taken[:, 1], axis=0) / alerts
    ratio, share = float(np.median(theirs / ours)), 1 - skipped / len(packets)
    return {
        "rounds": ROUNDS,
        "reference": {
            "alerts": ROUNDS * len(packets),
            "without_enough_points": ROUNDS * skipped,
            "alerts_per_s": 1 / float(np.median(theirs)),
        },
        "edgekit": {
            "alerts": alerts,
            **counts,
            "alerts_per_s": 1 / float(np.median(ours)),
            "microseconds": dict(zip(STAGES, each.tolist(), strict=True)),
        },
        "ratio": ratio,
        "ratio_of_classified": ratio / share,
        "ratio_range": [float(np.min(theirs / ours)), float(np.max(theirs / ours))],
    }


def open_stages(threads: int) -> tuple[Stages, Router]:
    """The pipeline's stages with the zoo's models in C."""
    model = configuration.Model(runtime="c", threads=threads, reuse="off")
    classifiers = open_classifiers(configuration.Config(model=model), None)
    load_kernels(print)
    classifiers.open_all()
    for item in classifiers.opened.values():
        item.session.warmup(BATCH)
    router = Router([Route("results")], classifiers.schema)
    router.warm_up()
    return Stages(classifiers), router


def through_stages(batches: list[MessageBatch], stages: Stages, router: Router) -> tuple[list[float], dict[str, int]]:
    """Return the CPU seconds of each stage, and the counts of classified alerts, published messages and their bytes."""
    seconds = np.zeros(len(STAGES))
    counts = dict.fromkeys(("classified", "published", "published_bytes"), 0)
    for batch in batches:
        moments = [time.process_time()]
        alerts, letters = stages.decode([message.value() for message in batch.messages])
        moments.append(time.process_time())
        rows, failed = stages.classify(alerts)
        numbers = rows["offset"].to_numpy()
        rows = with_positions(rows, batch, numbers)
        moments.append(time.process_time())
        indices = numbers.tolist()
        headers = [position_headers(batch.messages[k]) for k in indices]
        outgoing = [
            Outgoing(message.topic, message.value, headers[message.row], indices[message.row], message.key)
            for message in router(rows).messages
        ]
        moments.append(time.process_time())
        assert not letters, letters[0]
        assert not failed, failed[0]
        seconds += np.diff(moments)
        counts["classified"] += sum(status == CLASSIFIED for status in rows["status"].to_pylist())
        counts["published"] += len(outgoing)
        counts["published_bytes"] += sum(len(message.value or b"") for message in outgoing)
    return seconds.tolist(), counts


def reference_path() -> Callable[[bytes], bytes | None]:
    """Return a function that treats one alert as the published broker does; None if the alert has too few points."""
    bundle = resolve("t2-gr")
    session = open_session(bundle, "onnxruntime", threads=1)
    bands, wavelengths = "gr", tuple(ZTF[band] for band in "gr")
    output, classes = bundle.manifest.outputs[0].name, bundle.manifest.classes
    specs = {spec.name: spec for spec in bundle.manifest.inputs}

    def one(value: bytes) -> bytes | None:
        (alert,) = fastavro.reader(io.BytesIO(value))
        rows = set()
        for row in [alert["candidate"], *(alert["prv_candidates"] or [])]:
            if row["magpsf"] is None or row["fid"] > len(bands):
                continue
            flux = (1.0 if row["isdiffpos"] in ("t", "1") else -1.0) * 10.0 ** (-0.4 * (row["magpsf"] - 27.5))
            rows.add((row["jd"] - 2400000.5, int(row["fid"]) - 1, flux, abs(flux) * 0.921034 * row["sigmapsf"]))
        if len(rows) < 2:
            return None
        table = np.array(sorted(rows))
        curves = LightCurves(
            tuple(bands),
            np.array([0, len(table)]),
            table[:, 0],
            table[:, 1].astype(np.int8),
            table[:, 2],
            table[:, 3],
            np.ones(len(table), np.bool_),
        )
        frame = reference(Sample("ZTF", [alert["objectId"]], curves, wavelengths), 0)
        inputs = {"light_curve": frame[list(bands)].to_numpy(np.float32)[None]}
        if "context" in specs:
            inputs["context"] = np.zeros((1, int(specs["context"].shape[1])), np.float32)
        probabilities = session.run(inputs)[output][0]
        result = {"objectId": alert["objectId"], "candid": alert["candid"]}
        return json.dumps(result | dict(zip(classes, probabilities.tolist(), strict=True))).encode()

    return one


def all_cores(packets: list[bytes], alerts: int) -> dict[str, Any]:
    """Time the stages with a thread for each and queues between them, as the pipeline runs them, in wall seconds."""
    batches = [_batch(packets, start, min(BATCH, alerts - start)) for start in range(0, alerts, BATCH)]
    stages, router = open_stages(0)
    seconds = [_in_threads(batches, stages, router) for _ in range(ROUNDS_OF_THREADS)]
    return {"packets": alerts, "packets_per_s": alerts / float(np.median(seconds))}


def _in_threads(batches: list[MessageBatch], stages: Stages, router: Router) -> float:
    decoded: queue.Queue[Any] = queue.Queue(2)
    classified: queue.Queue[Any] = queue.Queue(2)

    def decode() -> None:
        for batch in batches:
            decoded.put(stages.decode([message.value() for message in batch.messages])[0])
        decoded.put(None)

    def classify() -> None:
        while (alerts := decoded.get()) is not None:
            classified.put(stages.classify(alerts)[0])
        classified.put(None)

    threads = [threading.Thread(target=decode), threading.Thread(target=classify)]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    published = 0
    while (rows := classified.get()) is not None:
        published += len(router(rows).messages)
    seconds = time.perf_counter() - started
    for thread in threads:
        thread.join()
    assert published == sum(map(len, batches))
    return seconds


def _batch(packets: list[bytes], first: int, count: int) -> MessageBatch:
    """Return a batch of messages of a partition: the packets, repeated as often as needed, from number `first` on."""
    numbers = np.arange(first, first + count)
    messages: list[Any] = [Given(k, packets[k % len(packets)]) for k in numbers.tolist()]
    return MessageBatch(messages, (("source", 0),), (0,), np.zeros(count, np.int64), numbers, time.monotonic())
