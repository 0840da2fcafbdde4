"""Import folders that transformers saved, with config.json and safetensors."""

from __future__ import annotations

import contextlib
import importlib.util
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from safetensors.numpy import save_file as save_safetensors

from edgekit.bundle.files import is_plain
from edgekit.bundle.format import Bundle, with_files
from edgekit.bundle.tensors import Arrays, TensorSpec
from edgekit.errors import EdgekitError
from edgekit.importers.base import PICKLES, read_json, unsafe
from edgekit.importers.factory import from_factory
from edgekit.importers.hugging_face_tasks import inputs_of, output_of, pooling_of, tokenizer_files

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
    """Make a bundle from a folder of transformers: config.json and safetensors. The folder also gives classes, scaling
    of pixels, pooling and the tokenizer's files. `inputs` are only needed for models that take neither images nor token
    ids."""
    config = safe_config(folder)
    from edgekit.importers import hiera
    from edgekit.nn import hugging_face

    if not inputs and (own := hiera.own_config(config)) is not None:
        try:
            return described(hiera.bundle_of(own, _tensors(folder), golden), folder, config)
        except EdgekitError as error:
            raise EdgekitError(f"{folder}: {error}") from None

    model, pooling = hugging_face.model_class(config), pooling_of(folder)
    output = output_of(model.__name__, folder)
    if pooling is not None and output != "last_hidden_state":
        raise EdgekitError(f"{folder}: modules.json pools tokens, and {model.__name__} gives none")
    specs = tuple(inputs) or inputs_of(config, model, folder)
    network = load_network(folder, config)
    state = {f"model.{name}": value.numpy() for name, value in network.state_dict().items()}
    arguments: dict[str, Any] = {"config": config, "inputs": [spec.name for spec in specs]}
    if pooling is not None:
        arguments |= {"pooling": pooling.mode, "normalize": pooling.normalize}
        output = "sentence_embedding"
    with tempfile.TemporaryDirectory() as scratch:
        weights = Path(scratch) / "model.safetensors"
        save_safetensors({name: np.ascontiguousarray(value) for name, value in state.items()}, weights)
        bundle = from_factory(
            hugging_face.FACTORY, arguments=arguments, weights=weights, inputs=specs, outputs=[output], golden=golden
        )
    return with_files(described(bundle, folder, config), {**bundle.contents, **tokenizer_files(folder)})


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
