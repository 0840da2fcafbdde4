"""The operators that ONNX Runtime really runs for a graph on this machine's CPU, and their times."""

from __future__ import annotations

import functools
import json
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import ModelProto, TensorProto

from edgekit.cost.operators import Workload, work
from edgekit.cost.timing import GRAIN as GRAIN_OF_CLOCK
from edgekit.cost.timing import in_turns, timed
from edgekit.errors import EdgekitError, missing_extra
from edgekit.graph.shapes import Value, sized

try:
    import onnxruntime
except ModuleNotFoundError as error:
    raise missing_extra(error.name or "onnxruntime", "onnx", "timing a graph") from None

Arrays = Mapping[str, npt.NDArray[Any]]
GRAIN = 0.5e-6  # seconds; the profiler cuts off fractions of a microsecond, on average half of one
LEAST_RUNS, MOST_RUNS, WARM_RUNS, FIRST_RUNS = 7, 400, 3, 2  # FIRST_RUNS of the WARM_RUNS are not timed
WHOLE = 0.95  # the share of wall time that the run itself must have had
BLOCKED = "_nchwc"  # ONNX Runtime's suffix for results in its blocked channel layout


@dataclass(frozen=True, slots=True)
class Kernel:
    """One operator as it ran. seconds: of a call that no other program interrupted."""

    name: str
    op_type: str
    seconds: float


def open_model(model: ModelProto, threads: int = 1, **settings: Any) -> Any:
    """Open a session on the CPU; `settings` are attributes of SessionOptions."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    for name, value in settings.items():
        setattr(options, name, value)
    # onnxruntime 1.32 crashes when it changes the layout of float16 graphs for convolutions (its issue 28392).
    avoided = ["NchwcTransformer"] if _holds_float16(model) else None
    try:
        return onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"], disabled_optimizers=avoided
        )
    except Exception as error:  # the exceptions of onnxruntime share no base class
        raise EdgekitError(f"onnxruntime cannot run this model here: {str(error).splitlines()[0]}") from error


def optimized_work(model: ModelProto, batch: int, lengths: Mapping[str, int] | None = None) -> Workload:
    """Return the operators that ONNX Runtime runs instead of the graph's own. Nothing runs: ONNX Runtime writes the
    graph that it has rewritten, in which results keep their names."""
    with tempfile.TemporaryDirectory(prefix="edgekit-") as folder:
        path = Path(folder) / "optimized.onnx"
        open_model(model, optimized_model_filepath=str(path))
        rewritten = onnx.load(path)
    before = sized(model, batch, lengths).values
    also = {**before, **_blocked(rewritten, before)}
    stored = {tensor.name for tensor in rewritten.graph.initializer}
    return work(rewritten, sized(rewritten, batch, lengths, {k: v for k, v in also.items() if k not in stored}))


def _blocked(model: ModelProto, values: Mapping[str, Value]) -> dict[str, Value]:
    """Return results in ONNX Runtime's blocked layout, which have as many numbers as in the plain one but other
    names."""
    found: dict[str, Value] = {}
    for node in model.graph.node:
        if node.domain != "com.microsoft.nchwc":
            continue
        plain = values.get(node.name.removesuffix(BLOCKED)) if node.name.endswith(BLOCKED) else None
        if plain is None and node.op_type == "ReorderInput":
            plain = values.get(node.input[0]) or found.get(node.input[0])
        if plain is not None:
            found[node.output[0]] = plain
    return found


def profiled(model: ModelProto, feeds: Arrays, *, seconds: float = 0.2, threads: int = 1) -> list[Kernel]:
    """Return the operators in the order in which they ran, with the time of each."""
    with tempfile.TemporaryDirectory(prefix="edgekit-") as folder:
        session = open_model(model, threads, enable_profiling=True, profile_file_prefix=str(Path(folder) / "run"))
        run = timed(functools.partial(session.run, None, dict(feeds)), time.perf_counter, time.thread_time)
        least = LEAST_RUNS + WARM_RUNS - FIRST_RUNS
        clock, spent = in_turns([run], seconds=seconds, least=least, most=MOST_RUNS, warmup=FIRST_RUNS)[:, 0].T
        # for each run, the share of wall time in which the thread ran; the profiler also records the discarded runs
        alone = [0.0] * FIRST_RUNS + list(spent / np.maximum(clock, GRAIN_OF_CLOCK))
        events = json.loads(Path(session.end_profiling()).read_text("utf-8"))
    taken: dict[str, list[float]] = {}
    op_types: dict[str, str] = {}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            name = event["name"].removesuffix("_kernel_time")
            op_types.setdefault(name, event["args"]["op_name"])
            taken.setdefault(name, []).append(event["dur"] * 1e-6)
    whole = _uninterrupted(alone) if threads == 1 else list(range(WARM_RUNS, len(alone)))
    kernels = []
    for name, times in taken.items():
        chosen = [times[run] for run in whole] if len(times) == len(alone) else times
        kernels.append(Kernel(name, op_types[name], _middle(chosen) + GRAIN))
    return kernels


def _uninterrupted(alone: list[float]) -> list[int]:
    """Return the runs in which no other program used the core: the profiler reads wall time, which includes such
    interruptions."""
    order = sorted(range(WARM_RUNS, len(alone)), key=lambda run: -alone[run])
    return [run for run in order if alone[run] > WHOLE] or order[: max(1, len(order) // 4)]


def _middle(times: list[float]) -> float:
    """Return the mean of the middle half: for short kernels timed in whole microseconds it is more precise than the
    median."""
    calls = sorted(times)
    cut = len(calls) // 4
    return float(np.mean(calls[cut : len(calls) - cut]))


def _holds_float16(model: ModelProto) -> bool:
    stored = any(tensor.data_type == TensorProto.FLOAT16 for tensor in model.graph.initializer)
    cast = (item.i for node in model.graph.node if node.op_type == "Cast" for item in node.attribute)
    return stored or TensorProto.FLOAT16 in cast


def random_feeds(model: ModelProto, batch: int, lengths: Mapping[str, int] | None = None, seed: int = 0) -> Arrays:
    """Return inputs of the right shapes: normal numbers, and zeros for integers, which may be indices."""
    values = sized(model, batch, lengths).values
    rng = np.random.default_rng(seed)
    stored = {tensor.name for tensor in model.graph.initializer}
    feeds = {}
    for item in model.graph.input:
        if item.name not in stored:
            value = values[item.name]
            dtype = onnx.helper.tensor_dtype_to_np_dtype(value.dtype)
            whole = np.dtype(dtype).kind in "iub"
            feeds[item.name] = (np.zeros(value.shape) if whole else rng.normal(0, 1, value.shape)).astype(dtype)
    return feeds
