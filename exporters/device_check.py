"""Check an export on the device that will run it. It needs Python 3.6 or newer, numpy, and onnxruntime for a .onnx or
openvino for a .xml; nothing else.

    python verify.py                                    every model of the export, on the target's provider
    python verify.py --provider CUDAExecutionProvider   ONNX Runtime's name; for a .xml OpenVINO's, such as GPU

Exit status: 0 if every model gives its golden outputs, at batch 1 and at all stored rows; 1 if not.
"""

import argparse
import hashlib
import json
import os
import sys
import tempfile
from pathlib import Path

import numpy as np

CPU = "CPUExecutionProvider"
ON_A_GPU = 1e-4  # a GPU adds in another order


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--provider", help="ONNX Runtime execution provider, or OpenVINO device [default: the target's, else the CPU]"
    )
    provider = parser.parse_args().provider
    folder = Path(__file__).resolve().parent
    manifest = json.loads((folder / "manifest.json").read_text())
    changed = [name for name, digest in manifest["files"].items() if sha256(folder / name) != digest]
    for name in changed:
        print(f"{name}: missing, or not the file that was exported; copy it again")
    if changed:
        return 1
    with np.load(folder / "golden.npz") as golden:
        inputs = {name: golden[f"in.{name}"] for name in manifest["inputs"]}
        expected = {name: golden[f"out.{name}"] for name in manifest["outputs"]}
    wrong = 0
    for name, facts in manifest["models"].items():
        tolerance = facts["tolerance"]
        try:
            if name.endswith(".xml"):
                where, run = load_openvino(folder / name, provider)
            else:
                asked = provider or manifest.get("stack", {}).get("provider") or CPU
                where, run = load_onnxruntime(folder / name, asked, inputs, manifest)
                tolerance = tolerance if where == CPU else max(tolerance, ON_A_GPU)
        except ImportError as error:
            package = error.name or "the runtime"
            print(f"{package} is not installed; run: {sys.executable} -m pip install {package}")
            return 1
        except LookupError as error:
            print(error.args[0])
            return 1
        wrong += differences(f"{name} on {where}", in_rows(run, manifest.get("rows")), inputs, expected, tolerance)
    print("FAIL" if wrong else "PASS")
    return 1 if wrong else 0


def sha256(path: Path) -> "str | None":
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def load_onnxruntime(path: Path, provider: str, inputs: dict, manifest: dict):  # type: ignore[type-arg,no-untyped-def]
    """Return the name of the provider, and run(names, inputs). A model that silently ran on the CPU would prove
    nothing, so the function reads from onnxruntime's own profile where each operator ran."""
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # onnxruntime 1.29 and later report their use to their maker
    import onnxruntime

    available = onnxruntime.get_available_providers()
    if provider not in available:
        raise LookupError(f"provider {provider} is not available; choose from {', '.join(available)}: --provider NAME")
    if provider == CPU:
        return provider, onnxruntime.InferenceSession(str(path), providers=[provider]).run
    new = hasattr(onnxruntime, "preload_dlls")  # since 1.21; the option below exists since 1.18
    if new:
        onnxruntime.preload_dlls()  # CUDA and cuDNN from pip are not on the loader's path
    # From Ampere on, float32 products use TF32 (10 bits) unless the option disables it.
    exact = new and provider.startswith("CUDA") and manifest.get("precision", "float32") == "float32"
    with tempfile.TemporaryDirectory() as scratch:
        options = onnxruntime.SessionOptions()
        options.enable_profiling, options.profile_file_prefix = True, str(Path(scratch) / "profile")
        wanted = [(provider, {"use_tf32": "0"}) if exact else provider]
        session = onnxruntime.InferenceSession(str(path), options, providers=wanted)
        if session.get_providers()[0] != provider:
            raise LookupError(
                f"{provider} did not start; onnxruntime fell back to {', '.join(session.get_providers())}"
            )
        first = {name: array[:2] for name, array in inputs.items()}
        in_rows(session.run, manifest.get("rows"))([value.name for value in session.get_outputs()], first)
        lost = ran_elsewhere(json.loads(Path(session.end_profiling()).read_text()), provider)
    if lost:
        raise LookupError(f"{provider} does not run all of {path.name}: {', '.join(lost)} ran elsewhere")
    return provider, session.run


