"""The matrix: every network of the zoo and the conformance list, and DeiT-tiny, for every target that can hold them.

Each graph passes ONNX's checker, the operator table of its target's parser and the numerics; for cards that
TensorRT-RTX knows, it compiles, and for TensorRT 10 and 11 the parser of that family takes it. A minute: pytest -m
targets.
"""

import functools
import subprocess
from dataclasses import replace

import numpy as np
import onnx
import pytest

from edgekit.bundle.format import assemble_graph
from edgekit.bundle.tensors import parse_spec
from edgekit.data.dataset import UNKNOWN, Dataset
from edgekit.errors import EdgekitError
from edgekit.graph.lower import float_graph
from edgekit.importers.factory import from_factory
from edgekit.importers.files import resolve
from edgekit.passes.base import Context, GraphCandidate
from edgekit.passes.static_int8 import StaticInt8
from edgekit.targets import profile
from exporters.shapes import for_shapes
from exporters.target_graph import arithmetic, deployment_target, target_graph
from exporters.tensorrt_export import build_script
from exporters.tensorrt_rtx_export import compile_engine, preflight
from exporters.verify import on_onnxruntime, verify
from tests.conformance.models import INPUTS
from tests.exporters.test_tensorrt_export import flags

ZOO = ("t2-gr", "t2-ugrizy", "t2-ugrizy-z")
CONFORMANCE = tuple(name for name in INPUTS if name not in ("leaky_hourglass", "deit_tiny"))
STACKS = {}
for _name in profile.names():
    for _stack in profile.find(_name).stacks:
        if _stack.runtime in ("onnxruntime", "tensorrt", "tensorrt-rtx"):
            _where = deployment_target(_name, _stack.runtime, _stack.name)
            STACKS[f"{_name}, {_stack.name}"] = _where
# what is refused, and the reason
REFUSED = {}


def alike(where):
    """Return what decides which graph a stack gets: stacks with the same value share a graph."""
    plan = where.target.plan
    return (
        where.opset,
        where.parser_version and where.parser_version.name,
        plan.order,
        plan.never,
        where.target.kind == "cpu",
    )


def source(name):
    """Return the bundle and its float32 graph."""
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
    return bundle, float_graph(bundle)


def test_stacks_that_read_alike_get_the_same_graph(toy):
    """The matrix relies on this, so that it need not write a network 42 times."""
    model = float_graph(toy())
    graphs = {}
    for where in STACKS.values():
        content = target_graph(model, where).model.SerializeToString(deterministic=True)
        graphs.setdefault(alike(where), set()).add(content)
    assert {len(contents) for contents in graphs.values()} == {1}
    assert 1 < len(set.union(*graphs.values())) < len(graphs) < len(STACKS)


def test_the_matrix_has_teeth(toy, tmp_path, monkeypatch):
    """A table that lacks an operator refuses the graph for its stack, and weights of another network are refused."""
    bundle = toy()
    model = float_graph(bundle)
    nano = {key: where for key, where in STACKS.items() if where.target.name == "jetson-nano"}
    assert hold("toy", bundle, model, nano, tmp_path, (1, 16)) == {}
    poor = {
        key: replace(
            where, parser_version=replace(where.parser_version, operators=where.parser_version.operators - {"Softmax"})
        )
        if where.parser_version
        else where
        for key, where in nano.items()
    }
    refused = hold("toy", bundle, model, poor, tmp_path, (1, 16))
    assert list(refused) == ["jetson-nano, JetPack 4.6: TensorRT 8.2"]
    assert "(Softmax)" in refused["jetson-nano, JetPack 4.6: TensorRT 8.2"]
    weight = next(tensor for tensor in model.graph.initializer if tensor.name == "embed.weight")
    weight.CopyFrom(onnx.numpy_helper.from_array(1.5 * onnx.numpy_helper.to_array(weight), weight.name))
    with pytest.raises(EdgekitError, match=r"model.onnx for jetson-nano, .*differ from the source network's"):
        hold("toy", bundle, model, nano, tmp_path, (1, 16))


