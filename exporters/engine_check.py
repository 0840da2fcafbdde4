"""Check this kit on the device that will run it, and time it. It needs Python 3.6 or newer, numpy, and a runtime.

    sh build.sh && python3 verify.py                 the engine under TensorRT (TensorRT-RTX needs no build.sh)
    python3 verify.py --runtime onnxruntime          the ONNX file alone, on the CPU

The program writes report.json: runtime, device, differences and times. Keep it as the proof of this check. Exit status:
0 if the model gives the golden outputs at its least batch and at all stored rows; 1 if not.
"""

# ruff: noqa: UP006, UP017, UP021, UP022, UP035, B905
# no annotations from the future, no walrus, no text=, no capture_output: JetPack 4.6 has Python 3.6
import argparse
import ctypes
import datetime
import hashlib
import importlib
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Dict, List, Sequence, Tuple

import numpy as np

RUNTIMES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx", "onnxruntime": "onnxruntime"}
DTYPES = {
    "FLOAT": np.float32, "HALF": np.float16, "INT8": np.int8, "INT32": np.int32, "INT64": np.int64, "BOOL": np.bool_,
    "UINT8": np.uint8,
}  # fmt: skip
MAJOR, MINOR = 75, 76  # attributes of the compute capability, as cudaDeviceGetAttribute numbers them
WARM, RUNS = 10, 100  # calls before and during the timing
Arrays = Dict[str, Any]


class Failed(Exception):  # noqa: N818
    """An error whose message is one line for the user."""


class Cuda:
    """The calls of the CUDA runtime that move arrays, through ctypes: no Python package is needed."""

    def __init__(self, path: str = "") -> None:
        names = (
            [path] if path else ["libcudart.so", *(f"libcudart.so.{number}" for number in ("13", "12", "11.0", "10.2"))]
        )
        if not path:
            for folder in [Path("/usr/local"), *(Path(part) / "nvidia" for part in sys.path if part)]:
                names += sorted(str(path) for path in folder.glob("*/lib*/libcudart.so*"))
        self.library = _first_library(names)
        self.library.cudaGetErrorString.restype = ctypes.c_char_p
        self.library.cudaMalloc.argtypes = [ctypes.POINTER(ctypes.c_void_p), ctypes.c_size_t]
        self.library.cudaMemcpy.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        self.library.cudaFree.argtypes = [ctypes.c_void_p]

    def check(self, status: int, what: str) -> None:
        if status:
            raise Failed(f"CUDA: {what}: {self.library.cudaGetErrorString(status).decode()}")

    def allocate(self, size: int) -> int:
        pointer = ctypes.c_void_p()
        self.check(self.library.cudaMalloc(ctypes.byref(pointer), max(size, 1)), f"{size} bytes")
        return pointer.value or 0

    def free(self, pointer: int) -> None:
        self.check(self.library.cudaFree(pointer), "free")

    def to_device(self, pointer: int, array: Any) -> None:
        self.check(self.library.cudaMemcpy(pointer, array.ctypes.data, array.nbytes, 1), "copy to the device")

    def to_host(self, array: Any, pointer: int) -> None:
        self.check(self.library.cudaMemcpy(array.ctypes.data, pointer, array.nbytes, 2), "copy from the device")

    def wait(self) -> None:
        self.check(self.library.cudaDeviceSynchronize(), "run")

    def compute_capability(self) -> int:
        """Return the compute capability as a number: 86 for 8.6."""
        numbers = []
        for attribute in (MAJOR, MINOR):
            value = ctypes.c_int()
            self.check(self.library.cudaDeviceGetAttribute(ctypes.byref(value), attribute, 0), "device 0")
            numbers.append(value.value)
        return 10 * numbers[0] + numbers[1]


def _first_library(names: "Sequence[str]") -> Any:
    for name in names:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise Failed("no CUDA runtime found (libcudart.so); install CUDA, or name the file: --cudart PATH")


