"""Data sets that an installed package can prepare: a provider is an entry point of the group `edgekit.datasets`.

A model of the zoo names the data set that it is measured on. A provider fetches or reads the raw data and turns it into
that model's inputs, with the model's own preprocessing; the preprocessing is stored in the file beside the arrays, so
that a model whose preprocessing has changed since is not measured on old inputs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from edgekit import plugins
from edgekit.bundle import zoo
from edgekit.bundle.store import open_bundle
from edgekit.bundle.tensors import Arrays, read_arrays
from edgekit.data.dataset import folder, save
from edgekit.errors import EdgekitError, unknown

GROUP = "edgekit.datasets"
PREPROCESSING = "preprocessing"  # the array of a prepared file that holds the preprocessing's parameters as JSON
State = Literal["not prepared", "prepared", "outdated"]


@dataclass(frozen=True, slots=True)
class PreparedDataset:
    """A data set as one model takes it."""

    name: str
    model: str  # of the zoo; it is measured on this data set
    preprocessing: Mapping[str, Any]  # the model's own, from its manifest

    @property
    def path(self) -> Path:
        """Return the path of the prepared file, whether it exists or not."""
        return folder() / f"{self.name}.npz"

    def state(self) -> State:
        """Return whether the file exists, and was made with the preprocessing that the model has now."""
        if not self.path.is_file():
            return "not prepared"
        arrays = read_arrays(self.path)
        same = PREPROCESSING in arrays and arrays[PREPROCESSING].tolist() == [self._text]
        return "prepared" if same else "outdated"

    def write(self, inputs: Arrays, labels: npt.NDArray[np.integer], split: npt.NDArray[np.integer]) -> None:
        """Write the prepared file. inputs: the model's, by name, (rows, ...); labels: (rows,); split: (rows,), 0 for
        training and 1 for test."""
        save(self.path, {**inputs, PREPROCESSING: np.array([self._text])}, labels, split)

    @property
    def _text(self) -> str:
        return json.dumps(self.preprocessing, sort_keys=True)


class DatasetProvider(Protocol):
    """What a package offers that can prepare a family of data sets."""

    description: str  # one sentence: what the data is, where it comes from, how large the download is
    accepts: str  # what `--from` may name instead of a download, as a noun phrase

    def datasets(self) -> Sequence[PreparedDataset]:
        """Return the data sets that it can prepare for the models that are installed."""
        ...

    def prepare(self, dataset: PreparedDataset, source: Path | None, notify: Callable[[str], None]) -> None:
        """Read `source`, or download the data if it is None, and write the prepared file with `dataset.write`."""
        ...


def providers() -> dict[str, DatasetProvider]:
    """Return the installed providers by name."""
    return {name: plugins.load(GROUP, name, problem_with) for name in plugins.names(GROUP)}


def problem_with(provider: Any, name: str) -> str:
    """Return why an object is not a provider of data sets; "" if it is one."""
    for part in ("description", "accepts", "datasets", "prepare"):
        if part not in dir(provider):
            return f"it has no {part!r}; edgekit.data.provider.DatasetProvider says what it must provide"
    return ""


def available() -> dict[str, tuple[PreparedDataset, DatasetProvider]]:
    """Return every data set that can be prepared here, by name, and its provider."""
    return {dataset.name: (dataset, provider) for provider in providers().values() for dataset in provider.datasets()}


def find(name: str) -> tuple[PreparedDataset, DatasetProvider]:
    """Return one data set and its provider; an error names those that there are."""
    known = available()
    if not known:
        raise nothing_to_prepare()
    if name not in known:
        raise unknown("data set", name, known)
    return known[name]


def nothing_to_prepare() -> EdgekitError:
    """Return the error for an installation in which no provider can prepare anything."""
    return EdgekitError(
        "no installed model names a data set that an installed package can prepare; `edgekit models` lists the models, "
        "and `pip install --force-reinstall edgekit` brings those that come with edgekit"
    )


def of_the_zoo() -> list[PreparedDataset]:
    """Return the data sets that the models of the zoo name. Models may share one only if their preprocessing is the
    same."""
    found: dict[str, PreparedDataset] = {}
    for model, path in zoo.folders().items():
        manifest = open_bundle(path).manifest
        if manifest.data is None or manifest.preprocessing is None:
            continue
        first = found.setdefault(manifest.data, PreparedDataset(manifest.data, model, manifest.preprocessing))
        if first.preprocessing != manifest.preprocessing:
            raise EdgekitError(
                f"the models {first.model} and {model} are both measured on {manifest.data!r} but differ in their "
                "preprocessing; give one of them a data set of another name"
            )
    return list(found.values())
