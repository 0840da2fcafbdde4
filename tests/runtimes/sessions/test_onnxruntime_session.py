"""ONNX Runtime: providers that really run, plans that change no number, and files that were exported before."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnxruntime
import pytest

from edgekit.bundle.format import KEY, model_key
from edgekit.bundle.store import write_bundle
from edgekit.bundle.tensors import golden_inputs
from edgekit.errors import EdgekitError
from edgekit.graph import lower as lowering
from exporters.onnx_export import FLOAT, QUANTISED, OnnxExporter
from runtimes.sessions import onnxruntime_session as module
from runtimes.sessions.onnxruntime_session import BatchPlan, OnnxRuntimeSession
from runtimes.sessions.torch_session import TorchSession
from tests.toys import toy_bundle

MODELS = {
    "plain": toy_bundle(),
    "context": toy_bundle(context=2),
    "layers": toy_bundle(layers=2),
    "palette": toy_bundle("palette"),
}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Use short trials, and forget the plans of other tests."""
    monkeypatch.setattr(module, "TRIAL_SECONDS", 0.001)
    monkeypatch.setattr(module, "_measured", {})


def test_inputs_that_the_graph_cannot_take_are_one_line(monkeypatch):
    """An example is a token id beyond the vocabulary, which only the runtime can check."""
    bundle = MODELS["plain"]
    rows = bundle.golden()[0]

    def refuses(*arguments):
        raise IndexError("index 99 is out of range\nand more lines")

    session = OnnxRuntimeSession(bundle, threads=1, chunk=4)
    session._sessions = {1: SimpleNamespace(run=refuses)}
    with pytest.raises(EdgekitError, match=r"onnxruntime cannot run .*\(4, 12, 2\)}: index 99 is out of range$"):
        session.run(rows)
    torch_session = TorchSession(bundle)
    torch_session._network = refuses
    with pytest.raises(EdgekitError, match=r"torch cannot run .*\(6, 12, 2\)}: index 99 is out of range$"):
        torch_session.run(rows)


def test_absent_provider_is_refused_with_what_is_there():
    with pytest.raises(EdgekitError, match=r"has no 'NoSuchProvider' here; it has .*CPUExecutionProvider"):
        OnnxRuntimeSession(MODELS["plain"], provider="NoSuchProvider")


def test_provider_that_does_not_take_the_model_is_refused(monkeypatch):
    """ONNX Runtime would run all of it on the CPU and say nothing."""
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["Azure", "CPUExecutionProvider"])
    with pytest.raises(EdgekitError, match=r"cannot run this model on Azure|did not start Azure"):
        OnnxRuntimeSession(MODELS["plain"], provider="Azure")


class Installed:
    """A stand-in for onnxruntime-gpu. started: the providers that a session really started; lost: operators that it
    runs on the CPU, by their outputs."""

    def __init__(self, monkeypatch, started, **lost):
        self.started, self.asked, self.lost, self.prefix = started, [], lost, ""
        monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CUDA, "CPUExecutionProvider"])
        monkeypatch.setattr(onnxruntime, "InferenceSession", self.open)

    def open(self, graph, options, providers, disabled_optimizers=None):
        self.asked = providers
        if options.enable_profiling:
            self.prefix = options.profile_file_prefix
        return self

    def end_profiling(self):
        nodes = [("MatMul", CUDA, {"float": [2, 5]})]
        nodes += [(name, "CPUExecutionProvider", made) for name, made in self.lost.items()]
        events = [
            {"args": {"op_name": name, "provider": provider, "output_type_shape": [made]}}
            for name, provider, made in nodes
        ]
        path = Path(f"{self.prefix}_1.json")
        path.write_text(json.dumps([{"name": "session_initialization"}, *events]))
        return str(path)

    def get_providers(self):
        return self.started

    def get_modelmeta(self):
        return SimpleNamespace(custom_metadata_map={KEY: model_key(MODELS["plain"])})

    def run(self, names, arrays):
        return [np.full((len(arrays["light_curve"]), 5), 0.2, np.float32)]


CUDA = "CUDAExecutionProvider"