class Engine:
    """A built engine, through either interface of TensorRT: tensors since 8.5, bindings before."""

    def __init__(self, trt: Any, content: bytes, cuda: Cuda) -> None:
        self.cuda, self.logger = cuda, trt.Logger(trt.Logger.WARNING)
        if hasattr(trt, "init_libnvinfer_plugins"):
            trt.init_libnvinfer_plugins(self.logger, "")
        self.runtime = trt.Runtime(self.logger)
        self.engine = self.runtime.deserialize_cuda_engine(content)
        if self.engine is None:
            raise Failed(
                f"TensorRT {trt.__version__} does not load this engine: another release built it, or it is "
                "for another GPU; build it here"
            )
        self.context = self.engine.create_execution_context()
        self.tensors = hasattr(self.engine, "num_io_tensors")
        engine = self.engine
        if self.tensors:
            self.names = [engine.get_tensor_name(number) for number in range(engine.num_io_tensors)]
            self.inputs = {n for n in self.names if engine.get_tensor_mode(n) == trt.TensorIOMode.INPUT}
            self.dtypes = {name: DTYPES[engine.get_tensor_dtype(name).name] for name in self.names}
        else:
            self.names = [engine.get_binding_name(number) for number in range(engine.num_bindings)]
            self.inputs = {n for number, n in enumerate(self.names) if engine.binding_is_input(number)}
            self.dtypes = {n: DTYPES[engine.get_binding_dtype(i).name] for i, n in enumerate(self.names)}
        self.buffers = {}  # type: Dict[str, Tuple[int, int]]# name: address, bytes

    def load(self, arrays: Arrays) -> None:
        """Set the shapes, copy the inputs to the device and allocate the outputs."""
        for number, name in enumerate(self.names):
            if name in self.inputs:
                shape = tuple(arrays[name].shape)
                if self.tensors:
                    taken = self.context.set_input_shape(name, shape)
                else:
                    taken = self.context.set_binding_shape(number, shape)
                if not taken:
                    raise Failed(f"the engine does not take input {name} in shape {shape}; see profile.json")
        for name in self.names:
            self._room(name, int(np.prod(self.shape(name))) * np.dtype(self.dtypes[name]).itemsize)
            if name in self.inputs:
                self.cuda.to_device(self.buffers[name][0], np.ascontiguousarray(arrays[name], self.dtypes[name]))

    def run(self) -> None:
        if not self.context.execute_v2([self.buffers[name][0] for name in self.names]):
            raise Failed("TensorRT reports that the run failed")
        self.cuda.wait()

    def outputs(self) -> Arrays:
        found = {}  # type: Arrays
        for name in self.names:
            if name not in self.inputs:
                found[name] = np.empty(self.shape(name), self.dtypes[name])
                self.cuda.to_host(found[name], self.buffers[name][0])
        return found

    def shape(self, name: str) -> "Tuple[int, ...]":
        if self.tensors:
            return tuple(self.context.get_tensor_shape(name))
        return tuple(self.context.get_binding_shape(self.names.index(name)))

    def _room(self, name: str, size: int) -> None:
        if name not in self.buffers or self.buffers[name][1] < size:
            if name in self.buffers:
                self.cuda.free(self.buffers[name][0])
            self.buffers[name] = (self.cuda.allocate(size), size)


