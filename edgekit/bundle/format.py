"""The bundle: one directory, `NAME.edge/`, that holds a model, the description of its inputs, and data to verify it.

edgekit.json          manifest: family, inputs, classes, preprocessing, a record per pass, SHA-256 of all files
weights.safetensors   parameters, encoded as the passes left them
graph.onnx            replaces the weights if the model is a graph: imported, or lowered by a pass on graphs
golden.npz            inputs, and the outputs that they must give

A bundle contains no executable code and no pickle. Opening verifies every hash; writing is atomic.
"""

from __future__ import annotations

import hashlib
import json
import types
import typing
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors.numpy import save as save_safetensors

from edgekit.bundle.bounded import arrays_from_npz, arrays_from_safetensors
from edgekit.bundle.encoding import Encoding, Float, from_arrays, to_arrays
from edgekit.bundle.files import is_plain
from edgekit.bundle.signature import Signature
from edgekit.bundle.tensors import Arrays, TensorSpec, arrays_to_bytes
from edgekit.errors import EdgekitError

if TYPE_CHECKING:
    from onnx import ModelProto
    from torch import nn

FORMAT = 1
WITH_AXES = 2  # the format of models whose batch is not the first axis, which older versions cannot run
# files of a Hugging Face folder that the bundle of a text model carries
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.txt",
    "vocab.json", "merges.txt", "spiece.model", "sentencepiece.bpe.model", "sentence_bert_config.json",
)  # fmt: skip
MANIFEST, WEIGHTS, GRAPH, GOLDEN = "edgekit.json", "weights.safetensors", "graph.onnx", "golden.npz"
LARGEST_CALL = 65_536  # rows
ONNX = "onnx"  # the family of bundles that hold a graph
PROBABILITIES = "probabilities"  # an output of this name is the softmax of the network's result
KEY = "edgekit.model"  # metadata entry with the model_key, so that a session refuses another model's file


