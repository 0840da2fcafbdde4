"""The table of measured operators: the fit against scipy, the table against times that follow a known law."""

import json

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper
from scipy.optimize import nnls

from edgekit.cost import measured
from edgekit.cost.measured import TERMS, OperatorTable, family, non_negative, relative_fit, terms
from edgekit.cost.operators import work
from edgekit.cost.profiled import Kernel, open_model, optimized_work, profiled, random_feeds
from edgekit.cost.samples import ALIKE, ROWS, samples
from edgekit.errors import EdgekitError
from edgekit.graph.shapes import sized

SAMPLES = samples()


@pytest.mark.parametrize("seed", range(20))
def test_least_squares_without_negative_weights_is_scipys(seed):
    rng = np.random.default_rng(seed)
    matrix = rng.random((rng.integers(6, 30), 6)) ** 3
    target = matrix @ np.maximum(rng.normal(0, 1, 6), 0) + rng.normal(0, 0.2, len(matrix))
    expected, _ = nnls(matrix, target)
    np.testing.assert_allclose(non_negative(matrix, target), expected, atol=1e-8)


def test_planted_plain_least_squares_would_go_below_zero():
    rng = np.random.default_rng(1)
    matrix = rng.random((12, 6))
    target = matrix @ np.array([1, -1, 1, 0, 0, 1.0])
    assert np.linalg.lstsq(matrix, target, rcond=None)[0].min() < -0.5
    assert non_negative(matrix, target).min() >= 0


def test_small_times_count_as_much_as_large_ones():
    """The fit finds a law with a constant of microseconds among milliseconds, over nine orders of magnitude."""
    rng = np.random.default_rng(0)
    matrix = np.stack([np.ones(30), *(10.0 ** rng.uniform(0, 9, 30) for _ in range(3))], axis=1)
    law = np.array([3e-6, 0.0, 2e-11, 4e-12])
    np.testing.assert_allclose(relative_fit(matrix, matrix @ law), law, rtol=1e-6, atol=1e-20)


@pytest.fixture(scope="module")
def counted():
    """Return each graph of the calibration set and its operator as the runtime runs it."""
    found = []
    for sample in SAMPLES:
        done = optimized_work(sample.model, 1)
        found.append((sample, [item for item in done.operators if family(item) == sample.family]))
    return found


def test_every_sample_holds_the_operator_that_it_is_for(counted):
    """The operator is the one that the runtime runs: a Transpose that the runtime removes cannot be timed."""
    assert [sample.family for sample, operators in counted if not operators] == []


def test_every_family_has_samples_of_several_sizes(counted):
    sizes = {}
    for sample, operators in counted:
        sizes.setdefault(sample.family, set()).update(item.bytes for item in operators)
    assert {name for name, found in sizes.items() if len(found) < 4} <= {"Reshape"}
    wanted = set(ALIKE.values()) | {f"{name} row" for name in ROWS} | {"Reshape", "product with weights", "depthwise"}
    assert wanted <= set(sizes)


def test_a_table_finds_the_law_that_times_follow(counted, monkeypatch):
    """Times computed from a known law replace the profiler's."""
    law = dict(zip(TERMS, (3e-6, 1e-8, 2e-11, 5e-12, 3e-11, 1e-11), strict=True))

    def made_up(model, feeds, **options):
        operators = optimized_work(model, 1).operators
        return [
            Kernel(item.name, item.op_type, float(np.dot(list(law.values()), terms(item, 1 << 20, 16))))
            for item in operators
        ]

    monkeypatch.setattr(measured, "profiled", made_up)
    monkeypatch.setattr(measured, "_own_cache", lambda: 1 << 20)
    monkeypatch.setattr(measured, "cpu_flags", lambda: {"avx512f"})
    chosen = [
        sample for sample in SAMPLES if sample.family in ("product with weights", "Softmax", "Add", "Relu", "Sigmoid")
    ]
    table = measured.measure(chosen, facts={}, runtime="none")
    held_out = work(model := product(77, 200, 300), sized(model, 1)).operators[0]
    expected = float(np.dot(list(law.values()), terms(held_out, 1 << 20, 16)))
    assert table.seconds(held_out) == pytest.approx(expected, rel=1e-3)
    assert all(error < 1e-3 for error in table.error.values())


