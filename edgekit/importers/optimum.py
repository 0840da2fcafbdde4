"""Import Hugging Face folders through optimum's ONNX exporter: for models whose inputs, tracing patches and opset it
knows better than a general tracer does. It needs its own environment, because it requires transformers below 4.58.

Its exporter only warns if the graph's numbers differ from the model's (huggingface/optimum#1755: by 1923.9), so this
module compares them.
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
from edgekit.importers.hugging_face import described, load_network, safe_config
from edgekit.importers.onnx import from_onnx

# of the largest output; another order of float32 operations changes a deep network's outputs by some 1e-5
TOLERANCE = 1e-3


def from_optimum(folder: Path, *, golden: Arrays | None = None) -> Bundle:
    """Make a bundle around the graph that optimum exports, and compare it with transformers on the golden inputs.

    The import downloads nothing and runs no code of the folder's author: optimum reads a copy, which transformers
    writes of the network after edgekit has loaded it. The copy has no key and no file that edgekit does not know.
    """
    config = safe_config(folder)
    extras.check("optimum-onnx")
    try:
        from optimum.exporters.onnx import main_export
        from optimum.exporters.tasks import TasksManager
    except ImportError as error:  # a package is missing, or another version of it lacks a name
        if isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] == "optimum":
            missing = missing_extra("optimum-onnx", "optimum", "reading a folder through optimum")
            raise EdgekitError(f"{missing}, in an environment of its own: it takes transformers below 4.58") from None
        raise EdgekitError(f"optimum's ONNX exporter cannot be imported: {error}") from None
    network = load_network(folder, config)
    with tempfile.TemporaryDirectory() as copy, tempfile.TemporaryDirectory() as scratch:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                network.save_pretrained(copy)
                task = TasksManager.infer_task_from_model(type(network))  # it cannot infer the task from a folder
                main_export(
                    copy,
                    task=task,
                    output=scratch,
                    trust_remote_code=False,
                    local_files_only=True,
                    do_validation=False,
                    no_post_process=True,
                )
        except Exception as error:  # the stages of the exporter raise many types
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
    """Return the graph with the channels, height and width of its images from config.json. optimum leaves these axes
    free, although the network accepts no other sizes."""
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
    """Raise unless the graph's outputs for the bundle's golden inputs agree with those of transformers."""
    import torch

    inputs, expected = bundle.golden()
    with torch.inference_mode():
        outputs = network.eval()(**{name: torch.from_numpy(array) for name, array in inputs.items()})
    for name, wanted in expected.items():
        got = outputs[name].numpy() if name in outputs else None
        if got is None or got.shape != wanted.shape:
            raise EdgekitError(
                f"{folder}: the graph's output {name!r} is not an output of the model, or has another shape"
            )
        off = float(np.abs(got - wanted).max(initial=0)) / max(1.0, float(np.abs(got).max(initial=0)))
        if not off <= TOLERANCE:  # also true for NaN
            raise EdgekitError(
                f"{folder}: output {name!r} of optimum's graph differs from transformers' by {off:.1e}; {TOLERANCE:g} "
                "is allowed; import the folder without --via optimum"
            )