@dataclass(frozen=True, slots=True)
class Manifest:
    """The content of `edgekit.json`."""

    name: str
    family: str  # name of the model family that builds the network
    arguments: dict[str, Any]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    state: dict[str, str] = field(default_factory=dict)  # input -> output that the caller passes to it in the next call
    classes: tuple[str, ...] = ()
    class_ids: tuple[int, ...] = ()  # the data set's own numbers for the classes, in the same order
    # {"id": ..., parameters}: the function that computes the inputs from raw data
    preprocessing: dict[str, Any] | None = None
    data: str | None = None  # the data set on which the model's quality is measured
    metrics: dict[str, Any] = field(default_factory=dict)
    target: str | None = None
    recipe: dict[str, Any] | None = None
    records: tuple[dict[str, Any], ...] = ()  # one per pass, kept or rolled back
    bits: dict[str, int] = field(default_factory=dict)  # code width of every encoded weight
    parent: str | None = None  # digest of the bundle from which this one was made
    seed: int | None = None
    synthetic: bool = False  # the golden inputs were made up, so their lengths and values say little about real ones
    versions: dict[str, str] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)  # relative path -> SHA-256
    rows_per_call: int | None = None  # the number of rows of a call, if the graph fixes it
    format: int = FORMAT

    @property
    def signature(self) -> Signature:
        """Return how rows become calls of the model."""
        return Signature.of(self.inputs, self.outputs, self.rows_per_call)

    @property
    def needed_format(self) -> int:
        """Return the oldest format that can say what the manifest says."""
        return FORMAT if self.signature.plain else WITH_AXES

    @classmethod
    def from_json(cls, text: bytes, source: str) -> Manifest:
        try:
            values = json.loads(text)
            # Python reads NaN, Infinity and lone surrogates, which JSON and UTF-8 do not have
            json.dumps(values, allow_nan=False, ensure_ascii=False).encode()
        except (ValueError, RecursionError) as error:
            raise EdgekitError(f"{source}: not valid JSON ({error}); the bundle is damaged, write it again") from None
        if not isinstance(values, dict) or values.get("format") not in (FORMAT, WITH_AXES):
            got = values.get("format") if isinstance(values, dict) else type(values).__name__
            raise EdgekitError(f"{source}: bundle format {got!r}; this edgekit reads formats {FORMAT} and {WITH_AXES}")
        names = {item.name for item in fields(cls)}
        strange, missing = set(values) - names, {"name", "family", "arguments", "inputs", "outputs"} - set(values)
        if strange or missing:
            problem = f"unknown key {min(strange)!r}" if strange else f"missing key {min(missing)!r}"
            raise EdgekitError(f"{source}: {problem}; expected the keys {', '.join(sorted(names))}")
        for key, hint in typing.get_type_hints(cls).items():
            if key in values and not _fits(values[key], hint):
                raise EdgekitError(
                    f"{source}: {key} = {str(values[key])[:60]!r} has a wrong type or value; restore the file"
                )
        for key in ("inputs", "outputs"):
            if not values[key]:
                raise EdgekitError(f"{source}: the model has no {key}; the bundle is damaged, write it again")
            try:
                values[key] = tuple(_spec(spec) for spec in values[key])
            except EdgekitError as error:
                raise EdgekitError(f"{source}: {error}") from None
        for key in ("classes", "class_ids", "records"):
            values[key] = tuple(values.get(key, ()))
        _check_names(values, source)
        rows = values.get("rows_per_call")
        if rows is not None and not 0 < rows <= LARGEST_CALL:
            raise EdgekitError(f"{source}: rows_per_call = {rows}; expected 1 to {LARGEST_CALL}; restore the file")
        found = cls(**values)
        if found.format != found.needed_format:
            raise EdgekitError(
                f"{source}: bundle format {found.format}, but its content is of format {found.needed_format}"
            )
        return found

    def to_json(self) -> bytes:
        values = asdict(self)
        for key in ("inputs", "outputs"):
            values[key] = [spec.to_json() for spec in getattr(self, key)]
        values["format"] = self.needed_format
        if self.rows_per_call is None:
            del values["rows_per_call"]
        if not self.synthetic:  # manifests that were written before this key stay the same bytes
            del values["synthetic"]
        return (json.dumps(values, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()


@dataclass(frozen=True, slots=True)
class Bundle:
    """A verified bundle in memory, with all its weights: the models that edgekit compresses fit there."""

    manifest: Manifest
    contents: Mapping[str, bytes]  # file name -> bytes, as listed in manifest.files
    path: Path | None = None

    @property
    def digest(self) -> str:
        """Return the SHA-256 of the manifest, and through its hashes of all files: results name the bundle by it."""
        return hashlib.sha256(self.manifest.to_json()).hexdigest()

    @property
    def size(self) -> int:
        """Return the bytes of manifest and files together."""
        return len(self.manifest.to_json()) + sum(len(content) for content in self.contents.values())

    @property
    def is_graph(self) -> bool:
        """Return whether the bundle holds an ONNX graph rather than a network that torch can build."""
        return self.manifest.family == ONNX

    @property
    def parameters(self) -> int:
        """Return how many learnt numbers the model has, in any encoding."""
        if self.is_graph:
            from edgekit.bundle.onnx_file import parameters

            return parameters(self.graph())
        return sum(value.size for value in self.weights().values())

    def stored(self) -> dict[str, Float | Encoding]:
        """Return the parameters as stored: float32 arrays, or encodings."""
        if self.is_graph:
            raise EdgekitError(
                f"{self.path or self.manifest.name} holds an ONNX graph and no network with named weights"
            )
        source = f"{self.path or self.manifest.name}/{WEIGHTS}"
        arrays = arrays_from_safetensors(self.contents[WEIGHTS], source)
        try:
            stored = from_arrays(arrays, self.manifest.bits)
            decoded = {name: v if isinstance(v, np.ndarray) else v.decode() for name, v in stored.items()}
        except (LookupError, ValueError) as error:
            raise EdgekitError(f"{source}: cannot be decoded ({error}); write the bundle again") from None
        for name, weight in decoded.items():
            if not np.isfinite(weight).all():
                raise EdgekitError(
                    f"{self.path or self.manifest.name}: weight {name!r} holds NaN or infinite values; "
                    "the model cannot be used, restore it from its source"
                )
        return stored

    def weights(self) -> dict[str, Float]:
        """Return the parameters, decoded to float32, by name."""
        return {name: v if isinstance(v, np.ndarray) else v.decode() for name, v in self.stored().items()}

    def encodings(self) -> dict[str, Encoding]:
        """Return the encodings of compressed parameters by name; a graph stores its own."""
        if self.is_graph:
            return {}
        return {name: value for name, value in self.stored().items() if not isinstance(value, np.ndarray)}

    def graph(self) -> ModelProto:
        """Return the ONNX graph that the bundle holds, parsed and checked."""
        from edgekit.bundle.onnx_file import load

        return load(self.contents[GRAPH], str(self.path or self.manifest.name))

    def model(self) -> nn.Module:
        """Return the network with its weights, in evaluation mode."""
        from edgekit.bundle.family import build

        if self.is_graph:
            raise EdgekitError(
                f"{self.path or self.manifest.name} holds an ONNX graph, which torch does not run; "
                "use the runtime onnxruntime"
            )

        return build(self.manifest.family, self.manifest.arguments, self.weights())

    def golden(self) -> tuple[Arrays, Arrays]:
        """Return golden inputs and outputs by name."""
        source = f"{self.path or self.manifest.name}/{GOLDEN}"
        arrays = arrays_from_npz(self.contents[GOLDEN], source)
        inputs, outputs = self.manifest.inputs, self.manifest.outputs
        for name in [*(f"in.{spec.name}" for spec in inputs), *(f"out.{spec.name}" for spec in outputs)]:
            if name not in arrays:
                raise EdgekitError(f"{source}: holds no array {name!r}; write the bundle again")
        return (
            {spec.name: arrays[f"in.{spec.name}"] for spec in inputs},
            {spec.name: arrays[f"out.{spec.name}"] for spec in outputs},
        )


def model_key(bundle: Bundle) -> str:
    """Return the SHA-256 of all that determines an export's outputs: architecture, weights, inputs and outputs, but not
    metrics, records or names."""
    manifest = bundle.manifest
    identity: dict[str, Any] = {
        "family": manifest.family,
        "arguments": manifest.arguments,
        "inputs": [spec.to_json() for spec in manifest.inputs],
        "outputs": [spec.to_json() for spec in manifest.outputs],
        "bits": manifest.bits,
        "weights": hashlib.sha256(bundle.contents[GRAPH if bundle.is_graph else WEIGHTS]).hexdigest(),
    }
    if manifest.rows_per_call is not None:
        identity["rows_per_call"] = manifest.rows_per_call
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def assemble(
    manifest: Manifest,
    weights: Mapping[str, Float],
    encodings: Mapping[str, Encoding],
    golden: tuple[Arrays, Arrays],
    extra: Mapping[str, bytes] | None = None,
) -> Bundle:
    """Make a bundle in memory; `extra` holds further files such as report.html. The function fills in `bits` and
    `files`."""
    contents = {WEIGHTS: save_safetensors(to_arrays(weights, encodings)), GOLDEN: _golden(golden), **(extra or {})}
    bits = {name: encoding.bits for name, encoding in encodings.items()}
    return Bundle(replace(manifest, bits=bits, files=_hashes(contents)), contents)


def assemble_graph(manifest: Manifest, graph: bytes, golden: tuple[Arrays, Arrays]) -> Bundle:
    """Make a bundle in memory that holds an ONNX graph; the function sets family and arguments."""
    contents = {GRAPH: graph, GOLDEN: _golden(golden)}
    written = replace(manifest, family=ONNX, arguments={}, bits={}, files=_hashes(contents))
    return Bundle(replace(written, format=written.needed_format), contents)


def replace_golden(bundle: Bundle, golden: tuple[Arrays, Arrays]) -> Bundle:
    """Return the bundle with other golden data."""
    return with_files(bundle, {GOLDEN: _golden(golden)})


def _golden(golden: tuple[Arrays, Arrays]) -> bytes:
    named = {f"in.{name}": array for name, array in golden[0].items()}
    return arrays_to_bytes(named | {f"out.{name}": array for name, array in golden[1].items()})


def with_files(bundle: Bundle, extra: Mapping[str, bytes]) -> Bundle:
    """Return the bundle with files added or replaced."""
    contents = {**bundle.contents, **extra}
    return replace(bundle, manifest=replace(bundle.manifest, files=_hashes(contents)), contents=contents)


def _spec(values: Mapping[str, Any]) -> TensorSpec:
    axes = values.get("axes")
    return TensorSpec(**{**values, "shape": tuple(values["shape"]), "axes": None if axes is None else tuple(axes)})


def _fits(value: Any, hint: Any) -> bool:
    """Return whether a value read from JSON has the type of a field; lists stand for tuples, objects for
    dataclasses."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin is types.UnionType:
        return any(_fits(value, part) for part in parts)
    if origin is tuple:
        return isinstance(value, list) and all(_fits(item, parts[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(_fits(item, parts[1]) for item in value.values())
    if is_dataclass(hint):
        hints = typing.get_type_hints(hint)
        keys = set(value) if isinstance(value, dict) else set()
        return {"name", "shape"} <= keys <= set(hints) and all(_fits(value[key], hints[key]) for key in keys)
    return isinstance(value, hint) and not (hint is int and isinstance(value, bool))


def _check_names(values: Mapping[str, Any], source: str) -> None:
    """Raise for names that cannot be printed on one line, paths that leave the bundle, and classes of one name."""
    specs = [spec.name for key in ("inputs", "outputs") for spec in values[key]]
    single = [values[key] for key in ("name", "family", "data", "target", "parent") if values.get(key)]
    for name in (*single, *values["classes"], *specs, *values.get("files", {}), *values.get("versions", {})):
        if not name.isprintable():
            raise EdgekitError(f"{source}: the name {name[:60]!r} holds a control character; restore the file")
    for name in values.get("files", {}):
        if not is_plain(name):
            raise EdgekitError(f"{source}: file name {name[:60]!r} points outside the bundle; do not trust this bundle")
    for what, names in (("class", values["classes"]), ("input or output", specs)):
        if twice := {name for name in names if names.count(name) > 1}:
            raise EdgekitError(f"{source}: the {what} {min(twice)!r} is named twice; restore the file")


def _hashes(contents: Mapping[str, bytes]) -> dict[str, str]:
    return {name: hashlib.sha256(content).hexdigest() for name, content in sorted(contents.items())}
