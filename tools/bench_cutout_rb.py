"""Compare the time of cutout-rb with that of braai in float32, both in ONNX Runtime on one thread, in turns.

    python tools/bench_cutout_rb.py ../shared/data/braai/weights_d6_m7.npz --json benchmarks/cutout_rb.json

Each network runs with the graph optimizations of ONNX Runtime that are fastest for it, which are chosen for each batch
size. The times are CPU time of the runtime's call in one thread, without the preprocessing. The inputs are synthetic:
no operator's time depends on their values.
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
from bench_inference import describe_machine

from alert_broker.cutouts.braai import IMAGES, from_published
from alert_broker.cutouts.bundle import braai_bundle, synthetic_stamps
from alert_broker.cutouts.tensors import CutoutTensors
from edgekit.bundle.format import Bundle
from edgekit.bundle.store import open_bundle
from edgekit.bundle.tensors import read_arrays
from edgekit.cost.profiled import open_model
from edgekit.cost.timing import in_turns, ratio_interval, timed
from edgekit.graph.lower import float_graph

ROOT = Path(__file__).resolve().parents[1]
BATCHES = (1, 256)
LEVELS = ("ALL", "EXTENDED", "BASIC")
CHOOSING = {1: 100, 256: 3}  # rounds in which the level is chosen
ROUNDS = {1: 1000, 256: 15}
FASTER = 10.0  # the target
Images = npt.NDArray[np.float32]


def fastest(bundle: Bundle, images: Images) -> tuple[str, Any]:
    """Return the level of optimization that is fastest with these images, and a function that runs the network once."""
    rows = CutoutTensors.from_bundle(bundle.manifest.preprocessing, bundle.manifest.name)(images)
    graph, inputs = float_graph(bundle), {bundle.manifest.inputs[0].name: rows}
    calls = {}
    for level in LEVELS:
        chosen = getattr(onnxruntime.GraphOptimizationLevel, f"ORT_ENABLE_{level}")
        session = open_model(graph, 1, graph_optimization_level=chosen)
        calls[level] = functools.partial(session.run, None, inputs)
    rounds = CHOOSING[len(images)]
    taken = in_turns([timed(call, time.thread_time) for call in calls.values()], least=rounds, most=rounds)[..., 0]
    name = list(calls)[int(np.median(taken, axis=0).argmin())]
    return name, calls[name]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path, help="published weights of braai, d6_m7")
    parser.add_argument("--bundle", type=Path, default=ROOT / "models" / "cutout-rb")
    parser.add_argument("--json", type=Path, help="write the numbers here")
    options = parser.parse_args()
    small = open_bundle(options.bundle)
    braai = braai_bundle(from_published(read_arrays(options.weights)), "braai", "rows")
    by_batch = {}
    for batch in BATCHES:
        images = synthetic_stamps(batch, 63, 0)
        assert images.shape[1] == IMAGES
        chosen = [fastest(bundle, images) for bundle in (braai, small)]
        calls = [timed(call, time.thread_time, time.perf_counter) for _, call in chosen]
        taken = in_turns(calls, least=ROUNDS[batch], most=ROUNDS[batch])
        ratio, low, high = ratio_interval(taken[:, 1, 0], taken[:, 0, 0])
        each = (1e6 * np.median(taken[..., 0], axis=0) / batch).round(2).tolist()
        share = float(taken[..., 0].sum() / taken[..., 1].sum())
        by_batch[str(batch)] = {
            "optimizations": [name for name, _ in chosen], "microseconds_per_alert": each, "times_faster": ratio,
            "interval": [low, high], "share_of_wall_time": round(share, 3), "reaches_target": ratio >= FASTER,
        }  # fmt: skip
        print(f"batch {batch}: braai {each[0]} us, cutout-rb {each[1]} us for each alert, {ratio:.1f} times faster")
    report = {
        "machine": describe_machine(),
        "digest": small.digest,
        "bytes": small.size,
        "parameters": [braai.parameters, small.parameters],
        "target": FASTER,
        "by_batch": by_batch,
    }
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
