"""Compiling with TensorRT's Python interface, on a stand-in: what is asked of it, and errors with their nodes."""

from types import SimpleNamespace

import pytest
from onnx import TensorProto, helper

from edgekit.errors import EdgekitError
from exporters.engines import build, complaints, parse
from exporters.float32_pinned import Float32Pinned

PROFILE = {"x": {"min": [1, 2], "opt": [8, 2], "max": [16, 2]}}


@pytest.fixture
def model():
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ("n", 2)) for name in "xy"]
    nodes = [helper.make_node("Relu", ["x"], ["h"], name="first"), helper.make_node("Exp", ["h"], ["y"], name="second")]
    return helper.make_model(helper.make_graph(nodes, "g", value[:1], value[1:]))


class Trt:
    """The few calls that are made; flags as TensorRT 8 has them, without EXPLICIT_BATCH as from 10 on."""

    def __init__(self, *, errors=(), engine=b"engine", says=(), flags=("EXPLICIT_BATCH", "STRONGLY_TYPED")):
        trt, self.asked = self, {}
        self.DataType = SimpleNamespace(FLOAT="float32")
        self.NetworkDefinitionCreationFlag = SimpleNamespace(**{name: number for number, name in enumerate(flags)})
        self.layers = [SimpleNamespace(name=name, precision=None, output=None) for name in ("first", "second")]
        for layer in self.layers:
            layer.set_output_type = lambda slot, kind, layer=layer: setattr(layer, "output", (slot, kind))

        class ILogger:
            ERROR, INTERNAL_ERROR, WARNING = 1, 0, 2

        class Builder:
            def __init__(self, logger):
                self.logger = logger

            def create_network(self, given):
                trt.asked["flags"] = given
                return SimpleNamespace(name="", num_layers=len(trt.layers), get_layer=trt.layers.__getitem__)

            def create_builder_config(self):
                return SimpleNamespace(add_optimization_profile=lambda shapes: trt.asked.update(profile=shapes.set))

            def create_optimization_profile(self):
                shapes = SimpleNamespace(set={})
                shapes.set_shape = lambda name, *ranges: shapes.set.update({name: ranges})
                return shapes

            def build_serialized_network(self, network, config):
                for severity, message in says:
                    self.logger.log(severity, message)
                trt.asked |= {"name": network.name, "config": config}
                return engine

        class OnnxParser:
            num_errors = len(errors)

            def __init__(self, network, logger):
                self.logger = logger

            def parse(self, content):
                self.logger.log(ILogger.ERROR, "said while\nparsing")
                trt.asked["content"] = content
                return not errors

            def get_error(self, number):
                return errors[number]

        self.ILogger, self.Builder, self.OnnxParser = ILogger, Builder, OnnxParser


def error(description, **calls):
    return SimpleNamespace(desc=lambda: description, **{name: lambda value=v: value for name, v in calls.items()})


def built(trt, model, **options):
    given = {"strong": False, "what": "TensorRT 10"} | options
    return build(trt, model, b"content", PROFILE, lambda config: setattr(config, "seen", True), **given)


def test_an_engine_is_built_from_the_content_with_the_profile_and_the_options(model):
    trt = Trt()
    assert built(trt, model) == b"engine"
    assert trt.asked["content"] == b"content"
    assert trt.asked["profile"] == {"x": ((1, 2), (8, 2), (16, 2))}
    assert trt.asked["config"].seen
    assert trt.asked["name"] == "g"


@pytest.mark.parametrize(
    ("flags", "strong", "bits"),
    [
        (("EXPLICIT_BATCH", "STRONGLY_TYPED"), False, 0b01),
        (("EXPLICIT_BATCH", "STRONGLY_TYPED"), True, 0b11),
        (("STRONGLY_TYPED",), True, 0b1),
        (("STRONGLY_TYPED",), False, 0),
        (("EXPLICIT_BATCH",), True, 0b1),
    ],
)
def test_flags_are_those_that_this_version_has(model, flags, strong, bits):
    trt = Trt(flags=flags)
    built(trt, model, strong=strong)
    assert trt.asked["flags"] == bits


def test_only_the_pinned_layers_stay_in_float32(model):
    trt = Trt()
    built(trt, model, pinned=Float32Pinned(layers=("second",), outputs=()))
    assert [(layer.precision, layer.output) for layer in trt.layers] == [(None, None), ("float32", None)]
    trt = Trt()
    built(trt, model, pinned=Float32Pinned(layers=("second",), outputs=("second",)))
    assert [(layer.precision, layer.output) for layer in trt.layers] == [(None, None), ("float32", (0, "float32"))]
    trt = Trt()
    built(trt, model)
    assert [(layer.precision, layer.output) for layer in trt.layers] == [(None, None)] * 2


def test_a_graph_that_is_refused_says_where(model):
    named = error("no\n such  operator", node=1, node_name="second", node_operator="Exp")
    with pytest.raises(EdgekitError, match=r"^TensorRT 10 refuses the graph: node 'second' .Exp.: no such operator$"):
        parse(Trt(errors=[named, named]), model, b"", strong=False, what="TensorRT 10")


def test_errors_of_old_versions_have_only_the_nodes_number(model):
    parser = SimpleNamespace(num_errors=3, get_error=[error("a", node=0), error("b", node=7), error("c")].__getitem__)
    assert complaints(parser, model) == ["node 'first' (Relu): a", "b", "c"]


def test_a_parser_that_only_logs_is_quoted(model):
    trt = Trt(errors=[error("")])
    trt.OnnxParser.num_errors = 0
    with pytest.raises(EdgekitError, match=r"refuses the graph: said while parsing$"):
        parse(trt, model, b"", strong=False, what="TensorRT 10")


def test_a_build_that_fails_quotes_errors_of_the_build_alone(model):
    says = [(2, "a warning"), (1, "out of\n memory"), (0, "inner")]
    with pytest.raises(EdgekitError, match=r"parses the graph but cannot build it: out of memory; inner$"):
        built(Trt(engine=None, says=says), model)
    with pytest.raises(EdgekitError, match=r"cannot build it: it gives no reason$"):
        built(Trt(engine=None), model)
