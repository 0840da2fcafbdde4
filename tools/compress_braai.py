"""Compress braai by `edgekit compress`, and compare the result with its float32 ONNX on the real triplets.

    python tools/compress_braai.py weights_d6_m7.npz ztf_triplets.npz -o braai-small.edge --json benchmarks/braai.json
    python tools/compress_braai.py weights_d6_m7.npz ztf_triplets.npz -o unseen.edge --without 0.25 --json more.json

The passes: `distill` gives the first convolution a stride of 2, which leaves a fourth of the work and a ninth of the
first dense layer, and trains the network on braai's own probabilities; `qat_int8` trains it through the int8
arithmetic in which it will run. No row has a label but braai's answer. The training rows are the triplets, each
several times, and copies of them that are turned, mirrored, shifted and noisier. So a verdict on a triplet that does
not change shows only that the small network learned it. Other copies, which were not trained on, show what it is worth
on similar images, and with --without, the triplets of the objects that are left out show it on other objects.
Times are CPU time of one thread on edgekit's onnxruntime session, in turns.
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
from typing import Any

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

TIMES, COPIES, HELD_OUT_COPIES = 4, 12, 2  # of each triplet: as it is, and augmented; copies that are only tested
SEED, OTHER_SEED, ROUNDS = 0, 9, 9
BATCHES = (1, 256)
SMALLER, FASTER = 8.0, 3.0  # the targets
# Dropout is for training on few labels; a student sees the original's answer on every copy.
RECIPE = """[[pass]]
name = "distill"
student = {strides = [2, 1, 1, 1], dropout = [0.0, 0.0, 0.0]}
start = "original"
epochs = 18

[[pass]]
name = "qat_int8"
weight_bits = 8
epochs = 3
"""
EDGEKIT = [sys.executable, "-c", "from edgekit.cli import main; main()"]
Images = npt.NDArray[np.float32]


def augmented(images: Images, rng: np.random.Generator) -> Images:
    """Return a copy of each triplet (count, 3, height, width): turned, mirrored, shifted by up to two pixels, and with
    noise of 1 to 30 % of the deviation of the difference."""
    made = np.empty_like(images)
    for number, triplet in enumerate(images):
        turned = np.rot90(triplet, rng.integers(4), axes=(1, 2))
        turned = turned[:, :, ::-1] if rng.random() < 0.5 else turned
        shifted = np.roll(turned, rng.integers(-2, 3, 2), axis=(1, 2))
        noise = np.float32(10 ** rng.uniform(-2, -0.5) * np.nanstd(triplet[2]))
        weights = np.array([1, 0.3, 1], np.float32)[:, None, None]  # a template is the mean of many exposures
        made[number] = shifted + noise * weights * rng.standard_normal(triplet.shape, np.float32)
    return made


def copies(images: Images, tensors: CutoutTensors, count: int, seed: int) -> Images:
    """Return the inputs of `count` augmented copies of each triplet."""
    rng = np.random.default_rng(seed)
    return np.concatenate([tensors(augmented(images, rng)) for _ in range(count)])


def compress(original: Bundle, train: Images, test: Images, output: Path) -> Bundle:
    """Return what `edgekit compress` makes of the original. It judges each pass on the test rows."""
    with tempfile.TemporaryDirectory() as scratch:
        source, data, recipe = (Path(scratch, name) for name in ("braai.edge", "data.npz", "recipe.toml"))
        write_bundle(original, source)
        unlabelled = np.full(len(train) + len(test), -1)
        save(data, {INPUT: np.concatenate([train, test])}, unlabelled, np.repeat([0, 1], [len(train), len(test)]))
        recipe.write_text(RECIPE)
        command = ["compress", source, "--recipe", recipe, "--data", data, "-o", output, "--metric", "changed"]
        flags = ["--batch", ",".join(map(str, BATCHES)), "--max-loss", "0.05", "--force"]
        subprocess.run([*EDGEKIT, *map(str, command), *flags], check=True)
    return open_bundle(output)


def scores(bundle: Bundle, inputs: Images) -> Images:
    session = open_session(bundle, "onnxruntime", threads=1)
    return np.asarray(session.run({INPUT: inputs})[PROBABILITIES][:, 1])


def agreement(original: Bundle, small: Bundle, inputs: Images) -> dict[str, Any]:
    """Compare the two networks' scores on the same rows."""
    before, after = scores(original, inputs), scores(small, inputs)
    changed = (before >= 0.5) != (after >= 0.5)
    return {
        "rows": len(inputs),
        "verdicts_changed": int(changed.sum()),
        "mean_change_of_a_score": float(np.abs(after - before).mean()),
        "largest_change_of_a_score": float(np.abs(after - before).max()),
        "scores_of_changed_verdicts": np.sort(before[changed]).round(3).tolist()[:20],
    }


