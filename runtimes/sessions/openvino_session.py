"""OpenVINO, the fastest standard runtime for small transformers on x86: shapes are fixed, and each is compiled once.

The session cuts a batch into pieces of few sizes, and each size has its own compiled model. Left to its defaults,
OpenVINO computes in bf16 on a CPU that has it; if f16 is requested and missing, it silently uses bf16 (which changes a
probability of t2 by 6e-3); and if weights are stored as integers, it rounds activations to int8. This session computes
in float32 or in the requested precision, or raises.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Lock
from typing import Any

import numpy as np
import numpy.typing as npt

from edgekit.bundle.format import KEY, Bundle, model_key
from edgekit.bundle.tensors import Arrays, TensorSpec, golden_inputs
from edgekit.errors import EdgekitError, missing_extra, unknown
from edgekit.session import check_inputs
from runtimes.sessions.rows import cut, share_out

try:
    import openvino
except ModuleNotFoundError as error:
    raise missing_extra(error.name or "openvino", "openvino", "the runtime openvino") from None

CHUNK = 16  # rows at a time by default: on one core a t2 row takes 0.35 ms alone and 0.26 ms in chunks of 16 or more
SIZES = 8  # compiled models to keep, the most recently used: each holds the weights again, in the layout of its shape
PRECISIONS = {"f32": "FP32", "bf16": "BF16", "f16": "FP16"}  # names in edgekit, and OpenVINO's names for the same


class Compiled:
    """A model compiled for one input shape, with as many inference requests as workers have needed at the same time."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self._idle: SimpleQueue[Any] = SimpleQueue()

    def run(self, arrays: Mapping[str, npt.NDArray[Any]]) -> list[npt.NDArray[Any]]:
        try:
            request = self._idle.get_nowait()
        except Empty:
            request = self.model.create_infer_request()
        try:
            results = request.infer(dict(arrays), share_inputs=True)
            # copies, because the request uses its memory again
            return [np.array(results[output]) for output in self.model.outputs]
        finally:
            self._idle.put(request)


