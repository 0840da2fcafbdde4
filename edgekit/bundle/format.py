"""The bundle: one directory, `NAME.edge/`, that holds a model, how to feed it, and the proof that it still works.

    edgekit.json          manifest: family, inputs, classes, preprocessing, a record per pass, SHA-256 of all files
    weights.safetensors   parameters, encoded as the passes left them
    graph.onnx            instead of it, once the model is a graph: imported, or lowered by a pass on graphs
    golden.npz            inputs and the outputs they must give

Nothing in it is executable and nothing is a pickle. Opening verifies every hash; writing is atomic.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import types
import typing
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load as load_safetensors
from safetensors.numpy import save as save_safetensors

from edgekit.bundle.encoding import Encoding, Float, from_arrays, to_arrays
from edgekit.bundle.files import write_directory
from edgekit.errors import EdgekitError

if TYPE_CHECKING:
    from torch import nn

FORMAT = 1
MANIFEST, WEIGHTS, GRAPH, GOLDEN = "edgekit.json", "weights.safetensors", "graph.onnx", "golden.npz"
ONNX = "onnx"  # the family of bundles that hold a graph
PROBABILITIES = "probabilities"  # an output of this name is the softmax of what the network gives
Arrays = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One named input or output. A string in `shape` names an axis that may have any length, such as "batch", or any
    multiple of a number, such as "9*faces"."""

    name: str
    shape: tuple[int | str, ...]
    dtype: str = "float32"
    unit: str = ""

    def __post_init__(self) -> None:
        for axis in self.shape:
            if isinstance(axis, str) and not _AXIS.fullmatch(axis):
                raise EdgekitError(f"{self.name!r}: axis {axis!r}; expected a name, or a multiple such as '9*faces'")

    def check(self, array: npt.NDArray[Any]) -> None:
        """Raise if the array does not fit this spec."""
        fits = array.ndim == len(self.shape) and all(
            isinstance(want, str) or want == got for want, got in zip(self.shape, array.shape, strict=True)
        )
        if not fits:
            raise EdgekitError(f"input {self.name!r} has shape {array.shape}; expected {self.shape_text}")
        for number, got in enumerate(array.shape):
            step = multiple(self.shape[number])
            if got % step or (step > 1 and got == 0):  # nothing of what comes in groups is no group
                below, above = got // step * step, (got // step + 1) * step
                nearest = f"{below} or {above}" if below else f"{above}"
                raise EdgekitError(
                    f"input {self.name!r} has length {got} along axis {number}; this model needs a multiple of {step} "
                    f"({nearest})"
                )
        if str(array.dtype) != self.dtype:
            raise EdgekitError(f"input {self.name!r} has dtype {array.dtype}; expected {self.dtype}")

    @property
    def shape_text(self) -> str:
        return "(" + ", ".join(str(axis) for axis in self.shape) + ")"


_AXIS = re.compile(r"(?:([1-9][0-9]*)\*)?[^*\s]+")


def multiple(axis: int | str) -> int:
    """What the length of an axis must be a multiple of: 9 for "9*faces"."""
    found = _AXIS.fullmatch(axis) if isinstance(axis, str) else None
    return int(found[1]) if found and found[1] else 1


