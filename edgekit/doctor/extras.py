"""Packages that cannot be used in one environment, as data. The caller says which packages are installed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import distributions

from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

from edgekit.errors import EdgekitError

OWN_ENVIRONMENT = ("optimum", "modelopt")  # extras whose pins contradict those of the others


@dataclass(frozen=True, slots=True)
class Conflict:
    """Installed packages that cannot work together. packages: names with versions, 'onnx 1.23.2'."""

    packages: tuple[str, ...]
    why: str
    remedy: str
    source: str


@dataclass(frozen=True, slots=True)
class Rule:
    """There is a conflict if every package is installed in a version that its specifier allows; "" allows all."""

    packages: Mapping[str, str]
    why: str
    remedy: str
    source: str


_SHARED = "both install the folder onnxruntime/: the later one overwrites the earlier, removing either breaks both"
_KEEP_ONE = (
    "pip uninstall -y onnxruntime {0}, then install the one you need: pip install {0}, or pip install onnxruntime"
)
_OPTIMUM = "make an environment of its own: python -m venv optimum && optimum/bin/pip install 'edgekit[optimum]'"
_MODELOPT = "make an environment of its own: python -m venv modelopt && modelopt/bin/pip install 'edgekit[modelopt]'"
_MODELOPT_PINS = "nvidia-modelopt 0.47.0, Requires-Dist of its wheel"
RULES = (
    *(
        Rule({"onnxruntime": "", other: ""}, _SHARED, _KEEP_ONE.format(other), "RECORD of the two wheels")
        for other in ("onnxruntime-gpu", "onnxruntime-openvino", "onnxruntime-directml")
    ),
    Rule(
        {"optimum-onnx": "", "transformers": ">=4.58"},
        "optimum-onnx takes transformers below 4.58; with transformers 5 its exporter does not import",
        _OPTIMUM,
        "optimum-onnx 0.1.0, Requires-Dist of its wheel; huggingface/optimum-onnx#114, #141",
    ),
    Rule(
        {"optimum-onnx": "<0.2", "optimum": ">=2.2"},
        "optimum-onnx 0.1 takes optimum 2.1 and no other",
        _OPTIMUM,
        "optimum-onnx 0.1.0, Requires-Dist of its wheel",
    ),
    Rule(
        {"nvidia-modelopt": "", "onnx": ">=1.22"},
        "modelopt's ONNX quantization is pinned to onnx 1.21",
        _MODELOPT,
        _MODELOPT_PINS,
    ),
    Rule(
        {"nvidia-modelopt": "", "onnxruntime": "!=1.24.*"},
        "modelopt's ONNX quantization is pinned to onnxruntime 1.24 (onnxruntime-gpu on Linux x86)",
        _MODELOPT,
        _MODELOPT_PINS,
    ),
    Rule(
        {"nvidia-modelopt": "", "onnxruntime-gpu": "!=1.24.*"},
        "modelopt's ONNX quantization is pinned to onnxruntime-gpu 1.24",
        _MODELOPT,
        _MODELOPT_PINS,
    ),
    Rule(
        {"nvidia-modelopt": "", "transformers": ">=5.15"},
        "modelopt's Hugging Face part takes transformers below 5.15",
        _MODELOPT,
        _MODELOPT_PINS,
    ),
    Rule(
        {"onnxruntime-gpu": ">=1.18", "tensorrt": ">=11"},
        "its TensorRT provider is linked against libnvinfer.so.10, which TensorRT 11 does not bring",
        "pip install 'tensorrt<11' for that provider, or use TensorRT 11 without onnxruntime",
        "NEEDED entries of the wheels' libraries, read up to 1.31.1",
    ),
    Rule(
        {"onnxruntime-gpu": "<1.18", "tensorrt": ">=10"},
        "its TensorRT provider is linked against libnvinfer.so.8",
        "pip install 'onnxruntime-gpu>=1.18', or on Pascal cards TensorRT 8.6.1 from NVIDIA's archive",
        "NEEDED entries of the wheels' libraries",
    ),
    Rule(
        {"onnxruntime-ep-nv-tensorrt-rtx-cu13": "", "onnxruntime": "<1.24"},
        "the plug-in provider needs the plug-in interface of onnxruntime 1.24",
        "pip install -U onnxruntime",
        "onnxruntime-ep-nv-tensorrt-rtx-cu13 0.5.0, Requires-Dist of its wheel",
    ),
    Rule(
        {"openvino": "", "numpy": ">=2.6"},
        "openvino takes numpy below 2.6",
        "pip install 'numpy<2.6'",
        "openvino 2026.4.1, Requires-Dist of its wheel",
    ),
)


def conflicts(installed: Mapping[str, str]) -> list[Conflict]:
    """The rules that these packages break; versions by name, in any spelling that pip allows: Torch_Pruning."""
    versions: dict[str, str] = {canonicalize_name(name): version for name, version in installed.items()}
    return [
        Conflict(tuple(f"{name} {versions[name]}" for name in rule.packages), rule.why, rule.remedy, rule.source)
        for rule in RULES
        if all(_named(name, specifier, versions) for name, specifier in rule.packages.items())
    ]


def check(*packages: str) -> None:
    """Raise EdgekitError if a package that is about to be imported conflicts with another installed package."""
    found = conflicts({item.metadata["Name"]: item.version for item in distributions() if item.metadata["Name"]})
    for conflict in found:
        if {entry.partition(" ")[0] for entry in conflict.packages} & {canonicalize_name(name) for name in packages}:
            raise EdgekitError(
                f"{' and '.join(conflict.packages)} cannot work together: {conflict.why}; {conflict.remedy}"
            )


def _named(name: str, specifier: str, versions: Mapping[str, str]) -> bool:
    if name not in versions:
        return False
    try:
        return Version(versions[name]) in SpecifierSet(specifier, prereleases=True)
    except InvalidVersion:  # a vendor's own build, which only a rule for all versions can cover
        return not specifier
