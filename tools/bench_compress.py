"""Compare the results of `edgekit compress --auto` with those of the stock tools, in one run.

    python tools/bench_compress.py --json compress.json            # t2-gr and DeiT-tiny; half an hour on two cores
    python tools/bench_compress.py deit-tiny --trials 6

The rows are: onnxruntime in float32 from either of torch's exporters; dynamic int8 (all operators, or MatMul and Gemm
only); static Q/DQ int8 in both forms; half of the channels removed in one shot, with dynamic int8 after it and without
training (torch-pruning; for t2, whose heads torch-pruning does not know, the half of smallest norm); OpenVINO in
float32 if it is installed; and the result of the search under its limits. Stock int8 rows have 8-bit weights, which is
onnxruntime's default. Times are CPU time of one thread, all rows in turns; `times as fast` compares with the faster of
the two float32 rows. For each batch size, the tool gives two verdicts: against the best stock row within the same limit
of loss, and against the fastest row at any loss. The exit status is 1 if a verdict is negative.

t2's loss is class-averaged log-loss on real light curves. DeiT-tiny is trained here for minutes on a synthetic task
(`tools/train_deit.py`), and its loss is the error rate: it shows how much compression costs a trained vision
transformer. Its weights are kept in --work.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from edgekit import machine, plugins
from edgekit.bundle.format import Bundle
from edgekit.bundle.tensors import Arrays, parse_spec
from edgekit.compression import metrics
from edgekit.compression.guard import Limits, tiled, time_in_turns
from edgekit.compression.job import Job, versions
from edgekit.compression.measure import outputs_of
from edgekit.compression.recipe import Step, of_bundle, to_table
from edgekit.compression.subject import applied, candidate_of
from edgekit.compression.trials import Constraints
from edgekit.cost.timing import ratio_interval
from edgekit.data.dataset import load, locate
from edgekit.errors import EdgekitError
from edgekit.importers.factory import from_factory
from edgekit.importers.files import resolve
from edgekit.search.auto import search
from edgekit.session import Session, open_session

ROOT = Path(__file__).resolve().parents[1]
BATCHES = {"t2-gr": (1, 16, 256), "deit-tiny": (1, 16)}
TRIALS = {"t2-gr": 4, "deit-tiny": 3}  # two and three of them are starts; a recovery takes minutes
MAX_LOSS = {"t2-gr": 0.02, "deit-tiny": 0.02}  # log-loss; error rate
TRAIN_ROWS = 512  # of DeiT's images, for recovery and trials
OURS = "edgekit compress --auto"
FLOAT = ("float32, TorchScript exporter", "float32, dynamo exporter")
OPENVINO, OPENVINO_SESSION = "float32, OpenVINO", "openvino"


def t2_job() -> Job:
    source = resolve("t2-gr")
    train, test = load(locate(source.manifest, None), source.manifest)
    return Job(source, [], train, test, limits("t2-gr"), "log-loss", runtime="c")


def deit_job(work: Path) -> Job:
    sys.path.insert(0, str(ROOT / "tools"))
    import train_deit

    test = train_deit.gratings(train_deit.TEST, train_deit.SEED + 2)
    weights, facts = train_deit.trained(work / "deit-tiny", test)
    print(
        f"DeiT-tiny: accuracy {facts['accuracy']:.4f}, trained for {facts['cpu_seconds']} CPU seconds, {facts['task']}"
    )
    source = from_factory(
        "deit:build",
        arguments=train_deit.arguments(),
        weights=weights,
        inputs=[parse_spec("image:float32:batch,3,224,224")],
        outputs=["scores"],
        golden={"image": test.take(np.arange(8)).inputs["image"]},
    )
    train = train_deit.gratings(TRAIN_ROWS, train_deit.SEED + 1)
    return Job(source, [], train, test, limits("deit-tiny"), "error-rate")


def limits(name: str) -> Limits:
    return Limits(max_loss=MAX_LOSS[name], batches=BATCHES[name], objective="latency")


def chained(job: Job, *steps: Step) -> Bundle:
    """Return the result of these passes on the source, without the guard's judgement."""
    bundle = job.source
    for step in steps:
        bundle = applied(replace(job, source=bundle), step)
    return bundle


