"""Graphs of every signature are imported, run row by row as the graph itself does, exported, and checked for damage."""

import subprocess
import sys
from dataclasses import replace
from functools import cache

import numpy as np
import onnxruntime
import pytest

import edgekit
from edgekit.bundle.format import GRAPH, assemble_graph
from edgekit.bundle.store import open_bundle, write_bundle
from edgekit.compression.bench import bench
from edgekit.errors import EdgekitError
from edgekit.exporter import export
from edgekit.graph.lower import lower
from edgekit.passes.base import Context, GraphCandidate
from edgekit.passes.dynamic_int8 import DynamicInt8
from edgekit.session import open_session
from exporters.damage import check_golden, sensitivity, with_tensors
from exporters.verify import on_onnxruntime, verify
from tests.edgekit.signature_graphs import (
    FEATURES,
    HIDDEN,
    branching,
    classifying_gru,
    gain,
    growing,
    gru,
    linear,
    power,
    running_sum,
    two_sequences,
)

STATE = {"before": "after"}
# name: graph, state, rows' shape and own axes of each tensor that has its own, rows of a call
CASES = {
    "batch in the middle": (gru(), STATE, {"x": ("batch", "time", 4), "before": ("batch", 1, 6)}, None),
    "no name for the batch": (gru(batch=None, time=3), STATE, {"x": ("batch", 3, 4), "before": ("batch", 1, 6)}, None),
    "time before the batch": (gru(state=False), {}, {"x": ("batch", "time", 4)}, None),
    "batch of one": (gru(batch=1, time=3), STATE, {}, 1),
    "batch fixed at one, first": (linear((1, FEATURES), (1, HIDDEN)), {}, {}, 1),
    "batch fixed at three": (linear((3, FEATURES), (3, HIDDEN)), {}, {}, 3),
    "minus one": (linear((-1, FEATURES), (-1, HIDDEN)), {}, {}, None),
    "a scalar": (gain(), {}, {"gain": ("batch",)}, None),
    "no batch": (linear((FEATURES,), (HIDDEN,)), {}, {"x": ("batch", FEATURES)}, 1),
    "two sequences": (two_sequences(), {}, {}, None),
}


@cache
def of_case(name):
    graph, state, shapes, rows = CASES[name]
    return edgekit.import_onnx(graph, name="case", state=state), graph, shapes, rows


def alone(graph, spec_of, rows, row, outputs):
    """The outputs of one row, out of the graph itself, whose tensors this function places by hand."""
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    fed = {}
    for value in session.get_inputs():
        spec, array = spec_of[value.name], rows[value.name][row]
        own = spec.own_axes
        fed[value.name] = np.expand_dims(array, own.index("batch")) if "batch" in own else np.asarray(array)
        if "batch" in own and value.shape[own.index("batch")] == 3:
            fed[value.name] = np.repeat(fed[value.name], 3, axis=own.index("batch"))
    found = dict(zip(outputs, session.run(list(outputs), fed), strict=True))
    return {
        name: np.take(array, 0, axis=spec_of[name].own_axes.index("batch"))
        if "batch" in spec_of[name].own_axes
        else array
        for name, array in found.items()
    }


@pytest.mark.parametrize("name", CASES)
def test_rows_give_what_the_graph_gives_for_each_alone(name):
    bundle, graph, shapes, per_call = of_case(name)
    manifest = bundle.manifest
    assert manifest.rows_per_call == per_call
    assert {spec.name: spec.shape for spec in manifest.inputs if spec.name in shapes} == shapes
    inputs, stored = bundle.golden()
    spec_of = {spec.name: spec for spec in (*manifest.inputs, *manifest.outputs)}
    for runtime in ("onnxruntime", "openvino"):
        found = open_session(bundle, runtime, threads=1).run(inputs)
        for row in range(len(next(iter(inputs.values())))):
            wanted = alone(graph, spec_of, inputs, row, found)
            for output, array in found.items():
                assert array[row].shape == wanted[output].shape
                assert np.abs(array[row] - wanted[output]).max() < 1e-5
                assert np.abs(stored[output][row] - wanted[output]).max() < 1e-5


def test_golden_states_are_zero_or_reached_by_the_model():
    bundle = of_case("batch in the middle")[0]
    inputs, _ = bundle.golden()
    assert not inputs["before"][::2].any()
    now = dict(inputs, before=np.zeros_like(inputs["before"]))
    for _ in range(2):
        now["before"] = open_session(bundle, "onnxruntime", threads=1).run(now)["after"]
    assert np.abs(now["before"]).min() > 0
    assert np.array_equal(inputs["before"][1::2], now["before"][1::2])


