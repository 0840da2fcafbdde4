"""Check an export on the device that will run it. Needs Python 3.6 or newer, numpy, and onnxruntime for a .onnx or
openvino for a .xml; nothing else.

    python verify.py                                    every model of the export, on the CPU
    python verify.py --provider CUDAExecutionProvider   ONNX Runtime's name; for a .xml OpenVINO's, such as GPU

Exit status: 0 if every model gives its golden outputs, at batch 1 and at all stored rows; 1 if not.
"""

import argparse
import hashlib
import json
import sys
from pathlib import Path

import numpy as np


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--provider", help="ONNX Runtime execution provider, or OpenVINO device [default: the CPU]")
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
        load = load_openvino if name.endswith(".xml") else load_onnxruntime
        try:
            where, run = load(folder / name, provider)
        except LookupError as error:
            print(error.args[0])
            return 1
        wrong += differences(f"{name} on {where}", run, inputs, expected, facts["tolerance"])
    print("FAIL" if wrong else "PASS")
    return 1 if wrong else 0


def sha256(path: Path) -> "str | None":
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def load_onnxruntime(path: Path, provider: "str | None"):  # type: ignore[no-untyped-def]
    """Where the model runs, and run(names, inputs)."""
    import onnxruntime

    available = onnxruntime.get_available_providers()
    provider = provider or "CPUExecutionProvider"
    if provider not in available:
        raise LookupError(f"provider {provider} is not here; choose from {', '.join(available)}")
    options = onnxruntime.SessionOptions()
    if provider != "CPUExecutionProvider":  # a model that quietly ran on the CPU would prove nothing
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    session = onnxruntime.InferenceSession(str(path), options, providers=[provider])
    if session.get_providers()[0] != provider:
        raise LookupError(f"{provider} did not start; onnxruntime fell back to {', '.join(session.get_providers())}")
    return provider, session.run


def load_openvino(path: Path, device: "str | None"):  # type: ignore[no-untyped-def]
    """Likewise: compiled for the shape of each batch, in float32."""
    import openvino

    core, device = openvino.Core(), device or "CPU"
    if device not in core.available_devices:
        raise LookupError(f"device {device} is not here; choose from {', '.join(core.available_devices)}")

    def run(names: list, feeds: dict) -> list:  # type: ignore[type-arg]
        model = core.read_model(str(path))
        model.reshape({name: list(array.shape) for name, array in feeds.items()})
        compiled = core.compile_model(model, device, {"INFERENCE_PRECISION_HINT": "f32"})
        results = compiled(feeds)
        return [results[name] for name in names]

    return f"OpenVINO {device}", run


def differences(where: str, run, inputs: dict, expected: dict, tolerance: float) -> int:  # type: ignore[type-arg,no-untyped-def]
    """Print how far each output is from the golden one; return how many are further than allowed."""
    rows = len(next(iter(inputs.values())))
    wrong = 0
    for batch in sorted({1, rows}):
        parts = [
            run(list(expected), {name: array[at : at + batch] for name, array in inputs.items()})
            for at in range(0, rows, batch)
        ]
        for number, (name, want) in enumerate(expected.items()):
            got = np.concatenate([part[number] for part in parts])
            scale = 1.0 if name == "probabilities" else max(1.0, float(np.abs(want).max()))
            difference = float(np.abs(got - want).max()) / scale
            fine = difference <= tolerance  # false for NaN
            wrong += not fine
            verdict = "ok" if fine else "WRONG"
            print(f"{where}, batch {batch}: {name} off by {difference:.1e}, allowed {tolerance:.1e}: {verdict}")
    return wrong


if __name__ == "__main__":
    sys.exit(main())