@pytest.mark.targets
@pytest.mark.parametrize("name", [*ZOO, "deit-tiny", *CONFORMANCE])
def test_every_target_holds_it(name, monkeypatch, tmp_path):
    if name == "deit-tiny":  # 2.5 GFLOP a row, in float64 too
        monkeypatch.setattr("exporters.verify.DISTINCT", (3,))
    bundle, model = source(name)
    refused = hold(name, bundle, model, STACKS, tmp_path, batches=(1, 3) if name == "deit-tiny" else (1, 16))
    assert set(refused) == REFUSED.get(name, set()), refused


@pytest.mark.targets
@pytest.mark.parametrize("name", ["t2-gr", "vit", "unet", "mixture"])
def test_every_target_that_is_given_int8_holds_it(name, tmp_path):
    """Its products in symmetric int8, held to the quantized graph as onnxruntime runs it: what int8 itself loses is
    another question. Where TensorRT is the runtime; CPUs have a form of their own."""
    bundle, model = source(name)
    inputs, _ = bundle.golden()
    data = Dataset(inputs, np.full(len(next(iter(inputs.values()))), UNKNOWN))
    context = Context(data, None, seed=0)
    quantized = StaticInt8(scheme="s8s8", weight_bits=8).apply(GraphCandidate(model), context).model
    manifest = replace(bundle.manifest, family="onnx", arguments={})
    golden = on_onnxruntime(quantized.SerializeToString()).run(None, inputs)
    names = [spec.name for spec in manifest.outputs]
    itself = assemble_graph(manifest, quantized.SerializeToString(), (inputs, dict(zip(names, golden, strict=True))))
    stacks = {key: where for key, where in STACKS.items() if "int8" in where.target.plan.order and where.parser_version}
    assert {where.parser_version.name for where in stacks.values()} == {"8.5", "8.6", "10", "11", "rtx"}
    assert hold(name, itself, quantized, stacks, tmp_path, batches=(1, 16)) == {}


def hold(name, bundle, model, stacks, folder, batches):
    """Try each stack, and return what refuses it and why. Numbers are compared at the end, for all graphs of one
    tolerance: the network is computed in float64 once for all of them."""
    write = functools.cache(lambda key: target_graph(model, next(w for w in stacks.values() if alike(w) == key)))
    computed = functools.cache(lambda key: arithmetic(write(key).model))
    real = replace(bundle, manifest=replace(bundle.manifest, synthetic=False))  # the golden rows' lengths
    _, shapes = for_shapes(real, (), (), "")
    refused, graphs, engines, parsed, scripts = {}, {}, {}, set(), 0
    for key, where in stacks.items():
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
                    engines[content, where.target.sm] = len(compile_engine(got.model, shapes, where.target.sm))
            elif where.parser_version:
                script(folder / "build.sh", where, got, shapes)
                scripts += 1
                if where.parser_version.typing != "weak" and content not in parsed and preflight(got.model):
                    parsed.add(content)
        except EdgekitError as error:
            refused[key] = str(error)
    for tolerance, contents in graphs.items():
        files = {f"model.onnx for {key}": content for content, key in contents.items()}
        verify(files, bundle, tolerance=tolerance, batches=batches)
    print(f"\n{name}: {len(stacks) - len(refused)} of {len(stacks)} stacks, {sum(map(len, graphs.values()))} graphs")
    print(
        f"  {len(engines)} engines of {sum(engines.values()):,} bytes; {scripts} build scripts; graphs parsed for "
        f"TensorRT 10 and 11: {len(parsed)}"
    )
    for key, reason in refused.items():
        print(f"  refused: {key}: {reason[:200]}")
    return refused


def script(path, where, got, shapes):
    """The kit's build.sh: a shell reads it, and it uses only the options of its TensorRT version."""
    text = build_script(where, got.precision, shapes, 512, 3, "0" * 64, got.pinned)
    path.write_text(text)
    done = subprocess.run(["sh", "-n", path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert set(flags(text)) <= where.parser_version.flags
    assert all(len(line) < 100_000 for line in text.splitlines()), "an argument that Linux does not take"