def graph_bytes(bundle: Bundle) -> int:
    """Return the bytes of a bundle's graph; a bundle in which no pass on the graph was kept is lowered to one."""
    return len(bundle.contents.get("graph.onnx") or lower(bundle, weights="float32").SerializeToString())


def times(original: Bundle, small: Bundle, rows: Images) -> dict[str, Any]:
    """Time the two networks in turns, for each batch size."""
    found = {}
    sessions = [open_session(bundle, "onnxruntime", threads=1) for bundle in (original, small)]
    for batch in BATCHES:
        inputs = {INPUT: rows[:batch]}
        calls = [timed(functools.partial(item.run, inputs), time.thread_time) for item in sessions]
        taken = in_turns(calls, least=ROUNDS, most=ROUNDS)[..., 0]
        ratio, low, high = ratio_interval(taken[:, 1], taken[:, 0])
        each = (1e6 * np.median(taken, axis=0) / batch).round(1).tolist()
        found[str(batch)] = {"microseconds_per_alert": each, "times_faster": ratio, "interval": [low, high]}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path)
    parser.add_argument("triplets", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--norm", default="rows")
    parser.add_argument("--without", type=float, default=0.0, help="share of the objects to leave out of training")
    parser.add_argument("--measure", action="store_true", help="only measure the output of an earlier run")
    parser.add_argument("--json", type=Path, help="write the numbers here")
    options = parser.parse_args()
    known = np.load(options.triplets)
    original = braai_bundle(from_published(read_arrays(options.weights)), "braai", options.norm)
    tensors = CutoutTensors.from_bundle(original.manifest.preprocessing, "braai")
    objects = np.random.default_rng(SEED).permutation(np.unique(known["object_id"]))
    unseen = np.isin(known["object_id"], objects[: round(options.without * len(objects))])
    images = known["images"][~unseen]
    triplets = tensors(images)
    held_out = copies(images, tensors, HELD_OUT_COPIES, OTHER_SEED)
    if options.measure:
        small = open_bundle(options.output)
    else:
        train = np.concatenate([np.repeat(triplets, TIMES, axis=0), copies(images, tensors, COPIES, SEED)])
        small = compress(original, train, triplets, options.output)
    sizes = [graph_bytes(bundle) for bundle in (original, small)]
    gap = float(np.abs(scores(original, triplets) - known["drb"][~unseen]).max())
    report = {
        "machine": describe_machine(),
        "training_rows": {"triplets": len(triplets), "times_each": TIMES, "augmented_copies": COPIES * len(triplets)},
        "largest_difference_of_the_original_to_the_packets": gap,
        "triplets": agreement(original, small, triplets),
        "copies_not_trained_on": agreement(original, small, held_out),
        "graph_bytes": sizes,
        "times_smaller": sizes[0] / sizes[1],
        "by_batch": times(original, small, held_out),
        "targets": {"times_smaller": SMALLER, "times_faster": FASTER, "verdicts_changed": 0},
    }
    if unseen.any():
        report["objects_not_trained_on"] = agreement(original, small, tensors(known["images"][unseen]))
    print(json.dumps(report, indent=1))
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
