"""Milliseconds per batch: ONNX Runtime with default settings, edgekit's sessions (ONNX Runtime, C), and PyTorch eager.

    python tools/bench_inference.py --json inference.json
    python tools/bench_inference.py models/t2-gr

All run in turns in one process, so that other programs on the machine disturb all of them alike. Each ratio is the
median of the ratios of neighbouring runs. Without a bundle, the script times a t2 with random weights, because speed
does not depend on them.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import subprocess
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch

from edgekit.bundle.family import build
from edgekit.bundle.format import Bundle, Manifest, assemble
from edgekit.bundle.tensors import Arrays, TensorSpec, golden_inputs
from edgekit.cost.timing import Timed, in_turns, timed
from edgekit.graph.lower import lower
from edgekit.importers.files import resolve
from edgekit.session import Session
from runtimes.sessions.c_session import CSession
from runtimes.sessions.onnxruntime_session import OnnxRuntimeSession
from runtimes.sessions.torch_session import TorchSession

BATCHES = (1, 16, 1000)
SECONDS = 12.0  # per batch size, all together
PAUSE = 0.005  # between runs: OpenMP and ONNX Runtime threads spin on for a millisecond or two, at a neighbour's cost
MOST_ROUNDS = 300
OURS, COMPILED = "edgekit, onnxruntime", "edgekit, C (default)"
STOCK, EAGER = "onnxruntime defaults", "torch eager"


class Stock:
    """ONNX Runtime with its default options, which runs the whole batch in one call."""

    def __init__(self, bundle: Bundle) -> None:
        graph = lower(bundle, weights="float32").SerializeToString()
        self.session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])

    def run(self, arrays: Arrays) -> Any:
        return self.session.run(None, arrays)


def random_t2() -> Bundle:
    """Return a t2 of the published shape for two bands, with random weights."""
    arguments = {"bands": 2}
    torch.manual_seed(0)
    model = build("t2", arguments)
    inputs = (TensorSpec("light_curve", ("batch", 100, 2)),)
    outputs = (TensorSpec("probabilities", ("batch", 14)),)
    golden = golden_inputs(inputs, 8)
    with torch.inference_mode():
        expected = torch.softmax(model(torch.from_numpy(golden["light_curve"])), dim=-1).numpy()
    weights = {name: value.numpy() for name, value in model.state_dict().items()}
    manifest = Manifest("random-t2", "t2", arguments, inputs, outputs)
    return assemble(manifest, weights, {}, (golden, {"probabilities": expected}))


def measure(runners: dict[str, Any], rows: Arrays, batch: int) -> dict[str, Any]:
    """Return the wall and CPU milliseconds of each runner, in turns, and the ratios of ONNX Runtime's defaults to the
    others."""

    def paused(run: Timed) -> Timed:
        def call() -> tuple[float, ...]:
            time.sleep(PAUSE)
            return run()

        return call

    calls = [
        paused(timed(functools.partial(runner.run, rows), time.perf_counter, time.process_time))
        for runner in runners.values()
    ]
    taken = in_turns(calls, seconds=SECONDS, least=3, most=MOST_ROUNDS) * 1e3
    wall, cpu = (dict(zip(runners, taken[:, :, clock].T, strict=True)) for clock in (0, 1))
    result: dict[str, Any] = {"batch": batch, "rounds": len(taken)}
    for name in runners:
        result[name] = {
            "p50_ms": float(np.percentile(wall[name], 50)),
            "p95_ms": float(np.percentile(wall[name], 95)),
            "cpu_p50_ms": float(np.percentile(cpu[name], 50)),
            "ratio": float(np.median(np.divide(wall[STOCK], wall[name]))),
            "cpu_ratio": float(np.median(np.divide(cpu[STOCK], cpu[name]))),
        }
    return result


def describe_machine() -> dict[str, str]:
    """Return the facts on which a number depends."""
    root = Path(__file__).resolve().parents[1]
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"]
    commit = subprocess.run(command, capture_output=True, text=True, check=False)
    return {
        "cpu": names[0] if names else platform.processor() or platform.machine(),
        "cores": str(len(os.sched_getaffinity(0))),
        "load": f"{os.getloadavg()[0]:.1f}",
        "python": platform.python_version(),
        "commit": commit.stdout.strip() or "unknown",
    } | {package: version(package) for package in ("edgekit", "onnxruntime", "onnx", "torch", "numpy")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", nargs="?", help="bundle or name of a model of the zoo; default: a random t2")
    parser.add_argument("--json", type=Path, help="write the numbers here")
    options = parser.parse_args()
    bundle = resolve(options.bundle) if options.bundle else random_t2()
    machine = describe_machine()
    print(*(f"{name} {value}" for name, value in machine.items()), sep=", ")
    print(f"model {bundle.manifest.name}, digest {bundle.digest[:12]}\n")
    ours = OnnxRuntimeSession(bundle)
    sessions: dict[str, Session] = {OURS: ours, COMPILED: CSession(bundle), EAGER: TorchSession(bundle)}
    runners: dict[str, Any] = {STOCK: Stock(bundle), **sessions}
    golden, _ = bundle.golden()
    print("batch  runner                   p50 ms    p95 ms    CPU ms   ratio   CPU ratio")
    results = []
    for batch in BATCHES:
        rows = {name: np.resize(array, (batch, *array.shape[1:])) for name, array in golden.items()}
        result = measure(runners, rows, batch)
        results.append(result)
        for name in runners:
            row = result[name]
            print(
                f"{batch:5d}  {name:22s} {row['p50_ms']:8.2f}  {row['p95_ms']:8.2f}  {row['cpu_p50_ms']:8.2f}"
                f"   {row['ratio']:5.2f}   {row['cpu_ratio']:9.2f}",
                flush=True,
            )
    plans = {"small batches": str(ours.small_plan), "large batches": str(ours.plan)}
    print("\nratio: ONNX Runtime's defaults by the runner's, same rows, same run; more is faster")
    for size, plan in plans.items():
        print(f"edgekit, {size}: {plan}")
    if options.json:
        report = {"machine": machine, "model": bundle.manifest.name, "digest": bundle.digest, "plans": plans}
        options.json.write_text(json.dumps({**report, "batches": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
