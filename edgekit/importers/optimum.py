"""Hugging Face folders as graphs, by optimum's ONNX exporter: for models whose inputs, patches for tracing and opset it
knows better than a general tracer does. It needs an environment of its own, since it takes transformers below 4.58.

Its exporter only warns where the graph's numbers are not the model's (huggingface/optimum#1755: 1923.9 apart), so they
are compared here.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from edgekit.bundle.format import Bundle
from edgekit.bundle.tensors import Arrays
from edgekit.doctor import extras
from edgekit.errors import EdgekitError, missing_extra
from edgekit.importers.hugging_face import described, safe_config
from edgekit.importers.onnx import from_onnx

TOLERANCE = 1e-3  # of the largest output; float32 in another order of a deep network moves it by some 1e-5


def from_optimum(folder: Path, *, golden: Arrays | None = None) -> Bundle:
    """A bundle around the graph that optimum makes of the folder, held against transformers on the golden inputs.

    Nothing is downloaded and no code of the folder's author is run.
    """
    config = safe_config(folder)
    extras.check("optimum-onnx")
    try:
        from optimum.exporters.onnx import main_export
        from optimum.exporters.tasks import TasksManager
    except ImportError as error:  # of a package, or of a name that another version of it has not
        if isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] == "optimum":
            missing = missing_extra("optimum-onnx", "optimum", "reading a folder through optimum")
            raise EdgekitError(f"{missing}, in an environment of its own: it takes transformers below 4.58") from None
        raise EdgekitError(f"optimum's ONNX exporter cannot be imported: {error}") from None
    from edgekit.nn.hugging_face import model_class

    network = model_class(config)
    with tempfile.TemporaryDirectory() as scratch:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                task = TasksManager.infer_task_from_model(network)  # it will not tell from a folder
                main_export(
                    str(folder),
                    task=task,
                    output=scratch,
                    trust_remote_code=False,
                    local_files_only=True,
                    do_validation=False,
                    no_post_process=True,
                )
        except Exception as error:  # its many stages raise what they like
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise EdgekitError(f"{folder}: optimum cannot export it: {reason}") from error
        found = sorted(path.name for path in Path(scratch).iterdir() if ".onnx" in path.name)
        if found != ["model.onnx"]:
            raise EdgekitError(
                f"{folder}: optimum wrote {', '.join(found) or 'no graph'}; a bundle holds one model.onnx below 2 GB"
            )
        content = with_image_size((Path(scratch) / "model.onnx").read_bytes(), config)
    bundle = described(from_onnx(content, folder.name, str(folder), golden=golden), folder, config)
    check_outputs(bundle, network, folder)
    return bundle


def with_image_size(content: bytes, config: Mapping[str, Any]) -> bytes:
    """The graph with channels, height and width of its images as config.json gives them; optimum leaves them free, and
    the network takes no others."""
    from onnx import load_from_string

    model = load_from_string(content)
    for value in model.graph.input:
        axes = value.type.tensor_type.shape.dim
        size = config.get("image_size")
        if value.name == "pixel_values" and size and len(axes) == 4:
            height, width = size if isinstance(size, list) else (size, size)
            for axis, length in zip(axes[1:], (config.get("num_channels", 3), height, width), strict=True):
                axis.dim_value = int(length)
    serialized: bytes = model.SerializeToString()
    return serialized


def check_outputs(bundle: Bundle, network: Any, folder: Path) -> None:
    """Raise unless the graph gives what transformers gives for the bundle's golden inputs."""
    import torch

    inputs, expected = bundle.golden()
    model = network.from_pretrained(folder, use_safetensors=True, local_files_only=True)
    with torch.inference_mode():
        outputs = model.eval()(**{name: torch.from_numpy(array) for name, array in inputs.items()})
    for name, wanted in expected.items():
        got = outputs[name].numpy() if name in outputs else None
        if got is None or got.shape != wanted.shape:
            raise EdgekitError(f"{folder}: the graph's output {name!r} is none of the model's, or of another shape")
        off = float(np.abs(got - wanted).max(initial=0)) / max(1.0, float(np.abs(got).max(initial=0)))
        if not off <= TOLERANCE:  # NaN included
            raise EdgekitError(
                f"{folder}: optimum's graph gives {name!r} {off:.1e} away from what transformers gives, {TOLERANCE:g} "
                "allowed; import the folder without --via optimum"
            )
