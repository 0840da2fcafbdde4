"""ONNX Runtime, with the batch cut into chunks that stay in the cache and keep every core busy.

ONNX Runtime runs each operator on the whole batch. t2's attention scores take 640 kB a sample, so a batch of 1000
streams 640 MB through memory several times over. A few rows at a time stay in the cache, and the cores share the rows
instead of the operators. The session measures on the machine how many rows and threads are best.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Lock
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnxruntime

from edgekit.bundle.files import write_file
from edgekit.bundle.format import KEY, Bundle, model_key
from edgekit.bundle.onnx_file import serialized
from edgekit.bundle.tensors import Arrays, TensorSpec, golden_inputs
from edgekit.cost.timing import in_turns, timed
from edgekit.doctor import extras
from edgekit.errors import EdgekitError, unknown
from edgekit.graph.model import stored_graph
from edgekit.session import check_inputs
from exporters.device_check import ran_elsewhere
from runtimes.sessions.rows import cut, share_out

CPU = "CPUExecutionProvider"
GPU = ("CUDAExecutionProvider", "TensorrtExecutionProvider")
CHUNKS = (1, 2, 4, 8, 16, 32)  # chunk sizes to try, in rows
SMALL = 8  # ONNX Runtime runs a batch below this many rows, or below one row per core, in one piece
TRIAL_SECONDS = 0.02  # of work in a trial: longer than the resolution of the clock and of the scheduler
ROUNDS = (5, 25)  # the median of these counts; more if a trial is a single short call
MARGIN = 0.1  # the gain for which a plan may take more memory, or a second core for a small batch
OPTIMISATIONS = {
    "all": "ORT_ENABLE_ALL",
    "extended": "ORT_ENABLE_EXTENDED",
    "basic": "ORT_ENABLE_BASIC",
    "off": "ORT_DISABLE_ALL",
}
_measured: dict[str, BatchPlan] = {}  # in this process, by model, runtime version and machine


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """How a session runs a batch: `workers` calls at a time, each with `chunk` rows on `threads` cores."""

    workers: int
    threads: int
    chunk: int
    rows_per_second: float | None = None  # of one worker, measured when the plan was chosen
    origin: Literal["measured", "cached", "given"] = "given"

    def __str__(self) -> str:
        speed = f", {self.rows_per_second:,.0f} rows/s per worker" if self.rows_per_second else ""
        return (
            f"{self.workers} worker{'s' * (self.workers > 1)} of {self.threads} thread{'s' * (self.threads > 1)}, "
            f"{self.chunk} row{'s' * (self.chunk > 1)} at a time ({self.origin}{speed})"
        )


class OnnxRuntimeSession:
    """A bundle under ONNX Runtime.

    source: a model.onnx that was exported from this bundle; by default the session exports one in memory, which needs
    torch. threads, chunk: values to use instead of measured ones. plan_file: a JSON file that stores measured plans
    between processes. exporter: which of torch's two exporters makes the model; optimization: how far ONNX Runtime
    rewrites the graph.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        provider: str = CPU,
        threads: int | None = None,
        chunk: int | None = None,
        source: str | Path | None = None,
        plan_file: str | Path | None = None,
        exporter: Literal["torchscript", "dynamo"] = "torchscript",
        optimization: str = "all",
    ) -> None:
        if optimization not in OPTIMISATIONS:
            raise unknown("graph optimization", optimization, OPTIMISATIONS)
        for name, value in (("threads", threads), ("chunk", chunk)):
            if value is not None and value < 1:
                raise EdgekitError(
                    f"onnxruntime: {name} = {value}; expected at least 1, or nothing to have it measured"
                )
        _check_available(provider)
        if provider in GPU and hasattr(onnxruntime, "preload_dlls"):
            onnxruntime.preload_dlls()  # CUDA and cuDNN from pip are not on the loader's path
        self.inputs: tuple[TensorSpec, ...] = bundle.manifest.inputs
        self.outputs: tuple[TensorSpec, ...] = bundle.manifest.outputs
        self.provider = provider
        self._names, self._signature = [spec.name for spec in self.outputs], bundle.manifest.signature
        self._key, self._graph = model_key(bundle), _graph(bundle, source, exporter)
        self._optimization = optimization
        # onnxruntime 1.32 crashes when it changes the layout of float16 graphs for convolutions (its issue 28392).
        self._avoided = ["NchwcTransformer"] if bundle.is_graph and holds_float16(self._graph) else None
        self._cores = threads or len(os.sched_getaffinity(0))
        self._chunk = chunk
        self._small = 0 if chunk else max(SMALL, self._cores)  # a given chunk applies to batches of every size
        self._plan_file = Path(plan_file) if plan_file is not None else None
        self._sessions: dict[int, Any] = {}
        self._chosen: dict[str, BatchPlan] = {}  # by size of batch: small, large
        self._lock = Lock()
        self._pool = ThreadPoolExecutor(max(1, self._cores - 1), "edgekit")  # the calling thread works too
        found = self._open(self._cores).get_modelmeta().custom_metadata_map.get(KEY, "missing")
        if found != self._key:
            raise EdgekitError(
                f"{source}: not an export of {bundle.manifest.name} as it is now: its {KEY} is {found[:12]}, the "
                f"bundle's is {self._key[:12]}; export it again: edgekit export BUNDLE --to onnx -o DIRECTORY"
            )
        self.device = f"cpu ({self._cores} thread{'s' * (self._cores > 1)})" if provider == CPU else provider

    @property
    def plan(self) -> BatchPlan | None:
        """How the session runs batches of SMALL rows and more; None until the first such batch, or `warmup`."""
        return self._chosen.get("large")

    @property
    def small_plan(self) -> BatchPlan | None:
        """How the session runs smaller batches."""
        return self._chosen.get("small")

    def run(self, arrays: Mapping[str, npt.NDArray[Any]]) -> Arrays:
        """Return the outputs by name, in the order of the inputs' rows. The plan changes them by rounding only."""
        if (outputs := self._few_rows(arrays)) is not None:
            return outputs
        batch = check_inputs(self.inputs, arrays)
        if batch == 0:
            one = {spec.name: np.zeros((1, *np.shape(arrays[spec.name])[1:]), spec.dtype) for spec in self.inputs}
            return {name: output[:0] for name, output in self._call(self._cores, one).items()}
        if self.provider != CPU:
            return self._call(self._cores, arrays)
        size = "small" if batch < self._small else "large"
        if size not in self._chosen:
            with self._lock:
                self._chosen[size] = self._choose(size, arrays, batch)
        return self._run_plan(self._chosen[size], arrays, batch)

    def warmup(self, batch: int) -> None:
        """Run once at this batch size, so that no later run pays for one-time work."""
        self.run(golden_inputs(self.inputs, batch))

    def _few_rows(self, arrays: Mapping[str, npt.NDArray[Any]]) -> Arrays | None:
        """Run a small batch without `check_inputs`, which costs a tenth of a single t2 row; ONNX Runtime checks names,
        types and shapes itself. Return None for anything unusual: then the normal path checks the inputs and explains
        the error."""
        plan = self._chosen.get("small")
        try:
            rows = {len(array) for array in arrays.values()}
            if plan is None or len(rows) != 1 or not 0 < max(rows) < self._small:
                return None
            if not all(np.logical_and.reduce(np.isfinite(array), axis=None) for array in arrays.values()):
                return None
            return self._call(plan.threads, arrays)
        except Exception:  # nothing is hidden: the normal path runs the same inputs again
            return None

    def _open(self, threads: int) -> Any:
        """Return the ONNX Runtime session with this many threads; it is opened once."""
        if threads not in self._sessions:
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = threads
            # warnings of a GPU provider name what it lacks
            options.log_severity_level = 4 if self.provider == CPU else 3
            options.graph_optimization_level = getattr(
                onnxruntime.GraphOptimizationLevel, OPTIMISATIONS[self._optimization]
            )
            with TemporaryDirectory() as scratch:
                if self.provider != CPU:
                    options.enable_profiling, options.profile_file_prefix = True, str(Path(scratch) / "profile")
                try:
                    session = onnxruntime.InferenceSession(
                        self._graph, options, providers=[self.provider], disabled_optimizers=self._avoided
                    )
                except Exception as error:  # the exceptions of onnxruntime share no base class
                    reason = str(error).splitlines()[0]
                    raise EdgekitError(f"onnxruntime cannot run this model on {self.provider}: {reason}") from error
                if session.get_providers()[0] != self.provider:  # disable_fallback() does not prevent this
                    raise EdgekitError(
                        f"onnxruntime did not start {self.provider}, it fell back to "
                        f"{', '.join(session.get_providers())}; check the device's driver and libraries, or choose "
                        "that provider"
                    )
                if self.provider != CPU:
                    self._prove(session)
            self._sessions[threads] = session
        return self._sessions[threads]

    def _prove(self, session: Any) -> None:
        """Raise if the session's own profile shows operators that silently run on the CPU. The option
        `session.disable_cpu_ep_fallback` would refuse every graph that computes a shape, which ONNX Runtime does on the
        CPU for every GPU."""
        self._signature.run(session.run, self._names, golden_inputs(self.inputs, 2))
        if lost := ran_elsewhere(json.loads(Path(session.end_profiling()).read_text()), self.provider):
            raise EdgekitError(
                f"onnxruntime would run {', '.join(lost)} on the CPU, not on {self.provider}; choose "
                "CPUExecutionProvider for all of it, or write the model with operators that the provider has"
            )

    def _call(self, threads: int, arrays: Mapping[str, npt.NDArray[Any]]) -> Arrays:
        session = self._sessions.get(threads) or self._open(threads)
        try:
            return dict(zip(self._names, self._signature.run(session.run, self._names, arrays), strict=True))
        except Exception as error:  # no common base here either: a shape or an index that the graph cannot take
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            shapes = {name: array.shape for name, array in arrays.items()}
            raise EdgekitError(f"onnxruntime cannot run this model on inputs of shapes {shapes}: {reason}") from error

    def _run_plan(self, plan: BatchPlan, arrays: Mapping[str, npt.NDArray[Any]], batch: int) -> Arrays:
        if plan.workers == 1 and batch <= plan.chunk:
            return self._call(plan.threads, arrays)
        outputs: Arrays = {}
        lock = Lock()

        def call(rows: slice) -> None:
            results = self._call(plan.threads, {name: array[rows] for name, array in arrays.items()})
            with lock:
                for name, result in results.items():
                    if name not in outputs:
                        outputs[name] = np.empty((batch, *result.shape[1:]), result.dtype)
                    outputs[name][rows] = result

        self._open(plan.threads)  # open the session before several workers ask for it at once
        share_out(self._pool, plan.workers, cut(batch, plan.chunk), call)
        return {spec.name: outputs[spec.name] for spec in self.outputs}

    def _choose(self, size: str, arrays: Mapping[str, npt.NDArray[Any]], batch: int) -> BatchPlan:
        """Return the best plan on this machine: from this process or the plan file, or measured on this batch.

        Large batches are shared by workers of one thread each, which never wait for one another. Threads inside an
        operator wait for one another after each operator; when other programs occupied a core, they ran at half the
        speed.
        """
        if size == "small":
            candidates = [BatchPlan(1, threads, self._small) for threads in sorted({1, self._cores})]
        else:
            candidates = [BatchPlan(self._cores, 1, chunk) for chunk in ((self._chunk,) if self._chunk else CHUNKS)]
        if len(candidates) == 1:
            return candidates[0]
        cpu = f"{_cpu()}, {self._cores} of {len(os.sched_getaffinity(0))} cores"
        key = f"{self._key}, onnxruntime {onnxruntime.__version__}, {cpu}, {self._optimization}, {size} batch"
        if key not in _measured:
            known = _read_plans(self._plan_file)
            if key in known:
                _measured[key] = replace(known[key], origin="cached")
            else:
                _measured[key] = self._measure(candidates, arrays, batch)
                _write_plans(self._plan_file, {**known, key: _measured[key]})
        return _measured[key]

    def _measure(self, candidates: list[BatchPlan], arrays: Mapping[str, npt.NDArray[Any]], batch: int) -> BatchPlan:
        """Time the candidates in turn, on real rows.

        The best chunk depends on the cache, so it is measured in one worker's CPU time, which other programs hardly
        change. The best number of threads for a small batch depends on waiting, so it is measured in wall time. A plan
        must be better by MARGIN than an earlier one in the list; plans with less memory and fewer cores come first.
        """
        alone = candidates[0].workers > 1 or candidates[0].chunk < candidates[-1].chunk
        clock = time.thread_time if alone else time.perf_counter
        one = {name: array[:1] for name, array in arrays.items()}
        for plan in candidates:
            self._call(plan.threads, one)  # this opens the session and allocates its memory
        started = clock()
        self._call(1, one)
        seconds = max(clock() - started, 1e-6)
        rows = int(np.clip(TRIAL_SECONDS / seconds, 4, CHUNKS[-1])) if alone else batch
        index = np.resize(np.arange(batch), rows)
        trial = {name: array[index] for name, array in arrays.items()}
        candidates = [plan for plan in candidates if plan.chunk <= rows or not alone]
        calls = [timed(partial(self._run_plan, replace(plan, workers=1), trial, rows), clock) for plan in candidates]
        least, most = ROUNDS
        budget = TRIAL_SECONDS * len(candidates)
        times = in_turns(calls, seconds=budget, least=least, most=most, warmup=1)[:, :, 0]
        middle = dict(zip(candidates, np.median(times, axis=0).tolist(), strict=True))
        chosen = next(plan for plan in candidates if middle[plan] <= (1 + MARGIN) * min(middle.values()))
        return replace(chosen, rows_per_second=rows / max(middle[chosen], 1e-6), origin="measured")


