"""Compare the milliseconds per batch on one thread of the exported C, edgekit's sessions of ONNX Runtime and OpenVINO,
and PyTorch eager.

    python tools/bench_c.py --json c_export.json
    python tools/bench_c.py models/t2-ugrizy

All run in turns in one process, and the tool takes the CPU time of the thread, so that other programs on the machine
disturb all of them equally. Each ratio is the median of the ratios of neighbouring runs. The inputs are the bundle's
golden rows, repeated. At the end, the tool compares outputs on random rows, and on the model's own data set if `edgekit
data` has prepared it.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import json
import os
import subprocess
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgekit import machine
from edgekit.bundle.format import Bundle
from edgekit.bundle.tensors import Arrays
from edgekit.cost.timing import in_turns, timed
from edgekit.data.dataset import load, locate
from edgekit.errors import EdgekitError
from edgekit.graph.network import Network
from edgekit.importers.files import resolve
from edgekit.session import Session, open_session
from exporters.c.library import NATIVE, PLAIN, Compiler
from exporters.c.program import Buffer, Program, program
from exporters.c.source import FOLDER
from exporters.c_export import CExporter
from runtimes.sessions.c_session import CSession
from runtimes.sessions.onnxruntime_session import OnnxRuntimeSession
from runtimes.sessions.torch_session import TorchSession

BATCHES = (1, 16, 256, 1000)
SECONDS = 12.0  # for each batch size, all sessions together
MOST_ROUNDS = 400
C, ORT, OPENVINO, TORCH = "c", "onnxruntime", "openvino", "torch"
PEAK = """
void peak(size_t rounds, float *out)
{
    vector sum[10]; /* enough to hide the latency of two units */
    UNROLL
    for (size_t i = 0; i < 10; i++)
        sum[i] = splat((float)i);
    for (size_t round = 0; round < rounds; round++)
        UNROLL
        for (size_t i = 0; i < 10; i++)
            sum[i] = multiply_add(sum[i], splat(0.5f), sum[i]);
    for (size_t i = 0; i < 10; i++)
        store(out + i * LANES, sum[i]);
}
"""


def measure(sessions: dict[str, Session], rows: Arrays, batch: int, seconds: float = SECONDS) -> dict[str, Any]:
    """Return the CPU milliseconds of each session, in turns, and the ratios of the other sessions to C."""
    calls = [timed(functools.partial(session.run, rows), time.thread_time) for session in sessions.values()]
    times = in_turns(calls, seconds=seconds, least=3, most=MOST_ROUNDS)[:, :, 0] * 1e3
    taken = dict(zip(sessions, times.T, strict=True))
    result: dict[str, Any] = {"batch": batch, "rounds": len(times)}
    for name, values in taken.items():
        ratios = np.divide(values, taken[C])
        result[name] = {
            "p50_ms": float(np.percentile(values, 50)),
            "p95_ms": float(np.percentile(values, 95)),
            "ratio": float(np.median(ratios)),
            "ratio_quartiles": [float(value) for value in np.percentile(ratios, [25, 75])],
        }
    return result


def differences(bundle: Bundle, session: Session, rows: Arrays) -> dict[str, Any]:
    """Return how far C and PyTorch's float32 are from PyTorch's float64 and from one another, and how many rows get
    another class."""
    count, name = len(next(iter(rows.values()))), bundle.manifest.outputs[0].name
    outputs = {C: session.run(rows)[name]}
    network = Network(bundle).eval()
    for runtime, dtype in ((TORCH, torch.float32), ("exact", torch.float64)):
        parts = zip(*(torch.from_numpy(array).to(dtype).split(16) for array in rows.values()), strict=True)
        network.to(dtype)
        with torch.inference_mode():
            outputs[runtime] = torch.cat([network(*part)[0] for part in parts]).numpy()
    exact = outputs.pop("exact")
    facts: dict[str, Any] = {"rows": count, "c_from_torch": float(np.abs(outputs[C] - outputs[TORCH]).max())}
    facts["classes_changed"] = int((outputs[C].argmax(-1) != exact.argmax(-1)).sum())
    for runtime, got in outputs.items():
        off = np.abs(got - exact)
        facts[runtime] = {"largest": float(off.max()), "rms": float(np.sqrt(np.square(off).mean()))}
    return facts


def random_rows(bundle: Bundle, count: int) -> Arrays:
    rng = np.random.default_rng(0)
    specs = bundle.manifest.inputs
    return {spec.name: rng.standard_normal((count, *spec.shape[1:])).astype(np.float32) for spec in specs}


def real_rows(bundle: Bundle) -> Arrays:
    """Return every row of the data set on which the model is measured, also training rows; no rows if it is not
    prepared."""
    try:
        parts = load(locate(bundle.manifest, None), bundle.manifest)
    except EdgekitError as error:
        print(f"outputs are compared on random rows only: {error}")
        return {}
    return {spec.name: np.concatenate([part.inputs[spec.name] for part in parts]) for spec in bundle.manifest.inputs}


def megaflops(network: Program) -> float:
    """Return the multiplications and additions of one row's matrix products. Exponentials, which take some thirty per
    cent of the time or more, are not counted."""
    total = 0
    for call in network.calls:
        if call.kernel in ("dense", "dense_in_double"):
            inputs, outputs = [item for item in call.arguments if isinstance(item, int)][:2]
            total += 2 * network.tokens * inputs * outputs
        elif call.kernel == "attention":
            mixed = call.arguments[0]
            assert isinstance(mixed, Buffer)
            total += 4 * network.tokens**2 * mixed.features
    return total / 1e6


def peak_gigaflops(compiler: Compiler) -> float:
    """Return the rate of multiply-adds in registers that this core reaches, the best of several tries."""
    rounds, best = 200_000, 0.0
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "peak.so"
        path.write_bytes(compiler.shared_library((FOLDER / "kernels.c").read_text() + PEAK, "", NATIVE))
        peak = ctypes.CDLL(str(path)).peak
        out = np.empty(10 * 16, np.float32)
        lanes = 0
        for _ in range(20):
            out[:] = np.nan
            started = time.thread_time()
            peak(ctypes.c_size_t(rounds), ctypes.c_void_p(out.ctypes.data))
            seconds = time.thread_time() - started
            lanes = int((~np.isnan(out)).sum()) // 10
            best = max(best, 2 * 10 * lanes * rounds / seconds / 1e9)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", nargs="?", default="t2-gr", help="bundle or name of a model of the zoo")
    parser.add_argument("--json", type=Path, help="write the numbers here")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for each batch size")
    parser.add_argument("--rows", type=int, default=10_000, help="random rows to compare outputs on")
    options = parser.parse_args()
    bundle, compiler = resolve(options.bundle), Compiler()
    root = Path(__file__).resolve().parents[1]
    command = ["git", "--no-optional-locks", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"]
    commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    described = {**machine.describe(), "load": f"{os.getloadavg()[0]:.1f}", "compiler": compiler.version()}
    described |= {package: version(package) for package in ("edgekit", "onnxruntime", "torch", "numpy")}
    try:
        described |= {OPENVINO: version(OPENVINO)}
    except PackageNotFoundError:
        print("openvino is not installed and so not in the table: pip install 'edgekit[openvino]'")
    described["commit"] = commit or "unknown"
    print(*(f"{name} {value}" for name, value in described.items()), sep=", ")
    sizes = {}
    for weights in ("float32", "encoded") if bundle.encodings() else ("float32",):
        source = CExporter(weights=weights).source(bundle)
        sizes[weights] = {
            "object_bytes": compiler.object_size(source.model, source.header, NATIVE),
            "object_bytes_plain": compiler.object_size(source.model, source.header, PLAIN),
            "workspace_bytes": 4 * source.workspace,
        }
    work, peak = megaflops(program(bundle)), peak_gigaflops(compiler)
    print(f"model {bundle.manifest.name}, digest {bundle.digest[:12]}; {sizes}")
    print(f"{work:.2f} MFLOP a row in matrix products; this core's peak {peak:.0f} GFLOP/s\n")
    ours = CSession(bundle, threads=1)
    ort = OnnxRuntimeSession(bundle, threads=1)
    sessions: dict[str, Session] = {C: ours, ORT: ort}
    if OPENVINO in described:
        sessions[OPENVINO] = open_session(bundle, OPENVINO, threads=1)
    sessions[TORCH] = TorchSession(bundle, threads=1, chunk=4)
    golden, _ = bundle.golden()
    print(f"batch  session        CPU p50 ms    p95 ms    rows/s   time / {C}  quartiles     share of peak")
    results = []
    for batch in BATCHES:
        rows = {name: np.resize(array, (batch, *array.shape[1:])) for name, array in golden.items()}
        result = measure(sessions, rows, batch, options.seconds)
        results.append(result)
        for name in sessions:
            row = result[name]
            row["rows_per_second"] = batch / row["p50_ms"] * 1e3
            row["share_of_peak"] = row["rows_per_second"] * work / 1e3 / peak
            low, high = row["ratio_quartiles"]
            print(
                f"{batch:5d}  {name:12s} {row['p50_ms']:12.3f} {row['p95_ms']:9.3f} {row['rows_per_second']:9,.0f}"
                f"   {row['ratio']:8.2f}  {low:.2f} to {high:.2f} {row['share_of_peak']:12.0%}",
                flush=True,
            )
    inputs = {"random": random_rows(bundle, options.rows), "real": real_rows(bundle)}
    apart = {source: differences(bundle, ours, rows) for source, rows in inputs.items() if rows}
    for source, facts in apart.items():
        print(f"\nfrom float64 on {source} rows: {facts}")
    plans = {"small batches": str(ort.small_plan), "large batches": str(ort.plan)}
    print(f"{ours.provider}; onnxruntime's plans: {plans}")
    if options.json:
        report = {
            "machine": described,
            "model": bundle.manifest.name,
            "digest": bundle.digest,
            "sizes": sizes,
            "megaflops_per_row": work,
            "peak_gigaflops": peak,
            "provider": ours.provider,
            "onnxruntime_plans": plans,
            "differences": apart,
            "batches": results,
        }
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