class Graph:
    """The ONNX file under onnxruntime, on the CPU."""

    def __init__(self, onnxruntime: Any, path: Path) -> None:
        self.session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        self.names = [value.name for value in self.session.get_outputs()]
        self.arrays = {}  # type: Arrays
        self.found = []  # type: List[Any]

    def load(self, arrays: Arrays) -> None:
        self.arrays = arrays

    def run(self) -> None:
        self.found = self.session.run(self.names, self.arrays)

    def outputs(self) -> Arrays:
        return dict(zip(self.names, self.found))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runtime", choices=sorted(RUNTIMES), help="default: the one that the kit is for")
    parser.add_argument("--cudart", default="", help="CUDA's runtime library, if it is not found")
    parser.add_argument("--runs", type=int, default=RUNS, help="calls to time at each batch size")
    options = parser.parse_args()
    folder = Path(__file__).resolve().parent
    try:
        report = check(folder, options.runtime, options.cudart, options.runs)
    except Failed as error:
        print(f"FAIL: {error}")
        return 1
    (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    for line in () if report["passed"] or report["runtime"] == "onnxruntime" else report["notes"]:
        print(f"note: {line}")
    print("PASS" if report["passed"] else "FAIL")
    return 0 if report["passed"] else 1


def check(folder: Path, runtime: "str | None" = None, cudart: str = "", runs: int = RUNS) -> "Dict[str, Any]":
    manifest = json.loads((folder / "manifest.json").read_text())
    for name, digest in manifest["files"].items():
        path = folder / name
        if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != digest:
            raise Failed(f"{name}: missing, or not the file that was exported; copy it again")
    runtime = runtime or manifest["runtime"]
    device = describe()
    module, model = opened(folder, manifest, runtime, cudart, device)
    with np.load(str(folder / "golden.npz")) as golden:
        inputs = {name: golden["in." + name] for name in manifest["inputs"]}
        expected = {name: golden["out." + name] for name in manifest["outputs"]}
    for name, ranges in manifest["shapes"].items():
        texts = {key: "x".join(str(length) for length in shape) for key, shape in ranges.items()}
        print(
            "{}: the engine takes {} to {}, and is fastest at {}".format(name, texts["min"], texts["max"], texts["opt"])
        )
    alike = rows_alike(inputs, manifest)
    stored, least = len(alike), manifest["least_batch"]
    checks, timings = [], []
    for batch in sorted({least, min(max(stored, least), manifest["largest_batch"])}):
        rows = alike[np.arange(batch) % stored]  # the stored rows repeat if the engine takes no smaller batch
        part = own_tensors({name: array[rows] for name, array in inputs.items()}, manifest)
        wanted = own_tensors({name: array[rows] for name, array in expected.items()}, manifest)
        checks += compare(model, part, wanted, batch, manifest["device_tolerance"])
        timings.append(timed(model, batch, runs))
    return {
        "kit": {key: manifest[key] for key in ("model", "bundle", "target", "precision", "format")},
        "runtime": runtime,
        "version": getattr(module, "__version__", ""),
        "device": device,
        "checks": checks,
        "latency": timings,
        "passed": all(item["fine"] for item in checks),
        "notes": manifest.get("notes", []),
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(),
    }


def rows_alike(inputs: Arrays, manifest: "Dict[str, Any]") -> Any:
    """Return the indices of the rows that can share a call: those with the first row's value of each input that has no
    batch."""
    rows = np.arange(len(next(iter(inputs.values()))))
    if "rows" in manifest and manifest["rows"]["per_call"] is None:
        for name, array in inputs.items():
            if manifest["rows"]["batch"][name] is None:
                rows = rows[[np.array_equal(array[row], array[0]) for row in rows]]
    return rows


def own_tensors(rows: Arrays, manifest: "Dict[str, Any]") -> Arrays:
    """Return rows as the model's own tensors, which may have the batch elsewhere, or none."""
    if "rows" not in manifest:
        return rows
    batch = manifest["rows"]["batch"]
    moved = {}  # type: Arrays
    for name, array in rows.items():
        own = array[0] if batch[name] is None else np.moveaxis(array, 0, batch[name])
        moved[name] = np.asarray(own, order="C")
    return moved


def opened(
    folder: Path, manifest: "Dict[str, Any]", runtime: str, cudart: str, device: "Dict[str, Any]"
) -> "Tuple[Any, Any]":
    """Return the runtime's module, and the model that it runs. Add the compute capability of the GPU to `device`."""
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # onnxruntime 1.29 and later report their use to their maker
    try:
        module = importlib.import_module(RUNTIMES[runtime])
    except ImportError as error:
        raise Failed(
            f"{runtime} is not installed ({error}); install the packages of requirements-*.txt, or check the ONNX file "
            "alone: python3 verify.py --runtime onnxruntime"
        ) from None
    if runtime == "onnxruntime":
        return module, Graph(module, folder / "model.onnx")
    engine = folder / manifest["engine"]["file"]
    if not engine.is_file():
        raise Failed(f"{engine.name} is not here; build it first: sh build.sh")
    cuda = Cuda(cudart)
    device["compute_capability"] = cuda.compute_capability()
    if device["compute_capability"] != manifest["sm"]:
        raise Failed(
            f"this GPU has compute capability {device['compute_capability'] / 10}, the kit is for "
            f"{manifest['sm'] / 10} ({manifest['target']}); export one for this device"
        )
    return module, Engine(module, engine.read_bytes(), cuda)


def compare(model: Any, inputs: Arrays, expected: Arrays, batch: int, tolerance: float) -> "List[Dict[str, Any]]":
    """Compare each output with the golden one: absolute for probabilities, else relative to the largest value."""
    model.load(inputs)
    model.run()
    result = []
    for name, got in model.outputs().items():
        want = expected[name]
        if got.shape != want.shape:
            raise Failed(f"output {name} has shape {got.shape}; expected {want.shape}")
        if want.dtype.kind in "iub":
            difference = float(np.mean(got != want))  # the share of codes that differ
        else:
            scale = 1.0 if name == "probabilities" else float(np.abs(want).max()) or 1.0
            difference = float(np.abs(got.astype(np.float64) - want).max()) / scale
        fine = bool(difference <= tolerance)  # false for NaN
        same = float(np.mean(got.argmax(-1) == want.argmax(-1))) if want.ndim > 1 and want.dtype.kind == "f" else None
        verdict = "ok" if fine else "WRONG"
        print(f"batch {batch}: {name} off by {difference:.1e}, allowed {tolerance:.1e}: {verdict}")
        shown = difference if np.isfinite(difference) else str(difference)
        result.append({"batch": batch, "output": name, "difference": shown, "fine": fine, "same_largest": same})
    return result


def timed(model: Any, batch: int, runs: int) -> "Dict[str, Any]":
    """Return the milliseconds of a call without copies to and from the device: the inputs are already there."""
    for _ in range(WARM):
        model.run()
    found = []
    for _ in range(runs):
        start = time.perf_counter()
        model.run()
        found.append(1e3 * (time.perf_counter() - start))
    shares = {f"p{share}": float(np.percentile(found, share)) for share in (50, 90, 99)}
    print(f"batch {batch}: {shares['p50']:.3f} ms (median of {runs})")
    return dict(shares, batch=batch, runs=runs, unit="ms")


def describe() -> "Dict[str, Any]":
    """Describe the device with its clock rates: without them a time cannot be judged."""
    found = {
        "machine": platform.machine(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "board": _text("/proc/device-tree/model"),
        "l4t": _text("/etc/nv_tegra_release"),
        "power_mode": _command("nvpmodel", "-q"),
        "jetson_clocks": _command("jetson_clocks", "--show"),
        "gpu": _command(
            "nvidia-smi", "--query-gpu=name,driver_version,clocks.sm,clocks.mem,power.limit", "--format=csv,noheader"
        ),
    }  # type: Dict[str, Any]
    clocks = {}
    for path in Path("/sys/class/devfreq").glob("*"):
        clocks[path.name] = [_text(str(path / "cur_freq")), _text(str(path / "max_freq"))]
    found["clocks"] = clocks  # Hz: current and maximum
    return {key: value for key, value in found.items() if value}


def _text(path: str) -> str:
    try:
        return Path(path).read_text().strip("\0\n ")
    except (OSError, UnicodeDecodeError):
        return ""


def _command(*words: str) -> str:
    """Return the output of a command, or an empty string if the command is missing or fails."""
    try:
        done = subprocess.run(
            words,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            universal_newlines=True,
            timeout=20,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


if __name__ == "__main__":
    sys.exit(main())