def test_a_gpu_that_starts_is_what_the_session_says_it_is(monkeypatch):
    there = Installed(monkeypatch, [CUDA, "CPUExecutionProvider"])
    loaded = []
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: loaded.append(len(there.asked)), raising=False)
    session = OnnxRuntimeSession(MODELS["plain"], provider=CUDA)
    assert loaded == [0], "CUDA's libraries first: a session opened before them falls back"
    assert there.asked == [CUDA], "the CPU is no second choice"
    assert session.provider == session.device == CUDA
    assert session.run(MODELS["plain"].golden()[0])["probabilities"].shape == (6, 5)


def test_a_shape_may_be_computed_beside_the_gpu_and_numbers_may_not(monkeypatch):
    """ONNX Runtime computes values that come from a Shape on the CPU for every GPU (its issue 17930)."""
    Installed(monkeypatch, [CUDA], Shape={"int64": [3]}, Sqrt={"float": []})
    assert OnnxRuntimeSession(MODELS["plain"], provider=CUDA).provider == CUDA
    Installed(monkeypatch, [CUDA], Shape={"int64": [3]}, Softmax={"float16": [2, 5]})
    with pytest.raises(EdgekitError, match="would run Softmax on the CPU, not on CUDAExecutionProvider"):
        OnnxRuntimeSession(MODELS["plain"], provider=CUDA)


@pytest.mark.parametrize("started", [["CPUExecutionProvider"], ["CPUExecutionProvider", CUDA]])
def test_a_gpu_that_does_not_start_is_an_error_and_no_slow_run(monkeypatch, started):
    """An example is CUDA libraries of the wrong version: the provider is listed, and the session runs on the CPU."""
    Installed(monkeypatch, started)
    with pytest.raises(EdgekitError, match="did not start CUDAExecutionProvider, it fell back to CPUExecutionProvider"):
        OnnxRuntimeSession(MODELS["plain"], provider=CUDA)


def test_a_gpu_build_that_is_not_there_is_named_with_its_install_line(monkeypatch):
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(EdgekitError, match=r"has no 'CUDAExecutionProvider' here.*pip install 'edgekit\[gpu\]'"):
        OnnxRuntimeSession(MODELS["plain"], provider=CUDA)
    both = [SimpleNamespace(metadata={"Name": name}, version="1.26.0") for name in ("onnxruntime", "onnxruntime-gpu")]
    monkeypatch.setattr("edgekit.doctor.extras.distributions", lambda: both)
    with pytest.raises(EdgekitError, match=r"onnxruntime 1.26.0 and onnxruntime-gpu 1.26.0 cannot work together"):
        OnnxRuntimeSession(MODELS["plain"], provider=CUDA)


@pytest.mark.parametrize(
    "plan",
    [BatchPlan(1, 1, 1), BatchPlan(1, 2, 7), BatchPlan(2, 1, 3), BatchPlan(3, 1, 64), BatchPlan(1, 1, 100)],
    ids=str,
)
def test_rows_come_out_the_same_and_in_order_whatever_the_plan(plan):
    bundle = MODELS["context"]
    rows = golden_inputs(bundle.manifest.inputs, 53)
    expected = TorchSession(bundle).run(rows)["probabilities"]
    got = OnnxRuntimeSession(bundle)._run_plan(plan, rows, 53)["probabilities"]
    np.testing.assert_allclose(got, expected, atol=1e-6)
    assert np.abs(got - np.roll(got, 1, axis=0)).max() > 1e-4  # the rows differ, so an exchange would have shown


def test_first_large_batch_chooses_a_plan_and_small_ones_have_their_own():
    bundle = MODELS["plain"]
    session = OnnxRuntimeSession(bundle, threads=2)
    assert session.plan is None
    session.warmup(1)
    assert session.plan is None
    assert session.small_plan.workers == 1
    session.warmup(40)
    assert session.plan.origin == "measured"
    assert session.plan.rows_per_second > 0
    assert session.plan.workers * session.plan.threads == 2
    assert OnnxRuntimeSession(bundle, threads=2)._choose("large", bundle.golden()[0], 6) is session.plan  # per process