def stock(job: Job) -> dict[str, tuple[Bundle, dict[str, Any]]]:
    """Return the rows by name: a bundle and the options of its session."""
    source = job.source
    if source.manifest.family == "t2":
        arguments = source.model().config  # type: ignore[attr-defined]
        keep = {"heads": arguments.heads // 2, "ff_dim": arguments.ff_dim // 2}
        half = Step("structured_prune", {"keep": keep, "epochs": 0})
    else:
        half = Step("dependency_prune", {"sparsity": 0.5, "importance": "magnitude", "epochs": 0})
    everything = ["MatMul", "Gemm", "Conv"]
    bits = {"weight_bits": 8}
    rows: dict[str, tuple[Bundle, dict[str, Any]]] = {
        FLOAT[0]: (source, {}),
        FLOAT[1]: (source, {"exporter": "dynamo"}),
        "dynamic int8, all products": (chained(job, Step("dynamic_int8", {"operators": everything, **bits})), {}),
        "dynamic int8, MatMul and Gemm": (chained(job, Step("dynamic_int8", bits)), {}),
        "static int8, Q/DQ u8s8": (chained(job, Step("static_int8", {"samples": 64, **bits})), {}),
        "static int8, Q/DQ s8s8": (chained(job, Step("static_int8", {"samples": 64, "scheme": "s8s8", **bits})), {}),
        "half removed + dynamic int8": (chained(job, half, Step("dynamic_int8", bits)), {}),
    }
    return rows


def loss(job: Job, bundle: Bundle, original: Any) -> float:
    """Return the change of the metric on the test rows, in batches of 256."""
    metric = metrics.metric(job.metric)
    expected = job.test.labels if metric.labelled else original
    onnx_job = replace(job, runtime="onnxruntime")
    outputs = outputs_of(onnx_job, bundle, candidate_of(bundle))
    return metric.value(outputs, expected) - metric.value(original, expected)


def measure(name: str, job: Job, constraints: Constraints, trials: int, work: Path, seconds: float) -> dict[str, Any]:
    original = outputs_of(replace(job, runtime="onnxruntime"), job.source, candidate_of(job.source))
    rows = stock(job)
    found = search(job, constraints, work, trials=trials, notify=lambda line: print("  " + line, flush=True))
    recipe = of_bundle(found.bundle)
    sessions: dict[str, Session] = {
        label: open_session(bundle, "onnxruntime", threads=1, chunk=4, **options)
        for label, (bundle, options) in rows.items()
    }
    if OPENVINO_SESSION in plugins.names("edgekit.sessions"):
        try:
            sessions[OPENVINO] = open_session(job.source, OPENVINO_SESSION, threads=1)
            rows[OPENVINO] = (job.source, {})
        except EdgekitError as error:
            print(f"  no row for OpenVINO: {error}")
    sessions[OURS] = open_session(found.bundle, job.runtime, threads=1, chunk=4)
    bundles = {label: bundle for label, (bundle, _) in rows.items()} | {OURS: found.bundle}
    losses = {label: loss(job, bundle, original) for label, bundle in bundles.items()}
    inputs: Arrays = dict(job.test.inputs)
    result: dict[str, Any] = {
        "model": name,
        "recipe": [to_table(step) for step in recipe],
        "runtime": job.runtime,
        "metric": job.metric,
        "losses": losses,
        "batches": {},
    }
    print(f"\n{name}: {', '.join(step.name for step in recipe)} on {job.runtime}")
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
    parser.add_argument("--trials", type=int, help=f"of each search; {TRIALS} unless given")
    parser.add_argument("--seconds", type=float, default=20.0, help="of timing, for a batch size")
    parser.add_argument("--work", type=Path, help="folder that keeps the search, and DeiT's weights, from run to run")
    parser.add_argument("--json", type=Path, help="write the numbers here")
    options = parser.parse_args()
    for name in options.models:
        if name not in BATCHES:
            raise EdgekitError(f"{name!r}: expected {' or '.join(BATCHES)}")
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40"]
    commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or "unknown"
    facts = {**machine.describe(), "int8": machine.int8_products(), "commit": commit}
    print(*(f"{key} {value}" for key, value in {**facts, **versions()}.items()), sep=", ", flush=True)
    work = options.work or Path(tempfile.mkdtemp(prefix="edgekit-bench-"))
    results = []
    for name in options.models:
        started = time.perf_counter()
        job = t2_job() if name == "t2-gr" else deit_job(work)
        trials = options.trials or TRIALS[name]
        results.append(measure(name, job, Constraints(MAX_LOSS[name]), trials, work, options.seconds))
        results[-1]["seconds"] = round(time.perf_counter() - started)
    if options.json:
        options.json.write_text(json.dumps({"machine": facts, "versions": versions(), "results": results}, indent=1))
    verdicts = [line for result in results for line in verdict(result)]
    print("", *verdicts, sep="\n")
    sys.exit(any("NOT MET" in line for line in verdicts))


def verdict(result: dict[str, Any]) -> list[str]:
    """Say whether the shipped model is at least as fast, beyond the noise, as float32, as the best stock row within the
    same limit of loss, and as the fastest row at any loss."""
    lines, losses = [], result["losses"]
    within = [label for label, loss in losses.items() if loss <= MAX_LOSS[result["model"]] and label != OURS]
    for batch, table in result["batches"].items():
        ours = table[OURS]
        rivals = {"best stock within the limit": within, "fastest stock": [label for label in table if label != OURS]}
        for rival, labels in rivals.items():
            best = max(labels, key=lambda label: table[label]["ratio"])
            met = ours["high"] >= table[best]["low"] and ours["high"] >= 1.0
            lines.append(
                f"{result['model']}, batch {batch}: ours {ours['ratio']:.2f} times as fast as float32 (loss "
                f"{losses[OURS]:+.4f}), {rival} {table[best]['ratio']:.2f} ({best}, loss {losses[best]:+.4f}): "
                f"{'met' if met else 'NOT MET'}"
            )
    return lines


if __name__ == "__main__":
    main()