@dataclass(frozen=True, slots=True)
class Manifest:
    """What `edgekit.json` says."""

    name: str
    family: str  # which constructor in edgekit.families builds the network
    arguments: dict[str, Any]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    state: dict[str, str] = field(default_factory=dict)  # input -> output that a caller hands back in the next call
    classes: tuple[str, ...] = ()
    class_ids: tuple[int, ...] = ()  # the data set's own numbers for the classes, in the same order
    preprocessing: dict[str, Any] | None = None  # {"id": ..., parameters}: what turns raw data into the inputs
    data: str | None = None  # the data set its quality is measured on
    metrics: dict[str, Any] = field(default_factory=dict)
    target: str | None = None
    recipe: dict[str, Any] | None = None
    records: tuple[dict[str, Any], ...] = ()  # one per pass, kept or rolled back
    bits: dict[str, int] = field(default_factory=dict)  # code width of every encoded weight
    parent: str | None = None  # digest of the bundle this one was made from
    seed: int | None = None
    versions: dict[str, str] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)  # relative path -> SHA-256
    format: int = FORMAT

    @classmethod
    def from_json(cls, text: bytes, source: str) -> Manifest:
        try:
            values = json.loads(text)
            json.dumps(values, allow_nan=False)  # Python reads NaN and Infinity, which JSON does not have
        except (ValueError, RecursionError) as error:
            raise EdgekitError(f"{source}: not valid JSON ({error}); the bundle is damaged, write it again") from None
        if not isinstance(values, dict) or values.get("format") != FORMAT:
            got = values.get("format") if isinstance(values, dict) else type(values).__name__
            raise EdgekitError(f"{source}: bundle format {got!r}; this edgekit reads format {FORMAT}")
        names = {item.name for item in fields(cls)}
        strange, missing = set(values) - names, {"name", "family", "arguments", "inputs", "outputs"} - set(values)
        if strange or missing:
            problem = f"unknown key {min(strange)!r}" if strange else f"missing key {min(missing)!r}"
            raise EdgekitError(f"{source}: {problem}; expected the keys {', '.join(sorted(names))}")
        for key, hint in typing.get_type_hints(cls).items():
            if key in values and not _fits(values[key], hint):
                raise EdgekitError(
                    f"{source}: {key} = {str(values[key])[:60]!r} is not what belongs there; restore the file"
                )
        for key in ("inputs", "outputs"):
            if not values[key]:
                raise EdgekitError(f"{source}: the model has no {key}; the bundle is damaged, write it again")
            values[key] = tuple(TensorSpec(**{**spec, "shape": tuple(spec["shape"])}) for spec in values[key])
        for key in ("classes", "class_ids", "records"):
            values[key] = tuple(values.get(key, ()))
        return cls(**values)

    def to_json(self) -> bytes:
        return (json.dumps(asdict(self), indent=1, sort_keys=True, allow_nan=False) + "\n").encode()


@dataclass(frozen=True, slots=True)
class Bundle:
    """A verified bundle in memory. Small by design: the models edgekit compresses fit, weights and all."""

    manifest: Manifest
    contents: Mapping[str, bytes]  # file name -> bytes, as listed in manifest.files
    path: Path | None = None

    @property
    def digest(self) -> str:
        """SHA-256 of the manifest, and through its hashes of everything: the identity that results are stamped with."""
        return hashlib.sha256(self.manifest.to_json()).hexdigest()

    @property
    def size(self) -> int:
        """Bytes of manifest and files together."""
        return len(self.manifest.to_json()) + sum(len(content) for content in self.contents.values())

    @property
    def is_graph(self) -> bool:
        """Whether it holds an ONNX graph rather than a network that torch can build."""
        return self.manifest.family == ONNX

    @property
    def parameters(self) -> int:
        """How many numbers the model has learnt, however they are stored."""
        if self.is_graph:
            from edgekit.graph.model import load, parameters

            return parameters(load(self.contents[GRAPH], str(self.path or self.manifest.name)))
        return sum(value.size for value in self.weights().values())

    def stored(self) -> dict[str, Float | Encoding]:
        """Parameters as stored: float32 arrays, or encodings."""
        if self.is_graph:
            raise EdgekitError(f"{self.path or self.manifest.name} holds an ONNX graph, no network with named weights")
        try:
            arrays = dict(sorted(load_safetensors(self.contents[WEIGHTS]).items()))  # safetensors gives any order
            stored = from_arrays(arrays, self.manifest.bits)
            decoded = {name: v if isinstance(v, np.ndarray) else v.decode() for name, v in stored.items()}
        except (SafetensorError, LookupError, ValueError) as error:
            raise EdgekitError(
                f"{self.path or self.manifest.name}/{WEIGHTS}: cannot be decoded ({error}); write the bundle again"
            ) from None
        for name, weight in decoded.items():
            if not np.isfinite(weight).all():
                raise EdgekitError(
                    f"{self.path or self.manifest.name}: weight {name!r} holds NaN or infinite values; "
                    "the model cannot be used, restore it from its source"
                )
        return stored

    def weights(self) -> dict[str, Float]:
        """Parameters decoded to float32, by name."""
        return {name: v if isinstance(v, np.ndarray) else v.decode() for name, v in self.stored().items()}

    def encodings(self) -> dict[str, Encoding]:
        """How compressed parameters are stored, by name; a graph holds its own."""
        if self.is_graph:
            return {}
        return {name: value for name, value in self.stored().items() if not isinstance(value, np.ndarray)}

    def model(self) -> nn.Module:
        """The network with its weights, in evaluation mode."""
        from edgekit.nn.families import build

        if self.is_graph:
            raise EdgekitError(
                f"{self.path or self.manifest.name} holds an ONNX graph, which torch does not run; "
                "use the runtime onnxruntime"
            )

        return build(self.manifest.family, self.manifest.arguments, self.weights())

    def golden(self) -> tuple[Arrays, Arrays]:
        """Golden inputs and outputs by name."""
        source = f"{self.path or self.manifest.name}/{GOLDEN}"
        arrays = arrays_from_bytes(self.contents[GOLDEN], source)
        inputs, outputs = self.manifest.inputs, self.manifest.outputs
        for name in [*(f"in.{spec.name}" for spec in inputs), *(f"out.{spec.name}" for spec in outputs)]:
            if name not in arrays:
                raise EdgekitError(f"{source}: holds no array {name!r}; write the bundle again")
        return (
            {spec.name: arrays[f"in.{spec.name}"] for spec in inputs},
            {spec.name: arrays[f"out.{spec.name}"] for spec in outputs},
        )