def ran_elsewhere(events: list, provider: str) -> "list[str]":  # type: ignore[type-arg]
    """Return operators that computed on another provider, from onnxruntime's profile. It ignores arithmetic on shapes,
    which onnxruntime keeps on the CPU for every GPU."""
    found = set()
    nodes = [event["args"] for event in events if event.get("args", {}).get("provider")]
    for node in nodes:
        if node["provider"] != provider:
            made = [item for output in node.get("output_type_shape", []) for item in output.items()]
            numbers = any("float" in dtype and np.prod(dims, dtype=float) > 1 for dtype, dims in made)
            if numbers or any(word in node["op_name"] for word in ("MatMul", "Gemm", "Conv")):
                found.add(node["op_name"])
    if not any(node["provider"] == provider for node in nodes):
        found.add("every operator")
    return sorted(found)


def load_openvino(path: Path, device: "str | None"):  # type: ignore[no-untyped-def]
    """Return the device's name, and run(names, inputs), which compiles for the shape of each batch, in float32."""
    import openvino

    core, device = openvino.Core(), device or "CPU"
    if device not in core.available_devices:
        raise LookupError(f"device {device} is not available; choose from {', '.join(core.available_devices)}")

    def run(names: list, feeds: dict) -> list:  # type: ignore[type-arg]
        model = core.read_model(str(path))
        model.reshape({name: list(array.shape) for name, array in feeds.items()})
        compiled = core.compile_model(model, device, {"INFERENCE_PRECISION_HINT": "f32"})
        results = compiled(feeds)
        return [results[name] for name in names]

    return f"OpenVINO {device}", run


def in_rows(run, layout: "dict | None"):  # type: ignore[type-arg,no-untyped-def]
    """Return run(names, rows) around a model whose tensors have the batch elsewhere, or none."""
    if layout is None:
        return run
    batch, per_call = layout["batch"], layout["per_call"]

    def call(names: list, rows: dict, count: int) -> list:  # type: ignore[type-arg]
        index = np.arange(per_call or count) % count
        own = {}
        for name, array in rows.items():
            at = batch[name]
            own[name] = array[0] if at is None else np.ascontiguousarray(np.moveaxis(array[index], 0, at))
            own[name] = np.asarray(own[name])  # a scalar that was indexed is no array
        found = zip(names, run(names, own))  # noqa: B905 - Python 3.6 has no strict
        return [(out[None] if batch[name] is None else np.moveaxis(out, batch[name], 0))[:count] for name, out in found]

    def by_calls(names: list, rows: dict) -> list:  # type: ignore[type-arg]
        count = len(next(iter(rows.values())))
        shared = [array for name, array in rows.items() if batch[name] is None]
        parts, start = [], 0
        for end in range(1, count + 1):
            full = end == count or end - start == per_call
            if full or (per_call is None and any(not np.array_equal(array[end], array[start]) for array in shared)):
                parts.append(call(names, {name: array[start:end] for name, array in rows.items()}, end - start))
                start = end
        return [np.concatenate(columns) for columns in zip(*parts)]  # noqa: B905 - Python 3.6 has no strict

    return by_calls


def differences(where: str, run, inputs: dict, expected: dict, tolerance: float) -> int:  # type: ignore[type-arg,no-untyped-def]
    """Print the difference of each output from the golden one; return the number of outputs beyond the tolerance."""
    rows = len(next(iter(inputs.values())))
    wrong = 0
    for batch in sorted({1, rows}):
        parts = [
            run(list(expected), {name: array[at : at + batch] for name, array in inputs.items()})
            for at in range(0, rows, batch)
        ]
        for number, (name, want) in enumerate(expected.items()):
            got = np.concatenate([part[number] for part in parts])
            if want.dtype.kind in "iub":
                difference = float(np.mean(got != want))  # the share of codes that differ
            else:
                scale = 1.0 if name == "probabilities" else float(np.abs(want).max()) or 1.0
                difference = float(np.abs(got - want).max()) / scale
            fine = difference <= tolerance  # false for NaN
            wrong += not fine
            verdict = "ok" if fine else "WRONG"
            print(f"{where}, batch {batch}: {name} off by {difference:.1e}, allowed {tolerance:.1e}: {verdict}")
    return wrong


if __name__ == "__main__":
    sys.exit(main())
