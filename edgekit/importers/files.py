"""Models from elsewhere as bundles: an ONNX file, a torch.export program, a Python function with safetensors, a
Hugging Face folder.

No pickle is ever read: unpickling runs whatever code the file's author put in it.
"""

from __future__ import annotations

import io
import json
import re
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load as load_safetensors
from safetensors.numpy import save_file as save_safetensors

from edgekit.bundle.format import (
    ONNX,
    Arrays,
    Bundle,
    Manifest,
    TensorSpec,
    assemble,
    assemble_graph,
    golden_inputs,
    multiple,
    replace_golden,
)
from edgekit.bundle.zoo import PICKLES
from edgekit.errors import EdgekitError, missing_extra
from edgekit.session import check_inputs, open_session

GOLDEN_ROWS = 8
SPEC_HELP = "NAME:DTYPE:AXES, such as image:float32:batch,3,224,224"


def from_file(path: Path, *, golden: Arrays | None = None) -> Bundle:
    """A bundle from an .onnx or .pt2 file."""
    if not path.is_file():
        raise EdgekitError(f"{path}: no such file; expected a model as .onnx or .pt2")
    if path.suffix == ".onnx":
        return from_onnx(path.read_bytes(), path.stem, str(path), golden=golden)
    if path.suffix == ".pt2":
        return from_program(path, golden=golden)
    raise unsafe(path)


def unsafe(path: Path) -> EdgekitError:
    """Why a model file of this kind is not read."""
    if path.suffix in PICKLES:
        return EdgekitError(
            f"{path}: a {path.suffix} file is a pickle, which runs its author's code when it is read; save the weights "
            "as safetensors (safetensors.torch.save_model) or the model as .onnx or .pt2 (torch.export.save)"
        )
    return EdgekitError(
        f"{path}: not a model that edgekit reads; expected .onnx, .pt2, a bundle or package.module:function"
    )


def from_onnx(content: bytes, name: str, source: str, *, golden: Arrays | None = None) -> Bundle:
    """A bundle around an ONNX graph; its golden outputs are what onnxruntime makes of the golden inputs."""
    from edgekit.graph.model import load, normalized, serialized, specs

    model = load(content, source)
    inputs, outputs = specs(model, source)
    given = _golden_rows(inputs, golden)
    manifest = Manifest(name=name, family=ONNX, arguments={}, inputs=inputs, outputs=outputs)
    empty = {spec.name: np.zeros(0, np.float32) for spec in outputs}
    bundle = assemble_graph(manifest, serialized(normalized(model)), (given, empty))
    try:
        found = open_session(bundle, "onnxruntime", threads=1).run(given)
    except EdgekitError as error:
        remedy = "" if golden else "; these inputs are made up, real ones may do: edgekit import --data FILE.npz"
        raise EdgekitError(f"{source}: {error}{remedy}") from None
    return replace_golden(bundle, (given, found))


