"""Bundles that an earlier edgekit wrote, kept as files: what a user has on disk opens after a refactoring."""

from pathlib import Path

import numpy as np
import pytest

from edgekit.bundle.store import open_bundle
from edgekit.compression import recipe
from edgekit.session import open_session

STORED = Path(__file__).parent / "stored"


@pytest.mark.parametrize("name", ["tiny", "clustered", "hugging_face"])
@pytest.mark.parametrize("runtime", ["torch", "onnxruntime"])
def test_a_bundle_of_0_1_opens_and_gives_its_golden_outputs(name, runtime):
    if name == "hugging_face":
        pytest.importorskip("transformers")
    bundle = open_bundle(STORED / f"{name}.edge")
    inputs, expected = bundle.golden()
    found = open_session(bundle, runtime, threads=1).run(inputs)
    for output, array in expected.items():
        assert np.abs(found[output] - array).max() < 2e-5


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_a_bundle_of_format_2_opens_and_gives_its_golden_outputs(runtime):
    bundle = open_bundle(STORED / "recurrent.edge")
    assert (bundle.manifest.format, bundle.manifest.state) == (2, {"before": "after"})
    assert bundle.manifest.inputs[1].own_axes == (1, "batch", 6)
    inputs, expected = bundle.golden()
    found = open_session(bundle, runtime, threads=1).run(inputs)
    for output, array in expected.items():
        assert np.abs(found[output] - array).max() < 2e-5


def test_its_recipe_can_be_run_again():
    (step,) = recipe.of_bundle(open_bundle(STORED / "clustered.edge"))
    assert (step.name, step.parameters["bits"]) == ("cluster", 4)
