"""Measure what scoring the images adds to each alert, in one run.

    python tools/bench_cutouts.py braai.edge braai-small.edge --json benchmarks/cutouts.json

Real ZTF packets go through the pipeline's stages in memory, from packets to messages, on one core and with reuse off
(tools/bench_memory.py): without a model of cutouts, and with each bundle that is given, under its file's name. The
parts are timed alone as well: gzip, reading images into tensors, gzip included, and inference. gzip is timed with every
package that edgekit can use, and with libdeflate (PyPI: deflate) and zlib-ng if they are installed, as a comparison.
All this runs in turns, in CPU time; a number is the median of the rounds, in microseconds for each alert. At the end,
the stages run in threads on all cores, as in the pipeline, in wall time.

Make braai.edge by `edgekit import-braai`, and a smaller one by tools/compress_braai.py.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bench_memory
import numpy as np
from bench_inference import describe_machine
from threadpoolctl import threadpool_limits

from alert_broker import containers
from alert_broker.cutouts.inflate import GZIP, inflaters
from alert_broker.cutouts.reader import READ, CutoutReader
from alert_broker.cutouts.scorer import AT_ONCE, CutoutScorer
from alert_broker.packet_images import Triplet
from alert_broker.packets import AlertBatch, batches
from alert_broker.stream import config as configuration
from alert_broker.stream.classifiers import open_classifiers
from alert_broker.stream.routing import Route, Router
from alert_broker.stream.stages import Stages
from edgekit.bundle.format import Bundle
from edgekit.bundle.store import open_bundle
from edgekit.cost.timing import in_turns, ratio_interval, timed

ROUNDS = 7
ROUNDS_OF_THREADS = 5
TARGET = 0.35  # of the present time of an alert, that scoring its images may add


def open_stages(bundle: Bundle | None, threads: int = 1) -> tuple[Stages, Router]:
    """The pipeline's stages, with the zoo's models in C and the cutouts on ONNX Runtime. threads: 0 for all cores."""
    settings = configuration.Config(
        model=configuration.Model(runtime="c", threads=threads, reuse="off"),
        cutouts=configuration.Cutouts(runtime="onnxruntime"),
    )
    classifiers = open_classifiers(settings, None, cutouts=bundle)
    bench_memory.load_kernels(print)
    classifiers.open_all()
    for item in (*classifiers.opened.values(), *([classifiers.cutouts] if classifiers.cutouts else [])):
        if threads == 1:
            item.session._threads = 1  # type: ignore[attr-defined]
        item.session.warmup(AT_ONCE)
    router = Router([Route("results")], classifiers.schema)
    router.warm_up()
    return Stages(classifiers, images=bundle is not None), router


def images_of(packets: list[bytes]) -> list[Triplet]:
    """The images of each packet; one batch has them all."""
    blocks = (containers.message(packet, index) for index, packet in enumerate(packets))
    (batch,) = (item for item in batches(blocks, len(packets), images=True) if isinstance(item, AlertBatch))
    assert batch.images is not None
    return list(batch.images)


def calls_of(packets: list[bytes], alerts: int, models: dict[str, Bundle]) -> dict[str, Callable[[], object]]:
    """What is timed, by name."""
    given = [
        bench_memory._batch(packets, start, min(bench_memory.BATCH, alerts - start))
        for start in range(0, alerts, bench_memory.BATCH)
    ]
    opened = {name: open_stages(bundle) for name, bundle in {"without": None, **models}.items()}
    calls: dict[str, Callable[[], object]] = {
        f"stages, {name}": (lambda pair=pair: bench_memory.through_stages(given, *pair))
        for name, pair in opened.items()
    }
    triplets = list(itertools.islice(itertools.cycle(images_of(packets)), alerts))
    parts = [triplets[start : start + AT_ONCE] for start in range(0, alerts, AT_ONCE)]
    scorers = {name: CutoutScorer(bundle, "onnxruntime", session_threads=1) for name, bundle in models.items()}
    tensors = next(iter(scorers.values())).reader.tensors
    for package in inflaters():
        reader = CutoutReader(tensors, package=package)
        calls[f"gzip, {package}"] = lambda reader=reader: [
            reader.gunzip(image) for triplet in triplets for image in triplet if image is not None
        ]
        calls[f"reading, {package}"] = lambda reader=reader: [reader(part) for part in parts]
    images = [bytes(image) for triplet in triplets for image in triplet if image is not None]
    for package, inflate in peers().items():
        calls[f"gzip, {package}"] = lambda inflate=inflate: [inflate(image) for image in images]
    inputs = []
    for part in parts:
        rows, codes = CutoutReader(tensors)(part)
        assert (codes == READ).all()
        inputs.append(rows)
    for name, scorer in scorers.items():
        calls[f"inference, {name}"] = lambda scorer=scorer: [
            scorer.session.run({scorer.bundle.manifest.inputs[0].name: rows}) for rows in inputs
        ]
    return calls


def peers() -> dict[str, Callable[[bytes], bytes]]:
    """Return the other packages that decompress gzip and are installed."""
    found: dict[str, Callable[[bytes], bytes]] = {}
    try:
        import deflate

        found["libdeflate"] = deflate.gzip_decompress
    except ImportError:
        pass
    try:
        from zlib_ng import zlib_ng

        found["zlib-ng"] = lambda data: zlib_ng.decompressobj(GZIP).decompress(data)
    except ImportError:
        pass
    return found


def throughput(packets: list[bytes], alerts: int, models: dict[str, Bundle]) -> dict[str, float]:
    """Return alerts per second of wall time on all cores, without a model of cutouts and with each: medians of rounds
    that are taken in turns."""
    given = [
        bench_memory._batch(packets, start, min(bench_memory.BATCH, alerts - start))
        for start in range(0, alerts, bench_memory.BATCH)
    ]
    opened = {name: open_stages(bundle, 0) for name, bundle in {"without": None, **models}.items()}
    seconds: dict[str, list[float]] = {name: [] for name in opened}
    for number in range(ROUNDS_OF_THREADS + 1):
        for name, pair in opened.items():
            taken = bench_memory._in_threads(given, *pair)
            if number:  # the first round warms up
                seconds[name].append(taken)
    return {name: round(alerts / float(np.median(taken)), 1) for name, taken in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", type=Path, nargs="+", help="models of cutouts: braai in float32, smaller ones")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder with the real data")
    parser.add_argument("--alerts", type=int, default=1020)
    parser.add_argument("--json", type=Path, help="write the numbers here")
    options = parser.parse_args()
    models = {path.stem: open_bundle(path) for path in options.bundles}
    packets = [path.read_bytes() for path in sorted((options.data / "alerts").glob("ztf*/*.avro"))]
    calls = calls_of(packets, options.alerts, models)
    clock = bench_memory.time.process_time
    with threadpool_limits(1):
        taken = in_turns([timed(call, clock) for call in calls.values()], least=ROUNDS, most=ROUNDS, warmup=1)[..., 0]
    each = {name: 1e6 * float(np.median(column)) / options.alerts for name, column in zip(calls, taken.T, strict=True)}
    added: dict[str, Any] = {}
    names = list(calls)
    for name in models:
        ratio, low, high = ratio_interval(taken[:, 0], taken[:, names.index(f"stages, {name}")])
        added[name] = {"share_added": ratio - 1, "interval": [low - 1, high - 1], "within_target": ratio - 1 <= TARGET}
    report = {
        "machine": describe_machine() | {"packages": ", ".join([*inflaters(), *peers()])},
        "packets": len(packets),
        "alerts": options.alerts,
        "rounds": ROUNDS,
        "target_share": TARGET,
        "models": {name: {"digest": bundle.digest, "bytes": bundle.size} for name, bundle in models.items()},
        "microseconds": {name: round(value, 2) for name, value in each.items()},
        "added": added,
        "alerts_per_s_on_all_cores": throughput(packets, options.alerts, models),
    }
    width = max(map(len, each))
    for name, value in each.items():
        print(f"{name:{width}}  {value:9.1f} us for each alert")
    for name, item in added.items():
        low, high = item["interval"]
        verdict = "within" if item["within_target"] else "beyond"
        print(f"{name}: adds {item['share_added']:.0%} [{low:.0%}, {high:.0%}], {verdict} the target of {TARGET:.0%}")
    for name, rate in report["alerts_per_s_on_all_cores"].items():
        print(f"{name}: {rate:,.0f} alerts/s on all cores")
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
