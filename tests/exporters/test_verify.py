"""Verification: right files pass, and the error for each type of wrong file names the fault."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import edgekit
from edgekit.bundle.format import GOLDEN, Bundle, assemble_graph, with_files
from edgekit.bundle.tensors import arrays_to_bytes
from edgekit.data.dataset import UNKNOWN, Dataset
from edgekit.errors import EdgekitError
from edgekit.graph.lower import lower
from edgekit.importers.api import described
from edgekit.passes.base import Context, GraphCandidate
from edgekit.passes.dynamic_int8 import DynamicInt8
from exporters import verify as module
from exporters.damage import with_tensors
from exporters.onnx_export import FLOAT as FLOAT_FILE
from exporters.onnx_export import OnnxExporter
from exporters.verify import ROUNDING, Reference, on_onnxruntime, reference, verify
from tests.edgekit.signature_graphs import FEATURES, FLOAT, HIDDEN, model, numbers
from tests.exporters.stateful import build

BATCHES = (1, 4, 40)


def graph(bundle: Bundle) -> onnx.ModelProto:
    return lower(bundle, weights="float32")


def check(model: onnx.ModelProto, bundle: Bundle) -> list[module.Check]:
    return verify({FLOAT_FILE: model.SerializeToString()}, bundle, batches=BATCHES)


def test_a_right_graph_passes_at_every_batch(toy):
    bundle = toy(context=2)
    checks = check(graph(bundle), bundle)
    assert [item.batch for item in checks] == list(BATCHES)
    assert all(item.difference < 1e-6 and item.spread < 1e-6 and item.changed == 0 for item in checks)
    assert all(item.allowed == module.TOLERANCE for item in checks)


def test_a_weight_off_by_a_thousandth_is_caught(toy):
    bundle = toy()
    model = graph(bundle)
    weight = next(item for item in model.graph.initializer if item.name == "classifier.weight")
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * np.float32(1.001), weight.name))
    with pytest.raises(EdgekitError, match=r"model.onnx at batch 1: its outputs differ .* by [1-9].*allowed 1.0e-05"):
        check(model, bundle)


def test_golden_outputs_that_the_network_does_not_give_are_caught(toy):
    bundle = toy()
    inputs, expected = bundle.golden()
    wrong = {"out.probabilities": np.roll(expected["probabilities"], 1, axis=0)}
    content = arrays_to_bytes({f"in.{name}": array for name, array in inputs.items()} | wrong)
    with pytest.raises(EdgekitError, match="golden outputs by"):
        check(graph(bundle), with_files(bundle, {GOLDEN: content}))


def test_empty_golden_data_is_refused(toy):
    with pytest.raises(EdgekitError, match="no rows"):
        check(graph(toy()), toy(rows=0))


def worse_in_a_batch(model: onnx.ModelProto, error: float = 1e-6) -> None:
    """Adds the batch size times `error` to the logits of one class: right when alone, and wrong in a crowd."""
    nodes = list(model.graph.node)
    softmax = nodes.pop()
    shift = numpy_helper.from_array(np.array([error, 0, 0, 0, 0], np.float32), "shift")
    model.graph.initializer.append(shift)
    nodes += [
        helper.make_node("Shape", [softmax.input[0]], ["shape"], "shape", end=1),
        helper.make_node("Cast", ["shape"], ["count"], "count", to=TensorProto.FLOAT),
        helper.make_node("Mul", ["count", "shift"], ["error"], "error"),
        helper.make_node("Add", [softmax.input[0], "error"], ["shifted"], "shifted"),
        helper.make_node("Softmax", ["shifted"], softmax.output, "softmax"),
    ]
    model.graph.ClearField("node")
    model.graph.node.extend(nodes)


def test_a_graph_that_depends_on_the_batch_is_caught_at_the_batch_that_shows_it(toy):
    bundle = toy()
    model = graph(bundle)
    worse_in_a_batch(model)
    with pytest.raises(EdgekitError, match=r"at batch 1: the same row differs from one batch size to another"):
        verify({FLOAT_FILE: model.SerializeToString()}, bundle, batches=(1, 16, 1000))


def as_graph(bundle: Bundle, model: onnx.ModelProto) -> Bundle:
    """The bundle of this graph, its golden outputs as the graph gives them for all golden rows together."""
    (inputs, _), content = bundle.golden(), model.SerializeToString()
    manifest = replace(bundle.manifest, family="onnx", arguments={})
    outputs = module.on_onnxruntime(content).run(None, inputs)
    names = [spec.name for spec in manifest.outputs]
    return assemble_graph(manifest, content, (inputs, dict(zip(names, outputs, strict=True))))


def dynamic(bundle: Bundle) -> onnx.ModelProto:
    inputs, _ = bundle.golden()
    data = Dataset(inputs, np.full(len(inputs["light_curve"]), UNKNOWN))
    return DynamicInt8().apply(GraphCandidate(graph(bundle)), Context(data, None, seed=0)).model


def by_batch_size(bundle: Bundle) -> onnx.ModelProto:
    model = graph(bundle)
    worse_in_a_batch(model, 1e-5)
    return model


@pytest.mark.parametrize("source", [dynamic, by_batch_size])
def test_a_copy_of_a_graph_differs_by_nothing_where_rows_depend_on_their_batch(toy, source):
    bundle = toy()
    model = source(bundle)
    checks = check(model, as_graph(bundle, model))
    assert [item.difference for item in checks] == [0.0] * len(BATCHES)
    assert max(item.spread for item in checks) > 5 * module.TOLERANCE, "the rows do depend on their batch"
    assert {item.allowed for item in checks} == {item.between_batches / 2 for item in checks}


def test_a_graph_that_moves_by_more_than_its_batches_do_is_caught(toy):
    bundle = toy()
    itself = as_graph(bundle, by_batch_size(bundle))
    noise = module.reference(itself, BATCHES).noise
    for size, refused in ((0.5, False), (1.5, True)):
        model = by_batch_size(bundle)
        shift_output(model, size * noise)
        if refused:  # by less than twice the noise, which two different batches may differ by
            with pytest.raises(EdgekitError, match=r"at batch 1: its outputs differ from the source network's by"):
                check(model, itself)
        else:
            assert check(model, itself)[0].difference == pytest.approx(size * noise, rel=1e-2)


def shift_output(model: onnx.ModelProto, amount: float) -> None:
    """Adds this amount to every probability."""
    softmax = model.graph.node[-1]
    name, softmax.output[0] = softmax.output[0], "before"
    model.graph.initializer.append(numpy_helper.from_array(np.array([amount], np.float32), "amount"))
    model.graph.node.append(helper.make_node("Add", ["before", "amount"], [name], "add"))


def compare(outputs: np.ndarray, exact: np.ndarray, allowed: float = 1e-5) -> module.Check:
    expected = Reference({}, {"probabilities": exact}, {"probabilities": exact[:0]}, 0.0)
    got = {"probabilities": outputs}
    return module.compare(FLOAT_FILE, b"", len(exact), len(exact), got, got, expected, allowed)


def test_ties_are_not_changed_classes_but_clear_calls_are():
    exact = np.array([[0.5 + 2e-6, 0.5 - 2e-6], [0.6, 0.4]])
    assert compare(exact[:, ::-1], exact).changed == 1
    assert compare(exact, exact).changed == 0


def test_nan_outputs_are_never_within_tolerance():
    exact = np.array([[0.6, 0.4]])
    with pytest.raises(EdgekitError, match="by nan; allowed"):
        module._judge(compare(np.array([[np.nan, 0.4]]), exact), "toy", "give up")


def test_an_unstable_network_gets_the_room_it_takes_itself_and_no_more(toy, monkeypatch):
    bundle = toy()
    steady: Callable[..., Reference] = module.reference
    monkeypatch.setattr(module, "reference", lambda *given: replace(steady(*given), noise=4e-5))
    assert check(graph(bundle), bundle)[0].allowed == pytest.approx(8e-5)
    monkeypatch.undo()
    monkeypatch.setattr(module, "CEILING", 0.0)
    with pytest.raises(EdgekitError, match="float32 moves this network's own outputs"):
        check(graph(bundle), bundle)


def test_nothing_is_left_behind_when_verification_fails(toy, tmp_path, monkeypatch):
    bundle = toy()
    monkeypatch.setattr(module, "_judge", lambda *_: (_ for _ in ()).throw(EdgekitError("planted")))
    with pytest.raises(EdgekitError, match="planted"):
        OnnxExporter().export(bundle, tmp_path / "deep" / "out")
    assert list(tmp_path.iterdir()) == []


def test_codes_differ_by_the_share_that_is_another():
    codes = np.arange(200).reshape(10, 20)
    other = codes.copy()
    other[3, 4:6] = 0
    assert float(module.differences("codes", other, codes)) == 0.01
    assert float(module.differences("codes", codes, codes)) == 0.0
    assert float(np.max(module.differences("numbers", other * 1.0, codes * 1.0))) > 0.3, "not a share for numbers"


def recurrent():
    """A bundle of a network with a state: one GRU cell."""
    random = np.random.default_rng(0)
    inputs = {"x": random.standard_normal((5, 4)), "before": random.standard_normal((5, 6))}
    rows = {name: array.astype(np.float32) for name, array in inputs.items()}
    bundle = edgekit.import_module(build(), inputs=rows, outputs=["y", "after"])
    return described(bundle, name="cell", state={"before": "after"})


def test_a_network_with_a_state_is_compared_over_calls_that_hand_it_on():
    """The planted defect is a runtime that is right in every call, except with a state that it gave itself."""
    bundle = recurrent()
    content = lower(bundle).SerializeToString()
    assert verify({"model.onnx": content}, bundle, batches=(1, 4))

    class Late:
        def __init__(self, content):
            self.session, self.given = on_onnxruntime(content), []

        def run(self, names, rows):
            again = any(np.array_equal(rows["before"], state) for state in self.given)
            found = self.session.run(names, rows)
            self.given.append(found[1])
            return [array + 0.01 * again for array in found]

    with pytest.raises(EdgekitError, match="after 8 calls that hand their state on: its outputs differ"):
        verify({"model.onnx": content}, bundle, batches=(1, 4), load=Late)


@pytest.mark.parametrize(("rate", "noise"), [(1.0, 1e-6), (1e4, ROUNDING)])
def test_rounding_of_inputs_widens_the_tolerance_of_a_graph_up_to_a_limit(rate, noise):
    """The cosine of a large number moves with the last bit of its input; another runtime's sums move it as well."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"], "matmul"),
        helper.make_node("Cos", ["h"], ["y"], "cos"),
    ]
    stored = [("w", np.float32(rate) * numbers(1, FEATURES, HIDDEN))]
    source = model(nodes, [("x", FLOAT, ("batch", FEATURES))], [("y", FLOAT, ("batch", HIDDEN))], stored)
    bundle = edgekit.import_onnx(source, name="cosine")
    found = reference(bundle, (1, 4)).noise
    assert found <= noise
    assert found == ROUNDING or rate == 1.0
    wrong = with_tensors(lower(bundle), {"w": np.float32(1 + 1e-3 / rate) * stored[0][1]})
    with pytest.raises(EdgekitError, match="its outputs differ from the source network's by"):
        verify({FLOAT_FILE: wrong.SerializeToString()}, bundle, batches=(1, 4))
