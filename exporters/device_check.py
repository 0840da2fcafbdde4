"""Check an export on the device that will run it. Needs Python 3.6 or newer, numpy and onnxruntime; nothing else.

    python verify.py                                    every model of the export, on the CPU
    python verify.py --provider CUDAExecutionProvider

Exit status: 0 if every model gives its golden outputs, at batch 1 and at all stored rows; 1 if not.
"""

import argparse
import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime

CPU = "CPUExecutionProvider"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--provider", default=CPU, help="ONNX Runtime execution provider")
    provider = parser.parse_args().provider
    if provider not in onnxruntime.get_available_providers():
        print(f"provider {provider} is not here; choose from {', '.join(onnxruntime.get_available_providers())}")
        return 1
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
    wrong = sum(
        differences(folder / name, inputs, expected, facts["tolerance"], provider)
        for name, facts in manifest["models"].items()
    )
    print("FAIL" if wrong else "PASS")
    return 1 if wrong else 0


def sha256(path: Path) -> "str | None":
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def differences(path: Path, inputs: dict, expected: dict, tolerance: float, provider: str) -> int:  # type: ignore[type-arg]
    """Print how far each output is from the golden one; return how many are further than allowed."""
    options = onnxruntime.SessionOptions()
    if provider != CPU:  # a model that quietly ran on the CPU would prove nothing
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    session = onnxruntime.InferenceSession(str(path), options, providers=[provider])
    rows = len(next(iter(inputs.values())))
    wrong = 0
    for batch in sorted({1, rows}):
        parts = [
            session.run(list(expected), {name: array[at : at + batch] for name, array in inputs.items()})
            for at in range(0, rows, batch)
        ]
        for number, (name, want) in enumerate(expected.items()):
            got = np.concatenate([part[number] for part in parts])
            scale = 1.0 if name == "probabilities" else max(1.0, float(np.abs(want).max()))
            difference = float(np.abs(got - want).max()) / scale
            fine = difference <= tolerance  # false for NaN
            wrong += not fine
            where = f"{path.name} on {provider}, batch {batch}"
            print(f"{where}: {name} off by {difference:.1e}, allowed {tolerance:.1e}: {'ok' if fine else 'WRONG'}")
    return wrong


if __name__ == "__main__":
    sys.exit(main())