@pytest.mark.parametrize("name", CASES)
def test_bundles_are_the_same_after_they_were_written(name, tmp_path):
    bundle = of_case(name)[0]
    written = write_bundle(bundle, tmp_path / "m.edge")
    again = open_bundle(str(tmp_path / "m.edge"))
    assert again.manifest == written.manifest
    assert again.manifest.format == (1 if name in ("minus one", "two sequences") else 2)


EXPORTS = [
    *(
        (name, "onnx")
        for name in ("batch in the middle", "batch of one", "batch fixed at three", "a scalar", "no batch")
    ),
    *((name, "openvino") for name in ("batch in the middle", "batch of one")),
]


@pytest.mark.parametrize(("name", "to"), EXPORTS)
def test_exports_check_themselves_on_the_device(name, to, tmp_path):
    bundle = of_case(name)[0]
    done = export(bundle, tmp_path / "x", to=to)
    assert done.manifest["golden"]["rows"]["tried"] > 0
    script = subprocess.run([sys.executable, tmp_path / "x" / "verify.py"], capture_output=True, text=True, check=False)
    assert (script.returncode, script.stdout.splitlines()[-1]) == (0, "PASS"), script.stdout + script.stderr


def test_a_kit_for_tensorrt_has_the_models_own_shapes(tmp_path):
    bundle = of_case("batch in the middle")[0]
    options = {"target": "tesla-p40", "axes": ("time=1:8:16", "batch=1:2:4")}
    done = export(bundle, tmp_path / "x", to="tensorrt", options=options)
    assert done.manifest["shapes"]["before"] == {"min": [1, 1, 6], "opt": [1, 2, 6], "max": [1, 4, 6]}
    assert (done.manifest["least_batch"], done.manifest["largest_batch"]) == (1, 4)
    command = [sys.executable, tmp_path / "x" / "verify.py", "--runtime", "onnxruntime"]
    script = subprocess.run(command, capture_output=True, text=True, check=False)
    assert script.returncode == 0, script.stdout + script.stderr


@pytest.mark.parametrize("name", ["batch in the middle", "batch of one"])
def test_damage_is_found_in_models_with_a_state(name):
    bundle = of_case(name)[0]
    model = lower(bundle)
    found = sensitivity(model, bundle, 1e-3)
    assert (found.found, found.blind, found.symmetric) == (found.tried, (), ())
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    half = 0.5 * np.frombuffer(weights["R"].raw_data, np.float32).reshape(weights["R"].dims)
    damaged = with_tensors(model, {"R": half.astype(np.float32)})
    with pytest.raises(EdgekitError, match="its outputs differ from the source network's by"):
        verify({"model.onnx": damaged.SerializeToString()}, bundle, batches=(1, 4), load=on_onnxruntime)


def test_a_difference_that_grows_with_the_state_is_found():
    """One call of the copy agrees within the tolerance. After eight calls that hand their state on, it does not."""
    bundle = edgekit.import_onnx(growing(), name="growing", state=STATE)
    copy = with_tensors(lower(bundle), {"rate": np.full(HIDDEN, 4.00002, np.float32)}).SerializeToString()
    options = {"tolerance": 1e-4, "batches": (1, 4)}
    without = replace(bundle, manifest=replace(bundle.manifest, state={}))
    assert max(check.difference for check in verify({"model.onnx": copy}, without, **options)) > 1e-6
    with pytest.raises(EdgekitError, match="after 8 calls that hand their state on"):
        verify({"model.onnx": copy}, bundle, **options)
    assert verify({"model.onnx": bundle.contents[GRAPH]}, bundle, **options)


def test_a_layer_that_is_squared_is_symmetric_and_others_are_not():
    bundle = edgekit.import_onnx(power(), name="power")
    found = sensitivity(lower(bundle), bundle, 1e-3)
    assert (found.symmetric, found.blind) == (("basis",), ())
    check_golden(lower(bundle), bundle, 1e-5, 1e-4)
    zero = {name: np.zeros_like(array) for name, array in bundle.golden()[0].items()}
    outputs = open_session(bundle, "onnxruntime", threads=1).run(zero)
    blind = assemble_graph(bundle.manifest, bundle.contents[GRAPH], (zero, outputs))
    with pytest.raises(EdgekitError, match="cannot tell a damaged model"):
        check_golden(lower(blind), blind, 1e-5, 1e-4)


