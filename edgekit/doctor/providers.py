"""Find out on which providers onnxruntime really runs. It runs a network of two nodes, a convolution (cuDNN) and a
product (cuBLAS), on one provider, and the runtime's own profile says where each node ran.

This file runs as a program, once per provider, because a provider without its driver prints to stderr from C++ and may
end the process.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from edgekit.doctor.system import Provider

CPU = "CPUExecutionProvider"
REMOTE = ("AzureExecutionProvider",)  # it sends requests to a service and is no device of this machine
NVIDIA = ("CUDAExecutionProvider", "TensorrtExecutionProvider", "NvTensorRTRTXExecutionProvider")
AGAIN = "second attempt, with the libraries that pip installed"  # messages before this line belong to the first attempt
SECONDS = 120  # long enough for TensorRT, which builds an engine first
# y = c @ c with c = conv(x), whose kernel is the identity; opset 13, (1, 1, 4, 4); the test builds it with onnx
NETWORK = bytes.fromhex(
    "080712003aad010a220a01780a01771201632204436f6e762a110a04706164734001400140014001a001070a110a01630a01631201792206"
    "4d61744d756c120570726f62652a33080108010803080310014201774a24000000000000000000000000000000000000803f000000000000"
    "000000000000000000005a1b0a017812160a14080112100a0208010a0208010a0208040a020804621b0a017912160a14080112100a020801"
    "0a0208010a0208040a02080442040a00100d"
)


def observe(*, gpu: bool) -> tuple[tuple[Provider, ...], str]:
    """Return every available provider, and the reason if onnxruntime did not answer. gpu: whether there is an NVIDIA
    GPU; without one, NVIDIA's providers are not tried."""
    first = _ask(CPU)
    if "available" not in first:
        return (), str(first.get("problem", ""))
    names = [name for name in first["available"] if name not in (CPU, *REMOTE)]
    tried = [name for name in names if gpu or name not in NVIDIA]
    with ThreadPoolExecutor(max(1, len(tried))) as pool:  # each waits for a process of its own
        answers = dict(zip(tried, pool.map(_ask, tried), strict=True))
    absent = {"problem": "there is no NVIDIA GPU, so it was not tried"}
    return (*(_provider(name, answers.get(name, absent)) for name in names), _provider(CPU, first)), ""


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
    if answer.get("ran") != [name]:
        answer["problem"] = complaint(f"{done.stderr}\n{answer.get('problem', '')}")
    return answer


def complaint(log: str) -> str:
    """Return the most useful part of the messages of onnxruntime: the library that could not be loaded, CUDA's own
    error, or otherwise the last line."""
    log = re.sub(r"\x1b\[[0-9;]*m", "", log.rpartition(AGAIN)[2])
    for telling in (r"[\w.+-]+: cannot open shared object file", r"(?:CUDA|CUDNN|CUBLAS) (?:failure|error) [^;\n]+"):
        if found := re.search(telling, log):
            return found[0].strip()
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""


def _run(name: str) -> list[str]:
    """Return the providers on which the nodes ran when this provider was requested."""
    import numpy as np
    import onnxruntime

    with tempfile.TemporaryDirectory() as scratch:
        options = onnxruntime.SessionOptions()
        options.enable_profiling, options.profile_file_prefix = True, str(Path(scratch) / "profile")
        options.intra_op_num_threads = 1
        session = onnxruntime.InferenceSession(NETWORK, options, providers=[name], enable_fallback=0)
        x = np.arange(16, dtype=np.float32).reshape(1, 1, 4, 4)
        (y,) = session.run(None, {"x": x})
        events = json.loads(Path(session.end_profiling()).read_text())
    if not np.allclose(y, x @ x, rtol=1e-2):
        raise ArithmeticError("gives wrong numbers")
    return sorted({item["args"]["provider"] for item in events if item.get("args", {}).get("provider")})


def main(name: str) -> dict[str, Any]:
    """Print what `observe` reads: the available providers, and what ran when this provider was requested."""
    import onnxruntime

    answer: dict[str, Any] = {"available": onnxruntime.get_available_providers()}
    for preloaded in (False, True):
        if preloaded:  # the loader does not search the folders of pip's CUDA and cuDNN
            if not hasattr(onnxruntime, "preload_dlls"):
                break
            print(AGAIN, file=sys.stderr, flush=True)
            onnxruntime.preload_dlls()
        try:
            answer |= {"ran": _run(name), "problem": ""}
        except Exception as error:  # the exceptions of onnxruntime share no base class
            answer |= {"ran": [], "problem": complaint(str(error)) or type(error).__name__}
        if answer["ran"] == [name]:
            answer["preloaded"] = preloaded
            break
    return answer


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1])))
