"""The matrix: every network of the zoo and the conformance list, and DeiT-tiny, for every target that can hold them.

Each graph passes ONNX's checker, the operator table of its target's parser and the numerics; for cards that
TensorRT-RTX knows, it compiles, and for TensorRT 10 and 11 the parser of that family takes it. Minutes: pytest -m
targets.
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
from exporters.tensorrt_rtx_export import compile_engine, preflight
from exporters.verify import verify
from tests.conformance.models import INPUTS

ZOO = ("t2-gr", "t2-ugrizy", "t2-ugrizy-z")
CONFORMANCE = tuple(name for name in INPUTS if name not in ("leaky_hourglass", "deit_tiny"))
PLACES = {}
for _name in profile.names():
    for _stack in profile.find(_name).stacks:
        if _stack.runtime in ("onnxruntime", "tensorrt", "tensorrt-rtx"):
            _where = place(_name, _stack.runtime, _stack.name)
            PLACES[f"{_name}, {_stack.name}"] = _where
# what is refused, and the reason
REFUSED = {}


def alike(where):
    """What of a place decides which graph it gets: those with the same share one."""
    plan = where.target.plan
    return where.opset, where.generation and where.generation.name, plan.order, plan.never, where.target.kind == "cpu"


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


def test_places_that_read_alike_get_the_same_graph(toy):
    """What the matrix takes for granted, so that it need not write a network 42 times."""
    model = OnnxExporter(weights="float32").float_graph(toy())
    graphs = {}
    for where in PLACES.values():
        content = typed(model, where).model.SerializeToString(deterministic=True)
        graphs.setdefault(alike(where), set()).add(content)
    assert {len(contents) for contents in graphs.values()} == {1}
    assert 1 < len(set.union(*graphs.values())) < len(graphs) < len(PLACES)


@pytest.mark.targets
@pytest.mark.parametrize("name", [*ZOO, "deit-tiny", *CONFORMANCE])
def test_every_target_holds_it(name, monkeypatch):
    if name == "deit-tiny":  # 2.5 GFLOP a row, in float64 too
        monkeypatch.setattr("exporters.verify.DISTINCT", 3)
    bundle, model = source(name)
    write = functools.cache(lambda key: typed(model, next(w for w in PLACES.values() if alike(w) == key)))
    computed = functools.cache(lambda key: arithmetic(write(key).model))
    refused, graphs, engines, parsed = {}, {}, {}, set()
    for key, where in PLACES.items():
        try:
            got = write(alike(where))
            assert got.model.opset_import[0].version <= where.opset
            assert not computed(alike(where)) & set(where.target.plan.never)
            content = got.model.SerializeToString(deterministic=True)
            if content not in graphs.setdefault(got.tolerance, {}):
                onnx.checker.check_model(got.model, full_check=True)
            graphs[got.tolerance].setdefault(content, key)
            if where.stack.runtime == "tensorrt-rtx":
                pytest.importorskip("tensorrt_rtx")
                if (content, where.target.sm) not in engines:
                    engine = compile_engine(got.model, kit.profile_of(bundle, ()), where.target.sm)
                    engines[content, where.target.sm] = len(engine)
            elif where.generation and where.generation.typing != "weak" and content not in parsed:
                parsed |= {content} if preflight(got.model) else set()
        except EdgekitError as error:
            refused[key] = str(error)
    print(f"\n{name}: {len(PLACES) - len(refused)} of {len(PLACES)} places, {sum(map(len, graphs.values()))} graphs")
    print(
        f"  {len(engines)} engines of {sum(engines.values()):,} bytes, {len(parsed)} graphs parsed for TensorRT 10, 11"
    )
    for key, reason in refused.items():
        print(f"  refused: {key}: {reason[:200]}")
    assert set(refused) == REFUSED.get(name, set()), refused
    for tolerance, contents in graphs.items():  # together: the network is computed in float64 once for all of them
        files = {f"model.onnx for {key}": content for content, key in contents.items()}
        verify(files, bundle, tolerance=tolerance, batches=(1, 3) if name == "deit-tiny" else (1, 16))
