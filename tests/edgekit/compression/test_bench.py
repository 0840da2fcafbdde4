"""`edgekit.bench` and `edgekit.bench_target`: a row for every model and batch size, a planted slowness, and the
caller's own rows."""

import sys
import time
from dataclasses import replace

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgekit.bundle.format import Manifest, assemble_graph
from edgekit.bundle.tensors import TensorSpec
from edgekit.compression.bench import bench, bench_target
from edgekit.cost import operators
from edgekit.errors import EdgekitError
from edgekit.targets import local
from tests.conftest import FakeSession


class Slow(FakeSession):
    """Works three milliseconds longer once the model has codes."""

    def run(self, arrays):
        until = time.process_time() + (3e-3 if self.codes else 0)
        outputs = super().run(arrays)
        while time.process_time() < until:
            pass
        return outputs

    def __init__(self, bundle, **options):
        super().__init__(bundle, **options)
        self.codes = bool(bundle.encodings())


def test_a_planted_slowness_is_in_the_speedup_of_its_model_alone(register, toy):
    register("edgekit.sessions", "slow", Slow)
    rows = bench([toy(), toy("palette")], batches=(1, 4), runtime="slow", seconds=0.1)
    assert [row.batch for row in rows] == [1, 1, 4, 4]
    for first, second in (rows[:2], rows[2:]):
        assert first.speedup == 1.0
        assert second.speedup_high < 0.8
        assert second.cpu_p50_ms >= 3
        assert first.p50_ms <= first.p90_ms <= first.p99_ms


def test_the_callers_rows_are_what_is_run(register, toy):
    seen = []

    class Looks(FakeSession):
        def run(self, arrays):
            seen.append(arrays["light_curve"].copy())
            return super().run(arrays)

    register("edgekit.sessions", "looks", Looks)
    bench(toy(), data={"light_curve": np.full((1, 12, 2), 0.25)}, batches=(3,), runtime="looks", seconds=0.01)
    assert {array.shape for array in seen} == {(3, 12, 2)}
    assert all((array == 0.25).all() for array in seen)


@pytest.fixture
def rates(monkeypatch):
    """The measured rates are 1 operation and 1 TB a second; the result lists the measurements."""
    measured = []
    monkeypatch.setattr(operators, "measured_rates", lambda: measured.append(1) or operators.Rates(1.0, 1e12))
    return measured


def test_the_roofline_counts_the_lengths_of_the_rows_that_are_run(rates, register):
    """y = x W for tokens of 8 numbers: 64 tokens take 32 times the operations of 2."""
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ("batch", "tokens", 8)) for name in "xy"]
    stored = [numpy_helper.from_array(np.eye(8, dtype=np.float32), "w")]
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"], "m")], "g", ends[:1], ends[1:], stored)
    content = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()
    spec = TensorSpec("x", ("batch", "tokens", 8))
    golden = ({"x": np.ones((1, 2, 8), np.float32)}, {"y": np.ones((1, 2, 8), np.float32)})
    bundle = assemble_graph(Manifest("m", "onnx", {}, (spec,), (replace(spec, name="y"),)), content, golden)

    def least(**options):
        (row,) = bench(bundle, batches=(1,), seconds=0.01, **options)
        return row.roofline * row.cpu_p50_ms / 1e3

    assert least() == pytest.approx(2 * 2 * 8 * 8)
    assert least(data={"x": np.ones((1, 64, 8), np.float32)}) == pytest.approx(2 * 64 * 8 * 8)


def test_models_are_compared_with_one_measurement_of_the_machine(rates, register, toy):
    register("edgekit.sessions", "slow", Slow)
    rows = bench([toy(), toy(embed_dim=32)], batches=(1, 4), runtime="slow", seconds=0.01)
    assert rates == [1]
    assert all(row.roofline > 0 for row in rows)
    assert bench(toy(), batches=(1,), runtime="slow", threads=2, seconds=0.01)[0].roofline is None
    assert rates == [1]


@pytest.mark.parametrize("missing", ["onnx", "onnxruntime"])
def test_without_onnx_a_model_is_timed_and_its_roofline_is_unknown(missing, rates, register, toy, monkeypatch):
    register("edgekit.sessions", "slow", Slow)
    monkeypatch.setitem(sys.modules, missing, None)
    (row,) = bench(toy(), batches=(1,), runtime="slow", seconds=0.01)
    assert row.roofline is None
    assert row.cpu_p50_ms > 0


def test_a_model_that_is_not_there_is_an_error():
    with pytest.raises(EdgekitError, match=r"nothing\.edge"):
        bench(["t2-gr", "nothing.edge"])


def test_models_on_a_target_are_reported_by_model_and_batch_size(toy):
    small, large = toy(rows=2), toy(rows=2, embed_dim=64)
    reports = bench_target([small, large], "jetson-nano", batches=(1, 256))
    assert [(report.model, report.batch) for report in reports] == [
        (bundle.manifest.name, batch) for bundle in (small, large) for batch in (1, 256)
    ]
    assert all(report.measured is None for report in reports)
    assert reports[3].estimate > reports[1].estimate > reports[0].estimate
    plain = reports[0].to_json(layers=True)
    assert plain["fits"]
    assert len(plain["rows"]) > len(reports[0].to_json()["rows"])


def test_options_of_a_target_are_refused_on_this_machine(toy, monkeypatch):
    monkeypatch.setattr(local, "is_here", lambda target: target.name == "x86-avx512")
    for options in ({"precision": "float32"}, {"power": "15W"}, {"threads": 2}):
        with pytest.raises(EdgekitError, match=r"x86-avx512 is this machine, .*leave precision, power and threads out"):
            bench_target(toy(), "x86-avx512", **options)


def test_a_target_needs_onnx_and_the_error_names_the_extra(toy, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(EdgekitError, match=r"estimating on a target needs onnx, .*edgekit\[onnx\]"):
        bench_target(toy(), "jetson-nano")