def assemble(
    manifest: Manifest,
    weights: Mapping[str, Float],
    encodings: Mapping[str, Encoding],
    golden: tuple[Arrays, Arrays],
    extra: Mapping[str, bytes] | None = None,
) -> Bundle:
    """A bundle in memory; `extra` holds further files such as report.html. Fills in `bits` and `files`."""
    contents = {WEIGHTS: save_safetensors(to_arrays(weights, encodings)), GOLDEN: _golden(golden), **(extra or {})}
    bits = {name: encoding.bits for name, encoding in encodings.items()}
    return Bundle(replace(manifest, bits=bits, files=_hashes(contents)), contents)


def assemble_graph(manifest: Manifest, graph: bytes, golden: tuple[Arrays, Arrays]) -> Bundle:
    """A bundle in memory that holds an ONNX graph; its family and arguments are set to say so."""
    contents = {GRAPH: graph, GOLDEN: _golden(golden)}
    return Bundle(replace(manifest, family=ONNX, arguments={}, bits={}, files=_hashes(contents)), contents)


def replace_golden(bundle: Bundle, golden: tuple[Arrays, Arrays]) -> Bundle:
    """The bundle with other golden data."""
    return with_files(bundle, {GOLDEN: _golden(golden)})


def _golden(golden: tuple[Arrays, Arrays]) -> bytes:
    named = {f"in.{name}": array for name, array in golden[0].items()}
    return arrays_to_bytes(named | {f"out.{name}": array for name, array in golden[1].items()})


def with_files(bundle: Bundle, extra: Mapping[str, bytes]) -> Bundle:
    """The bundle with files added or replaced."""
    contents = {**bundle.contents, **extra}
    return replace(bundle, manifest=replace(bundle.manifest, files=_hashes(contents)), contents=contents)


def open_bundle(path: str | Path) -> Bundle:
    """Read a bundle directory, or a packed file, and verify it."""
    path = Path(path)
    if path.is_file():
        from edgekit.bundle.pack import unpack

        return replace(unpack(path.read_bytes(), str(path)), path=path)
    if not path.exists():
        raise EdgekitError(f"{path}: no such bundle; `edgekit models` lists those that come with edgekit")
    if not (path / MANIFEST).is_file():
        raise EdgekitError(f"{path}: not a bundle, it holds no {MANIFEST}; a bundle is a directory written by edgekit")
    manifest = Manifest.from_json((path / MANIFEST).read_bytes(), f"{path}/{MANIFEST}")
    contents = {}
    for name, expected in manifest.files.items():
        file = path / name
        if not file.resolve().is_relative_to(path.resolve()):
            raise EdgekitError(f"{path}/{MANIFEST}: file name {name!r} leaves the bundle; the bundle is not trusted")
        if not file.is_file():
            raise EdgekitError(f"{file}: listed in {MANIFEST} but missing; the bundle is incomplete, copy it again")
        contents[name] = file.read_bytes()
        if (got := hashlib.sha256(contents[name]).hexdigest()) != expected:
            raise EdgekitError(
                f"{file}: SHA-256 is {got[:12]}..., the manifest says {expected[:12]}...; the file was changed "
                "or damaged after the bundle was written, restore it or write the bundle again"
            )
    for needed in (GRAPH if manifest.family == ONNX else WEIGHTS, GOLDEN):
        if needed not in contents:
            raise EdgekitError(f"{path}/{MANIFEST}: lists no {needed}; the bundle is incomplete, write it again")
    return Bundle(manifest, contents, path)