def from_program(path: Path, *, golden: Arrays | None = None) -> Bundle:
    """A bundle from torch.export's archive: its program becomes an ONNX graph."""
    try:
        import torch
    except ModuleNotFoundError:
        raise missing_extra("torch", "compress", "reading a .pt2 file") from None
    archive = _plain_archive(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.load(archive)
            exported = torch.onnx.export(program, dynamo=True, opset_version=18, verbose=False)
    except Exception as error:  # both have many stages of their own
        raise EdgekitError(
            f"{path}: torch cannot read it and write it as ONNX: {type(error).__name__}: {error}"
        ) from None
    assert exported is not None
    return from_onnx(exported.model_proto.SerializeToString(), path.stem, str(path), golden=golden)


PLAIN = "save a model of plain tensors with torch.export.save, or export it to ONNX"
# all that an archive of plain tensors holds. What else torch would load is run: pickled constants, compiled libraries
MEMBERS = re.compile(
    r"archive_format|archive_version|byteorder|version|\.data/\w+|models/\w+\.json|extra/[\w./-]+"
    r"|data/(weights/(weight_\d+|\w+_weights_config\.json)|constants/(tensor_\d+|\w+_constants_config\.json))"
    r"|data/sample_inputs/\w+\.pt"
)
PAYLOAD = re.compile(r"(weight|tensor)_\d+")


def _plain_archive(path: Path) -> io.BytesIO:
    """The archive written anew from members that were checked, so that torch reads what we have seen and nothing else.

    torch.export.load unpickles what the archive marks as pickled, and sample inputs too where its safe reader fails.
    """
    import torch

    checked = io.BytesIO()
    try:
        with zipfile.ZipFile(path) as archive, zipfile.ZipFile(checked, "w") as plain:
            names = archive.namelist()
            if len(set(names)) != len(names):
                raise EdgekitError(f"{path}: holds two files of one name; {PLAIN}")
            for item in names:
                name, content = item.partition("/")[2], archive.read(item)
                if not MEMBERS.fullmatch(name):
                    raise EdgekitError(
                        f"{path}: holds {name or item!r}, which torch would run and edgekit does not; {PLAIN}"
                    )
                if name.endswith("_config.json"):
                    for key, entry in json.loads(content).get("config", {}).items():
                        if entry.get("use_pickle") is not False or not PAYLOAD.fullmatch(entry.get("path_name", "")):
                            raise EdgekitError(f"{path}: {key!r} is stored as a pickle, which is never read; {PLAIN}")
                if name.startswith("data/sample_inputs/"):
                    _check_tensors(content, path, name, torch)
                plain.writestr(item, content)
    except (zipfile.BadZipFile, ValueError, AttributeError, NotImplementedError) as error:
        raise EdgekitError(f"{path}: not an archive of torch.export.save ({error}); write it again") from None
    checked.seek(0)
    return checked


def _check_tensors(content: bytes, path: Path, name: str, torch: Any) -> None:
    try:
        torch.load(io.BytesIO(content), weights_only=True)
    except Exception:  # whatever its reader meets: torch would then read it without care
        raise EdgekitError(f"{path}: {name} holds more than tensors, which would be run; {PLAIN}") from None


def from_factory(
    factory: str,
    *,
    arguments: Mapping[str, Any],
    weights: Path | None,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[str],
    golden: Arrays | None = None,
) -> Bundle:
    """A bundle from a Python function that builds a network. outputs: their names, in order; one named
    "probabilities" is the softmax of what the network gives."""
    from edgekit.data.dataset import Dataset
    from edgekit.nn.families import build
    from edgekit.nn.module import tied, trust
    from edgekit.nn.training import outputs as run_network

    if not inputs:
        raise EdgekitError(f"{factory}: its inputs are not known; pass --input {SPEC_HELP} for each")
    trust(factory)
    described = {spec.name: f"{spec.dtype}:{','.join(map(str, spec.shape))}" for spec in inputs}
    values = {"factory": factory, "arguments": dict(arguments), "inputs": described}
    stored = None
    if weights is not None:
        if weights.suffix in PICKLES:
            raise unsafe(weights)
        try:
            stored = load_safetensors(weights.read_bytes())
        except SafetensorError as error:
            raise EdgekitError(f"{weights}: not a safetensors file ({error})") from None
    model = build("module", values, stored)
    given = _golden_rows(tuple(inputs), golden)
    names = list(outputs) or ["output"]

    def run(rows: Arrays) -> list[npt.NDArray[Any]]:
        data = Dataset(rows, np.zeros(len(next(iter(rows.values()))), np.int64))
        try:
            return run_network(model, data, softmax=[name == "probabilities" for name in names])
        except (RuntimeError, TypeError, IndexError, ValueError) as error:
            raise EdgekitError(
                f"{factory}: does not run on inputs of shapes { ({n: a.shape for n, a in rows.items()}) }: "
                f"{str(error).splitlines()[0]}"
            ) from None

    found = run(given)
    shapes = _output_axes(run, inputs, names)
    specs = tuple(TensorSpec(name, shapes[name], str(array.dtype)) for name, array in zip(names, found, strict=True))
    manifest = Manifest(
        name=factory.partition(":")[0].rpartition(".")[2],
        family="module",
        arguments=values,
        inputs=tuple(inputs),
        outputs=specs,
    )
    aliases = tied(model)
    state = {name: value.detach().numpy() for name, value in model.state_dict().items() if name not in aliases}
    return assemble(manifest, state, {}, (given, dict(zip(names, found, strict=True))))


def from_hugging_face(folder: Path, *, inputs: Sequence[TensorSpec] = (), golden: Arrays | None = None) -> Bundle:
    """A bundle from a folder of transformers: config.json and safetensors. Classes and the scaling of pixels come
    along. `inputs` need only be given for models that take neither images nor token ids."""
    config = safe_config(folder)
    from edgekit.nn import hugging_face

    specs = tuple(inputs) or _usual_inputs(config, hugging_face.model_class(config).main_input_name, folder)
    try:
        model = hugging_face.model_class(config).from_pretrained(
            folder, config=hugging_face.configuration(config), use_safetensors=True, local_files_only=True
        )
    except (OSError, RuntimeError, SafetensorError) as error:
        raise EdgekitError(f"{folder}: transformers cannot load it: {str(error).splitlines()[0]}") from None
    state = {f"model.{name}": value.float().numpy() for name, value in model.state_dict().items()}
    arguments = {"config": config, "inputs": [spec.name for spec in specs]}
    with tempfile.TemporaryDirectory() as scratch:
        weights = Path(scratch) / "model.safetensors"
        save_safetensors({name: np.ascontiguousarray(value) for name, value in state.items()}, weights)
        bundle = from_factory(
            hugging_face.FACTORY, arguments=arguments, weights=weights, inputs=specs, outputs=["logits"], golden=golden
        )
    return described(bundle, folder, config)


def safe_config(folder: Path) -> dict[str, Any]:
    """What config.json says. Raises if the model is its author's code, or its weights are not safetensors."""
    config = _read_json(folder / "config.json")
    if "auto_map" in config:
        raise EdgekitError(
            f"{folder}: its model is code of its author's (auto_map), which is not run; export it to ONNX"
        )
    if not list(folder.glob("*.safetensors")):
        pickles = sorted(path for path in folder.iterdir() if path.suffix in PICKLES)
        raise unsafe(pickles[0]) if pickles else EdgekitError(f"{folder}: holds no safetensors; save the model again")
    return config


def described(bundle: Bundle, folder: Path, config: Mapping[str, Any]) -> Bundle:
    """The bundle with what the folder says of its classes and of the scaling of pixels."""
    labels = config.get("id2label") or {}
    pixels = folder / "preprocessor_config.json"
    scaling = _read_json(pixels) if pixels.is_file() else {}
    known = {"mean": scaling.get("image_mean"), "std": scaling.get("image_std")}
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
        height, width = size if isinstance(size, list) else (size, size)
        return (TensorSpec(name, ("batch", int(config.get("num_channels", 3)), int(height), int(width))),)
    if name == "input_ids":
        return (TensorSpec(name, ("batch", "tokens"), "int64"),)
    raise EdgekitError(f"{folder}: the shape of its input {name!r} is not known; pass --input {SPEC_HELP}")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise EdgekitError(
            f"{path}: cannot be read as JSON ({error}); expected a folder that transformers saved"
        ) from None
    if not isinstance(values, dict):
        raise EdgekitError(f"{path}: expected a JSON object")
    return values


def parse_spec(text: str) -> TensorSpec:
    """'image:float32:batch,3,224,224' as a spec."""
    parts = text.split(":")
    if len(parts) != 3 or not parts[2]:
        raise EdgekitError(f"--input {text!r}: expected {SPEC_HELP}")
    axes = tuple(int(axis) if axis.isdigit() else axis for axis in parts[2].split(","))
    try:
        np.dtype(parts[1])
    except TypeError:
        raise EdgekitError(f"--input {text!r}: unknown dtype {parts[1]!r}; expected float32, int64, ...") from None
    if isinstance(axes[0], int):
        raise EdgekitError(f"--input {text!r}: the first axis is the batch, of any length; expected {SPEC_HELP}")
    return TensorSpec(parts[0], axes, parts[1])


def _golden_rows(specs: Sequence[TensorSpec], given: Arrays | None) -> Arrays:
    if given is None:
        return golden_inputs(tuple(specs), GOLDEN_ROWS)
    rows = {spec.name: given[spec.name][:GOLDEN_ROWS] for spec in specs if spec.name in given}
    check_inputs(specs, rows)
    return rows


def _output_axes(
    run: Callable[[Arrays], list[npt.NDArray[Any]]], inputs: Sequence[TensorSpec], names: Sequence[str]
) -> dict[str, tuple[int | str, ...]]:
    """Axes of the outputs by name. Which grow with which free axis of the inputs is found by making that longer."""

    def outputs(longer: str | None) -> list[tuple[int, ...]]:
        sized = [
            replace(
                spec,
                shape=tuple(
                    (2 + (axis == longer)) * multiple(axis) if isinstance(axis, str) else axis for axis in spec.shape
                ),
            )
            for spec in inputs
        ]
        return [array.shape for array in run(golden_inputs(tuple(sized), 2))]

    usual = outputs(None)
    shapes: list[list[int | str]] = [["batch", *shape[1:]] for shape in usual]
    for free in dict.fromkeys(axis for spec in inputs for axis in spec.shape[1:] if isinstance(axis, str)):
        for number, shape in enumerate(outputs(free)):
            for axis in range(1, len(shape)):
                step, start = shape[axis] - usual[number][axis], usual[number][axis]
                if step:
                    proportional = start == 2 * step and isinstance(shapes[number][axis], int)
                    own = free.partition("*")[2] or free
                    name = own if step == 1 else f"{step}*{own}"
                    shapes[number][axis] = name if proportional else f"{names[number]}_{axis}"
    return {name: tuple(shape) for name, shape in zip(names, shapes, strict=True)}
