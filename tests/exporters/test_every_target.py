"""The matrix: every network of the zoo and the conformance list, and DeiT-tiny, for every target that can hold it.

Each graph passes ONNX's checker, the operator table of its target's parser and the numerics; for cards that
TensorRT-RTX knows, it compiles. Minutes: pytest -m targets.
"""

import functools

import onnx
import pytest

from edgekit.errors import EdgekitError
from edgekit.importers import from_factory, parse_spec
from edgekit.targets import profile
from edgekit.zoo import resolve
from exporters import kit
from exporters.for_target import arithmetic, place, typed
from exporters.onnx_export import OnnxExporter
from exporters.tensorrt_rtx_export import compile_engine
from exporters.verify import verify
from tests.conformance.models import INPUTS

pytestmark = pytest.mark.targets

ZOO = ("t2-gr", "t2-ugrizy", "t2-ugrizy-z")
CONFORMANCE = tuple(name for name in INPUTS if name not in ("leaky_hourglass", "deit_tiny"))
# stacks of several targets that read alike are tried once: what differs is named here
PLACES = {}
for _name in profile.names():
    for _stack in profile.find(_name).stacks:
        if _stack.runtime in ("onnxruntime", "tensorrt", "tensorrt-rtx"):
            _where = place(_name, _stack.runtime, _stack.name)
            PLACES[f"{_name}, {_stack.name}"] = _where
# what is refused, and the reason
REFUSED = {}


@functools.lru_cache(maxsize=1)
def source(name):
    """Bundle and its float32 graph."""
    if name in ZOO:
        bundle = resolve(name)
    elif name == "deit-tiny":
        bundle = from_factory(
            "tools.deit:build",
            arguments={},
            weights=None,
            inputs=[parse_spec("image:float32:batch,3,224,224")],
            outputs=(),
        )
    else:
        from tests.conformance.test_conformance import imported

        bundle = imported(name)
    return bundle, OnnxExporter(weights="float32").float_graph(bundle)


@pytest.fixture(scope="module")
def known():
    """Graphs verified already, by their bytes: many places get the same."""
    return {}


@pytest.mark.parametrize("name", [*ZOO, "deit-tiny", *CONFORMANCE])
def test_every_target_holds_it(name, known, monkeypatch):
    if name == "deit-tiny":  # 2.5 GFLOP a row, in float64 too
        monkeypatch.setattr("exporters.verify.DISTINCT", 3)
    bundle, model = source(name)
    refused = {}
    for key, where in PLACES.items():
        try:
            got = typed(model, where)
            content = got.model.SerializeToString(deterministic=True)
            onnx.checker.check_model(got.model, full_check=True)
            assert got.model.opset_import[0].version <= where.opset
            assert not arithmetic(got.model) & set(where.target.plan.never)
            if content not in known:
                batches = (1, 3) if name == "deit-tiny" else (1, 16)
                known[content] = verify({"model.onnx": content}, bundle, tolerance=got.tolerance, batches=batches)
            if where.stack.runtime == "tensorrt-rtx":
                pytest.importorskip("tensorrt_rtx")
                if ("engine", content) not in known:
                    known["engine", content] = len(
                        compile_engine(got.model, kit.profile_of(bundle, ()), where.target.sm)
                    )
        except EdgekitError as error:
            refused[key] = str(error)
    print(f"\n{name}: {len(PLACES) - len(refused)} of {len(PLACES)} places")
    for key, reason in refused.items():
        print(f"  refused: {key}: {reason[:200]}")
    assert set(refused) == REFUSED.get(name, set()), refused
