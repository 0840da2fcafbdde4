"""`edgekit.bench` and `edgekit.bench_target`: a row for every model and batch size, a planted slowness, and the
caller's own rows."""

import sys
import time

import numpy as np
import pytest

from edgekit.compression.bench import bench, bench_target
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