def write_bundle(bundle: Bundle, path: str | Path, *, force: bool = False) -> Bundle:
    """Write a new directory and move it into place: whatever goes wrong, `path` holds the old bundle or the new.

    Replacing takes two renames; a process killed between them leaves the old bundle beside `path`, as .NAME.PID.old.
    """
    path = Path(path)
    if path.exists():
        if not force:
            raise EdgekitError(f"{path} already exists; choose another name or pass --force to replace it")
        if not (path / MANIFEST).is_file():
            raise EdgekitError(
                f"{path} exists and is not a bundle, so --force will not replace it; choose another name"
            )
    write_directory(path, {**bundle.contents, MANIFEST: bundle.manifest.to_json()})
    return replace(bundle, path=path)


def default_name(path: str | Path) -> str:
    """The model's name that a path suggests: 'runs/t2-gr.edge' gives 't2-gr'."""
    return Path(path).name.removesuffix(".edge")


def golden_inputs(specs: tuple[TensorSpec, ...], rows: int) -> Arrays:
    """Inputs for golden data where no real ones are at hand: smooth, bounded, different in every element; whole numbers
    from 0 to 7, which the smallest vocabulary has."""
    made = {}
    for number, spec in enumerate(specs):
        axes = tuple(axis if isinstance(axis, int) else 2 * multiple(axis) for axis in spec.shape[1:])
        index = np.arange(rows * math.prod(axes), dtype=np.int64)
        values = np.sin(0.37 * index * (1 + number)) if np.dtype(spec.dtype).kind == "f" else index * (3 + number) % 8
        made[spec.name] = values.reshape(rows, *axes).astype(spec.dtype)
    return made


def arrays_to_bytes(arrays: Arrays) -> bytes:
    """A compressed, byte-for-byte reproducible .npz (numpy.savez stamps the time into the archive)."""
    buffer = BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, array in sorted(arrays.items()):
            inner = BytesIO()
            np.lib.format.write_array(inner, np.asarray(array, order="C"), allow_pickle=False)
            archive.writestr(
                zipfile.ZipInfo(f"{name}.npy", (1980, 1, 1, 0, 0, 0)), inner.getvalue(), zipfile.ZIP_DEFLATED
            )
    return buffer.getvalue()


def arrays_from_bytes(content: bytes, source: str) -> Arrays:
    if content[:4] not in (b"PK\x03\x04", b"PK\x05\x06", b"\x93NUM"):  # numpy takes anything else for a pickle
        raise EdgekitError(f"{source}: not an .npz archive; write named arrays with numpy.savez")
    try:
        archive = np.load(BytesIO(content), allow_pickle=False)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise EdgekitError(f"{source}: one array (.npy), not named arrays; write them with numpy.savez")
        with archive:
            arrays = {name: archive[name] for name in archive.files}
    except _UNREADABLE as error:
        raise EdgekitError(f"{source}: not a readable .npz of plain arrays ({error})") from None
    for name, array in arrays.items():
        if not isinstance(array, np.ndarray):
            raise EdgekitError(f"{source}: {name!r} is not an array; expected an .npz as numpy.savez writes it")
    return arrays


# what numpy, zipfile and zlib raise for a damaged archive
_UNREADABLE = (
    ValueError, OSError, EOFError, LookupError, NotImplementedError, RuntimeError, SyntaxError, MemoryError,
    zipfile.BadZipFile, zlib.error,
)  # fmt: skip


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value read from JSON is what a field's type says; lists stand for tuples, objects for dataclasses."""
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


def _hashes(contents: Mapping[str, bytes]) -> dict[str, str]:
    return {name: hashlib.sha256(content).hexdigest() for name, content in sorted(contents.items())}
