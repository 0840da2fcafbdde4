"""Import folders that transformers saved, with config.json and safetensors."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from safetensors.numpy import save_file as save_safetensors

from edgekit.bundle.bounded import LARGEST_TEXT, read_file
from edgekit.bundle.files import is_plain
from edgekit.bundle.format import Bundle
from edgekit.bundle.tensors import SPEC_HELP, Arrays, TensorSpec
from edgekit.errors import EdgekitError
from edgekit.importers.base import PICKLES, unsafe
from edgekit.importers.factory import from_factory

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers from drawing progress bars and printing warnings on standard error while the block runs."""
    if importlib.util.find_spec("transformers") is None:  # the import that needs it says what to install
        yield
        return
    logging: Any = importlib.import_module("transformers.utils.logging")  # its functions have no types
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


@_quiet()
def from_hugging_face(folder: Path, *, inputs: Sequence[TensorSpec] = (), golden: Arrays | None = None) -> Bundle:
    """Make a bundle from a folder of transformers: config.json and safetensors. The bundle takes classes and the
    scaling of pixels from the folder. `inputs` are only needed for models that take neither images nor token ids."""
    config = safe_config(folder)
    from edgekit.nn import hugging_face

    specs = tuple(inputs) or _usual_inputs(config, hugging_face.model_class(config).main_input_name, folder)
    network = load_network(folder, config)
    state = {f"model.{name}": value.numpy() for name, value in network.state_dict().items()}
    arguments = {"config": config, "inputs": [spec.name for spec in specs]}
    with tempfile.TemporaryDirectory() as scratch:
        weights = Path(scratch) / "model.safetensors"
        save_safetensors({name: np.ascontiguousarray(value) for name, value in state.items()}, weights)
        bundle = from_factory(
            hugging_face.FACTORY, arguments=arguments, weights=weights, inputs=specs, outputs=["logits"], golden=golden
        )
    return described(bundle, folder, config)


def load_network(folder: Path, config: Mapping[str, Any]) -> PreTrainedModel:
    """Return transformers' network with the folder's weights as float32. transformers is given the keys of config.json
    that were checked, and tensors. It sees no file, so it loads no adapter, no generation settings, no other model."""
    from edgekit.nn import hugging_face

    try:
        hugging_face.check_size(config)
        network, report = hugging_face.model_class(config).from_pretrained(
            None,
            config=hugging_face.configuration(config),
            state_dict=_tensors(folder),
            output_loading_info=True,
        )
    except EdgekitError as error:
        raise EdgekitError(f"{folder}: {error}") from None
    except Exception as error:  # transformers raises many types
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise EdgekitError(f"{folder}: transformers cannot load it: {reason}") from None
    if absent := sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]])):
        raise EdgekitError(
            f"{folder}: the safetensors do not hold {absent[0][:80]!r} as config.json describes it, and "
            "transformers would use random numbers; save the model again"
        )
    return cast("PreTrainedModel", network.float())


def _tensors(folder: Path) -> dict[str, Tensor]:
    """Return the tensors of model.safetensors, or of the files that model.safetensors.index.json names."""
    from safetensors.torch import load_file

    names = ["model.safetensors"]
    index = folder / "model.safetensors.index.json"
    if not (folder / names[0]).is_file() and index.is_file():
        files = read_json(index).get("weight_map")
        names = sorted(set(map(str, files.values()))) if isinstance(files, dict) else []
    tensors: dict[str, Tensor] = {}
    for name in names:
        if not name.endswith(".safetensors") or not is_plain(name) or not (folder / name).is_file():
            raise EdgekitError(f"its weights are in {name[:80]!r}, which is no safetensors file of the folder")
        tensors |= load_file(folder / name)
    return tensors


def safe_config(folder: Path) -> dict[str, Any]:
    """Return the content of config.json. Raises if the model needs its author's code, or if its weights are not
    safetensors."""
    config = read_json(folder / "config.json")
    if "auto_map" in config:
        raise EdgekitError(
            f"{folder}: its model needs code of its author (auto_map), which edgekit does not run; export it to ONNX"
        )
    if not list(folder.glob("*.safetensors")):
        pickles = sorted(path for path in folder.iterdir() if path.suffix in PICKLES)
        raise unsafe(pickles[0]) if pickles else EdgekitError(f"{folder}: holds no safetensors; save the model again")
    return config


def described(bundle: Bundle, folder: Path, config: Mapping[str, Any]) -> Bundle:
    """Return the bundle with the folder's classes and scaling of pixels."""
    labels = config.get("id2label") or {}
    if not isinstance(labels, Mapping) or not all(str(key).isascii() and str(key).isdigit() for key in labels):
        raise EdgekitError(f"{folder}: id2label = {repr(labels)[:60]}; expected class names by their numbers")
    pixels = folder / "preprocessor_config.json"
    scaling = read_json(pixels) if pixels.is_file() else {}
    known = {"mean": scaling.get("image_mean"), "std": scaling.get("image_std")}
    for name, value in known.items():
        if value is not None and not (isinstance(value, list) and all(type(item) in (int, float) for item in value)):
            raise EdgekitError(f"{pixels}: image_{name} = {repr(value)[:60]}; expected a list of numbers")
    manifest = replace(
        bundle.manifest,
        name=folder.name,
        classes=tuple(str(labels[key]) for key in sorted(labels, key=int)),
        preprocessing={"id": "image/1", **known} if all(known.values()) else None,
    )
    return replace(bundle, manifest=manifest)


def _usual_inputs(config: Mapping[str, Any], name: str, folder: Path) -> tuple[TensorSpec, ...]:
    size = config.get("image_size")
    if name == "pixel_values" and size:
        lengths = [config.get("num_channels", 3), *(size if isinstance(size, list) else (size, size))]
        if len(lengths) != 3 or not all(type(length) is int and 0 < length < 2**31 for length in lengths):
            raise EdgekitError(
                f"{folder}/config.json: num_channels = {repr(lengths[0])[:30]}, image_size = {repr(size)[:30]}; "
                "expected whole numbers"
            )
        return (TensorSpec(name, ("batch", *lengths)),)
    if name == "input_ids":
        return (TensorSpec(name, ("batch", "tokens"), "int64"),)
    raise EdgekitError(f"{folder}: the shape of its input {name!r} is not known; pass --input {SPEC_HELP}")


def read_json(path: Path, largest: int = LARGEST_TEXT) -> dict[str, Any]:
    """Return the JSON object in a file of up to `largest` bytes."""
    try:
        values = json.loads(read_file(path, largest=largest))
        json.dumps(values, allow_nan=False)  # Python reads NaN and infinities, which JSON does not have
    except (OSError, ValueError, RecursionError) as error:
        raise EdgekitError(
            f"{path}: cannot be read as JSON ({error}); expected a folder that transformers saved"
        ) from None
    if not isinstance(values, dict):
        raise EdgekitError(f"{path}: expected a JSON object")
    return values
