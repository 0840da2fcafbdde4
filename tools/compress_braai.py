"""Compress braai by `edgekit compress`, and compare the result with its float32 ONNX on the real triplets.

    python tools/compress_braai.py weights_d6_m7.npz ztf_triplets.npz -o braai-small.edge --json benchmarks/braai.json

The passes: the first dense layer, which holds 94 % of the weights, becomes the product of two thin ones, and all
products run in int8. Calibration rows are turned, mirrored, shifted and noisier copies of the triplets. The test rows
are the triplets themselves, so the result says how faithful the small network is to the original on these images, and
nothing about other images. Times are CPU time of one thread on edgekit's onnxruntime session, in turns.
"""

from __future__ import annotations

import argparse
import functools
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt
from bench_inference import describe_machine

from alert_broker.cutouts.braai import from_published
from alert_broker.cutouts.bundle import INPUT, braai_bundle
from alert_broker.cutouts.tensors import CutoutTensors
from edgekit.bundle.format import PROBABILITIES, Bundle
from edgekit.bundle.store import open_bundle, write_bundle
from edgekit.bundle.tensors import read_arrays
from edgekit.cost.timing import in_turns, ratio_interval, timed
from edgekit.data.dataset import save
from edgekit.graph.lower import lower
from edgekit.session import open_session

COPIES, SEED, ROUNDS = 2, 0, 9
BATCHES = (1, 256)
SMALLER, FASTER = 8.0, 3.0  # the targets
RECIPE = """[[pass]]
name = "low_rank"
energy = 0.999
include = ["*fc_1*"]

[[pass]]
name = "static_int8"
weight_bits = 8
"""
EDGEKIT = [sys.executable, "-c", "from edgekit.cli import main; main()"]
Images = npt.NDArray[np.float32]


def augmented(images: Images, rng: np.random.Generator) -> Images:
    """Return a turned, mirrored, shifted and noisier copy of each triplet."""
    made = np.empty_like(images)
    for number, triplet in enumerate(images):
        turned = np.rot90(triplet, rng.integers(4), axes=(1, 2))
        turned = turned[:, :, ::-1] if rng.random() < 0.5 else turned
        shifted = np.roll(turned, rng.integers(-2, 3, 2), axis=(1, 2))
        noise = np.float32(0.1 * np.nanstd(triplet[2])) * rng.standard_normal(triplet.shape, np.float32)
        made[number] = shifted + noise * np.array([1, 0.3, 1], np.float32)[:, None, None]
    return made


def scores(bundle: Bundle, inputs: Images) -> Images:
    session = open_session(bundle, "onnxruntime", threads=1)
    return np.asarray(session.run({INPUT: inputs})[PROBABILITIES][:, 1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path)
    parser.add_argument("triplets", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--norm", default="rows")
    parser.add_argument("--json", type=Path, help="write the numbers here")
    options = parser.parse_args()
    known = np.load(options.triplets)
    with tempfile.TemporaryDirectory() as scratch:
        source, data, recipe = (Path(scratch, name) for name in ("braai.edge", "data.npz", "recipe.toml"))
        original = braai_bundle(from_published(read_arrays(options.weights)), "braai", options.norm)
        write_bundle(original, source)
        tensors = CutoutTensors.from_bundle(original.manifest.preprocessing, "braai")
        rng = np.random.default_rng(SEED)
        parts = [tensors(augmented(known["images"], rng)) for _ in range(COPIES)] + [tensors(known["images"])]
        rows = np.concatenate(parts)
        split = np.repeat([0, 1], [len(rows) - len(parts[-1]), len(parts[-1])])
        save(data, {INPUT: rows}, (scores(original, rows) >= 0.5).astype(np.int64), split)
        recipe.write_text(RECIPE)
        command = ["compress", source, "--recipe", recipe, "--data", data, "-o", options.output, "--metric", "changed"]
        flags = ["--batch", ",".join(map(str, BATCHES)), "--force"]
        subprocess.run([*EDGEKIT, *map(str, command), *flags], check=True)
    small = open_bundle(options.output)
    before, after = scores(original, parts[-1]), scores(small, parts[-1])
    sizes = [len(lower(original, weights="float32").SerializeToString()), len(small.contents["graph.onnx"])]
    times = {}
    sessions = [open_session(bundle, "onnxruntime", threads=1) for bundle in (original, small)]
    for batch in BATCHES:
        inputs = {INPUT: rows[:batch]}
        calls = [timed(functools.partial(item.run, inputs), time.thread_time) for item in sessions]
        taken = in_turns(calls, least=ROUNDS, most=ROUNDS)[..., 0]
        ratio, low, high = ratio_interval(taken[:, 1], taken[:, 0])
        each = (1e6 * np.median(taken, axis=0) / batch).round(1).tolist()
        times[str(batch)] = {"microseconds_per_alert": each, "times_faster": ratio, "interval": [low, high]}
    report = {
        "machine": describe_machine(),
        "rows": len(before),
        "largest_difference_to_the_packets": [float(np.abs(found - known["drb"]).max()) for found in (before, after)],
        "verdicts_changed": int(((before >= 0.5) != (after >= 0.5)).sum()),
        "graph_bytes": sizes,
        "times_smaller": sizes[0] / sizes[1],
        "by_batch": times,
        "targets": {"times_smaller": SMALLER, "times_faster": FASTER, "verdicts_changed": 0},
    }
    print(json.dumps(report, indent=1))
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
