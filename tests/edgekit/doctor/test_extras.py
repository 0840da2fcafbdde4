"""Packages that cannot be installed together: each rule finds what it names, and nothing else."""

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from edgekit.doctor import extras
from edgekit.doctor.extras import OWN_ENVIRONMENT, RULES, conflicts
from edgekit.errors import EdgekitError

PROJECT = tomllib.loads((Path(__file__).resolve().parents[3] / "pyproject.toml").read_text())["project"]
GOOD = {"onnxruntime": "1.32.0", "transformers": "5.23.0", "onnx": "1.23.2", "numpy": "2.4.6", "openvino": "2026.4.1"}
BAD = {
    "two onnxruntimes": ({"onnxruntime": "1.32.0", "onnxruntime_gpu": "1.26.0"}, "overwrites"),
    "optimum with transformers 5": ({"optimum-onnx": "0.1.0", "transformers": "5.23.0"}, "below 4.58"),
    "optimum-onnx with a later optimum": ({"Optimum_ONNX": "0.1.0", "optimum": "2.3.0"}, "optimum 2.1"),
    "modelopt and onnx": ({"nvidia-modelopt": "0.47.0", "onnx": "1.23.2"}, "onnx 1.21"),
    "modelopt and onnxruntime": ({"nvidia-modelopt": "0.47.0", "onnxruntime": "1.32.0"}, "onnxruntime 1.24"),
    "modelopt and a later GPU build": ({"nvidia-modelopt": "0.47.0", "onnxruntime-gpu": "1.26.0"}, "1.24"),
    "modelopt and transformers": ({"nvidia-modelopt": "0.47.0", "transformers": "5.23.0"}, "below 5.15"),
    "TensorRT 11 under onnxruntime": ({"onnxruntime-gpu": "1.31.1", "tensorrt": "11.4.0.106"}, r"libnvinfer.so.10"),
    "TensorRT 10 under an old onnxruntime": ({"onnxruntime-gpu": "1.17.1", "tensorrt": "10.0.1"}, "libnvinfer.so.8"),
    "plug-in": ({"onnxruntime-ep-nv-tensorrt-rtx-cu13": "0.5.0", "onnxruntime": "1.20.0"}, "1.24"),
    "openvino and numpy": ({"openvino": "2026.4.1", "numpy": "2.6.0"}, "below 2.6"),
}
FINE = [
    {},
    GOOD,
    {"onnxruntime-gpu": "1.26.0", "tensorrt": "10.3.0"},
    {"optimum-onnx": "0.1.0", "optimum": "2.1.0", "transformers": "4.57.6"},
    {"nvidia-modelopt": "0.47.0", "onnx": "1.21.1", "onnxruntime-gpu": "1.24.4", "transformers": "4.57.6"},
    {"transformers": "not a version", "optimum-onnx": "0.1.0"},
]


@pytest.mark.parametrize(("installed", "words"), BAD.values(), ids=BAD)
def test_what_cannot_live_together_is_named(installed, words):
    (found,) = conflicts(GOOD | installed if "openvino" in installed else installed)
    assert words in found.why
    assert found.remedy
    assert found.source
    named = {canonicalize_name(entry.partition(" ")[0]): entry.partition(" ")[2] for entry in found.packages}
    assert named == {canonicalize_name(name): version for name, version in installed.items()}
    for name in installed:  # planted: without one of the two there is nothing to say
        assert conflicts({other: version for other, version in installed.items() if other != name}) == []


@pytest.mark.parametrize("installed", FINE, ids=str)
def test_what_can_live_together_is_left_alone(installed):
    assert conflicts(installed) == []


def test_every_rule_is_one_of_these_and_can_be_read():
    broken = {found.why for installed, _ in BAD.values() for found in conflicts(installed)}
    assert broken == {rule.why for rule in RULES}
    for rule in RULES:
        assert len(rule.packages) == 2
        assert all(name == canonicalize_name(name) for name in rule.packages)
        for specifier in rule.packages.values():
            SpecifierSet(specifier)


def test_importing_what_conflicts_is_an_error_that_explains(monkeypatch):
    class Installed:
        def __init__(self, name, version):
            self.metadata, self.version = {"Name": name}, version

    there = [Installed("optimum_onnx", "0.1.0"), Installed("transformers", "5.23.0"), Installed("onnx", "1.23.2")]
    monkeypatch.setattr("edgekit.doctor.extras.distributions", lambda: there)
    with pytest.raises(EdgekitError, match=r"optimum-onnx 0.1.0 and transformers 5.23.0 cannot .*'edgekit\[optimum\]'"):
        extras.check("optimum-onnx")
    extras.check("onnx")  # not its business
    there.pop(1)
    extras.check("optimum-onnx")


def test_extras_agree_with_the_rules():
    """An extra that can share an environment with all others must not install what the rules forbid there."""
    declared = PROJECT["optional-dependencies"]
    assert {"gpu", "tensorrt", "rtx", "openvino", "optimum", "modelopt"} <= set(declared)
    assert set(OWN_ENVIRONMENT) <= set(declared)
    everything = {Requirement(line).name for line in declared["all"] + declared["dev"]}
    assert not everything & {"optimum-onnx", "nvidia-modelopt", "onnxruntime-gpu"}
    brings = {extra: {canonicalize_name(Requirement(line).name) for line in lines} for extra, lines in declared.items()}
    assert "onnxruntime" not in brings["gpu"], "it would overwrite onnxruntime-gpu"
    assert "onnxruntime" not in brings["modelopt"]
