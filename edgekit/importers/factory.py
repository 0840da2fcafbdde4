"""Import networks that a Python function builds, with weights from a safetensors file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from edgekit.bundle.bounded import arrays_from_safetensors, read_file
from edgekit.bundle.format import Bundle, Manifest, assemble
from edgekit.bundle.tensors import SPEC_HELP, Arrays, TensorSpec, golden_inputs, multiple
from edgekit.errors import EdgekitError
from edgekit.importers.base import PICKLES, golden_rows, synthetic_rows, unsafe

if TYPE_CHECKING:
    from torch import nn


def from_factory(
    factory: str,
    *,
    arguments: Mapping[str, Any],
    weights: Path | Mapping[str, npt.NDArray[Any]] | None,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[str],
    golden: Arrays | None = None,
) -> Bundle:
    """Make a bundle from a Python function that builds a network. weights: a safetensors file, or arrays by name;
    outputs: their names, in order; one named "probabilities" is the softmax of the network's result."""
    from edgekit.bundle.family import build, tied
    from edgekit.data.dataset import Dataset
    from edgekit.nn.module import trust
    from edgekit.nn.training import outputs as run_network

    if not inputs:
        raise EdgekitError(f"{factory}: its inputs are not known; pass --input {SPEC_HELP} for each")
    trust(factory)
    described = {spec.name: f"{spec.dtype}:{','.join(map(str, spec.shape))}" for spec in inputs}
    values = {"factory": factory, "arguments": dict(arguments), "inputs": described}
    stored = _weights(weights) if isinstance(weights, Path) else weights
    model = build("module", values, stored)
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

    def named(rows: Arrays) -> Arrays:
        return dict(zip(names, run(rows), strict=True))

    if golden is None:
        given, results = synthetic_rows(inputs, _vocabularies(model, inputs, run), named)
    else:
        given = golden_rows(tuple(inputs), golden)
        results = named(given)
    found = list(results.values())
    shapes = _output_axes(run, inputs, names)
    specs = tuple(TensorSpec(name, shapes[name], str(array.dtype)) for name, array in zip(names, found, strict=True))
    manifest = Manifest(
        name=factory.partition(":")[0].rpartition(".")[2],
        family="module",
        arguments=values,
        inputs=tuple(inputs),
        outputs=specs,
        synthetic=golden is None,
    )
    aliases = tied(model)
    state = {name: value.detach().numpy() for name, value in model.state_dict().items() if name not in aliases}
    return assemble(manifest, state, {}, (given, dict(zip(names, found, strict=True))))


def _weights(path: Path) -> dict[str, npt.NDArray[Any]]:
    if path.suffix in PICKLES:
        raise unsafe(path)
    return arrays_from_safetensors(read_file(path), str(path))


def _vocabularies(
    model: nn.Module, inputs: Sequence[TensorSpec], run: Callable[[Arrays], list[npt.NDArray[Any]]]
) -> dict[str, int]:
    """Return the number of ids of each input that an embedding reads as it is. The function runs the network once and
    compares what embeddings read with the inputs."""
    from torch import nn

    rows, sizes = golden_inputs(tuple(inputs), 2), dict[str, list[int]]()

    def compare(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        read = arguments[0].detach().cpu().numpy()
        for name, array in rows.items():
            if read.size == array.size and np.array_equal(read.reshape(-1), array.reshape(-1)):
                sizes.setdefault(name, []).append(int(module.num_embeddings))  # type: ignore[arg-type]

    hooks = [part.register_forward_pre_hook(compare) for part in model.modules() if isinstance(part, nn.Embedding)]
    try:
        if hooks:
            run(rows)
    except EdgekitError:
        return {}  # ids from 0 to 7 do not suit this network; the proposals are tried in turn
    finally:
        for hook in hooks:
            hook.remove()
    return {name: min(found) for name, found in sizes.items()}


def _output_axes(
    run: Callable[[Arrays], list[npt.NDArray[Any]]], inputs: Sequence[TensorSpec], names: Sequence[str]
) -> dict[str, tuple[int | str, ...]]:
    """Return the axes of the outputs by name. The function makes each free axis of the inputs longer and sees which
    axes of the outputs grow."""

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