def test_weights_in_branches_are_stored_by_the_graph_and_a_fixed_input_removes_the_branch(tmp_path):
    graph = branching()
    free = edgekit.import_onnx(graph, name="free")
    assert {tuple(tensor.dims) for tensor in free.graph().graph.initializer} >= {(4, 6)}
    assert set(free.golden()[0]["rate"]) == {16000}
    with pytest.raises(EdgekitError, match="cannot tell a damaged model"):
        export(free, tmp_path / "x", to="onnx")  # the rows never reach the other branch
    with pytest.raises(EdgekitError, match=r"the products are in branches of If 'if', .* --fix NAME=NUMBER"):
        DynamicInt8().apply(GraphCandidate(free.graph()), Context(None, None, 0))
    high = edgekit.import_onnx(graph, name="high", fix={"rate": 16000})
    low = edgekit.import_onnx(graph, name="low", fix={"rate": 8000})
    assert [node.op_type for node in high.graph().graph.node] == ["MatMul"]
    rows = {"x": free.golden()[0]["x"]}
    answers = [open_session(item, "onnxruntime", threads=1).run(rows)["y"] for item in (high, low)]
    session = onnxruntime.InferenceSession(graph.SerializeToString())
    for rate, found in zip((16000, 8000), answers, strict=True):
        assert np.abs(found - session.run(None, {**rows, "rate": np.array(rate)})[0]).max() < 1e-6
    assert np.abs(answers[0] - answers[1]).max() > 0.1
    export(high, tmp_path / "x", to="onnx")


@pytest.mark.parametrize(
    ("fix", "words"),
    [
        ({"rat": 1}, "nothing to fix is called 'rat'; it has x, rate"),
        ({"rate": 1.5}, "rate = 1.5 cannot be fixed; expected one int64"),
        ({"x[1]": 8}, "nothing to fix is called"),
        ({"batch": 0}, "cannot have the length 0"),
    ],
)
def test_what_cannot_be_fixed_is_named(fix, words):
    with pytest.raises(EdgekitError, match=words):
        edgekit.import_onnx(branching(), fix=fix)


def test_rows_that_depend_on_one_another_are_no_batch():
    """Sums along the first axis, whose name does not say so, beside an input without it: a row is a call."""
    bundle = edgekit.import_onnx(running_sum(), name="sums")
    assert bundle.manifest.rows_per_call == 1
    assert bundle.manifest.inputs[0].own_axes == ("n", FEATURES)


def test_the_guard_measures_a_recurrent_model_and_the_result_keeps_its_signature():
    bundle = edgekit.import_onnx(classifying_gru(), name="classes", state=STATE)
    random = np.random.default_rng(4)
    rows = {
        "x": random.standard_normal((64, 7, FEATURES)).astype(np.float32),
        "before": random.standard_normal((64, 1, HIDDEN)).astype(np.float32),
    }
    labels = open_session(bundle, "onnxruntime", threads=1).run(rows)["logits"].argmax(-1)
    found = edgekit.compress(
        bundle,
        data={**rows, "labels": labels.astype(np.int64), "split": np.arange(64) % 2},
        recipe=[("weight_only", {"bits": 8})],
        metric="error-rate",
        max_loss=0.2,
        objective="size",
        batches=(1, 4),
    )
    assert [record.kept for record in found.records] == [True], [record.reason for record in found.records]
    assert found.bundle.manifest.inputs == bundle.manifest.inputs
    assert found.bundle.manifest.outputs == bundle.manifest.outputs
    assert found.bundle.manifest.state == STATE
    answers = open_session(found.bundle, "onnxruntime", threads=1).run(rows)["logits"].argmax(-1)
    assert np.mean(answers != labels) <= 0.2


def test_times_of_calls_of_a_fixed_number_of_rows():
    bundle = of_case("batch fixed at three")[0]
    one, seven = bench(bundle, batches=(3, 7), seconds=0.05)
    assert one.roofline is not None
    least = [row.roofline * row.cpu_p50_ms for row in (one, seven)]
    assert abs(least[1] / least[0] - 3) < 1e-6  # seven rows take three calls
    with pytest.raises(EdgekitError, match=r"each call takes 3 rows, so a batch of 16 is no call .* give --batch 3"):
        edgekit.bench_target(bundle, "jetson-nano", batches=(16,))
    assert edgekit.bench_target(bundle, "jetson-nano", batches=(3,))[0].memory.fits
