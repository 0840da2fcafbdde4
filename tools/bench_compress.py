"""What `edgekit compress --auto` ships, beside what the stock tools would, in one run.

    python tools/bench_compress.py --json compress.json            # t2-gr and DeiT-tiny; half an hour on two cores
    python tools/bench_compress.py deit-tiny --trials 6

Rows: onnxruntime in float32 from either of torch's exporters, dynamic int8 (all operators, or MatMul and Gemm only),
static Q/DQ int8, half of the channels removed with dynamic int8 on top (torch-pruning, in one shot, nothing trained
afterwards), and what the search found under its limits. CPU time of one thread, all in turns; `times as fast` is
against the faster of the two float32 rows. DeiT-tiny has random weights: its speed is real, its accuracy means nothing,
so its loss is the distance from the original's outputs and is not limited. For t2 the limit is --max-loss.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from edgekit import machine, quality
from edgekit.bundle import Arrays, Bundle
from edgekit.compress import Job, applied, candidate_of, outputs_of, versions
from edgekit.data import UNKNOWN, Dataset, load, locate
from edgekit.errors import EdgekitError
from edgekit.guard import Limits, ratio_interval, tiled, time_in_turns
from edgekit.importers import from_factory, parse_spec
from edgekit.recipe import Step
from edgekit.search.auto import Targets, search
from edgekit.session import Session, open_session
from edgekit.zoo import resolve

ROOT = Path(__file__).resolve().parents[1]
BATCHES = {"t2-gr": (1, 16, 256), "deit-tiny": (1, 16)}
FLOAT = ("float32, TorchScript exporter", "float32, dynamo exporter")


def t2_job(max_loss: float) -> Job:
    source = resolve("t2-gr")
    train, test = load(locate(source.manifest, None), source.manifest)
    limits = Limits(max_loss=max_loss, batches=BATCHES["t2-gr"], objective="latency")
    return Job(source, [], train, test, limits, "log-loss", runtime="c")


def deit_job() -> Job:
    sys.path.insert(0, str(ROOT / "tools"))
    source = from_factory(
        "deit:build", arguments={}, weights=None, inputs=[parse_spec("image:float32:batch,3,224,224")],
        outputs=["scores"], golden={"image": images(8, 0)},
    )  # fmt: skip
    train, test = (Dataset({"image": images(32, seed)}, np.full(32, UNKNOWN)) for seed in (1, 2))
    return Job(
        source, [], train, test, Limits(max_loss=1e6, batches=BATCHES["deit-tiny"], objective="latency"),
        "relative-error",
    )  # fmt: skip


def images(count: int, seed: int) -> Any:
    return np.random.default_rng(seed).normal(0, 1, (count, 3, 224, 224)).astype(np.float32)


def chained(job: Job, *steps: Step) -> Bundle:
    """What these passes make of the source, unjudged."""
    bundle = job.source
    for step in steps:
        bundle = applied(replace(job, source=bundle), step)
    return bundle


def stock(job: Job) -> dict[str, tuple[Bundle, dict[str, Any]]]:
    """Rows by name: a bundle and the options of its session."""
    source = job.source
    if source.manifest.family == "t2":
        arguments = source.model().config  # type: ignore[attr-defined]
        keep = {"heads": arguments.heads // 2, "ff_dim": arguments.ff_dim // 2}
        half = Step("structured_prune", {"keep": keep, "epochs": 0})
    else:
        half = Step("dependency_prune", {"sparsity": 0.5, "importance": "magnitude", "epochs": 0})
    everything = ["MatMul", "Gemm", "Conv"]
    rows: dict[str, tuple[Bundle, dict[str, Any]]] = {
        FLOAT[0]: (source, {}),
        FLOAT[1]: (source, {"exporter": "dynamo"}),
        "dynamic int8, all products": (chained(job, Step("dynamic_int8", {"operators": everything})), {}),
        "dynamic int8, MatMul and Gemm": (chained(job, Step("dynamic_int8", {})), {}),
        "static int8, Q/DQ u8s8": (chained(job, Step("static_int8", {"samples": 32})), {}),
        "half removed + dynamic int8": (chained(job, half, Step("dynamic_int8", {})), {}),
    }
    return rows


def loss(job: Job, bundle: Bundle, original: Any) -> float:
    """Change of the metric on the test rows, in batches of 256."""
    metric = quality.metric(job.metric)
    expected = job.test.labels if metric.labelled else original
    onnx_job = replace(job, runtime="onnxruntime")
    outputs = outputs_of(onnx_job, bundle, candidate_of(bundle))
    return metric.value(outputs, expected) - metric.value(original, expected)


def measure(name: str, job: Job, targets: Targets, trials: int, work: Path, seconds: float) -> dict[str, Any]:
    original = outputs_of(replace(job, runtime="onnxruntime"), job.source, candidate_of(job.source))
    rows = stock(job)
    found = search(job, targets, work, trials=trials, notify=lambda line: print("  " + line, flush=True))
    sessions: dict[str, Session] = {
        label: open_session(bundle, "onnxruntime", threads=1, chunk=4, **options)
        for label, (bundle, options) in rows.items()
    }
    ours = "edgekit compress --auto"
    sessions[ours] = open_session(found.bundle, job.runtime, threads=1, chunk=4)
    bundles = {label: bundle for label, (bundle, _) in rows.items()} | {ours: found.bundle}
    losses = {label: loss(job, bundle, original) for label, bundle in bundles.items()}
    inputs: Arrays = dict(job.test.inputs)
    result: dict[str, Any] = {
        "model": name, "recipe": [{"name": step.name, **step.parameters} for step in found.recipe],
        "runtime": job.runtime, "metric": job.metric, "losses": losses, "batches": {},
    }  # fmt: skip
    print(f"\n{name}: {', '.join(step.name for step in found.recipe)} on {job.runtime}")
    for batch in BATCHES[name]:
        times = time_in_turns(list(sessions.values()), tiled(inputs, batch), batch, seconds=seconds)
        middle = np.median(times, axis=0)
        base = int(np.argmin(middle[:2]))
        table = {}
        for index, label in enumerate(sessions):
            ratio, low, high = ratio_interval(times[:, index], times[:, base])
            table[label] = {"cpu_p50_ms": float(middle[index] * 1e3), "ratio": ratio, "low": low, "high": high}
            print(
                f"  batch {batch:4d}  {label:32s} {middle[index] * 1e3:9.3f} ms  {ratio:5.2f} [{low:.2f}, {high:.2f}]  "
                f"loss {losses[label]:+.4f}",
                flush=True,
            )
        result["batches"][str(batch)] = table
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=list(BATCHES), help="t2-gr, deit-tiny")
    parser.add_argument("--trials", type=int, default=16)
    parser.add_argument("--max-loss", type=float, default=0.02, help="for t2")
    parser.add_argument("--seconds", type=float, default=20.0, help="of timing, for a batch size")
    parser.add_argument("--work", type=Path, help="folder that keeps the search from run to run")
    parser.add_argument("--json", type=Path, help="write the numbers here")
    options = parser.parse_args()
    for name in options.models:
        if name not in BATCHES:
            raise EdgekitError(f"{name!r}: expected {' or '.join(BATCHES)}")
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40"]
    commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or "unknown"
    facts = {**machine.describe(), "commit": commit}
    print(*(f"{key} {value}" for key, value in {**facts, **versions()}.items()), sep=", ")
    work = options.work or Path(tempfile.mkdtemp(prefix="edgekit-bench-"))
    results = []
    for name in options.models:
        job = t2_job(options.max_loss) if name == "t2-gr" else deit_job()
        targets = Targets(options.max_loss if name == "t2-gr" else 1e6)
        results.append(measure(name, job, targets, options.trials, work, options.seconds))
    if options.json:
        options.json.write_text(json.dumps({"machine": facts, "versions": versions(), "results": results}, indent=1))


if __name__ == "__main__":
    main()
