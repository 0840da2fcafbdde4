"""What the importer reads of a graph's inputs and outputs, and the signature that a graph carries."""

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgekit.bundle.tensors import TensorSpec
from edgekit.errors import EdgekitError
from edgekit.graph.signature import KEY, described, marked, of_model, proposals, to_json
from tests.edgekit.signature_graphs import gru

FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64


def plain(inputs, outputs=(("y", FLOAT, ("batch", 4)),), stored=()):
    """A graph of one Identity whose inputs and outputs are (name, type, shape); shape None: of unknown rank."""
    made = [[helper.make_tensor_value_info(*value) for value in part] for part in (inputs, outputs)]
    node = helper.make_node("Identity", [inputs[0][0] if inputs else "w"], ["y"], "same")
    return helper.make_model(helper.make_graph([node], "g", *made, list(stored)))


def test_inputs_and_outputs_are_described_without_stored_tensors():
    weight = numpy_helper.from_array(np.zeros(4, np.float32), "w")
    model = plain(
        [("x", FLOAT, ("N", 12, "2 * tokens", None)), ("w", FLOAT, (4,))], [("y", INT64, ("rows", 4))], [weight]
    )
    found = of_model(model)
    assert found.plain
    assert list(found.inputs.values()) == [TensorSpec("x", ("batch", 12, "2xtokens", "axis_3"), "float32")]
    assert list(found.outputs.values()) == [TensorSpec("y", ("batch", 4), "int64")]


def test_what_is_no_tensor_of_known_rank_is_refused():
    sequence = plain([("x", FLOAT, ("batch", 4))])
    sequence.graph.input[0].CopyFrom(helper.make_tensor_sequence_value_info("x", FLOAT, ("batch",)))
    cases = {
        "takes no inputs": plain([]),
        "'x' is not a tensor of known rank": plain([("x", FLOAT, None)]),
        "'y' is not a tensor of known rank": plain([("x", FLOAT, ("batch", 4))], [("y", FLOAT, None)]),
        "m: 'x' is not a tensor of known rank": sequence,
    }
    for words, model in cases.items():
        with pytest.raises(EdgekitError, match=words):
            of_model(model, "m")


def test_a_graph_carries_its_signature_and_a_damaged_one_is_refused():
    signature = next(proposals(gru(), "m", {"before": "after"}))
    model = marked(gru(), signature)
    assert of_model(model) == signature == described(to_json(signature), "m")
    assert [axis.dim_param or axis.dim_value for axis in model.graph.input[1].type.tensor_type.shape.dim] == [
        1,
        "batch",
        6,
    ]
    damaged = to_json(signature).replace('"rows_per_call": null', '"rows_per_call": -1')
    without_rows = '{"inputs": [{"name": "x", "shape": []}], "outputs": [], "rows_per_call": null}'
    for text in ("", "[]", "{}", damaged, without_rows):
        helper.set_model_props(model, {KEY: text})
        with pytest.raises(EdgekitError, match=r"metadata 'edgekit\.signature' is damaged"):
            of_model(model, "m")


def test_the_last_proposal_is_that_a_row_is_a_call():
    found = list(proposals(plain([("x", FLOAT, ("n", 4)), ("rate", FLOAT, ())]), "m", {}))
    assert [spec.own_axes for spec in found[0].inputs.values()] == [("batch", 4), ()]
    assert found[0].rows_per_call is None
    assert ([spec.own_axes for spec in found[-1].inputs.values()], found[-1].rows_per_call) == ([("n", 4), ()], 1)