class OpenVinoSession:
    """A bundle under OpenVINO.

    source: a model.xml that was exported from this bundle; by default the session exports the bundle to ONNX in memory,
    which needs torch unless the bundle is a graph. precision: f32, or bf16 or f16 if the device has it. threads:
    workers of one thread each, by default one for each core. chunk: rows at a time, used exactly; by default up to
    CHUNK rows, in powers of two.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        device: str = "CPU",
        precision: str = "f32",
        threads: int | None = None,
        chunk: int | None = None,
        source: str | Path | None = None,
    ) -> None:
        for name, value in (("threads", threads), ("chunk", chunk)):
            if value is not None and value < 1:
                raise EdgekitError(f"openvino: {name} = {value}; expected at least 1, or nothing for the default")
        if precision not in PRECISIONS:
            raise unknown("precision", precision, PRECISIONS, where="openvino")
        self._core = openvino.Core()
        if device not in self._core.available_devices:
            raise EdgekitError(
                f"openvino {openvino.__version__} has no device {device!r} here; it has "
                f"{', '.join(self._core.available_devices) or 'none'}; choose one of these, or install its driver"
            )
        able = self._core.get_property(device, "OPTIMIZATION_CAPABILITIES")
        if PRECISIONS[precision] not in able:
            has = [name for name, capability in PRECISIONS.items() if capability in able]
            raise EdgekitError(
                f"openvino: {device} cannot compute in {precision}, and openvino would silently use another precision"
                f"; it can do {', '.join(has)}"
            )
        self.inputs: tuple[TensorSpec, ...] = bundle.manifest.inputs
        self.outputs: tuple[TensorSpec, ...] = bundle.manifest.outputs
        self._workers = (threads or len(os.sched_getaffinity(0))) if device == "CPU" else 1
        self._signature = bundle.manifest.signature
        self._given, self._chunk = chunk is not None, chunk or CHUNK
        self._where, self._precision = device, precision
        self._model = read_model(self._core, bundle, source)
        self._compiled: OrderedDict[tuple[tuple[int, ...], ...], Compiled] = OrderedDict()
        self._lock = Lock()
        self._pool = ThreadPoolExecutor(max(1, self._workers - 1), "edgekit-openvino")  # the calling thread works too
        cpu = f"cpu ({self._workers} thread{'s' * (self._workers > 1)})"
        self.device = cpu if device == "CPU" else str(self._core.get_property(device, "FULL_DEVICE_NAME"))
        self.provider = f"openvino {device} {precision}"  # `_compile` checks that the compiled model agrees

    def run(self, arrays: Mapping[str, npt.NDArray[Any]]) -> Arrays:
        """Return the outputs by name, in the order of the inputs' rows."""
        batch = check_inputs(self.inputs, arrays)
        if batch == 0:
            one = {spec.name: np.zeros((1, *np.shape(arrays[spec.name])[1:]), spec.dtype) for spec in self.inputs}
            return {name: output[:0] for name, output in self.run(one).items()}
        pieces = self._pieces(batch)
        if len(pieces) == 1:
            return self._call(arrays)
        outputs: Arrays = {}
        lock = Lock()

        def call(rows: slice) -> None:
            results = self._call({name: array[rows] for name, array in arrays.items()})
            with lock:
                for name, result in results.items():
                    if name not in outputs:
                        outputs[name] = np.empty((batch, *result.shape[1:]), result.dtype)
                    outputs[name][rows] = result

        share_out(self._pool, self._workers, pieces, call)
        return {spec.name: outputs[spec.name] for spec in self.outputs}

    def warmup(self, batch: int) -> None:
        """Run once at this batch size, so that no later run pays for one-time work."""
        self.run(golden_inputs(self.inputs, batch))

    def _pieces(self, batch: int) -> list[slice]:
        """Cut a batch. A given chunk is used exactly; otherwise the rest after the last full chunk is cut into powers
        of two, so that batches of all sizes need few compiled models."""
        pieces = cut(batch, self._chunk)
        if self._given or pieces[-1].stop - pieces[-1].start == self._chunk:
            return pieces
        start = pieces.pop().start
        while start < batch:
            size = 1 << ((batch - start).bit_length() - 1)
            pieces.append(slice(start, start + size))
            start += size
        return pieces

    def _call(self, arrays: Mapping[str, npt.NDArray[Any]]) -> Arrays:
        rows = {spec.name: np.ascontiguousarray(arrays[spec.name]) for spec in self.inputs}
        results = self._signature.run(self._own, [spec.name for spec in self.outputs], rows)
        return {
            spec.name: result.astype(spec.dtype, copy=False) for spec, result in zip(self.outputs, results, strict=True)
        }

    def _own(self, names: Sequence[str], tensors: Mapping[str, npt.NDArray[Any]]) -> list[npt.NDArray[Any]]:
        """Run the model's own tensors; the outputs come in the manifest's order."""
        return self._for_shapes(dict(tensors)).run(tensors)

    def _for_shapes(self, rows: Arrays) -> Compiled:
        """Return the model compiled for these shapes. A new model replaces the least recently used one."""
        shapes = tuple(array.shape for array in rows.values())
        with self._lock:
            if shapes not in self._compiled:
                self._compiled[shapes] = self._compile(rows)
                if len(self._compiled) > SIZES:
                    self._compiled.popitem(last=False)
            self._compiled.move_to_end(shapes)
            return self._compiled[shapes]

    def _compile(self, rows: Arrays) -> Compiled:
        options: dict[str, Any] = {"INFERENCE_PRECISION_HINT": self._precision}
        # streams of one thread never wait for one another; with pinning, several would run on the same core
        if self._where == "CPU":
            options |= {
                "NUM_STREAMS": self._workers,
                "INFERENCE_NUM_THREADS": self._workers,
                "ENABLE_CPU_PINNING": False,
                "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
            }
        model = self._model.clone()
        try:
            model.reshape({name: list(array.shape) for name, array in rows.items()})
            compiled = self._core.compile_model(model, self._where, options)
        except RuntimeError as error:  # openvino raises no other exception type
            shapes = {name: array.shape for name, array in rows.items()}
            raise EdgekitError(
                f"openvino cannot compile this model for inputs of shapes {shapes}: {_reason(error)}"
            ) from error
        used = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
        ran_on = compiled.get_property("EXECUTION_DEVICES")
        if used != self._precision or list(ran_on) != [self._where]:
            raise EdgekitError(
                f"openvino was asked for {self._precision} on {self._where} and would compute in {used} on "
                f"{', '.join(ran_on)}; choose that, or another device"
            )
        return Compiled(compiled)


def read_model(core: Any, bundle: Bundle, source: str | Path | None) -> Any:
    """Read the given exported model, or the bundle as ONNX; inputs and outputs are in the manifest's order."""
    if source is not None:
        path = Path(source)
        if not path.is_file() or not path.with_suffix(".bin").is_file():
            raise EdgekitError(
                f"{path}: no such model, or no {path.with_suffix('.bin').name} in its folder; write them with: "
                "edgekit export BUNDLE --to openvino -o DIRECTORY"
            )
        try:
            model = core.read_model(path)
        except RuntimeError as error:
            raise EdgekitError(f"{path}: openvino cannot read it: {_reason(error)}") from None
        found = model.get_rt_info(KEY).astype(str) if model.has_rt_info(KEY) else "missing"
        if found != model_key(bundle):
            raise EdgekitError(
                f"{path}: not an export of {bundle.manifest.name} as it is now: its {KEY} is {found[:12]}, not "
                f"{model_key(bundle)[:12]}; export it again: edgekit export BUNDLE --to openvino -o DIRECTORY"
            )
        return model

    try:
        from edgekit.graph.lower import lower  # this imports torch, which an exported file does not need

        return core.read_model(lower(bundle, weights="float32").SerializeToString())
    except RuntimeError as error:
        raise EdgekitError(f"openvino cannot read {bundle.manifest.name} as ONNX: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """Return the last line of an error that is not empty: the first lines of openvino's messages are positions in its
    source."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines or ["no reason given"])[-1][-200:]
