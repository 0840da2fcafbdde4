"""What onnxruntime really runs on: a network of two nodes, a convolution (cuDNN) and a product (cuBLAS), is run on one
provider, and the runtime's own profile says where each node ran.

Run as a program, once per provider: a provider without its driver prints to stderr from C++, and may take the process
with it.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from edgekit.doctor.system import Provider

CPU = "CPUExecutionProvider"
REMOTE = ("AzureExecutionProvider",)  # sends requests to a service; not a device of this machine
SECONDS = 120  # TensorRT builds an engine first
# y = c @ c with c = conv(x), whose kernel is the identity; opset 13, (1, 1, 4, 4); the test builds it with onnx
NETWORK = bytes.fromhex(
    "080712003aad010a220a01780a01771201632204436f6e762a110a04706164734001400140014001a001070a110a01630a01631201792206"
    "4d61744d756c120570726f62652a33080108010803080310014201774a24000000000000000000000000000000000000803f000000000000"
    "000000000000000000005a1b0a017812160a14080112100a0208010a0208010a0208040a020804621b0a017912160a14080112100a020801"
    "0a0208010a0208040a02080442040a00100d"
)


def observe() -> tuple[tuple[Provider, ...], str]:
    """Every provider that is available, and why onnxruntime could not be asked, if so."""
    first = _ask(CPU)
    if "available" not in first:
        return (), str(first.get("problem", ""))
    names = [name for name in first["available"] if name not in (CPU, *REMOTE)]
    return (*(_provider(name, _ask(name)) for name in names), _provider(CPU, first)), ""


def _provider(name: str, answer: dict[str, Any]) -> Provider:
    ran, problem = tuple(answer.get("ran", ())), str(answer.get("problem", ""))
    return Provider(name, ran, bool(answer.get("preloaded")), problem)


def _ask(name: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "edgekit.doctor.providers", name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False, errors="replace")
    except subprocess.TimeoutExpired:
        return {"problem": f"gave no answer within {SECONDS} s"}
    try:
        answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        return {"problem": complaint(done.stderr) or f"the process ended with status {done.returncode}"}
    if answer.get("ran") != [name] and (logged := complaint(done.stderr)):
        answer["problem"] = logged
    return answer


def complaint(log: str) -> str:
    """The most telling line of what onnxruntime printed: the library that could not be loaded, else the last line."""
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line).strip() for line in log.splitlines() if line.strip()]
    telling = next((line for line in lines if "cannot open shared object" in line), lines[-1] if lines else "")
    found = re.search(r"[\w.+-]+: cannot open shared object file", telling)
    return found[0] if found else telling[:300]


def _run(name: str) -> list[str]:
    """Providers that the nodes ran on, when this one is asked for."""
    import numpy as np
    import onnxruntime

    with tempfile.TemporaryDirectory() as scratch:
        options = onnxruntime.SessionOptions()
        options.enable_profiling, options.profile_file_prefix = True, str(Path(scratch) / "profile")
        options.intra_op_num_threads = 1
        session = onnxruntime.InferenceSession(NETWORK, options, providers=[name])
        x = np.arange(16, dtype=np.float32).reshape(1, 1, 4, 4)
        (y,) = session.run(None, {"x": x})
        events = json.loads(Path(session.end_profiling()).read_text())
    if not np.allclose(y, x @ x, rtol=1e-2):
        raise ArithmeticError("gives wrong numbers")
    return sorted({item["args"]["provider"] for item in events if item.get("args", {}).get("provider")})


def main(name: str) -> dict[str, Any]:
    """What `observe` reads: the providers available, and what ran when this one was asked for."""
    import onnxruntime

    answer: dict[str, Any] = {"available": onnxruntime.get_available_providers()}
    try:
        answer["ran"] = _run(name)
        if answer["ran"] != [name] and hasattr(onnxruntime, "preload_dlls"):
            onnxruntime.preload_dlls()  # CUDA and cuDNN from pip lie where the loader does not look
            answer["ran"] = _run(name)
            answer["preloaded"] = answer["ran"] == [name]
    except Exception as error:  # onnxruntime's exceptions have no common base of their own
        answer["problem"] = str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
    return answer


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1])))