def product(rows, inner, columns):
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["a", "w"], ["y"], "product")],
        "held out",
        [helper.make_tensor_value_info("a", TensorProto.FLOAT, (rows, inner))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, (rows, columns))],
        [numpy_helper.from_array(np.ones((inner, columns), np.float32), "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def test_without_the_plainest_family_there_is_no_table():
    chosen = [sample for sample in SAMPLES if sample.family == "Softmax"][:4]
    with pytest.raises(EdgekitError, match="no sample of 'Add' was timed"):
        measured.measure(chosen, facts={}, runtime="none", seconds=0.001)


def test_real_times_are_fitted_and_ranked():
    """On this machine, a product with a hundred times the work must not be predicted to be fast."""
    chosen = [sample for sample in SAMPLES if sample.family in ("product with weights", "Add", "Relu", "Sigmoid")]
    table = measured.measure(chosen, facts={}, runtime="none", seconds=0.004)
    small, large = (work(m := product(*size), sized(m, 1)).operators[0] for size in ((20, 100, 100), (400, 500, 500)))
    assert 20 < table.seconds(large) / table.seconds(small) < 2000
    assert table.seconds(large) > 2 * 400 * 500 * 500 / 2e12, "faster than any core"
    assert table.of(small) >= 0


def test_a_table_is_kept_and_a_damaged_one_measured_again(tmp_path, monkeypatch):
    monkeypatch.setenv("EDGEKIT_CACHE", str(tmp_path))
    calls = []
    fake = OperatorTable(
        {"Add": (1e-6,) * len(TERMS)}, 1e-6, 0.0, 1 << 20, 16, 1.0, {"Add": 3}, {"Add": 0.1}, {"cpu": "x"}, "ort"
    )
    monkeypatch.setattr(measured, "measure", lambda *a, **k: calls.append(1) or fake)
    assert measured.table() == fake
    assert measured.table() == fake
    assert len(calls) == 1
    (path,) = (tmp_path / "operators").iterdir()
    path.write_text(json.dumps({"weights": {}}))
    assert measured.table() == fake
    assert len(calls) == 2
    monkeypatch.setattr(measured.machine, "describe", lambda: {"cpu": "another", "cores": 2, "system": "x"})
    measured.table()
    assert len(calls) == 3, "another machine has a table of its own"


def test_kernels_are_those_that_run():
    model = product(20, 30, 40)
    kernels = profiled(model, random_feeds(model, 1), seconds=0.01)
    assert [(kernel.name, kernel.op_type) for kernel in kernels] == [("product", "MatMul")]
    assert 0 < kernels[0].seconds < 0.05


def test_the_runtimes_own_operators_are_sized():
    """The runtime fuses a convolution with its Relu in a blocked channel layout, and the results have names of their
    own."""
    rng = np.random.default_rng(0)
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], "conv", pads=[1] * 4),
        helper.make_node("Relu", ["c"], ["r"], "relu"),
        helper.make_node("Conv", ["r", "v"], ["y"], "second", pads=[1] * 4),
    ]
    graph = helper.make_graph(
        nodes,
        "conv",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ("n", 16, 12, 12))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ("n", 32, 12, 12))],
        [
            numpy_helper.from_array(rng.random((32, 16, 3, 3), np.float32), "w"),
            numpy_helper.from_array(rng.random((32, 32, 3, 3), np.float32), "v"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    done = optimized_work(model, 3)
    assert done.unknown == ()
    products = [item for item in done.operators if item.product]
    assert [item.operations for item in products] == [2 * 3 * 32 * 144 * 16 * 9, 2 * 3 * 32 * 144 * 32 * 9]
    ran = {kernel.name for kernel in profiled(model, random_feeds(model, 3), seconds=0.01)}
    assert {item.name for item in done.operators} == ran


def test_a_model_that_does_not_run_is_one_line():
    broken = product(2, 3, 4)
    broken.graph.node[0].op_type = "NoSuchOperator"
    with pytest.raises(EdgekitError, match=r"onnxruntime cannot run this model here: [^\n]*$"):
        open_model(broken)