def _check_available(provider: str) -> None:
    available = onnxruntime.get_available_providers()
    if provider not in available:
        extras.check("onnxruntime-gpu")  # the usual reason is a CPU build that was installed over it
        remedy = "choose one of these, or install the onnxruntime build for your device"
        if provider in GPU:
            remedy += " (pip uninstall -y onnxruntime; pip install 'edgekit[gpu]')"
        raise EdgekitError(
            f"onnxruntime {onnxruntime.__version__} has no {provider!r} here; it has {', '.join(available)}; {remedy}"
        )


def _graph(bundle: Bundle, source: str | Path | None, exporter: Literal["torchscript", "dynamo"]) -> bytes:
    """Return the given ONNX file, or export the bundle now."""
    if source is None:
        if bundle.is_graph:
            return serialized(stored_graph(bundle))
        from edgekit.graph.lower import lower  # this imports torch, which a graph does not need

        return serialized(lower(bundle, weights="float32", exporter=exporter))
    if not Path(source).is_file():
        raise EdgekitError(f"{source}: no such ONNX file; write one with: edgekit export BUNDLE --to onnx -o DIRECTORY")
    return Path(source).read_bytes()


def holds_float16(graph: bytes) -> bool:
    """Return whether the graph stores a float16 value or casts to float16."""
    from onnx import TensorProto, load_from_string

    model = load_from_string(graph).graph
    cast = (item.i for node in model.node if node.op_type == "Cast" for item in node.attribute if item.name == "to")
    dtypes = {tensor.data_type for tensor in model.initializer} | set(cast)
    return int(TensorProto.FLOAT16) in dtypes


def _cpu() -> str:
    """Return this machine's name for its processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _read_plans(path: Path | None) -> dict[str, BatchPlan]:
    if path is None or not path.is_file():
        return {}
    try:
        return {key: BatchPlan(**values) for key, values in json.loads(path.read_text()).items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise EdgekitError(
            f"{path}: not a file of plans ({error}); delete it, and the session will measure again"
        ) from None


def _write_plans(path: Path | None, plans: Mapping[str, BatchPlan]) -> None:
    """Write the plans. Two processes that measure at the same time may lose one plan, but never the file."""
    if path is not None:
        write_file(path, (json.dumps({key: asdict(plan) for key, plan in plans.items()}, indent=1) + "\n").encode())
