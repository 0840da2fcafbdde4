"""Open and import models from Python: what `edgekit.open`, `edgekit.import_*` and `edgekit.Session` are."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from edgekit.bundle.bounded import read_file
from edgekit.bundle.format import Bundle, Manifest
from edgekit.bundle.store import default_name
from edgekit.bundle.tensors import Arrays, TensorSpec, parse_spec
from edgekit.data.stream import Stream, run_stream
from edgekit.errors import EdgekitError
from edgekit.importers.factory import from_factory
from edgekit.importers.files import from_file, resolve
from edgekit.importers.hugging_face import from_hugging_face
from edgekit.importers.onnx import from_onnx, try_out
from edgekit.session import open_session

if TYPE_CHECKING:
    from onnx import ModelProto
    from torch import nn

Inputs = Mapping[str, Any] | Sequence[TensorSpec | str]


def open_model(model: str | Path | Bundle) -> Bundle:
    """Open a model and verify its hashes: a zoo's model by name, a bundle, a packed bundle, an .onnx or a .pt2 file.

    >>> import edgekit
    >>> edgekit.open("t2-gr").manifest.outputs[0].shape
    ('batch', 14)

    Raises EdgekitError if there is no such model, or if it was changed after it was written."""
    return model if isinstance(model, Bundle) else resolve(str(model))


def open_to_run(model: str | Path | Bundle) -> Bundle:
    """Open a model as `open_model` does, and try out its graph in a confined process before it runs in this one."""
    return try_out(open_model(model))


def import_onnx(
    model: str | Path | bytes | ModelProto,
    *,
    name: str | None = None,
    golden: Mapping[str, Any] | None = None,
    state: Mapping[str, str] | None = None,
    fix: Mapping[str, float] | None = None,
) -> Bundle:
    """Return a bundle around an ONNX graph: a file, its bytes, or an onnx.ModelProto.

    golden: real inputs by name, (rows, ...) each; they are kept with the outputs that onnxruntime gives for them, as
    the proof that travels with the model. Without them, inputs are made up. state: {input: output} of a recurrent
    model: which output a caller hands back as which input. fix: numbers by name, of inputs and axes that are constant
    where the model is deployed: {"sr": 16000, "sequence": 576}, or {"input[1]": 576} for an axis without a name."""
    bundle = _from_onnx(model, name, golden=_arrays(golden), state=state, fix=fix)
    check_state(bundle.manifest, state or {})
    return bundle


def _from_onnx(model: str | Path | bytes | ModelProto, name: str | None, **options: Any) -> Bundle:
    if isinstance(model, (str, Path)):
        path = Path(model)
        if not path.is_file():
            raise EdgekitError(f"{path}: no such file; expected an ONNX model")
        return from_onnx(read_file(path), name or default_name(path.stem), str(path), **options)
    content = model if isinstance(model, bytes) else model.SerializeToString()
    return from_onnx(content, name or "model", name or "the ONNX model", **options)


def import_program(path: str | Path, *, golden: Mapping[str, Any] | None = None) -> Bundle:
    """Return a bundle from a program that torch.export.save wrote (.pt2). golden: as for `import_onnx`."""
    if Path(path).suffix != ".pt2":
        raise EdgekitError(f"{path}: expected an exported program, .pt2")
    return from_file(Path(path), golden=_arrays(golden))


def import_factory(
    factory: str,
    *,
    inputs: Inputs,
    outputs: Sequence[str] = ("output",),
    arguments: Mapping[str, Any] | None = None,
    weights: str | Path | Mapping[str, npt.NDArray[Any]] | None = None,
    golden: Mapping[str, Any] | None = None,
) -> Bundle:
    """Return a bundle of the network that the Python function `package.module:function` builds from `arguments`. Naming
    the function allows it to be run.

    inputs: an example array for each input by name, or descriptions such as "image:float32:batch,3,224,224"; outputs:
    their names in order, where one named "probabilities" is the softmax of what the network gives; weights: a
    safetensors file, or arrays by name."""
    return from_factory(
        factory,
        arguments=arguments or {},
        weights=Path(weights) if isinstance(weights, str) else weights,
        inputs=_specs(inputs),
        outputs=list(outputs),
        golden=_arrays(golden) or _examples(inputs),
    )


def import_module(
    network: nn.Module,
    *,
    inputs: Inputs,
    outputs: Sequence[str] = ("output",),
    factory: str | None = None,
    arguments: Mapping[str, Any] | None = None,
    golden: Mapping[str, Any] | None = None,
) -> Bundle:
    """Return a bundle of a torch network, as it is now: training it later does not change the bundle.

    inputs: an example array for each input by name, in the order in which forward() takes them, (rows, ...) each, of
    which the first axis is the batch; or descriptions such as "image:float32:batch,3,224,224". outputs: as for
    `import_factory`. factory, arguments: package.module:function that builds the same network in another process.
    Without a factory the bundle belongs to this process: `Result.save` writes it as an ONNX graph.

    >>> import edgekit, numpy, torch
    >>> network = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> bundle = edgekit.import_module(network, inputs={"x": numpy.zeros((2, 4), "float32")})
    >>> bundle.parameters, bundle.manifest.outputs[0].shape
    (58, ('batch', 2))
    """
    from edgekit.importers.live import from_network

    return from_network(
        network,
        inputs=_specs(inputs),
        outputs=list(outputs),
        factory=factory,
        arguments=arguments,
        golden=_arrays(golden) or _examples(inputs),
    )


def import_hugging_face(folder: str | Path, *, inputs: Inputs = (), golden: Mapping[str, Any] | None = None) -> Bundle:
    """Return a bundle from a folder that transformers saved: config.json and safetensors. inputs: needed only for
    models that take neither images nor token ids."""
    return from_hugging_face(Path(folder), inputs=_specs(inputs), golden=_arrays(golden) or _examples(inputs))


def import_any(
    source: str,
    *,
    via: str | None = None,
    inputs: Inputs = (),
    outputs: Sequence[str] = ("output",),
    arguments: Mapping[str, Any] | None = None,
    weights: str | Path | None = None,
    golden: Mapping[str, Any] | None = None,
    state: Mapping[str, str] | None = None,
    fix: Mapping[str, float] | None = None,
) -> Bundle:
    """Return a bundle of the model that `source` names: a folder of transformers, package.module:function, an .onnx or
    a .pt2 file. via: "optimum" makes a graph of a folder by optimum's ONNX exporter. state, fix: of a file, as
    for `import_onnx`."""
    path = Path(source)
    if via is not None:
        from edgekit.importers.optimum import from_optimum

        return from_optimum(path, golden=_arrays(golden))
    if ":" in source and not path.exists():
        return import_factory(
            source, inputs=inputs, outputs=outputs, arguments=arguments, weights=weights, golden=golden
        )
    if path.is_dir():
        return import_hugging_face(path, inputs=inputs, golden=golden)
    return from_file(path, golden=_arrays(golden), state=state, fix=fix)


def described(
    bundle: Bundle,
    *,
    name: str,
    classes: Sequence[str] = (),
    preprocessing: Mapping[str, Any] | None = None,
    state: Mapping[str, str] | None = None,
    versions: Mapping[str, str] | None = None,
) -> Bundle:
    """Return the bundle with the facts that its file does not hold. state: which output a caller hands back as which
    input."""
    manifest = bundle.manifest
    check_state(manifest, state or {})
    own = {
        "name": name,
        "classes": tuple(classes) or manifest.classes,
        "preprocessing": dict(preprocessing) if preprocessing else manifest.preprocessing,
        "state": dict(state or manifest.state),
        "versions": dict(versions or manifest.versions),
    }
    return replace(bundle, manifest=replace(manifest, **own))  # type: ignore[arg-type]


def check_state(manifest: Manifest, state: Mapping[str, str]) -> None:
    """Raise unless each output of the state can be handed back as its input."""
    inputs, outputs = ({spec.name: spec for spec in specs} for specs in (manifest.inputs, manifest.outputs))
    for name, source in state.items():
        if name not in inputs or source not in outputs:
            raise EdgekitError(
                f"'{name}={source}': expected INPUT=OUTPUT, of {', '.join(inputs)} and {', '.join(outputs)}"
            )
        if inputs[name].shape != outputs[source].shape or inputs[name].dtype != outputs[source].dtype:
            raise EdgekitError(
                f"'{name}={source}': {inputs[name].shape_text} {inputs[name].dtype} cannot be fed with "
                f"{outputs[source].shape_text} {outputs[source].dtype}"
            )


class Session:
    """A model loaded on a runtime: named arrays in, named arrays out.

    model: as for `edgekit.open`; runtime: c, onnxruntime, openvino, torch, or auto, which takes c if a compiler is here
    and knows the model; threads: None for the runtime's own choice.

    >>> import edgekit, numpy
    >>> session = edgekit.Session("t2-gr", "torch")
    >>> rows = {"light_curve": numpy.zeros((3, 100, 2), "float32"), "context": numpy.zeros((3, 3), "float32")}
    >>> session.run(rows)["probabilities"].shape
    (3, 14)

    Raises EdgekitError if the runtime is not installed or cannot run the model; it never falls back to another."""

    def __init__(self, model: str | Path | Bundle, runtime: str = "auto", *, threads: int | None = None) -> None:
        bundle = open_to_run(model)
        self._session = open_session(bundle, runtime, **({} if threads is None else {"threads": threads}))
        self._signature = bundle.manifest.signature
        self.state: Mapping[str, str] = bundle.manifest.state
        self.inputs: Sequence[TensorSpec] = self._session.inputs
        self.outputs: Sequence[TensorSpec] = self._session.outputs
        self.device: str = self._session.device
        self.provider: str = self._session.provider

    def run(self, arrays: Mapping[str, npt.NDArray[Any]]) -> Arrays:
        """Return outputs by name, in the order of the inputs' rows. arrays: each input by name, (rows, ...)."""
        return self._session.run(arrays)

    def call(self, tensors: Mapping[str, npt.NDArray[Any]]) -> Arrays:
        """Return the outputs of one call in the model's own axes, which `TensorSpec.axes` names. tensors: the inputs in
        their own axes."""
        inputs, outputs = self._signature.inputs, self._signature.outputs
        own = {name: inputs[name].rows(np.asarray(array)) for name, array in tensors.items() if name in inputs}
        count = max([len(array) for name, array in own.items() if not inputs[name].shared], default=1)
        rows = {name: np.repeat(array, count, axis=0) if inputs[name].shared else array for name, array in own.items()}
        found = self.run({**{name: array for name, array in tensors.items() if name not in inputs}, **rows})
        return {name: outputs[name].own(array) for name, array in found.items()}

    def stream(self) -> Stream:
        """Return a stream of sequences, one a row: `feed` runs the next chunk of them and keeps the state."""
        return Stream(self._session, self.state)

    def run_stream(
        self, arrays: Mapping[str, npt.NDArray[Any]], *, chunk: int | None = None, overlap: int = 0
    ) -> Arrays:
        """Return the outputs of whole sequences, (rows, ..., length, ...), fed in chunks with the state carried; see
        `edgekit.data.stream.run_stream`."""
        return run_stream(self._session, self.state, arrays, chunk=chunk, overlap=overlap)

    def warmup(self, batch: int) -> None:
        """Run once with `batch` rows, so that the next run of that size includes no set-up."""
        self._session.warmup(batch)


def is_network(model: object) -> bool:
    """Return whether this is a torch network. It imports nothing: without torch in the process, it cannot be one."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(model, torch.nn.Module)


def _specs(inputs: Inputs) -> list[TensorSpec]:
    if isinstance(inputs, Mapping):
        arrays = _arrays(inputs) or {}
        return [TensorSpec(name, ("batch", *array.shape[1:]), str(array.dtype)) for name, array in arrays.items()]
    return [parse_spec(item) if isinstance(item, str) else item for item in inputs]


def _examples(inputs: Inputs) -> Arrays | None:
    """Example arrays serve as golden inputs too, unless there are no rows."""
    arrays = _arrays(inputs) if isinstance(inputs, Mapping) else None
    return arrays if arrays and all(len(array) for array in arrays.values()) else None


def _arrays(given: Mapping[str, Any] | None) -> Arrays | None:
    from edgekit.data.live import named_arrays

    if given is None:
        return None
    found = named_arrays({**given, "split": np.zeros(0)}) if given else {}
    return {name: array for name, array in found.items() if name != "split"}