def test_measuring_picks_the_fastest(monkeypatch):
    """The test has its own clock."""
    session = OnnxRuntimeSession(MODELS["plain"], threads=2)
    inputs = MODELS["plain"].golden()[0]
    now, cost = [0.0], {}

    def run_plan(plan, arrays, batch):
        now[0] += cost.get((plan.threads, plan.chunk), 0.050)
        return {}

    def call(threads, arrays):
        now[0] += 1e-5
        return {}

    monkeypatch.setattr(session, "_run_plan", run_plan)
    monkeypatch.setattr(session, "_call", call)
    monkeypatch.setattr(module, "TRIAL_SECONDS", 0.02)
    for clock in ("thread_time", "perf_counter"):
        monkeypatch.setattr(module.time, clock, lambda: now[0])

    def chosen(size):
        module._measured.clear()
        plan = session._choose(size, inputs, 6)
        return plan.workers, plan.threads, plan.chunk

    cost[1, 4] = 0.010
    assert chosen("large") == (2, 1, 4)
    cost[1, 4] = 0.049  # within the noise: the plan that needs the least memory
    assert chosen("large") == (2, 1, 1)
    assert chosen("small") == (1, 1, 8)  # nor is a second core taken for nothing
    cost[2, 8] = 0.030
    assert chosen("small") == (1, 2, 8)


def test_given_numbers_are_taken_and_not_measured():
    session = OnnxRuntimeSession(MODELS["plain"], threads=1, chunk=5)
    session.warmup(3)
    assert str(session.plan) == "1 worker of 1 thread, 5 rows at a time (given)"
    with pytest.raises(EdgekitError, match="chunk = 0"):
        OnnxRuntimeSession(MODELS["plain"], chunk=0)


def test_plans_are_kept_in_a_file_and_belong_to_one_model(tmp_path):
    path = tmp_path / "cache" / "plans.json"
    OnnxRuntimeSession(MODELS["plain"], threads=2, plan_file=path).warmup(20)
    module._measured.clear()
    again = OnnxRuntimeSession(MODELS["plain"], threads=2, plan_file=path)
    again.warmup(20)
    assert again.plan.origin == "cached"
    other = OnnxRuntimeSession(MODELS["layers"], threads=2, plan_file=path)
    other.warmup(20)
    assert other.plan.origin == "measured"
    assert len(json.loads(path.read_text())) == 2
    module._measured.clear()
    path.write_text("{'")
    with pytest.raises(EdgekitError, match="not a file of plans"):
        OnnxRuntimeSession(MODELS["plain"], threads=2, plan_file=path).warmup(20)


@pytest.mark.parametrize("file", [FLOAT, QUANTISED])
def test_an_exported_file_runs_and_only_for_its_own_bundle(file, tmp_path, monkeypatch):
    bundle = MODELS["palette"]
    OnnxExporter().export(bundle, tmp_path / "out")
    monkeypatch.setattr(lowering, "lower", lambda *_, **options: pytest.fail("exported again"))
    inputs, expected = bundle.golden()
    session = OnnxRuntimeSession(bundle, source=tmp_path / "out" / file)
    np.testing.assert_allclose(session.run(inputs)["probabilities"], expected["probabilities"], atol=2e-6)
    with pytest.raises(EdgekitError, match="not an export of toy as it is now"):
        OnnxRuntimeSession(MODELS["plain"], source=tmp_path / "out" / file)
    with pytest.raises(EdgekitError, match="no such ONNX file"):
        OnnxRuntimeSession(bundle, source=tmp_path / "nowhere.onnx")


def test_a_device_without_torch_runs_an_exported_file(tmp_path):
    bundle = MODELS["plain"]
    OnnxExporter().export(bundle, tmp_path / "out")
    write_bundle(bundle, tmp_path / "toy.edge")
    program = """
import sys
sys.modules["torch"] = None  # as if it were not installed
from edgekit.bundle.store import open_bundle
from edgekit.session import open_session
open_session(open_bundle(sys.argv[1]), "onnxruntime", source=sys.argv[2]).warmup(9)
"""
    command = [sys.executable, "-c", program, tmp_path / "toy.edge", tmp_path / "out" / FLOAT]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
